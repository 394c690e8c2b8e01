//! Tensors of a checkpoint by name, whatever files they lie in.

use super::gguf::Type;
use super::tensors::TensorFile;
use crate::ffi::TensorView;
use crate::quant::Groups;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use tch::{Kind, Tensor};

/// A matrix as it is quantised in a file.
pub(super) enum Packed<'a> {
    /// GGUF's blocks, one row behind the other.
    Gguf(Type, &'a [u8]),
    /// Codes, scales and minimums.
    Grouped(Groups<'a>),
}

/// A file of named tensors.
pub(super) trait Store {
    /// Names of its tensors.
    fn names(&self) -> Vec<String>;

    /// Shape of one of them.
    fn shape(&self, name: &str) -> Option<Vec<i64>>;

    /// The dtype that [`Store::rows`] gives: fp32 for what is quantised.
    ///
    /// # Errors
    /// No such tensor; a dtype that libtorch has no type for.
    fn kind(&self, name: &str) -> Result<Kind>;

    /// How it is stored, in the words of its format.
    fn stored_as(&self, name: &str) -> Result<String> {
        Ok(dtype_name(self.kind(name)?).to_owned())
    }

    /// Bytes on disk.
    fn bytes(&self, name: &str) -> Result<u64> {
        let n: i64 = self.shape(name).unwrap_or_default().iter().product();
        Ok(n as u64 * self.kind(name)?.elt_size_in_bytes() as u64)
    }

    /// Rows (slices of the first dimension) of a tensor on the CPU, bit for bit but for what is quantised. They are
    /// within its shape; a tensor without dimensions has the row 0. They lie in the file where its bytes can be taken
    /// as they are.
    fn rows(&self, name: &str, rows: Range<i64>) -> Result<TensorView<'_>>;

    /// Whether a tensor is stored in quantised values.
    fn is_quantised(&self, _name: &str) -> bool {
        false
    }

    /// Its quantised values, where it is.
    fn blocks(&self, _name: &str) -> Result<Option<Packed<'_>>> {
        Ok(None)
    }

    /// Reads the whole tensor into memory of its size, where that is faster than copying it out of a map; `false`: it is
    /// not, and nothing was done.
    fn read(&self, _name: &str, _out: &mut [u8]) -> Result<bool> {
        Ok(false)
    }
}

/// A dtype's short name, as safetensors writes it.
pub fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "F32",
        Kind::BFloat16 => "BF16",
        Kind::Half => "F16",
        Kind::Double => "F64",
        Kind::Int64 => "I64",
        Kind::Int => "I32",
        Kind::Int16 => "I16",
        Kind::Int8 => "I8",
        Kind::Uint8 => "U8",
        Kind::Bool => "BOOL",
        _ => "other",
    }
}

impl Store for TensorFile {
    fn names(&self) -> Vec<String> {
        self.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.shape(name)
    }

    fn kind(&self, name: &str) -> Result<Kind> {
        self.kind(name)
    }

    fn rows(&self, name: &str, rows: Range<i64>) -> Result<TensorView<'_>> {
        self.rows(name, rows)
    }

    fn read(&self, name: &str, out: &mut [u8]) -> Result<bool> {
        self.read_into(name, out)
    }
}

/// The open files of a checkpoint and which tensor lies where.
#[derive(Default)]
pub(super) struct Weights {
    stores: Vec<Box<dyn Store>>,
    place: BTreeMap<String, Place>,
}

/// The store and the name there.
type Place = (usize, String);

impl Weights {
    /// Adds a file's tensors under the names that `rename` gives them; `None` leaves one out.
    ///
    /// # Errors
    /// Two tensors of one name.
    pub fn add(
        &mut self,
        store: Box<dyn Store>,
        rename: impl Fn(&str) -> Option<String>,
    ) -> Result<()> {
        for stored in store.names() {
            let Some(name) = rename(&stored) else { continue };
            let before = self.place.insert(name, (self.stores.len(), stored));
            if let Some((_, before)) = before {
                anyhow::bail!("two tensors of one meaning, the second is `{before}`");
            }
        }
        self.stores.push(store);
        Ok(())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> + Clone {
        self.place.keys().map(String::as_str)
    }

    pub fn has(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    fn find(&self, name: &str) -> Result<(&dyn Store, &str)> {
        let (store, stored) = self.place.get(name).with_context(|| format!("`{name}`: missing"))?;
        Ok((&*self.stores[*store], stored))
    }

    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let (store, stored) = self.find(name).ok()?;
        store.shape(stored)
    }

    pub fn kind(&self, name: &str) -> Result<Kind> {
        let (store, stored) = self.find(name)?;
        store.kind(stored)
    }

    pub fn stored_as(&self, name: &str) -> Result<String> {
        let (store, stored) = self.find(name)?;
        store.stored_as(stored)
    }

    pub fn bytes(&self, name: &str) -> Result<u64> {
        let (store, stored) = self.find(name)?;
        store.bytes(stored)
    }

    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let rows = self.shape(name).unwrap_or_default().first().copied().unwrap_or(1);
        Ok(self.rows(name, 0..rows)?.to_owned())
    }

    pub fn rows(&self, name: &str, rows: Range<i64>) -> Result<TensorView<'_>> {
        let (store, stored) = self.find(name)?;
        store.rows(stored, rows).with_context(|| format!("cannot read `{name}`"))
    }

    pub fn is_quantised(&self, name: &str) -> bool {
        self.find(name).is_ok_and(|(store, stored)| store.is_quantised(stored))
    }

    pub fn blocks(&self, name: &str) -> Result<Option<Packed<'_>>> {
        let (store, stored) = self.find(name)?;
        store.blocks(stored).with_context(|| format!("cannot read `{name}`"))
    }

    pub fn read(&self, name: &str, out: &mut [u8]) -> Result<bool> {
        let (store, stored) = self.find(name)?;
        store.read(stored, out).with_context(|| format!("cannot read `{name}`"))
    }

    /// What is wrong with one tensor, by the header alone.
    pub fn problem(&self, name: &str, expected: &[i64]) -> Option<String> {
        let Ok((store, stored)) = self.find(name) else {
            return Some(format!("`{name}`: missing, expected shape {expected:?}"));
        };
        let got = store.shape(stored).unwrap_or_default();
        if got != expected {
            return Some(format!("`{name}`: expected shape {expected:?}, got {got:?}"));
        }
        match store.kind(stored) {
            Ok(Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double) => None,
            Ok(other) => Some(format!("`{name}`: expected a float dtype, got {other:?}")),
            Err(error) => Some(format!("{error:#}")),
        }
    }
}
