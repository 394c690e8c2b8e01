//! Writes GGUF 3, one tensor at a time.

use super::read::alignment;
use super::{Array, GgufError, Metadata, TensorInfo, Value};
use anyhow::{Context, Result};
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file that is being written: the header is, the tensors come in order.
pub struct GgufWriter {
    path: PathBuf,
    file: BufWriter<File>,
    tensors: Vec<TensorInfo>,
    next: usize,
    /// Bytes of that tensor so far.
    written: u64,
    /// Alignment of the tensors, bytes.
    alignment: u64,
}

impl GgufWriter {
    /// Creates the file with its metadata and the descriptions of all tensors (their offsets are
    /// set here, in the order given).
    ///
    /// # Errors
    /// Two tensors of one name, more than 4 sizes, rows that are no whole blocks; the I/O error.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[TensorInfo]) -> Result<Self> {
        let told = || format!("cannot write `{}`", path.display());
        let (tensors, alignment) = (tensors.to_vec(), alignment(metadata).with_context(told)?);
        let mut tensors = tensors;
        place(&mut tensors, alignment).with_context(told)?;
        let header = header(metadata, &tensors, alignment);
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path).with_context(told)?);
        file.write_all(&header).with_context(told)?;
        Ok(Self { path: path.to_owned(), file, tensors, next: 0, written: 0, alignment })
    }

    /// The tensor whose bytes are to come, if any is left.
    pub fn next(&self) -> Option<&TensorInfo> {
        self.tensors.get(self.next)
    }

    /// Writes bytes of the next tensor, all or some; after the last of them the padding.
    ///
    /// # Errors
    /// More bytes than its type and shape need; no tensor is left; the I/O error.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let told = || format!("cannot write `{}`", self.path.display());
        let Some(tensor) = self.tensors.get(self.next) else {
            let expected = format!("no more than {} tensors", self.tensors.len());
            return Err(GgufError::tensor("", expected, "one more")).with_context(told);
        };
        let expected = tensor.bytes()?;
        self.written += bytes.len() as u64;
        if self.written > expected {
            let (expected, got) = (format!("{expected} bytes"), self.written);
            return Err(GgufError::tensor(&tensor.name, expected, got)).with_context(told);
        }
        self.file.write_all(bytes).with_context(told)?;
        if self.written < expected {
            return Ok(());
        }
        let padding = expected.next_multiple_of(self.alignment) - expected;
        std::io::copy(&mut std::io::Read::take(std::io::repeat(0), padding), &mut self.file)
            .with_context(told)?;
        (self.next, self.written) = (self.next + 1, 0);
        Ok(())
    }

    /// Flushes the file.
    ///
    /// # Errors
    /// Tensors that did not come; the I/O error.
    pub fn finish(mut self) -> Result<()> {
        let told = || format!("cannot write `{}`", self.path.display());
        if let Some(missing) = self.tensors.get(self.next) {
            let got = format!("{} of {} tensors", self.next, self.tensors.len());
            return Err(GgufError::tensor(&missing.name, "its bytes", got)).with_context(told);
        }
        self.file.flush().with_context(told)
    }
}

/// Checks the tensors and sets their offsets.
fn place(tensors: &mut [TensorInfo], alignment: u64) -> Result<(), GgufError> {
    let (mut names, mut offset) = (HashSet::new(), 0u64);
    for tensor in tensors {
        if !names.insert(tensor.name.clone()) {
            return Err(GgufError::tensor(&tensor.name, "one tensor of that name", "two"));
        }
        if tensor.shape.len() > 4 {
            return Err(GgufError::tensor(&tensor.name, "at most 4 sizes", tensor.shape.len()));
        }
        tensor.offset = offset;
        let end = offset.checked_add(tensor.bytes()?);
        let end = end.and_then(|end| end.checked_next_multiple_of(alignment));
        offset = end.ok_or_else(|| {
            GgufError::tensor(&tensor.name, "to end before 2^64", format!("{:?}", tensor.shape))
        })?;
    }
    Ok(())
}

fn header(metadata: &Metadata, tensors: &[TensorInfo], alignment: u64) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.entries().len() as u64).to_le_bytes());
    for (key, value) in metadata.entries() {
        string(&mut out, key);
        put(&mut out, value);
    }
    for tensor in tensors {
        string(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend((tensor.kind as u32).to_le_bytes());
        out.extend(tensor.offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(alignment as usize), 0);
    out
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Type number, then the value.
fn put(out: &mut Vec<u8>, value: &Value) {
    let mut scalar = |kind: u32, bytes: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U8(n) => scalar(0, &n.to_le_bytes()),
        Value::I8(n) => scalar(1, &n.to_le_bytes()),
        Value::U16(n) => scalar(2, &n.to_le_bytes()),
        Value::I16(n) => scalar(3, &n.to_le_bytes()),
        Value::U32(n) => scalar(4, &n.to_le_bytes()),
        Value::I32(n) => scalar(5, &n.to_le_bytes()),
        Value::F32(x) => scalar(6, &x.to_le_bytes()),
        Value::Bool(b) => scalar(7, &[(*b).into()]),
        Value::U64(n) => scalar(10, &n.to_le_bytes()),
        Value::I64(n) => scalar(11, &n.to_le_bytes()),
        Value::F64(x) => scalar(12, &x.to_le_bytes()),
        Value::String(text) => {
            scalar(8, &[]);
            string(out, text);
        }
        Value::Array(array) => {
            scalar(9, &[]);
            put_array(out, array);
        }
    }
}

/// Type number of the elements, their number, the elements.
fn put_array(out: &mut Vec<u8>, array: &Array) {
    macro_rules! numbers {
        ($kind:literal, $values:ident) => {{
            out.extend(u32::to_le_bytes($kind));
            out.extend(($values.len() as u64).to_le_bytes());
            $values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }};
    }
    let count = array.len() as u64;
    match array {
        Array::U8(v) => numbers!(0, v),
        Array::I8(v) => numbers!(1, v),
        Array::U16(v) => numbers!(2, v),
        Array::I16(v) => numbers!(3, v),
        Array::U32(v) => numbers!(4, v),
        Array::I32(v) => numbers!(5, v),
        Array::F32(v) => numbers!(6, v),
        Array::U64(v) => numbers!(10, v),
        Array::I64(v) => numbers!(11, v),
        Array::F64(v) => numbers!(12, v),
        Array::Bool(v) => {
            out.extend(7u32.to_le_bytes());
            out.extend(count.to_le_bytes());
            out.extend(v.iter().map(|&b| u8::from(b)));
        }
        Array::String(v) => {
            out.extend(8u32.to_le_bytes());
            out.extend(count.to_le_bytes());
            v.iter().for_each(|text| string(out, text));
        }
        Array::Array(v) => {
            out.extend(9u32.to_le_bytes());
            out.extend(count.to_le_bytes());
            v.iter().for_each(|array| put_array(out, array));
        }
    }
}
