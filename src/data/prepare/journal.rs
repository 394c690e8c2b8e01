//! `journal.jsonl`: how far an unfinished preparation is, a line a source file that is through.

use super::manifest::{Counts, SourceRecord};
use crate::data::writer::{OutputFile, Position};
use crate::error::WithHint;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Its name in the unfinished folder.
pub(super) const FILE_NAME: &str = "journal.jsonl";

/// One source file is through.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Entry {
    /// Its path.
    pub(super) source: String,
    pub(super) record: SourceRecord,
    /// Counts of all files so far.
    pub(super) counts: Counts,
    /// Where the training split ends then.
    pub(super) train: Position,
    /// Where the validation split ends then.
    pub(super) validation: Position,
    /// Packed files that became whole with this source.
    pub(super) outputs: BTreeMap<String, OutputFile>,
    pub(super) validation_outputs: BTreeMap<String, OutputFile>,
}

/// The file, open at its end.
pub(super) struct Journal {
    file: File,
    path: PathBuf,
}

impl Journal {
    /// The entries of a folder, in order. A last line that was cut off is none.
    pub(super) fn read(dir: &Path) -> Vec<Entry> {
        let text = fs::read_to_string(dir.join(FILE_NAME)).unwrap_or_default();
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.map_while(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Keeps these entries, drops what follows them, and opens the file to go on.
    pub(super) fn go_on(dir: &Path, entries: &[Entry]) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let open = || {
            let mut text = String::new();
            for entry in entries {
                text += &(serde_json::to_string(entry)? + "\n");
            }
            let temporary = path.with_extension("tmp");
            fs::write(&temporary, text)?;
            fs::rename(&temporary, &path)?;
            anyhow::Ok(OpenOptions::new().append(true).open(&path)?)
        };
        let file = open()
            .with_context(|| format!("cannot write `{}`", path.display()))
            .hint("check that the disk is there and not full")?;
        Ok(Self { file, path })
    }

    /// Appends an entry; with `sync` it is on the disk then.
    pub(super) fn append(&mut self, entry: &Entry, sync: bool) -> Result<()> {
        let line = serde_json::to_string(entry)? + "\n";
        let written = self.file.write_all(line.as_bytes()).and_then(|()| match sync {
            true => self.file.sync_data(),
            false => Ok(()),
        });
        written
            .with_context(|| format!("cannot write `{}`", self.path.display()))
            .hint("make room on the disk and start again: it goes on where it is")
    }
}
