//! TensorBoard event files, written without TensorFlow.
//!
//! A file is a row of records: length (u64, little-endian), masked CRC-32C of those eight bytes
//! (u32), payload, masked CRC-32C of the payload (u32). A payload is an `Event` in protobuf's wire
//! format, of which scalars need the few fields coded below. `scripts/golden/tensorboard_check.py`
//! reads such a file back with the real `tensorboard`; a test here holds the bytes equal to those
//! of its own writer.
//!
//! ```text
//! Event       { wall_time = 1: double, step = 2: int64, file_version = 3: string,
//!               summary = 5: Summary, session_log = 7: SessionLog }
//! Summary     { value = 1: repeated Value { tag = 1: string, simple_value = 2: float } }
//! SessionLog  { status = 1: enum { START = 1 } }
//! ```

use super::append::AppendFile;
use anyhow::{Context, Result};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Version that the first event of a file states; readers take 2 to mean "trust session logs".
const FILE_VERSION: &str = "brain.Event:2";
/// `SessionLog.SessionStatus.START`.
const SESSION_START: u64 = 1;

/// One events file, open for appending.
pub struct EventWriter {
    file: AppendFile,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a new events file in `dir`: `events.out.tfevents.SECONDS.HOST`.
    ///
    /// `first_step` is the first step that this process will log. It is written as a session start,
    /// at which TensorBoard forgets the points that an earlier process logged at that step or later
    /// and lost when the run went back to its last checkpoint.
    ///
    /// # Errors
    /// Where the file cannot be created.
    pub fn create(dir: &Path, first_step: u64, wall_time: f64) -> Result<EventWriter> {
        // TensorBoard reads the files of a folder in the order of their names, so a later session's
        // second must be later, even where one run follows another within the same second.
        let second = newest_second(dir)?.map_or(0, |s| s + 1).max(wall_time as u64);
        let path = dir.join(format!("events.out.tfevents.{second:010}.{}", host_name()));
        let create = || -> io::Result<AppendFile> {
            let mut file = AppendFile::open(&path)?;
            file.append(&record(&version_event(wall_time)))?;
            file.append(&record(&session_start_event(wall_time, first_step)))?;
            Ok(file)
        };
        let file = create().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(EventWriter { file, path })
    }

    /// Appends one event with scalars (stored as f32). NaN and infinity are stored as they are;
    /// TensorBoard marks them.
    pub fn scalars(
        &mut self,
        step: u64,
        wall_time: f64,
        scalars: &[(&str, f64)],
    ) -> io::Result<()> {
        self.file.append(&record(&scalar_event(wall_time, step, scalars)))
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The seconds in the name of the newest events file of a folder.
fn newest_second(dir: &Path) -> Result<Option<u64>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let second = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix("events.out.tfevents.")?.split('.').next()?.parse().ok()
    };
    Ok(entries.flatten().filter_map(second).max())
}

/// This machine's name, made safe for a file name.
fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String =
        name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
    if name.is_empty() { "localhost".into() } else { name }
}

/// Payload with its length and both checksums.
fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(payload.len() + 16);
    out.extend(length);
    out.extend(masked_crc32c(&length).to_le_bytes());
    out.extend(payload);
    out.extend(masked_crc32c(payload).to_le_bytes());
    out
}

/// CRC-32C, rotated and shifted by a constant, so that a checksum of checksums stays a good
/// checksum.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The first event of a file.
fn version_event(wall_time: f64) -> Vec<u8> {
    let mut event = Vec::new();
    put_f64(&mut event, 1, wall_time);
    put_bytes(&mut event, 3, FILE_VERSION.as_bytes());
    event
}

/// "A process starts to log at `step`."
fn session_start_event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut log = Vec::new();
    put_u64(&mut log, 1, SESSION_START);
    let mut event = Vec::new();
    put_f64(&mut event, 1, wall_time);
    put_u64(&mut event, 2, step);
    put_bytes(&mut event, 7, &log);
    event
}

/// Scalars of one step.
fn scalar_event(wall_time: f64, step: u64, scalars: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in scalars {
        let mut entry = Vec::new();
        put_bytes(&mut entry, 1, tag.as_bytes());
        put_f32(&mut entry, 2, *value as f32);
        put_bytes(&mut summary, 1, &entry);
    }
    let mut event = Vec::new();
    put_f64(&mut event, 1, wall_time);
    put_u64(&mut event, 2, step);
    put_bytes(&mut event, 5, &summary);
    event
}

// Protobuf's wire format: a field is the varint `number << 3 | type`, then its value.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const LENGTH_DELIMITED: u64 = 2;
const FIXED32: u64 = 5;

/// Seven bits a byte, the lowest first; the top bit says that more follow.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// An integer; 0 is the default and takes no bytes.
fn put_u64(out: &mut Vec<u8>, field: u64, value: u64) {
    if value != 0 {
        put_varint(out, (field << 3) | VARINT);
        put_varint(out, value);
    }
}

fn put_f64(out: &mut Vec<u8>, field: u64, value: f64) {
    put_varint(out, (field << 3) | FIXED64);
    out.extend(value.to_le_bytes());
}

/// Always written, 0 too: `simple_value` belongs to a oneof, where presence counts.
fn put_f32(out: &mut Vec<u8>, field: u64, value: f32) {
    put_varint(out, (field << 3) | FIXED32);
    out.extend(value.to_le_bytes());
}

/// A string or an embedded message.
fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(out, (field << 3) | LENGTH_DELIMITED);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by `tensorboard_check.py --write-golden` with the real package's protobufs and
    /// writer.
    const GOLDEN: &[u8] = include_bytes!("../../tests/golden/metrics/events.tfevents");

    #[test]
    fn bytes_equal_those_of_tensorboards_own_writer() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 1, 1.5e9).unwrap();
        let first = [("train/loss", 10.25), ("train/lr", 2e-7), ("throughput/tokens_per_sec", 0.0)];
        writer.scalars(1, 1.5e9 + 0.25, &first).unwrap();
        writer.scalars(715_256, 1.5e9 + 1e6, &[("val/loss", f64::NAN), ("val/ppl", 1e30)]).unwrap();
        let name = writer.path().file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("events.out.tfevents.1500000000."), "{name}");
        assert_eq!(fs::read(writer.path()).unwrap(), GOLDEN);
    }

    #[test]
    fn a_later_session_sorts_behind_an_earlier_one_of_the_same_second() {
        let dir = tempfile::tempdir().unwrap();
        let first = EventWriter::create(dir.path(), 1, 1.5e9).unwrap();
        let second = EventWriter::create(dir.path(), 1, 1.5e9).unwrap();
        let third = EventWriter::create(dir.path(), 1, 1.4e9).unwrap(); // the clock was set back
        assert!(first.path() < second.path() && second.path() < third.path());
    }

    #[test]
    fn the_checksum_is_castagnolis_masked() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc32c(b"123456789"), 0xc78a_b0e5);
    }
}
