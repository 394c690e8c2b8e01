//! safetensors files: written one tensor at a time, read through a memory map.

use crate::ffi;
use anyhow::{Context, Result, anyhow};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors, View, serialize_to_file};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// What can be wrong with a tensor file.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// Truncated, or no safetensors at all.
    #[error("`{path}` is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
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

fn dtype_of(kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        Kind::Double => Dtype::F64,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Uint8 => Dtype::U8,
        other => return Err(anyhow!("safetensors file: no dtype for {other:?}")),
    })
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::F64 => Kind::Double,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        _ => return None,
    })
}

/// A tensor whose bytes are fetched when it is its turn, so that one copy at a time is held.
struct Lazy<'a> {
    tensor: &'a Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(ffi::tensor_bytes(self.tensor))
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// Writes tensors (any device, views allowed) bit for bit.
pub fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        views.push((name.clone(), Lazy { tensor, dtype: dtype_of(tensor.kind())?, shape }));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize_to_file(views, Some(metadata), path)
        .map_err(io_error)
        .and_then(|()| Ok(readable_by_all(path)?))
        .with_context(|| format!("cannot write `{}`", path.display()))
}

/// The library creates files that only their owner may read; a checkpoint is meant to be shared.
fn readable_by_all(path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

/// The I/O error inside, so that a full disk can be told from other failures.
fn io_error(e: safetensors::SafeTensorError) -> anyhow::Error {
    match e {
        safetensors::SafeTensorError::IoError(io) => io.into(),
        other => other.into(),
    }
}

/// An open tensor file.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
}

impl TensorFile {
    /// Maps a file and checks its header and size.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
        let map =
            ffi::map_file(&file).with_context(|| format!("cannot map `{}`", path.display()))?;
        let this = Self { path: path.to_owned(), map };
        this.parse()?;
        Ok(this)
    }

    fn parse(&self) -> Result<SafeTensors<'_>, TensorFileError> {
        SafeTensors::deserialize(&self.map).map_err(|e| TensorFileError::Damaged {
            path: self.path.clone(),
            reason: format!("{e} (file of {} bytes)", self.map.len()),
        })
    }

    /// Names of the tensors.
    pub fn names(&self) -> Result<Vec<String>> {
        Ok(self.parse()?.names().into_iter().map(str::to_owned).collect())
    }

    /// One tensor, copied to the CPU.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let file = self.parse()?;
        let view = file.tensor(name).map_err(|e| anyhow!("`{}`: {e}", self.path.display()))?;
        let kind = kind_of(view.dtype()).ok_or_else(|| TensorFileError::Dtype {
            path: self.path.clone(),
            name: name.to_owned(),
            dtype: format!("{:?}", view.dtype()),
        })?;
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Ok(ffi::tensor_from_bytes(view.data(), &shape, kind))
    }

    /// Every tensor, in the order of the names.
    pub fn all(&self) -> Result<Vec<(String, Tensor)>> {
        let mut names = self.names()?;
        names.sort();
        names.into_iter().map(|name| Ok((name.clone(), self.tensor(&name)?))).collect()
    }
}
