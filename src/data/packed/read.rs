//! Packed files that are there, as one stream of tokens.

use super::error::io_error;
use super::{HEADER, MAGIC, PackedError, Result, UNFINISHED, VERSION};
use crate::ffi;
use memmap2::{Advice, Mmap};
use rayon::prelude::*;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Integer dtypes of a packed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 1 byte.
    U8,
    /// 1 byte, signed.
    I8,
    /// 2 bytes, signed.
    I16,
    /// 4 bytes, signed.
    I32,
    /// 8 bytes, signed.
    I64,
    /// 2 bytes.
    U16,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", format!("{self:?}").to_lowercase())
    }
}

impl Dtype {
    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::U8,
            2 => Self::I8,
            3 => Self::I16,
            4 => Self::I32,
            5 => Self::I64,
            8 => Self::U16,
            _ => return None,
        })
    }

    /// Bytes of a token.
    pub fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::I16 | Self::U16 => 2,
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    fn decode(self, bytes: &[u8], out: &mut Vec<i64>) {
        fn each<const N: usize>(bytes: &[u8], out: &mut Vec<i64>, f: impl Fn([u8; N]) -> i64) {
            out.extend(bytes.as_chunks::<N>().0.iter().map(|&b| f(b)));
        }
        match self {
            Self::U8 => each(bytes, out, |[b]| b.into()),
            Self::I8 => each(bytes, out, |b| i8::from_le_bytes(b).into()),
            Self::I16 => each(bytes, out, |b| i16::from_le_bytes(b).into()),
            Self::U16 => each(bytes, out, |b| u16::from_le_bytes(b).into()),
            Self::I32 => each(bytes, out, |b| i32::from_le_bytes(b).into()),
            Self::I64 => each(bytes, out, i64::from_le_bytes),
        }
    }
}

/// How the files of a set are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// From memory maps, where the process has not too many.
    #[default]
    Mapped,
    /// Opened, read and closed for each range of tokens.
    Opened,
}

/// Files that this process has mapped through sets.
static MAPS: AtomicUsize = AtomicUsize::new(0);
/// Half of what Linux allows a process (`vm.max_map_count`): libtorch and CUDA need some too.
const MOST_MAPS: usize = 32_768;

/// A set's part of the maps, given back with it.
struct Maps(usize);

impl Maps {
    fn take(n: usize) -> Option<Self> {
        let mine = Self(n);
        let before = MAPS.fetch_add(n, Ordering::Relaxed);
        (before + n <= MOST_MAPS).then_some(mine)
    }
}

impl Drop for Maps {
    fn drop(&mut self) {
        MAPS.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// One packed file whose header was checked.
pub(crate) struct PackedFile {
    path: PathBuf,
    pub(crate) dtype: Dtype,
    /// Tokens in the file.
    pub(crate) len: u64,
    map: Option<Mmap>,
}

impl PackedFile {
    /// Reads the header and compares it with the file's size.
    pub(crate) fn open(path: &Path, mapped: bool) -> Result<Self> {
        let mut file = File::open(path).map_err(io_error("open", path))?;
        let size = file.metadata().map_err(io_error("read", path))?.len();
        let path = path.to_owned();
        if size < HEADER as u64 {
            return Err(PackedError::Header { path, got: size });
        }
        let mut header = [0; HEADER];
        file.read_exact(&mut header).map_err(io_error("read", &path))?;
        let (dtype, len) = parse_header(path.clone(), &header, size)?;
        let map = mapped.then(|| {
            let map = ffi::map_file(&file)?;
            // Blocks come in random order: the system should not read ahead.
            map.advise(Advice::Random).map(|()| map)
        });
        let map = map.transpose().map_err(io_error("map", &path))?;
        Ok(Self { path, dtype, len, map })
    }

    /// Appends tokens `from .. from + n` to `out`; an id outside the vocabulary is an error.
    pub(crate) fn read(
        &self,
        from: u64,
        n: u64,
        vocab_size: usize,
        out: &mut Vec<i64>,
    ) -> Result<()> {
        let (start, size) = (out.len(), self.dtype.size());
        let (at, n_bytes) = (HEADER + from as usize * size, n as usize * size);
        match &self.map {
            Some(map) => {
                self.check_size()?;
                self.dtype.decode(&map[at..at + n_bytes], out);
            }
            None => {
                let mut bytes = vec![0; n_bytes];
                let file = File::open(&self.path).map_err(io_error("open", &self.path))?;
                file.read_exact_at(&mut bytes, at as u64).map_err(io_error("read", &self.path))?;
                self.dtype.decode(&bytes, out);
            }
        }
        self.check_ids(from, vocab_size, &out[start..])
    }

    /// Appends all tokens to `out`; an id outside the vocabulary is an error. Returns the CRC-32C of all bytes.
    pub(crate) fn read_all(&self, vocab_size: usize, out: &mut Vec<i64>) -> Result<u32> {
        let bytes = fs::read(&self.path).map_err(io_error("read", &self.path))?;
        let (path, expected, got) = (self.path.clone(), self.bytes(), bytes.len() as u64);
        if got != expected {
            return Err(PackedError::Changed { path, expected, got });
        }
        let start = out.len();
        self.dtype.decode(&bytes[HEADER..], out);
        self.check_ids(0, vocab_size, &out[start..])?;
        Ok(crc32c::crc32c(&bytes))
    }

    /// On disk.
    pub(crate) fn bytes(&self) -> u64 {
        HEADER as u64 + self.len * self.dtype.size() as u64
    }

    /// `ids` are those from token `from` on.
    fn check_ids(&self, from: u64, vocab_size: usize, ids: &[i64]) -> Result<()> {
        if are_below(ids, vocab_size) {
            return Ok(());
        }
        let is_out = |id: &i64| !(0..vocab_size as i64).contains(id);
        let i = ids.iter().position(is_out).unwrap_or(0);
        let (path, at) = (self.path.clone(), from + i as u64);
        Err(PackedError::Id { path, at, got: ids[i], vocab_size })
    }

    /// A map of a file that was cut since ends the process where it is touched.
    fn check_size(&self) -> Result<()> {
        let got = fs::metadata(&self.path).map_err(io_error("read", &self.path))?.len();
        let expected = self.bytes();
        match got >= expected {
            true => Ok(()),
            false => Err(PackedError::Changed { path: self.path.clone(), expected, got }),
        }
    }
}

/// Whether all ids are in the vocabulary, without a branch for each: the sign bit of any that is not shows in the end.
fn are_below(ids: &[i64], vocab_size: usize) -> bool {
    let last = vocab_size as i64 - 1;
    ids.iter().fold(0, |signs, id| signs | id | last.wrapping_sub(*id)) >= 0
}

/// Dtype and number of tokens of a file of `size` bytes.
fn parse_header(path: PathBuf, header: &[u8; HEADER], size: u64) -> Result<(Dtype, u64)> {
    let u64_at = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if &header[..7] != MAGIC {
        return Err(PackedError::Magic { path, got: header[..7].escape_ascii().to_string() });
    }
    if u64_at(7) != VERSION {
        return Err(PackedError::Version { path, got: u64_at(7) });
    }
    let Some(dtype) = Dtype::from_code(header[15]) else {
        return Err(PackedError::Dtype { path, got: header[15] });
    };
    let tokens = u64_at(16);
    let expected = tokens.saturating_mul(dtype.size() as u64).saturating_add(HEADER as u64);
    if size != expected {
        return Err(PackedError::Size { path, tokens, expected, got: size });
    }
    Ok((dtype, tokens))
}

/// Packed files in sorted order, as one stream of tokens.
pub struct PackedSet {
    files: Vec<PackedFile>,
    maps: Option<Maps>,
    /// First token of each file in the stream, and the total.
    starts: Vec<u64>,
}

impl PackedSet {
    /// Every `.bin` file in a folder (and the folders in it), or every one whose path begins with `path`, mapped where
    /// the process has not too many maps. Reads each header once, in parallel.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_by(path, Access::Mapped)
    }

    /// [`PackedSet::open`], read in a certain way.
    pub fn open_by(path: &Path, access: Access) -> Result<Self> {
        let paths = find_files(path)?;
        let maps = match access {
            Access::Mapped => Maps::take(paths.len()),
            Access::Opened => None,
        };
        let open = |p: &PathBuf| PackedFile::open(p, maps.is_some());
        let files = paths.par_iter().map(open).collect::<Result<Vec<_>>>()?;
        let mut starts = vec![0];
        for file in &files {
            starts.push(starts[starts.len() - 1] + file.len);
        }
        Ok(Self { files, maps, starts })
    }

    /// How it is read.
    pub fn access(&self) -> Access {
        if self.maps.is_some() { Access::Mapped } else { Access::Opened }
    }

    /// Number of files.
    pub fn n_files(&self) -> usize {
        self.files.len()
    }

    /// Tokens in all files.
    pub fn len(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The i-th file, in sorted order.
    pub fn file(&self, i: usize) -> FileInfo<'_> {
        let PackedFile { path, dtype, len, .. } = &self.files[i];
        FileInfo { path, dtype: *dtype, len: *len, start: self.starts[i] }
    }

    /// Asks the system to bring tokens `from .. from + n` of mapped files into memory, and does not wait.
    pub fn prefetch(&self, from: u64, n: u64) {
        let (mut from, end) = (from, (from + n).min(self.len()));
        let mut at = self.starts.partition_point(|&start| start <= from) - 1;
        while from < end {
            let stop = end.min(self.starts[at + 1]);
            let (file, start) = (&self.files[at], self.starts[at]);
            if let Some(map) = &file.map {
                let size = file.dtype.size();
                let (offset, bytes) =
                    ((from - start) as usize * size, (stop - from) as usize * size);
                map.advise_range(Advice::WillNeed, HEADER + offset, bytes).ok(); // only advice
            }
            from = stop;
            at += 1;
        }
    }

    /// Tokens `from .. from + n` of the stream, across file borders. The range must lie in the stream.
    pub fn read(&self, from: u64, n: u64, vocab_size: usize) -> Result<Vec<i64>> {
        let mut out = Vec::with_capacity(n as usize);
        self.read_into(from, n, vocab_size, &mut out)?;
        Ok(out)
    }

    /// [`PackedSet::read`], appended to `out`.
    pub fn read_into(
        &self,
        from: u64,
        n: u64,
        vocab_size: usize,
        out: &mut Vec<i64>,
    ) -> Result<()> {
        let (mut from, end) = (from, from + n);
        assert!(end <= self.len(), "tokens {from}..{end} of a stream of {}", self.len());
        let mut at = self.starts.partition_point(|&start| start <= from) - 1;
        while from < end {
            let stop = end.min(self.starts[at + 1]);
            let file_start = self.starts[at];
            self.files[at].read(from - file_start, stop - from, vocab_size, out)?;
            from = stop;
            at += 1;
        }
        Ok(())
    }
}

/// A file of a set.
#[derive(Clone, Copy, Debug)]
pub struct FileInfo<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// Of its tokens.
    pub dtype: Dtype,
    /// Tokens in it.
    pub len: u64,
    /// Tokens before it in the set's stream.
    pub start: u64,
}

/// The `.bin` files of a set, sorted.
pub fn find_files(path: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let is_dir = path.is_dir();
    if is_dir {
        collect(path, &mut found)?;
    } else if let (Some(dir), Some(prefix)) = (path.parent(), path.file_name()) {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let prefix = prefix.to_string_lossy();
        let starts = |p: &PathBuf| file_name(p).starts_with(&*prefix) && p.is_file();
        if dir.is_dir() {
            found.extend(list(dir)?.into_iter().filter(starts));
        }
    }
    found.retain(|p| p.extension().is_some_and(|e| e == "bin"));
    found.sort();
    if found.is_empty() {
        return Err(PackedError::NoFiles { path: path.into() });
    }
    let has = |split: &str| found.iter().any(|p| file_name(p).starts_with(split));
    if is_dir && has("train") && has("validation") {
        return Err(PackedError::MixedSplits { path: path.into() });
    }
    Ok(found)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(io_error("read", dir))?;
    entries.map(|e| Ok(e.map_err(io_error("read", dir))?.path())).collect()
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for path in list(dir)? {
        if !path.is_dir() {
            found.push(path);
        } else if !file_name(&path).ends_with(UNFINISHED) {
            collect(&path, found)?;
        }
    }
    Ok(())
}
