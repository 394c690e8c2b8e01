//! How fast a checkpoint comes into host memory, beside what its files give when they are read one after the other.

use crate::checkpoint::Source;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::{Device, Kind};

/// Speeds in bytes of the files a second, the best of some passes.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Format of the checkpoint.
    pub format: String,
    /// Bytes of its tensors on disk.
    pub bytes: u64,
    /// Reading its files into one buffer, 8 MiB at a time.
    pub read: f64,
    /// Reading them into as much new memory as they have bytes, which a loader needs.
    pub read_to_memory: f64,
    /// Loading the model in the dtype asked for.
    pub load: f64,
}

/// Measures `passes` of each in turns, after one that is not counted.
///
/// # Errors
/// No checkpoint; tensors that do not fit its architecture.
pub fn run(path: &Path, kind: Kind, passes: usize) -> Result<Report> {
    let source = Source::open(path)?;
    let bytes: u64 = source.stored()?.iter().map(|tensor| tensor.bytes).sum();
    let files = weights_of(path)?;
    let mut report = Report {
        format: source.format().to_owned(),
        bytes,
        read: 0.0,
        read_to_memory: 0.0,
        load: 0.0,
    };
    for pass in 0..=passes {
        let best = |speed: &mut f64, measured: f64| {
            if pass > 0 {
                *speed = speed.max(measured);
            }
        };
        best(&mut report.read, read(&files)?);
        best(&mut report.read_to_memory, read_to_memory(&files)?);
        let start = Instant::now();
        let source = Source::open(path)?;
        drop(source.load_model(kind, Device::Cpu)?);
        best(&mut report.load, bytes as f64 / start.elapsed().as_secs_f64());
    }
    Ok(report)
}

/// The large files of a checkpoint.
fn weights_of(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let told = || format!("cannot read `{}`", path.display());
    let is_weights = |path: &PathBuf| {
        let known = ["safetensors", "bin", "pth", "gguf"];
        path.is_file() && path.extension().is_some_and(|e| known.iter().any(|k| e == *k))
    };
    let all = fs::read_dir(path).with_context(told)?.flatten().map(|entry| entry.path());
    Ok(all.filter(is_weights).collect())
}

fn read(files: &[PathBuf]) -> Result<f64> {
    let (mut buffer, mut bytes, start) = (vec![0; 8 << 20], 0, Instant::now());
    for path in files {
        let mut file = File::open(path)?;
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            bytes += n;
        }
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64())
}

fn read_to_memory(files: &[PathBuf]) -> Result<f64> {
    let (mut bytes, start) = (0, Instant::now());
    let mut all = Vec::new();
    for path in files {
        let mut memory = Vec::with_capacity(fs::metadata(path)?.len() as usize);
        bytes += File::open(path)?.read_to_end(&mut memory)?;
        all.push(memory);
    }
    let seconds = start.elapsed().as_secs_f64();
    drop(all);
    Ok(bytes as f64 / seconds)
}
