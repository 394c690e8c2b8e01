//! The layout before PyTorch 1.6 (`_use_new_zipfile_serialization=False`).
//!
//! Pickles one after another: PyTorch's number, 1001, a dict about the machine, the value, the list
//! of the storages' keys. Then, in the order of that list, each storage's number of elements (i64,
//! little-endian) and its bytes. Nothing is aligned.

use super::error::{Result, damaged, shown, unsupported};
use super::heap::Storage;
use super::pickle::{Parsed, parse, parse_plain};
use super::value::{Tree, Value};
use std::collections::HashMap;
use std::ops::Range;

/// 0x1950a86a20f9469cfc6c, as a pickle holds it.
pub(super) const MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// The value, and where each of its storages lies.
pub(super) fn read(file: &[u8]) -> Result<(Tree, Vec<Range<usize>>)> {
    let mut at = 0;
    plain(file, &mut at)?; // the number, which brought us here
    let version = plain(file, &mut at)?.root().as_i64();
    if version != Some(1001) {
        return Err(unsupported(format!("version {version:?} of the old layout, not 1001")));
    }
    let machine = plain(file, &mut at)?;
    if machine.root().get("little_endian").and_then(|v| v.as_bool()) == Some(false) {
        return Err(unsupported("big-endian numbers"));
    }
    let Parsed { tree, storages } = parse(&file[at..], at as u64)?;
    at += tree.pickle_bytes;
    let keys = plain(file, &mut at)?;
    let ranges = places(file, at, &storages, keys.root())?;
    Ok((tree, ranges))
}

/// The next pickle, which has no tensors.
fn plain(file: &[u8], at: &mut usize) -> Result<Tree> {
    let tree = parse_plain(&file[*at..], *at as u64)?;
    *at += tree.pickle_bytes;
    Ok(tree)
}

/// Steps through the storages behind the pickles.
fn places(
    file: &[u8],
    mut at: usize,
    storages: &[Storage],
    keys: Value,
) -> Result<Vec<Range<usize>>> {
    let by_key: HashMap<&str, usize> =
        storages.iter().enumerate().map(|(i, storage)| (&*storage.key, i)).collect();
    let mut ranges = vec![None; storages.len()];
    for key in keys.items() {
        let index = key.as_str().and_then(|key| by_key.get(key));
        let &index = index.ok_or_else(|| damaged(at as u64, "a storage that nothing uses"))?;
        let storage = &storages[index];
        let count = file.get(at..).and_then(|rest| rest.first_chunk::<8>());
        let count = count.ok_or_else(|| damaged(at as u64, "the storages end too early"))?;
        let bytes = u64::from_le_bytes(*count).checked_mul(storage.element_bytes);
        if bytes != Some(storage.bytes) {
            let (key, bytes) = (shown(&storage.key), storage.bytes);
            let told = format!("storage `{key}`: expected {bytes} bytes, got another length");
            return Err(damaged(at as u64, told));
        }
        let start = at + 8;
        let end = usize::try_from(storage.bytes).ok().and_then(|n| start.checked_add(n));
        let end = end.filter(|&end| end <= file.len()).ok_or_else(|| {
            let (key, bytes, left) = (shown(&storage.key), storage.bytes, file.len() - start);
            damaged(start as u64, format!("storage `{key}`: expected {bytes} bytes, got {left}"))
        })?;
        if ranges[index].replace(start..end).is_some() {
            let told = format!("storage `{}` comes twice", shown(&storage.key));
            return Err(damaged(at as u64, told));
        }
        at = end;
    }
    let missing = |(i, range): (usize, Option<Range<usize>>)| {
        range.ok_or_else(|| damaged(at as u64, format!("no storage `{}`", shown(&storages[i].key))))
    };
    ranges.into_iter().enumerate().map(missing).collect()
}
