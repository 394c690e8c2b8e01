//! safetensors files: written one tensor at a time, read through a memory map.
//!
//! A file is the header's length (u64), a JSON header `{name: {dtype, shape, data_offsets}}`, then
//! the bytes. The `safetensors` crate reads and checks headers; writing is done here, because the
//! crate's writer cannot report a failed copy from the GPU and leaves files that only their owner
//! may read.

use crate::ffi::{self, TensorView};
use anyhow::{Context, Result, anyhow, bail};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// What can be wrong with a tensor file.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// Shorter (or longer) than its header says.
    #[error(
        "`{path}` is truncated or damaged: expected {expected} bytes by its header, got {got} bytes"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Bytes that the header promises, itself included.
        expected: u64,
        /// Bytes on disk.
        got: u64,
    },
    /// No safetensors file, or one with a damaged header.
    #[error("`{path}` is damaged, or is no safetensors file ({got} bytes): {reason}")]
    Header {
        /// The file.
        path: PathBuf,
        /// Bytes on disk.
        got: u64,
        /// The library's finding.
        reason: String,
    },
    /// A dtype that libtorch has no type for.
    #[error("`{path}`: tensor `{name}` has dtype {dtype}, which is not supported")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its dtype.
        dtype: String,
    },
}

/// Both directions of the dtype's name.
const DTYPES: [(Kind, Dtype); 10] = [
    (Kind::Float, Dtype::F32),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Half, Dtype::F16),
    (Kind::Double, Dtype::F64),
    (Kind::Int64, Dtype::I64),
    (Kind::Int, Dtype::I32),
    (Kind::Int16, Dtype::I16),
    (Kind::Int8, Dtype::I8),
    (Kind::Uint8, Dtype::U8),
    (Kind::Bool, Dtype::BOOL),
];

/// Name, dtype and shape of a tensor that will be written.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name in the file.
    pub name: String,
    /// Dtype in the file.
    pub kind: Kind,
    /// Shape.
    pub shape: Vec<i64>,
}

impl Entry {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * self.kind.elt_size_in_bytes() as u64
    }
}

/// Writes a file whose tensors are made when it is their turn: `tensor(i)` belongs to `entries[i]`
/// and may be a view, on any device, of another float dtype. One tensor at a time is held.
///
/// # Errors
/// The I/O error (a full disk among them) stays in the chain.
///
/// # Sync
/// The CPU waits for each CUDA tensor.
pub fn write_lazily(
    path: &Path,
    entries: &[Entry],
    tensor: impl Fn(usize) -> Result<Tensor>,
) -> Result<()> {
    let (header, order) = header(entries)?;
    let told = || format!("cannot write `{}`", path.display());
    let mut file = File::create(path).with_context(told)?;
    file.write_all(&header).with_context(told)?;
    for i in order {
        let Entry { name, kind, shape } = &entries[i];
        let tensor =
            to_cpu(tensor(i), *kind).with_context(|| format!("cannot copy `{name}` to the CPU"))?;
        if tensor.size() != *shape {
            bail!("`{name}`: expected shape {shape:?}, got {:?}", tensor.size());
        }
        let tensor = tensor.contiguous();
        let bytes =
            ffi::bytes_of(&tensor).with_context(|| format!("`{name}` is not on the CPU"))?;
        file.write_all(bytes).with_context(told)?;
    }
    Ok(())
}

/// Converts on the tensor's own device, then copies.
fn to_cpu(tensor: Result<Tensor>, kind: Kind) -> Result<Tensor> {
    Ok(tensor?.f_to_kind(kind)?.f_to_device(Device::Cpu)?)
}

/// Writes tensors (any device, views allowed) bit for bit.
pub fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let entry = |(name, t): &(String, Tensor)| Entry {
        name: name.clone(),
        kind: t.kind(),
        shape: t.size(),
    };
    let entries: Vec<Entry> = tensors.iter().map(entry).collect();
    write_lazily(path, &entries, |i| Ok(tensors[i].1.detach()))
}

/// The header's bytes with their length in front, and the order of the tensors: wide dtypes first, so that every tensor
/// is aligned to its dtype. Bytes of an even number stay among those of 2, so that what is made together stays so.
fn header(entries: &[Entry]) -> Result<(Vec<u8>, Vec<usize>)> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    let width = |entry: &Entry| match entry.kind.elt_size_in_bytes() {
        1 if entry.bytes().is_multiple_of(2) => 2,
        size => size,
    };
    order.sort_by_key(|&i| std::cmp::Reverse(width(&entries[i])));
    let mut json = Map::new();
    json.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for &i in &order {
        let entry = &entries[i];
        let dtype = DTYPES.iter().find(|(kind, _)| *kind == entry.kind).map(|(_, dtype)| dtype);
        let dtype = dtype.with_context(|| format!("safetensors has no dtype {:?}", entry.kind))?;
        let end = offset + entry.bytes();
        let info = json!({"dtype": dtype, "shape": entry.shape, "data_offsets": [offset, end]});
        if json.insert(entry.name.clone(), info).is_some() {
            bail!("two tensors named `{}`", entry.name);
        }
        offset = end;
    }
    let mut text = Value::Object(json).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    Ok((header, order))
}

/// An open tensor file.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    data: usize,
}

impl TensorFile {
    /// Maps a file and checks its header against its size; reads no tensor.
    ///
    /// # Errors
    /// [`TensorFileError`], or the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
        let map =
            ffi::map_file(&file).with_context(|| format!("cannot map `{}`", path.display()))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| damage(path, &map, &e))?;
        Ok(Self { path: path.to_owned(), file, map, metadata, data: 8 + header })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.sort();
        names
    }

    /// Shape of a tensor, if the file has it.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let info = self.metadata.info(name)?;
        Some(info.shape.iter().map(|&n| n as i64).collect())
    }

    /// Dtype of a tensor.
    ///
    /// # Errors
    /// The file has no such tensor, or libtorch no such dtype.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        let dtype = self.info(name)?.dtype;
        let kind = DTYPES.iter().find(|(_, d)| *d == dtype).map(|(kind, _)| *kind);
        Ok(kind.ok_or_else(|| TensorFileError::Dtype {
            path: self.path.clone(),
            name: name.to_owned(),
            dtype: format!("{dtype:?}"),
        })?)
    }

    /// One tensor, copied to the CPU bit for bit.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let rows = self.info(name)?.shape.first().map_or(1, |&n| n as i64);
        Ok(self.rows(name, 0..rows)?.to_owned())
    }

    /// Some rows of a tensor (of its first dimension) where they lie in the file.
    pub fn rows(&self, name: &str, rows: Range<i64>) -> Result<TensorView<'_>> {
        let (info, kind) = (self.info(name)?, self.kind(name)?);
        let mut shape: Vec<i64> = info.shape.iter().map(|&n| n as i64).collect();
        let (start, end) = info.data_offsets;
        let bytes = &self.map[self.data + start..self.data + end];
        let Some(first) = shape.first_mut() else {
            return Ok(TensorView::over(bytes, &shape, kind));
        };
        let row = bytes.len() / (*first).max(1) as usize;
        *first = rows.end - rows.start;
        let bytes = &bytes[rows.start as usize * row..rows.end as usize * row];
        Ok(TensorView::over(bytes, &shape, kind))
    }

    /// Reads a tensor into memory of its size, some MiB a thread at a time: the system copies from its cache straight to
    /// there, without pages of the map that must be found one after the other. `false`: not on this system.
    ///
    /// # Errors
    /// The I/O error.
    pub(super) fn read_into(&self, name: &str, out: &mut [u8]) -> Result<bool> {
        const PIECE: usize = 4 << 20;
        let (start, end) = self.info(name)?.data_offsets;
        if out.len() != end - start || !cfg!(unix) {
            return Ok(false);
        }
        #[cfg(unix)]
        out.par_chunks_mut(PIECE).enumerate().try_for_each(|(i, piece)| {
            let at = self.data + start + i * PIECE;
            std::os::unix::fs::FileExt::read_exact_at(&self.file, piece, at as u64)
        })?;
        Ok(true)
    }

    /// Every tensor, in the order of the names.
    pub fn all(&self) -> Result<Vec<(String, Tensor)>> {
        let named = |name: String| Ok((name.clone(), self.tensor(&name)?));
        self.names().into_iter().map(named).collect()
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing = || anyhow!("`{}` has no tensor `{name}`", self.path.display());
        self.metadata.info(name).ok_or_else(missing)
    }
}

/// The library's finding with sizes, where the header is readable enough to tell the expected one.
fn damage(path: &Path, bytes: &[u8], error: &SafeTensorError) -> TensorFileError {
    let (path, got) = (path.to_owned(), bytes.len() as u64);
    match promised_bytes(bytes) {
        Some(expected) if expected != got => TensorFileError::Size { path, expected, got },
        _ => TensorFileError::Header { path, got, reason: error.to_string() },
    }
}

/// Size of the file by its own header.
fn promised_bytes(bytes: &[u8]) -> Option<u64> {
    let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let text = bytes.get(8..usize::try_from(length).ok()?.checked_add(8)?)?;
    let json: Map<String, Value> = serde_json::from_slice(text).ok()?;
    let end = |info: &Value| info.pointer("/data_offsets/1").and_then(Value::as_u64);
    json.values().filter_map(end).max().unwrap_or(0).checked_add(length + 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_comes_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        // Bytes 0..=255 make NaNs with payloads, infinities and denormals of every float type.
        let bytes: Vec<u8> = (0..=255).collect();
        let tensors: Vec<(String, Tensor)> = DTYPES
            .iter()
            .filter(|(kind, _)| *kind != Kind::Bool)
            .map(|(kind, _)| {
                let n = (256 / kind.elt_size_in_bytes()) as i64;
                (format!("{kind:?}"), ffi::tensor_from_bytes(&bytes, &[2, n / 2], *kind))
            })
            .chain([("empty".into(), Tensor::empty([0, 3], tch::kind::FLOAT_CPU))])
            .collect();
        write(&path, &tensors).unwrap();
        let back = TensorFile::open(&path).unwrap();
        assert_eq!(back.names().len(), tensors.len());
        for (name, tensor) in &tensors {
            let got = back.tensor(name).unwrap();
            assert_eq!((got.kind(), got.size()), (tensor.kind(), tensor.size()), "{name}");
            assert_eq!(ffi::tensor_bytes(&got), ffi::tensor_bytes(tensor), "{name}");
        }
    }

    #[test]
    fn a_view_is_written_as_what_it_shows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let x = Tensor::arange(12, tch::kind::INT64_CPU).view([3, 4]);
        write(&path, &[("t".into(), x.tr()), ("row".into(), x.narrow(0, 1, 1))]).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert!(file.tensor("t").unwrap().equal(&x.tr()));
        assert!(file.tensor("row").unwrap().equal(&x.narrow(0, 1, 1)));
    }

    #[test]
    fn a_file_cut_at_any_byte_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        write(&path, &[("x".into(), Tensor::ones([3], tch::kind::FLOAT_CPU))]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = TensorFile::open(&path).map(|_| ()).unwrap_err();
            assert!(error.chain().any(|e| e.is::<TensorFileError>()), "{length}: {error:#}");
        }
        let error = TensorFile::open(&path).map(|_| ()).unwrap_err().to_string();
        let (expected, got) = (whole.len(), whole.len() - 1);
        let told = format!("expected {expected} bytes by its header, got {got} bytes");
        assert!(error.contains(&told), "{error}");
    }

    #[test]
    fn two_tensors_of_one_name_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let x = || ("x".to_owned(), Tensor::ones([1], tch::kind::FLOAT_CPU));
        let error = write(&dir.path().join("t"), &[x(), x()]).unwrap_err();
        assert!(error.to_string().contains("two tensors named `x`"));
    }
}
