//! The values of a pickle: a table of nodes, and [`Value`], a handle on one of them.
//!
//! Nodes name each other by index, because a pickle may share or even nest a list in itself:
//! nothing is copied, freeing is no recursion, and [`names`] walks everything once, with bounds, so
//! that whoever walks later stays within them.

use super::error::{Result, TorchFileError, shown, unsupported};
use super::globals::Global;
use super::tensor::{Part, TorchTensor};
use std::collections::HashSet;
use std::fmt;

/// Index of a node.
pub(super) type Id = u32;

/// Deepest nesting of containers.
const MAX_DEPTH: usize = 128;

/// One value.
#[derive(Debug)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    /// Two's complement, little-endian: more than 64 bits.
    BigInt(Box<[u8]>),
    Float(f64),
    Text(Box<str>),
    Bytes(Box<[u8]>),
    List(Vec<Id>),
    Tuple(Box<[Id]>),
    Set(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A `Namespace`, whose attributes are a dict.
    Namespace(Option<Id>),
    Tensor(Box<TorchTensor>),
    Storage(Box<Part>),
    /// A function or class of the list of harmless ones.
    Global(Global),
    NumpyDtype {
        code: Box<str>,
        big_endian: bool,
    },
    Opaque(Box<Opaque>),
    /// What a refused function would have returned.
    Refused,
}

/// A harmless object that is not interpreted.
#[derive(Debug)]
pub(super) struct Opaque {
    pub class: &'static str,
    pub args: Id,
    pub state: Option<Id>,
}

/// Every value of a pickle.
#[derive(Debug)]
pub(super) struct Tree {
    pub nodes: Vec<Node>,
    pub root: Id,
    /// Bytes of the pickle.
    pub pickle_bytes: usize,
}

impl Tree {
    /// Its outermost value.
    pub fn root(&self) -> Value<'_> {
        Value { tree: self, id: self.root }
    }
}

/// A value of a file; a handle that is free to copy.
///
/// A walk from the root meets containers at most 128 deep, and a number of values that is at most
/// 16 times the pickle's bytes, shared ones counted each time.
#[derive(Clone, Copy)]
pub struct Value<'a> {
    tree: &'a Tree,
    id: Id,
}

impl<'a> Value<'a> {
    /// The node; for a namespace, that of its attributes.
    fn node(&self) -> &'a Node {
        match &self.tree.nodes[self.id as usize] {
            Node::Namespace(Some(state)) => &self.tree.nodes[*state as usize],
            node => node,
        }
    }

    fn with(&self, id: Id) -> Self {
        Self { tree: self.tree, id }
    }

    /// What it is: `none`, `bool`, `int`, `float`, `text`, `bytes`, `list`, `tuple`, `set`, `dict`,
    /// `tensor`, `storage`, `dtype`, `type`, or the class of an object that is not interpreted.
    pub fn kind(&self) -> &'static str {
        match self.node() {
            Node::None => "none",
            Node::Bool(_) => "bool",
            Node::Int(_) | Node::BigInt(_) => "int",
            Node::Float(_) => "float",
            Node::Text(_) => "text",
            Node::Bytes(_) => "bytes",
            Node::List(_) => "list",
            Node::Tuple(_) => "tuple",
            Node::Set(_) => "set",
            Node::Dict(_) | Node::Namespace(_) => "dict",
            Node::Tensor(_) => "tensor",
            Node::Storage(_) => "storage",
            Node::Global(Global::Dtype(_)) => "dtype",
            Node::Global(_) | Node::Refused => "type",
            Node::NumpyDtype { .. } => "numpy.dtype",
            Node::Opaque(object) => object.class,
        }
    }

    /// Whether it is Python's `None`.
    pub fn is_none(&self) -> bool {
        matches!(self.node(), Node::None)
    }

    /// A bool, numpy's too.
    pub fn as_bool(&self) -> Option<bool> {
        match self.node() {
            Node::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// An integer that fits 64 bits, numpy's too; no bool.
    pub fn as_i64(&self) -> Option<i64> {
        match self.node() {
            Node::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// The same, without a sign: seeds above 2^63.
    pub fn as_u64(&self) -> Option<u64> {
        match self.node() {
            Node::Int(value) => u64::try_from(*value).ok(),
            Node::BigInt(bytes) => match bytes.split_first_chunk::<8>() {
                Some((low, [0])) => Some(u64::from_le_bytes(*low)),
                _ => None,
            },
            _ => None,
        }
    }

    /// A float or an integer, numpy's too.
    pub fn as_f64(&self) -> Option<f64> {
        match self.node() {
            Node::Float(value) => Some(*value),
            Node::Int(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// A text; also a path, a device (`cuda:0`), a layout, and the name of a dtype (`float32`).
    pub fn as_str(&self) -> Option<&'a str> {
        match self.node() {
            Node::Text(text) => Some(text),
            Node::Global(Global::Dtype(dtype)) => Some(dtype.name()),
            _ => None,
        }
    }

    /// A `bytes` or `bytearray`.
    pub fn as_bytes(&self) -> Option<&'a [u8]> {
        match self.node() {
            Node::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// A tensor or parameter.
    pub fn as_tensor(&self) -> Option<&'a TorchTensor> {
        match self.node() {
            Node::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// The values of a list, tuple or set; nothing for any other kind.
    pub fn items(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let ids: &[Id] = match self.node() {
            Node::List(ids) | Node::Set(ids) => ids,
            Node::Tuple(ids) => ids,
            _ => &[],
        };
        let value = *self;
        ids.iter().map(move |&id| value.with(id))
    }

    /// Keys and values of a dict or namespace, in its order; nothing for any other kind.
    pub fn entries(&self) -> impl Iterator<Item = (Value<'a>, Value<'a>)> + use<'a> {
        let pairs: &[(Id, Id)] = match self.node() {
            Node::Dict(pairs) => pairs,
            _ => &[],
        };
        let value = *self;
        pairs.iter().map(move |&(key, item)| (value.with(key), value.with(item)))
    }

    /// Number of items or entries.
    pub fn len(&self) -> usize {
        match self.node() {
            Node::List(ids) | Node::Set(ids) => ids.len(),
            Node::Tuple(ids) => ids.len(),
            Node::Dict(pairs) => pairs.len(),
            _ => 0,
        }
    }

    /// Whether there are no items or entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entry of a dict or namespace by its text key, or by an integer one (`"0"`); or the item
    /// of a list or tuple by its index. Searches from the front.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        let index = key.parse::<i64>().ok();
        if let Node::List(_) | Node::Tuple(_) = self.node() {
            return self.items().nth(usize::try_from(index?).ok()?);
        }
        let fits = |(k, _): &(Value, Value)| match k.node() {
            Node::Text(text) => **text == *key,
            Node::Int(number) => Some(*number) == index,
            _ => false,
        };
        self.entries().find(fits).map(|(_, value)| value)
    }

    /// Arguments and state of an object that is not interpreted (a numpy array among them).
    pub fn parts(&self) -> Option<(Value<'a>, Option<Value<'a>>)> {
        match self.node() {
            Node::Opaque(object) => {
                Some((self.with(object.args), object.state.map(|id| self.with(id))))
            }
            _ => None,
        }
    }
}

/// Shallow: what it is, and what a scalar holds.
impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.node() {
            Node::None => f.write_str("None"),
            Node::Bool(value) => value.fmt(f),
            Node::Int(value) => value.fmt(f),
            Node::Float(value) => value.fmt(f),
            Node::Text(text) => text.fmt(f),
            Node::Tensor(tensor) => {
                write!(f, "tensor {} {:?}", tensor.dtype().name(), tensor.shape())
            }
            _ => write!(f, "{} of {}", self.kind(), self.len()),
        }
    }
}

/// Walks everything below the root, and names the tensors by the keys that lead to them, joined by
/// dots.
///
/// # Errors
/// A dict with a key twice, or more than [`Value`] promises.
pub(super) fn names(tree: &Tree) -> Result<Vec<(String, Id)>> {
    let mut walk = Walk {
        tree,
        values: 16 * tree.pickle_bytes + 1000,
        path_bytes: path_limit(tree),
        path: String::new(),
        found: Vec::new(),
    };
    walk.visit(tree.root, 0)?;
    Ok(walk.found)
}

/// Bytes of keys that the walk may look at and of names that it may keep: about 3 times the pickle in
/// honest files. Without it, one long key that many dicts share would cost its length in each.
fn path_limit(tree: &Tree) -> usize {
    8 * tree.pickle_bytes + 65_536
}

struct Walk<'a> {
    tree: &'a Tree,
    /// How many more may come.
    values: usize,
    /// The same, of keys and names.
    path_bytes: usize,
    path: String,
    found: Vec<(String, Id)>,
}

impl Walk<'_> {
    fn visit(&mut self, id: Id, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            let (what, limit) = ("levels of nested containers", MAX_DEPTH as u64);
            return Err(TorchFileError::Limit { what, limit });
        }
        let limit = 16 * self.tree.pickle_bytes as u64 + 1000;
        let what = "values, shared ones counted each time";
        self.values = self.values.checked_sub(1).ok_or(TorchFileError::Limit { what, limit })?;
        let tree = self.tree;
        match &tree.nodes[id as usize] {
            Node::Tensor(_) => self.tensor(id),
            Node::List(ids) | Node::Set(ids) => self.items(ids, depth),
            Node::Tuple(ids) => self.items(ids, depth),
            Node::Dict(pairs) => self.entries(pairs, depth),
            Node::Namespace(Some(state)) => self.visit(*state, depth + 1),
            Node::Opaque(object) => {
                let Opaque { args, state, .. } = **object;
                self.visit(args, depth + 1)?;
                state.map_or(Ok(()), |state| self.visit(state, depth + 1))
            }
            _ => Ok(()),
        }
    }

    fn tensor(&mut self, id: Id) -> Result<()> {
        self.pay(self.path.len() + 64)?; // with the table's entry
        self.found.push((self.path.clone(), id));
        Ok(())
    }

    fn pay(&mut self, bytes: usize) -> Result<()> {
        let (what, limit) = ("bytes of keys and tensors' names", path_limit(self.tree) as u64);
        let left = self.path_bytes.checked_sub(bytes);
        self.path_bytes = left.ok_or(TorchFileError::Limit { what, limit })?;
        Ok(())
    }

    fn items(&mut self, ids: &[Id], depth: usize) -> Result<()> {
        for (i, &id) in ids.iter().enumerate() {
            self.below(&i.to_string(), id, depth)?;
        }
        Ok(())
    }

    fn entries(&mut self, pairs: &[(Id, Id)], depth: usize) -> Result<()> {
        let tree = self.tree;
        let (mut texts, mut numbers) = (HashSet::new(), HashSet::new());
        for &(key, value) in pairs {
            let twice = |key| unsupported(format!("a dict with the key `{key}` twice"));
            if let Node::Text(text) = &tree.nodes[key as usize] {
                self.pay(text.len())?;
            }
            match &tree.nodes[key as usize] {
                Node::Text(text) if !texts.insert(text) => return Err(twice(shown(text))),
                Node::Text(text) => self.below(text, value, depth)?,
                Node::Int(int) if !numbers.insert(int) => return Err(twice(int.to_string())),
                Node::Int(int) => self.below(&int.to_string(), value, depth)?,
                _ => {
                    self.below("?", key, depth)?;
                    self.below("?", value, depth)?;
                }
            }
        }
        Ok(())
    }

    /// Visits a value under a longer path.
    fn below(&mut self, segment: &str, id: Id, depth: usize) -> Result<()> {
        let length = self.path.len();
        if length > 0 {
            self.path.push('.');
        }
        self.path.push_str(segment);
        self.visit(id, depth + 1)?;
        self.path.truncate(length);
        Ok(())
    }
}
