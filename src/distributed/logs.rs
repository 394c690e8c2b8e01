//! Where ranks write: rank 0 on the terminal, the others in files, whoever started them.

use super::world::World;
use crate::error::WithHint;
use anyhow::{Context, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Begins the first line of each process in a log.
const HEADER: &str = "---- rank ";

/// stderr as it was before [`redirect`].
static TERMINAL: OnceLock<File> = OnceLock::new();

/// `out_dir/logs/rank-00001.log`.
pub fn path(out_dir: &Path, rank: usize) -> PathBuf {
    out_dir.join("logs").join(format!("rank-{rank:05}.log"))
}

/// The log of a rank, to be written at its end.
pub fn open(out_dir: &Path, rank: usize) -> Result<File> {
    let path = path(out_dir, rank);
    let folder = path.parent().unwrap_or(out_dir);
    fs::create_dir_all(folder)
        .and_then(|()| OpenOptions::new().create(true).append(true).open(&path))
        .with_context(|| format!("cannot write the log `{}` of rank {rank}", path.display()))
        .hint("choose another `out_dir`, or make room in it")
}

/// Lets this rank's stdout and stderr go to its log, where it is not rank 0 and no launcher has done so.
pub fn redirect(world: &World, out_dir: &Path) -> Result<()> {
    if world.rank == 0 {
        return Ok(());
    }
    if world.launcher.is_none() {
        let log = open(out_dir, world.rank)?;
        if let Ok(terminal) = rustix::io::dup(std::io::stderr()) {
            let _ = TERMINAL.set(terminal.into());
        }
        rustix::stdio::dup2_stdout(&log)
            .and_then(|()| rustix::stdio::dup2_stderr(&log))
            .context("cannot let a rank write into its log")?;
    }
    let (rank, size) = (world.rank, world.size);
    eprintln!("{HEADER}{rank} of {size} on {}, process {}", world.host, std::process::id());
    Ok(())
}

/// Writes to where stderr led before [`redirect`], in one piece, so that lines of several processes stay whole.
pub fn to_terminal(text: &str) {
    let _ = match TERMINAL.get() {
        Some(mut terminal) => terminal.write_all(text.as_bytes()),
        None => {
            let mut stderr = std::io::stderr().lock();
            // A progress bar may stand on this line.
            let clear = if stderr.is_terminal() { "\r\x1b[2K" } else { "" };
            stderr.write_all(format!("{clear}{text}").as_bytes())
        }
    };
}

/// The last line of a log that says something, of the process that writes it now.
pub fn last_line(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let size = file.seek(SeekFrom::End(0)).ok()?;
    file.seek(SeekFrom::Start(size.saturating_sub(4096))).ok()?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).ok()?;
    let text = String::from_utf8_lossy(&tail);
    let lines = text.lines().rev().map(str::trim_end);
    let mut own = lines.take_while(|line| !line.starts_with(HEADER));
    own.find(|line| !line.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_a_log_is_found_at_its_end_and_that_of_an_earlier_process_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), 12).unwrap();
        assert!(path(dir.path(), 12).ends_with("logs/rank-00012.log"));
        assert_eq!(last_line(&path(dir.path(), 12)), None);
        log.write_all(&[b'x'; 9000]).unwrap();
        log.write_all(b"\nstep 7\n\n").unwrap();
        assert_eq!(last_line(&path(dir.path(), 12)).as_deref(), Some("step 7"));
        log.write_all(b"---- rank 12 of 16 on a, process 3\n").unwrap();
        assert_eq!(last_line(&path(dir.path(), 12)), None);
    }
}
