//! What the functions and classes of the list make: values, by the meaning of their arguments.
//!
//! `REDUCE` (call), `NEWOBJ` (make) and `BUILD` (set the state) come here, and persistent ids, which
//! is how a pickle names storages. Nothing is executed; attributes of tensors, hooks and flags are
//! left out.

use super::error::{Result, shown, unsupported};
use super::globals::Global;
use super::heap::{EMPTY_TUPLE, Heap, NONE, REFUSED, Storage};
use super::tensor::{Dtype, Part, TorchTensor};
use super::value::{Id, Node, Opaque};

impl Heap {
    /// For classes made with arguments by name.
    pub fn expect_no_arguments(&self, id: Id) -> Result<()> {
        match self.node(id) {
            Node::Dict(pairs) if pairs.is_empty() => Ok(()),
            _ => Err(self.damaged("arguments by name, which no class of the list takes")),
        }
    }

    /// What `function(*args)` would be.
    pub fn reduce(&mut self, function: Id, args: Id) -> Result<Id> {
        let global = match *self.node(function) {
            Node::Global(global) => global,
            Node::Refused => return Ok(REFUSED),
            _ => return Err(self.damaged("a call of something that is no function")),
        };
        let list = self.ids(args)?;
        let node = match (global, &list[..]) {
            // Some are one of their arguments.
            (Global::Tuple, []) => return Ok(EMPTY_TUPLE),
            (Global::Bytes, [of]) if matches!(self.node(*of), Node::Bytes(_)) => return Ok(*of),
            (Global::Layout, [name]) => return self.text(*name).map(|_| *name),
            (Global::RebuildParameter, [data, ..]) => return self.parameter(*data),
            (Global::RebuildFromType, [inner, class, args, _]) => {
                return self.rebuilt_from_type(*inner, *class, *args);
            }
            // Others are new.
            (Global::List | Global::Set | Global::Tuple | Global::Bytes, _) => {
                self.collection(global, &list)?
            }
            (Global::Dict, []) | (Global::DefaultDict, [] | [_]) => Node::Dict(Vec::new()),
            (Global::Dict, [of]) | (Global::DefaultDict, [_, of]) => self.dict_of(*of)?,
            (Global::Encode, [text, codec]) => self.encode(*text, *codec)?,
            (Global::Namespace, []) => Node::Namespace(None),
            (Global::Path, parts) => self.path(parts)?,
            (Global::Device, [name, index @ ..]) => self.device(*name, index)?,
            (Global::RebuildTensor, [storage, rest @ ..]) => {
                let dtype = self.part(*storage)?.dtype;
                self.tensor(*storage, rest, dtype, rest.get(5))?
            }
            (Global::RebuildTensorV3, [storage, rest @ ..]) => {
                let dtype = rest.get(5).map(|&id| self.node(id));
                let Some(&Node::Global(Global::Dtype(dtype))) = dtype else {
                    return Err(self.damaged("a tensor without a dtype"));
                };
                self.tensor(*storage, rest, dtype, rest.get(6))?
            }
            (Global::NumpyDtype, [code, ..]) => self.numpy_dtype(*code)?,
            (Global::NumpyScalar, [dtype, bytes]) => self.numpy_scalar(*dtype, *bytes, args)?,
            (Global::NumpyArray, [..]) => opaque("numpy.ndarray", args),
            (Global::Complex, [..]) => opaque("complex", args),
            _ => return Err(self.damaged(format!("{} arguments for {global:?}", list.len()))),
        };
        self.add(node)
    }

    /// A list, tuple, set or text of bytes of its arguments.
    fn collection(&mut self, class: Global, args: &[Id]) -> Result<Node> {
        let items = match (class, args) {
            (Global::Bytes, []) => return Ok(Node::Bytes(Box::default())),
            (Global::Bytes, [text, codec]) => return self.encode(*text, *codec), // Python 2
            (_, []) => Vec::new(),
            (_, [of]) => self.ids(*of)?,
            _ => return Err(self.damaged("more than one argument for a list, tuple or set")),
        };
        Ok(match class {
            Global::List => Node::List(items),
            Global::Set => Node::Set(items),
            _ => Node::Tuple(items.into()),
        })
    }

    /// A dict of another one, or of a list of pairs as Python 2 writes it.
    fn dict_of(&mut self, of: Id) -> Result<Node> {
        if let Node::Dict(pairs) = self.node(of) {
            let pairs = pairs.clone();
            self.charge(2 * pairs.len())?;
            return Ok(Node::Dict(pairs));
        }
        let mut pairs = Vec::new();
        for item in self.ids(of)? {
            match self.ids(item)?[..] {
                [key, value] => pairs.push((key, value)),
                _ => return Err(self.damaged("expected pairs of key and value")),
            }
        }
        Ok(Node::Dict(pairs))
    }

    /// Bytes as protocol 2 spells them: a text of letters below 256.
    fn encode(&mut self, text: Id, codec: Id) -> Result<Node> {
        let (text, codec) = (self.text(text)?, self.text(codec)?);
        if !matches!(codec, "latin1" | "latin-1") {
            return Err(unsupported(format!("bytes in the encoding `{}`", shown(codec))));
        }
        let bytes: Option<Box<[u8]>> = text.chars().map(|c| u8::try_from(c).ok()).collect();
        let length = text.len();
        self.charge(length)?;
        bytes.map(Node::Bytes).ok_or_else(|| self.damaged("bytes with letters above 255"))
    }

    /// A path as a text, of its parts.
    fn path(&mut self, parts: &[Id]) -> Result<Node> {
        let mut path = String::new();
        for &part in parts {
            let part = self.text(part)?.to_owned();
            self.charge(part.len())?;
            if !path.is_empty() && !path.ends_with(['/', '\\']) {
                path.push('/');
            }
            path.push_str(&part);
        }
        Ok(Node::Text(if path.is_empty() { ".".into() } else { path.into() }))
    }

    /// A device as a text, as `cuda:0`.
    fn device(&mut self, name: Id, index: &[Id]) -> Result<Node> {
        let mut device = self.text(name)?.to_owned();
        self.charge(device.len())?;
        if let [index] = index {
            device += &format!(":{}", self.int(*index)?);
        }
        Ok(Node::Text(device.into()))
    }

    // ---------------------------------------------------------------- tensors

    fn part(&self, id: Id) -> Result<Part> {
        match self.node(id) {
            Node::Storage(part) => Ok(**part),
            _ => Err(self.damaged("a tensor without a storage")),
        }
    }

    fn numbers(&mut self, id: Id) -> Result<Vec<u64>> {
        self.ids(id)?.into_iter().map(|id| self.int(id)).collect()
    }

    /// A tensor of its storage and (offset, size, stride, ..); checked when the storage is found.
    fn tensor(
        &mut self,
        storage: Id,
        rest: &[Id],
        dtype: Dtype,
        metadata: Option<&Id>,
    ) -> Result<Node> {
        let &[offset, size, stride, ..] = rest else {
            return Err(self.damaged("a tensor without offset, size or stride"));
        };
        if let Some(Node::Dict(flags)) = metadata.map(|&id| self.node(id)) {
            let (length, is_true) = (flags.len(), |id| matches!(self.node(id), Node::Bool(true)));
            if flags.iter().any(|&(_, flag)| is_true(flag)) {
                return Err(unsupported("a tensor that is to be conjugated or negated"));
            }
            self.charge(length)?;
        }
        let (shape, strides) = (self.numbers(size)?, self.numbers(stride)?);
        let (offset, part) = (self.int(offset)?, self.part(storage)?);
        Ok(Node::Tensor(Box::new(TorchTensor::new(dtype, shape, strides, offset, part))))
    }

    /// A parameter is its tensor.
    fn parameter(&self, data: Id) -> Result<Id> {
        match self.node(data) {
            Node::Tensor(_) => Ok(data),
            Node::Refused => Ok(REFUSED),
            _ => Err(self.damaged("a parameter without a tensor")),
        }
    }

    /// A tensor or parameter with attributes, which are left out.
    fn rebuilt_from_type(&mut self, inner: Id, class: Id, args: Id) -> Result<Id> {
        match (self.node(inner), self.node(class)) {
            // Not itself, so that this does not call itself ever deeper.
            (Node::Global(Global::RebuildFromType), _) => {
                Err(self.damaged("a tensor made in more than one step"))
            }
            (_, Node::Global(Global::Type)) => self.reduce(inner, args),
            (Node::Refused, _) | (_, Node::Refused) => Ok(REFUSED),
            _ => Err(self.damaged("a tensor whose type is no class")),
        }
    }

    /// A persistent id: `("storage", class, key, location, numel)`, and in the old layout the view
    /// `(key, offset, numel)` of it, or none.
    pub fn persistent(&mut self, id: Id) -> Result<Id> {
        let ids = self.ids(id)?;
        let (&[kind, class, key, _, numel], view) = match ids.split_first_chunk::<5>() {
            Some((first, [])) => (first, None),
            Some((first, [view])) => (first, Some(*view)),
            _ => return Err(self.damaged(format!("a persistent id of {} parts", ids.len()))),
        };
        let dtype = match (self.text(kind)?, self.node(class)) {
            ("storage", Node::Global(Global::Storage(dtype))) => *dtype,
            (_, Node::Refused) => return Ok(REFUSED),
            _ => return Err(self.damaged("a persistent id of something that is no storage")),
        };
        let bytes = self.bytes_of(numel, dtype)?;
        let storage = self.storage(key, bytes, dtype)?;
        let whole = Part { storage, start: 0, bytes, dtype };
        let part = match view {
            Some(view) if view != NONE => {
                let view = self.ids(view)?;
                self.view(whole, &view)?
            }
            _ => whole,
        };
        self.add(Node::Storage(Box::new(part)))
    }

    fn bytes_of(&self, numel: Id, dtype: Dtype) -> Result<u64> {
        let bytes = self.int(numel)?.checked_mul(dtype.size());
        bytes.ok_or_else(|| self.damaged("a storage of more than 2^64 bytes"))
    }

    /// The storage of that key, a new one at its first mention.
    fn storage(&mut self, key: Id, bytes: u64, dtype: Dtype) -> Result<u32> {
        let key: Box<str> = self.text(key)?.into();
        self.charge(key.len())?;
        if let Some(&index) = self.by_key.get(&key) {
            let known = self.storages[index as usize].bytes;
            if known == bytes {
                return Ok(index);
            }
            let key = shown(&key);
            let told = format!("storage `{key}` has {known} bytes here and {bytes} there");
            return Err(self.damaged(told));
        }
        let index = self.storages.len() as u32;
        self.storages.push(Storage { key: key.clone(), bytes, element_bytes: dtype.size() });
        self.by_key.insert(key, index);
        Ok(index)
    }

    /// A part of a storage in the old layout: `(key, offset, numel)`.
    fn view(&mut self, whole: Part, view: &[Id]) -> Result<Part> {
        let &[_, offset, numel] = view else {
            return Err(self.damaged("a part of a storage without offset and length"));
        };
        let (start, bytes) =
            (self.bytes_of(offset, whole.dtype)?, self.bytes_of(numel, whole.dtype)?);
        if start.checked_add(bytes).is_none_or(|end| end > whole.bytes) {
            return Err(self.damaged("a part that reaches beyond its storage"));
        }
        Ok(Part { start, bytes, ..whole })
    }

    // ------------------------------------------------------------------ state

    /// What `object.__setstate__(state)` would leave.
    pub fn build(&mut self, object: Id, state: Id) -> Result<()> {
        let dict = matches!(self.node(state), Node::Dict(_));
        match &mut self.nodes[object as usize] {
            // Attributes: `_metadata` of a state dict, and whatever is hung on a tensor.
            Node::Dict(_) | Node::Set(_) | Node::Tensor(_) | Node::Refused => {}
            Node::Namespace(attributes @ None) if dict => *attributes = Some(state),
            Node::Opaque(opaque) => opaque.state = Some(state),
            Node::NumpyDtype { .. } => return self.numpy_dtype_state(object, state),
            _ => return Err(self.damaged("a state for something that has none")),
        }
        Ok(())
    }
}

/// An object that is not interpreted.
fn opaque(class: &'static str, args: Id) -> Node {
    Node::Opaque(Box::new(Opaque { class, args, state: None }))
}
