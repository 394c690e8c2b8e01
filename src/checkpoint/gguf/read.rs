//! Reads GGUF 2 and 3 through a memory map.
//!
//! Every count, length and offset is checked against the bytes that are there before anything is
//! allocated for it, so that opening a file takes memory of a few times its header at most.
//! Version 1 (32-bit lengths) and big-endian files are refused.

use super::{ALIGNMENT, Array, GgufError, Metadata, TensorInfo, Type, Value, quants};
use anyhow::{Context, Result, anyhow};
use memmap2::Mmap;
use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Arrays of arrays may be nested this deep.
const MAX_DEPTH: u32 = 4;
/// Dimensions of a tensor.
const MAX_DIMS: u32 = 4;
/// Smallest key with its value, in bytes: length, type, one byte.
const SMALLEST_ENTRY: usize = 13;
/// Smallest description of a tensor, in bytes: length, number of dimensions, type, offset.
const SMALLEST_TENSOR: usize = 24;

/// Everything in front of the tensors' bytes.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// All metadata.
    pub metadata: Metadata,
    /// The tensors, in the order of the file's descriptions.
    pub tensors: Vec<TensorInfo>,
    /// Where offset 0 of the tensors lies in the file.
    pub data: u64,
}

/// An open file.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl GgufFile {
    /// Maps a file and checks its header; touches no tensor.
    ///
    /// # Errors
    /// A [`GgufError`] in the chain, or the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
        let length = file.metadata().map(|m| m.len()).unwrap_or(0);
        let map = crate::ffi::map_file(&file)
            .with_context(|| format!("cannot map `{}` ({length} bytes)", path.display()))?;
        let header = Self::parse(&map).with_context(|| {
            format!("`{}` is damaged, or is no GGUF file ({length} bytes)", path.display())
        })?;
        Ok(Self { path: path.to_owned(), map, header })
    }

    /// Reads and checks the header of a whole file in memory.
    ///
    /// # Errors
    /// The first fault, with its place.
    pub fn parse(bytes: &[u8]) -> Result<Header, GgufError> {
        Header::parse(bytes)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// All metadata, with typed getters.
    pub fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// The value of a metadata key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(key)
    }

    /// The tensors.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The tensor of a name.
    ///
    /// # Errors
    /// The file has none.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        let found = self.header.tensors.iter().find(|tensor| tensor.name == name);
        found.ok_or_else(|| anyhow!("`{}` has no tensor `{name}`", self.path.display()))
    }

    /// A tensor's bytes as they lie in the file; empty for a tensor of another file.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        self.header.bytes(&self.map, tensor).unwrap_or_default()
    }

    /// A tensor's values, in parallel.
    ///
    /// # Errors
    /// A type that cannot be dequantised.
    pub fn dequantize(&self, tensor: &TensorInfo) -> Result<Vec<f32>> {
        let rows = if tensor.row() == 0 { 0 } else { tensor.values()? / tensor.row() };
        self.dequantize_rows(tensor, 0..rows)
    }

    /// Some rows of a tensor (all sizes but the last flattened): `rows.len() * row` values.
    ///
    /// # Errors
    /// As [`Self::dequantize`]; rows that are not there.
    pub fn dequantize_rows(&self, tensor: &TensorInfo, rows: Range<u64>) -> Result<Vec<f32>> {
        let told = || format!("cannot read `{}` of `{}`", tensor.name, self.path.display());
        let values = rows.end.saturating_sub(rows.start).saturating_mul(tensor.row());
        let place = |row: u64| tensor.kind.bytes(row.checked_mul(tensor.row())?);
        let range = place(rows.start).zip(place(rows.end));
        let bytes = range.and_then(|(a, b)| self.bytes(tensor).get(a as usize..b as usize));
        let got = || format!("rows {rows:?} of a tensor of shape {:?}", tensor.shape);
        let bytes = bytes.ok_or_else(|| GgufError::tensor(&tensor.name, "rows in range", got()));
        let bytes = bytes.with_context(told)?;
        let mut out = vec![0.0; values as usize];
        quants::dequantize(tensor.kind, bytes, &mut out).with_context(told)?;
        Ok(out)
    }
}

impl Header {
    /// Reads and checks the header of a whole file.
    fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor { bytes, at: 0 };
        let version = cursor.version()?;
        let (tensors, entries) = cursor.counts()?;
        let metadata = cursor.metadata(entries)?;
        let alignment = alignment(&metadata)?;
        let mut infos = Vec::new();
        for _ in 0..tensors {
            infos.push(cursor.tensor(alignment)?);
        }
        let data = (cursor.at as u64).checked_next_multiple_of(alignment).ok_or_else(|| {
            GgufError::key("general.alignment", "a place within the file", alignment)
        })?;
        check_names(&infos)?;
        check_places(&infos, data, bytes.len() as u64)?;
        Ok(Self { version, metadata, tensors: infos, data })
    }

    /// A tensor's bytes within the whole file.
    pub fn bytes<'a>(&self, file: &'a [u8], tensor: &TensorInfo) -> Option<&'a [u8]> {
        let start = self.data.checked_add(tensor.offset)?;
        let end = start.checked_add(tensor.bytes().ok()?)?;
        file.get(start.try_into().ok()?..end.try_into().ok()?)
    }
}

/// `general.alignment`: a power of two.
pub(super) fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    let key = "general.alignment";
    match metadata.get(key) {
        None => Ok(ALIGNMENT),
        Some(Value::U32(n)) if n.is_power_of_two() => Ok((*n).into()),
        Some(other) => Err(GgufError::key(key, "a u32, a power of two", other.brief())),
    }
}

fn check_names(tensors: &[TensorInfo]) -> Result<(), GgufError> {
    let mut seen = HashSet::new();
    match tensors.iter().find(|tensor| !seen.insert(tensor.name.as_str())) {
        Some(twice) => Err(GgufError::tensor(&twice.name, "one tensor of that name", "two")),
        None => Ok(()),
    }
}

/// Tensors must lie within the file, and no two on the same bytes.
fn check_places(tensors: &[TensorInfo], data: u64, length: u64) -> Result<(), GgufError> {
    let mut places = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let bytes = tensor.bytes()?;
        let end = data.checked_add(tensor.offset).and_then(|start| start.checked_add(bytes));
        if end.is_none_or(|end| end > length) {
            let got = format!("{bytes} bytes from {data} + {}", tensor.offset);
            let expected = format!("to end within the file's {length} bytes");
            return Err(GgufError::tensor(&tensor.name, expected, got));
        }
        places.push((tensor.offset, tensor.offset + bytes, &tensor.name));
    }
    places.sort();
    for pair in places.windows(2) {
        let ((_, end, before), (start, _, name)) = (pair[0], pair[1]);
        if start < end {
            let expected = format!("an offset of at least {end}, where `{before}` ends");
            return Err(GgufError::tensor(name, expected, start));
        }
    }
    Ok(())
}

/// A position in the file.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, length: u64, what: &str) -> Result<&'a [u8], GgufError> {
        if length > self.left() as u64 {
            let got = format!("{} bytes to the end of the file", self.left());
            return Err(GgufError::damaged(self.at, what, format!("{length} bytes"), got));
        }
        let taken = &self.bytes[self.at..self.at + length as usize];
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &str) -> Result<&'a str, GgufError> {
        let length = self.u64(what)?;
        let at = self.at;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|e| GgufError::damaged(at, what, "UTF-8", e))
    }

    fn version(&mut self) -> Result<u32, GgufError> {
        let magic: [u8; 4] = self.array("the magic")?;
        if &magic != b"GGUF" {
            let got = magic.escape_ascii().to_string();
            return Err(GgufError::damaged(0, "the magic", "`GGUF`", format!("`{got}`")));
        }
        let got = match self.u32("the version")? {
            version @ (2 | 3) => return Ok(version),
            1 => "1, whose lengths have 32 bits".to_owned(),
            n if n & 0xffff == 0 && n != 0 => format!("big-endian {}", n.swap_bytes()),
            n => n.to_string(),
        };
        Err(GgufError::damaged(4, "the version", "2 or 3, little-endian", got))
    }

    /// Numbers of tensors and of metadata entries, both small enough for the file.
    fn counts(&mut self) -> Result<(u64, u64), GgufError> {
        let (tensors, entries) = (self.u64("the tensor count")?, self.u64("the metadata count")?);
        let counts = [
            (8, "the tensor count", tensors, self.left() / SMALLEST_TENSOR),
            (16, "the metadata count", entries, self.left() / SMALLEST_ENTRY),
        ];
        for (at, what, count, most) in counts {
            if count > most as u64 {
                let expected = format!("at most {most} in a file of {} bytes", self.bytes.len());
                return Err(GgufError::damaged(at, what, expected, count));
            }
        }
        Ok((tensors, entries))
    }

    fn metadata(&mut self, entries: u64) -> Result<Metadata, GgufError> {
        let mut metadata = Metadata::default();
        let mut seen = HashSet::new();
        for _ in 0..entries {
            let at = self.at;
            let key = self.string("a metadata key")?;
            if !seen.insert(key) {
                return Err(GgufError::damaged(at, "a metadata key", "a new one", key));
            }
            let value = self.value(key)?;
            metadata.push(key.to_owned(), value);
        }
        Ok(metadata)
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let at = self.at;
        Ok(match self.u32(key)? {
            0 => Value::U8(u8::from_le_bytes(self.array(key)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(key)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(key)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(key)?)),
            4 => Value::U32(self.u32(key)?),
            5 => Value::I32(i32::from_le_bytes(self.array(key)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => Value::Bool(self.bools(1, key)?[0]),
            8 => Value::String(self.string(key)?.to_owned()),
            9 => Value::Array(self.values(key, 1)?),
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            other => return Err(GgufError::damaged(at, key, "a value type of 0 to 12", other)),
        })
    }

    /// An array: type of the elements, their number, the elements.
    fn values(&mut self, key: &str, depth: u32) -> Result<Array, GgufError> {
        let at = self.at;
        let (kind, count) = (self.u32(key)?, self.u64(key)?);
        Ok(match kind {
            0 => Array::U8(self.take(count, key)?.to_vec()),
            1 => Array::I8(self.numbers(count, key, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(count, key, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(count, key, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(count, key, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(count, key, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(count, key, f32::from_le_bytes)?),
            7 => Array::Bool(self.bools(count, key)?),
            8 => Array::String(self.elements(count, key, |c| Ok(c.string(key)?.to_owned()))?),
            9 if depth == MAX_DEPTH => {
                let expected = format!("arrays nested at most {MAX_DEPTH} deep");
                return Err(GgufError::damaged(at, key, expected, "one more"));
            }
            9 => Array::Array(self.elements(count, key, |c| c.values(key, depth + 1))?),
            10 => Array::U64(self.numbers(count, key, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(count, key, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(count, key, f64::from_le_bytes)?),
            other => return Err(GgufError::damaged(at, key, "an element type of 0 to 12", other)),
        })
    }

    /// Numbers of N bytes; nothing is allocated before all bytes are known to be there.
    fn numbers<T, const N: usize>(
        &mut self,
        count: u64,
        key: &str,
        read: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        let bytes = self.take(count.saturating_mul(N as u64), key)?;
        Ok(bytes.as_chunks().0.iter().map(|chunk| read(*chunk)).collect())
    }

    fn bools(&mut self, count: u64, key: &str) -> Result<Vec<bool>, GgufError> {
        let at = self.at;
        let bytes = self.take(count, key)?;
        match bytes.iter().position(|&byte| byte > 1) {
            Some(i) => Err(GgufError::damaged(at + i, key, "0 or 1", bytes[i])),
            None => Ok(bytes.iter().map(|&byte| byte == 1).collect()),
        }
    }

    /// Elements of at least 8 bytes each. The vector grows as they are read: the count may lie.
    fn elements<T>(
        &mut self,
        count: u64,
        key: &str,
        read: impl Fn(&mut Self) -> Result<T, GgufError>,
    ) -> Result<Vec<T>, GgufError> {
        if count > self.left() as u64 / 8 {
            let expected = format!("at most {} elements", self.left() / 8);
            return Err(GgufError::damaged(self.at, key, expected, count));
        }
        (0..count).map(|_| read(self)).collect::<Result<Vec<T>, _>>()
    }

    fn tensor(&mut self, alignment: u64) -> Result<TensorInfo, GgufError> {
        let name = self.string("a tensor's name")?;
        let damaged = |expected: String, got: String| GgufError::tensor(name, expected, got);
        let dims = self.u32(name)?;
        if dims > MAX_DIMS {
            return Err(damaged(format!("at most {MAX_DIMS} dimensions"), dims.to_string()));
        }
        let mut shape = (0..dims).map(|_| self.u64(name)).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let id = self.u32(name)?;
        let kind = Type::from_id(id)
            .ok_or_else(|| damaged("a known type".to_owned(), format!("type {id}")))?;
        let offset = self.u64(name)?;
        if !offset.is_multiple_of(alignment) {
            let expected = format!("an offset that is a multiple of {alignment}");
            return Err(damaged(expected, offset.to_string()));
        }
        Ok(TensorInfo { name: name.to_owned(), kind, shape, offset })
    }
}
