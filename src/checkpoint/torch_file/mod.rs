//! PyTorch files (`torch.save`: `.pt`, `.pth`, `.ckpt`, `pytorch_model.bin`), read without Python and
//! without running anything that they contain.
//!
//! ```text
//! let file = TorchFile::open(path)?;
//! for (name, tensor) in file.tensors() {          // "model.transformer.wte.weight", ..
//!     let bytes = file.bytes(tensor)?;            // contiguous, little-endian; borrowed if it can be
//! }
//! let step = file.root().get("iter_num").and_then(|value| value.as_i64());
//! ```
//!
//! A `torch.save` file is a pickle, a program that may call any Python function, beside the tensors'
//! bytes. Here the pickle is run by a machine that cannot call (`pickle.rs`); the few names that
//! checkpoints need are listed (`globals.rs`) and mean values (`calls.rs`, `numpy.rs`, `value.rs`).
//! The bytes stay in the file's map: zip archives since PyTorch 1.6 (`zip.rs`), its own layout
//! before (`legacy.rs`). Every size is checked before it is used (`tensor.rs`), since a file may have
//! been made to deceive.
//!
//! Not read: sparse, quantized, nested and distributed tensors, whole modules, TorchScript, the tar
//! layout of 2016, compressed archives, and files of big-endian machines.

mod calls;
mod error;
mod globals;
mod heap;
mod legacy;
mod numpy;
mod pickle;
mod tensor;
mod value;
mod zip;

pub use error::TorchFileError;
pub use tensor::{Dtype, TorchTensor};
pub use value::Value;

use crate::ffi;
use anyhow::Context;
use error::{Result, damaged, explain, shown, unsupported};
use memmap2::Mmap;
use std::borrow::Cow;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use value::{Id, Node, Tree};
use zip::Archive;

/// Bytes that all expanded tensors of a file may have together: those that show elements more than
/// once, so that they need more memory than the file has for them.
const MAX_EXPANDED: u64 = 64 << 20;

/// The bytes of a file.
enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// An open PyTorch file.
pub struct TorchFile {
    bytes: Bytes,
    tree: Tree,
    /// Names of the tensors, and their nodes.
    tensors: Vec<(String, Id)>,
    /// The zip archive's entries; none in the old layout.
    archive: Option<Archive>,
}

/// How a file begins.
enum Layout {
    Zip,
    Legacy,
    Tar,
}

impl Layout {
    /// Looks at the first 512 bytes at most.
    fn of(first: &[u8]) -> Option<Self> {
        let first = &first[..first.len().min(512)];
        let number =
            |at: usize| first.get(at..).is_some_and(|rest| rest.starts_with(legacy::MAGIC));
        match first {
            [b'P', b'K', 3, 4, ..] => Some(Self::Zip),
            // Protocol, and in 4 and 5 a frame of 9 bytes.
            [0x80, 2..=5, ..] if number(2) || number(11) => Some(Self::Legacy),
            _ if first.get(257..262) == Some(b"ustar") => Some(Self::Tar),
            _ => None,
        }
    }
}

/// Whether a file that begins so may be a PyTorch file: a zip archive, or a pickle that begins with
/// PyTorch's number. 16 bytes are enough, 32 if the pickle has frames.
pub fn is_torch_file(first: &[u8]) -> bool {
    matches!(Layout::of(first), Some(Layout::Zip | Layout::Legacy))
}

impl TorchFile {
    /// Maps a file, runs its pickle and checks where the tensors lie; reads no tensor.
    ///
    /// # Errors
    /// [`TorchFileError`] in the chain.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let io = |action| {
            let path = path.to_owned();
            move |source| TorchFileError::Io { action, path, source }
        };
        let file = explain(File::open(path).map_err(io("open")))?;
        let map = explain(ffi::map_file(&file).map_err(io("map")))?;
        explain(Self::read(Bytes::Mapped(map)))
            .with_context(|| format!("cannot read `{}`", path.display()))
    }

    /// The same for a file in memory.
    pub fn parse(bytes: Vec<u8>) -> anyhow::Result<Self> {
        explain(Self::read(Bytes::Owned(bytes)))
    }

    fn read(bytes: Bytes) -> Result<Self> {
        let (tree, ranges, archive) = match Layout::of(&bytes) {
            Some(Layout::Zip) => {
                let archive = Archive::read(&bytes)?;
                let (tree, ranges) = read_archive(&bytes, &archive)?;
                (tree, ranges, Some(archive))
            }
            Some(Layout::Legacy) => {
                let (tree, ranges) = legacy::read(&bytes)?;
                (tree, ranges, None)
            }
            Some(Layout::Tar) => return Err(unsupported("a tar archive, as of PyTorch 0.1")),
            None => {
                let first = &bytes[..bytes.len().min(8)];
                let got = format!("{} bytes that begin with {first:02x?}", bytes.len());
                return Err(TorchFileError::Magic { got });
            }
        };
        let tensors = value::names(&tree)?;
        let mut file = Self { bytes, tree, tensors, archive };
        file.place(&ranges)?;
        Ok(file)
    }

    /// Finds each named tensor in its storage.
    fn place(&mut self, ranges: &[Range<usize>]) -> Result<()> {
        let mut expanded = 0;
        for (name, id) in &self.tensors {
            let Node::Tensor(tensor) = &mut self.tree.nodes[*id as usize] else { continue };
            let told = |reason| TorchFileError::Tensor { name: name.clone(), reason };
            tensor.place(&ranges[tensor.part.storage as usize]).map_err(told)?;
            if tensor.is_expanded() {
                expanded = tensor.byte_len().saturating_add(expanded);
            }
            if expanded > MAX_EXPANDED {
                let told = format!(
                    "shape {:?} is expanded from a storage of {} bytes; expected at most \
                     {MAX_EXPANDED} bytes of such tensors in a file",
                    tensor.shape, tensor.part.bytes
                );
                return Err(TorchFileError::Tensor { name: name.clone(), reason: told });
            }
        }
        Ok(())
    }

    /// The saved value.
    pub fn root(&self) -> Value<'_> {
        self.tree.root()
    }

    /// Every tensor in the order of the file, under the keys that lead to it joined by dots (an
    /// item of a list by its index). A tensor that is in two places has two names.
    pub fn tensors(&self) -> Vec<(String, &TorchTensor)> {
        let tensor = |(name, id): &(String, Id)| match &self.tree.nodes[*id as usize] {
            Node::Tensor(tensor) => Some((name.clone(), &**tensor)),
            _ => None,
        };
        self.tensors.iter().filter_map(tensor).collect()
    }

    /// The elements of a tensor of this file, contiguous and little-endian. Borrowed from the file
    /// where they lie so, which they do unless it was transposed, expanded or cut; not aligned in
    /// files before PyTorch 1.6.
    ///
    /// # Errors
    /// The tensor is of another file.
    pub fn bytes<'a>(&'a self, tensor: &TorchTensor) -> anyhow::Result<Cow<'a, [u8]>> {
        tensor.bytes(&self.bytes).context("a tensor of another PyTorch file")
    }

    /// Compares the file's bytes with their CRC-32, which [`TorchFile::open`] does not, because that
    /// reads everything. The number of bytes compared: 0 in the layout before PyTorch 1.6, which has
    /// no checksums.
    ///
    /// # Errors
    /// A difference; also for files saved after `torch.serialization.set_crc32_options(False)`.
    pub fn verify(&self) -> anyhow::Result<u64> {
        let archive = self.archive.as_ref();
        explain(archive.map_or(Ok(0), |archive| archive.verify(&self.bytes)))
    }
}

/// The value in an archive, and where each of its storages lies.
fn read_archive(file: &[u8], archive: &Archive) -> Result<(Tree, Vec<Range<usize>>)> {
    let folder = archive.folder()?;
    let entry = |name: &str| archive.get(&format!("{folder}/{name}"));
    if entry("constants.pkl").is_some() {
        return Err(unsupported("a TorchScript archive"));
    }
    if let Some(order) = entry("byteorder")
        && &file[order.data.clone()] != b"little"
    {
        return Err(unsupported("big-endian numbers"));
    }
    let Some(pickle) = entry("data.pkl") else {
        return Err(unsupported("a zip archive without `data.pkl`"));
    };
    let base = pickle.data.start as u64;
    let parsed = pickle::parse(&file[pickle.data.clone()], base)?;
    let place = |storage: &heap::Storage| {
        let (key, bytes) = (shown(&storage.key), storage.bytes);
        let told = |got| format!("`data/{key}`: expected {bytes} bytes, {got}");
        match entry(&format!("data/{}", storage.key)) {
            Some(entry) if entry.data.len() as u64 == storage.bytes => Ok(entry.data.clone()),
            Some(entry) => Err(damaged(base, told(format!("got {}", entry.data.len())))),
            None => Err(damaged(base, told("there is no such entry".to_owned()))),
        }
    };
    let ranges = parsed.storages.iter().map(place).collect::<Result<_>>()?;
    Ok((parsed.tree, ranges))
}
