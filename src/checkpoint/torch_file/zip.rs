//! The zip archives that PyTorch writes since 1.6: stored entries only, read where they lie.
//!
//! Own code, because the subset is small and what is wanted is unusual: the place of each entry in
//! the file, none of them read. Compressed entries are refused (PyTorch writes none), so there is
//! nothing to inflate. Checked: every offset and length, that local headers agree with the central
//! directory, that no name comes twice, and that no two entries share a byte. The bytes' CRC-32 is
//! left to [`Archive::verify`].

use super::error::{Result, damaged, shown, unsupported};
use std::collections::HashMap;
use std::ops::Range;

/// "End of central directory": its size without a comment, and the longest comment.
const END: usize = 22;
const COMMENT: usize = 0xffff;
const LOCATOR: usize = 20;
const END64: usize = 56;
const CENTRAL: usize = 46;
const LOCAL: usize = 30;

/// One file of an archive.
pub(super) struct Entry {
    /// Its bytes in the archive's file.
    pub data: Range<usize>,
    crc: u32,
}

/// The table of contents of an archive.
pub(super) struct Archive {
    entries: HashMap<String, Entry>,
}

/// Where the central directory lies, and how many entries it has.
struct Directory {
    bytes: Range<usize>,
    count: u64,
}

/// A little-endian number of N bytes at `at`, widened.
fn number<const N: usize>(file: &[u8], at: usize) -> Result<u64> {
    let bytes = at.checked_add(N).and_then(|end| file.get(at..end));
    let bytes = bytes.ok_or_else(|| damaged(at as u64, "the zip archive ends too early"))?;
    Ok(bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
}

/// Expects four letters: `PK` and two codes.
fn signature(file: &[u8], at: usize, codes: [u8; 2], what: &str) -> Result<()> {
    let got = file.get(at..).and_then(|rest| rest.get(..4));
    if got == Some(&[b'P', b'K', codes[0], codes[1]]) {
        return Ok(());
    }
    Err(damaged(at as u64, format!("expected the zip archive's {what}")))
}

impl Archive {
    /// Reads the central directory at the end and the local header in front of each entry.
    pub fn read(file: &[u8]) -> Result<Self> {
        let directory = Directory::find(file)?;
        let mut at = directory.bytes.start;
        let mut entries = HashMap::new();
        let mut taken = Vec::new(); // bytes of each entry, its local header included
        for _ in 0..directory.count {
            let record = Record::read(file, at, directory.bytes.end)?;
            at = record.end;
            let data = record.data(file, directory.bytes.start)?;
            taken.push((record.header, data.end));
            let entry = Entry { data, crc: record.crc };
            if entries.insert(record.name.clone(), entry).is_some() {
                let told = format!("two entries named `{}`", shown(&record.name));
                return Err(damaged(at as u64, told));
            }
        }
        if at != directory.bytes.end {
            let (n, count) = (directory.bytes.end - at, directory.count);
            let told = format!("{n} more bytes of directory behind its {count} entries");
            return Err(damaged(at as u64, told));
        }
        taken.sort_unstable();
        for pair in taken.windows(2) {
            if pair[1].0 < pair[0].1 {
                return Err(damaged(pair[1].0 as u64, "two entries of the zip archive overlap"));
            }
        }
        Ok(Self { entries })
    }

    /// An entry by its full name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// The folder that everything lies in: what is in front of `/data.pkl`.
    pub fn folder(&self) -> Result<&str> {
        let names = || self.entries.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
        let mut folders = names().filter(|folder| !folder.contains('/'));
        match (folders.next(), folders.next()) {
            (Some(folder), None) => Ok(folder),
            (None, _) => Err(unsupported("a zip archive without `data.pkl`")),
            _ => Err(unsupported("a zip archive with more than one `data.pkl`")),
        }
    }

    /// Compares every entry's bytes with their CRC-32, and tells how many bytes that were.
    pub fn verify(&self, file: &[u8]) -> Result<u64> {
        let mut total = 0;
        for (name, entry) in &self.entries {
            let got = crc32fast::hash(&file[entry.data.clone()]);
            if got != entry.crc {
                let (name, crc) = (shown(name), entry.crc);
                let told = format!("`{name}`: expected CRC-32 {crc:08x}, got {got:08x}");
                return Err(damaged(entry.data.start as u64, told));
            }
            total += entry.data.len() as u64;
        }
        Ok(total)
    }
}

impl Directory {
    fn find(file: &[u8]) -> Result<Self> {
        let end = Self::end_record(file)?;
        let locator = end.checked_sub(LOCATOR).filter(|&at| file[at..].starts_with(b"PK\x06\x07"));
        let (limit, count, size, start) = match locator {
            Some(locator) => {
                let at = number::<8>(file, locator + 8)?;
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                signature(file, at, [6, 6], "64-bit end of directory")?;
                let fields = (number::<8>(file, at + 32)?, number::<8>(file, at + 40)?);
                if at.checked_add(END64).is_none_or(|after| after > locator) {
                    return Err(damaged(at as u64, "the 64-bit end of directory is misplaced"));
                }
                (at, fields.0, fields.1, number::<8>(file, at + 48)?)
            }
            None => {
                let (count, size) = (number::<2>(file, end + 10)?, number::<4>(file, end + 12)?);
                (end, count, size, number::<4>(file, end + 16)?)
            }
        };
        let stop = start.checked_add(size).filter(|&stop| stop <= limit as u64);
        let stop = stop.ok_or_else(|| {
            damaged(limit as u64, format!("expected {size} bytes of directory at byte {start}"))
        })?;
        if count > size / CENTRAL as u64 {
            let told = format!("{count} entries do not fit a directory of {size} bytes");
            return Err(damaged(start, told));
        }
        Ok(Self { bytes: start as usize..stop as usize, count })
    }

    /// The end record: the last one whose comment reaches exactly to the end of the file.
    fn end_record(file: &[u8]) -> Result<usize> {
        let missing = || {
            damaged(file.len() as u64, "the zip archive has no directory at its end; truncated?")
        };
        let last = file.len().checked_sub(END).ok_or_else(missing)?;
        let fits = |&at: &usize| {
            file[at..].starts_with(b"PK\x05\x06")
                && number::<2>(file, at + 20).is_ok_and(|n| at + END + n as usize == file.len())
        };
        let at = (last.saturating_sub(COMMENT)..=last).rev().find(fits).ok_or_else(missing)?;
        match number::<4>(file, at + 4)? {
            0 => Ok(at), // this disk and the directory's: both 0
            _ => Err(unsupported("a zip archive in several parts")),
        }
    }
}

/// One entry of the central directory.
struct Record {
    name: String,
    crc: u32,
    size: u64,
    /// Where its local header begins.
    header: usize,
    /// Where the next record begins.
    end: usize,
}

impl Record {
    fn read(file: &[u8], at: usize, limit: usize) -> Result<Self> {
        signature(file, at, [1, 2], "directory entry")?;
        let (flags, method) = (number::<2>(file, at + 8)?, number::<2>(file, at + 10)?);
        let lengths = [28, 30, 32].map(|field| number::<2>(file, at + field));
        let [name, extra, comment] = lengths;
        let (name, extra, comment) = (name? as usize, extra? as usize, comment? as usize);
        let end = at + CENTRAL + name + extra + comment;
        if end > limit {
            return Err(damaged(at as u64, "an entry reaches beyond the zip archive's directory"));
        }
        let texts = at + CENTRAL;
        let name_bytes = &file[texts..texts + name];
        let extra = &file[texts + name..texts + name + extra];
        let name = std::str::from_utf8(name_bytes)
            .map_err(|_| damaged(texts as u64, "the name of an entry is no UTF-8"))?;
        if method != 0 {
            return Err(unsupported(format!("the compressed zip entry `{}`", shown(name))));
        }
        if flags & 1 != 0 {
            return Err(unsupported(format!("the encrypted zip entry `{}`", shown(name))));
        }
        let narrow = [24, 20, 42].map(|field| number::<4>(file, at + field));
        let [size, stored, header] = wide(narrow, extra, at)?;
        if size != stored {
            let name = shown(name);
            let told = format!("`{name}`: expected {size} bytes in the archive, got {stored}");
            return Err(damaged(at as u64, told));
        }
        let header = usize::try_from(header).unwrap_or(usize::MAX);
        let crc = number::<4>(file, at + 16)? as u32;
        Ok(Self { name: name.to_owned(), crc, size, header, end })
    }

    /// Where the bytes lie; the local header in front of them must agree.
    fn data(&self, file: &[u8], limit: usize) -> Result<Range<usize>> {
        let at = self.header;
        let name = shown(&self.name);
        signature(file, at, [3, 4], &format!("header of `{name}`"))?;
        let wrong = |what: &str| damaged(at as u64, format!("the header of `{name}` {what}"));
        let (letters, extra) = (number::<2>(file, at + 26)?, number::<2>(file, at + 28)?);
        let (texts, start) = (at + LOCAL, at + LOCAL + letters as usize + extra as usize);
        if file.get(texts..texts + letters as usize) != Some(self.name.as_bytes()) {
            return Err(wrong("has another name"));
        }
        if number::<2>(file, at + 8)? != 0 {
            return Err(wrong("says that it is compressed"));
        }
        let end = usize::try_from(self.size).ok().and_then(|size| start.checked_add(size));
        let end = end.filter(|&end| end <= limit);
        let end = end.ok_or_else(|| {
            wrong(&format!("has {} bytes behind it, beyond the end of the data", self.size))
        })?;
        // A streamed entry (flag 3) has its sizes behind the bytes; a wide one has them elsewhere.
        let streamed = number::<2>(file, at + 6)? & 8 != 0;
        let local = number::<4>(file, at + 22)?;
        if !streamed && local != u64::from(u32::MAX) && local != self.size {
            return Err(wrong("has another size"));
        }
        Ok(start..end)
    }
}

/// Replaces each field of 32 ones by the next number of the zip64 extra field (id 1).
fn wide(narrow: [Result<u64>; 3], extra: &[u8], at: usize) -> Result<[u64; 3]> {
    let [a, b, c] = narrow;
    let mut fields = [a?, b?, c?];
    let mut from = 0;
    let zip64 = loop {
        if from + 4 > extra.len() {
            break &[][..];
        }
        let (id, length) = (number::<2>(extra, from)?, number::<2>(extra, from + 2)? as usize);
        let body = extra.get(from + 4..from + 4 + length);
        let body = body.ok_or_else(|| damaged(at as u64, "an extra field is cut short"))?;
        if id == 1 {
            break body;
        }
        from += 4 + length;
    };
    let mut next = 0;
    for field in fields.iter_mut().filter(|field| **field == u64::from(u32::MAX)) {
        *field = number::<8>(zip64, next)
            .map_err(|_| damaged(at as u64, "an entry above 4 GiB lacks its 64-bit sizes"))?;
        next += 8;
    }
    Ok(fields)
}
