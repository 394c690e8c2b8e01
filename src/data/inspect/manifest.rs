//! What the `manifest.json` of a set's folders say, read leniently: older ones know less.

use super::Bad;
use super::scan::Scan;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Its name in a folder.
const FILE_NAME: &str = "manifest.json";

/// The manifests beside a set's files, by folder.
pub struct Manifests {
    folders: BTreeMap<PathBuf, Folder>,
}

struct Folder {
    manifest: Option<Value>,
    /// Names of the set's files in it.
    files: Vec<String>,
    /// What the manifest's keys of these files begin with: nothing, or `validation_`; `None`: it lists none of them.
    split: Option<&'static str>,
}

/// How a folder was made.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// The folder.
    pub folder: PathBuf,
    /// Kind of the corpus.
    pub kind: Option<String>,
    /// Where it came from.
    pub source: Option<String>,
    /// Ids of the tokenizer.
    pub vocab_size: Option<u64>,
    /// Documents of its split.
    pub documents: Option<u64>,
    /// Tokens of its split.
    pub tokens: Option<u64>,
    /// Rows left out.
    pub skipped: u64,
}

/// What a manifest says of a packed file: `bytes`, or `{bytes, crc32c}`.
struct Expected {
    bytes: Option<u64>,
    crc32c: Option<u32>,
}

impl Folder {
    /// `outputs` or `validation_outputs`, whichever lists one of the files here.
    fn find_split(&self) -> Option<&'static str> {
        let lists = |split: &&str| {
            let outputs = self.get(split, "outputs").and_then(Value::as_object);
            outputs.is_some_and(|map| self.files.iter().any(|name| map.contains_key(name)))
        };
        ["", "validation_"].into_iter().find(lists)
    }

    fn get(&self, split: &str, key: &str) -> Option<&Value> {
        self.manifest.as_ref()?.get(format!("{split}{key}"))
    }

    fn outputs(&self) -> Option<&serde_json::Map<String, Value>> {
        self.get(self.split?, "outputs")?.as_object()
    }

    fn count(&self, what: &str) -> Option<u64> {
        self.get(self.split?, what)?.as_u64()
    }

    fn expected(&self, name: &str) -> Option<Expected> {
        let entry = self.outputs()?.get(name)?;
        let crc32c = entry.get("crc32c").and_then(|crc| match crc {
            Value::String(hex) => u32::from_str_radix(hex.trim_start_matches("0x"), 16).ok(),
            number => number.as_u64().and_then(|n| u32::try_from(n).ok()),
        });
        Some(Expected { bytes: entry.as_u64().or_else(|| entry.get("bytes")?.as_u64()), crc32c })
    }
}

impl Manifests {
    /// Of the folders that these files are in.
    pub fn of(files: &[PathBuf]) -> Self {
        let mut folders: BTreeMap<PathBuf, Folder> = BTreeMap::new();
        for file in files {
            let folder = file.parent().unwrap_or(Path::new("")).to_owned();
            let entry = folders.entry(folder).or_insert_with_key(|folder| {
                let text = std::fs::read_to_string(folder.join(FILE_NAME)).ok();
                let manifest = text.and_then(|text| serde_json::from_str(&text).ok());
                Folder { manifest, files: Vec::new(), split: None }
            });
            entry.files.push(file.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        for folder in folders.values_mut() {
            folder.split = folder.find_split();
        }
        Self { folders }
    }

    /// Of the tokenizers, where all folders say so: the largest.
    pub fn vocab_size(&self) -> Option<usize> {
        let of = |f: &Folder| Some(f.manifest.as_ref()?.get("vocab_size")?.as_u64()? as usize);
        let all: Option<Vec<usize>> = self.folders.values().map(of).collect();
        all.and_then(|all| all.into_iter().max())
    }

    /// What all folders were made with, of an option that is on or off; `None`: they differ, or do not say.
    pub fn option(&self, key: &str) -> Option<bool> {
        let of = |f: &Folder| f.manifest.as_ref()?.get("options")?.get(key)?.as_bool();
        let mut all = self.folders.values().map(of);
        let first = all.next()??;
        all.all(|other| other == Some(first)).then_some(first)
    }

    /// Documents, where each folder's manifest says so and all of its files are in the set.
    pub fn documents(&self) -> Option<u64> {
        let of = |f: &Folder| {
            let is_whole = f.outputs()?.len() == f.files.len();
            f.count("documents").filter(|_| is_whole)
        };
        self.folders.values().map(of).sum()
    }

    /// How a file differs from what its manifest says; counts the checksums that were compared.
    pub fn problem(&self, path: &Path, scan: &Scan, checksums: &mut usize) -> Option<String> {
        let name = path.file_name()?.to_string_lossy();
        let expected = self.folders.get(path.parent()?)?.expected(&name)?;
        if let Some(bytes) = expected.bytes.filter(|bytes| *bytes != scan.bytes) {
            return Some(format!("expected {bytes} bytes by `{FILE_NAME}`, got {}", scan.bytes));
        }
        let (want, got) = (expected.crc32c?, scan.crc32c?);
        *checksums += 1;
        (want != got)
            .then(|| format!("expected CRC-32C {want:08x} by `{FILE_NAME}`, got {got:08x}"))
    }

    /// Files that a manifest lists and that are not there.
    pub fn missing(&self) -> Vec<Bad> {
        let mut bad = Vec::new();
        for (path, folder) in &self.folders {
            let names = folder.outputs().map_or(Vec::new(), |map| map.keys().collect());
            for name in names.into_iter().filter(|name| !path.join(name).exists()) {
                let problem = format!("is missing, `{FILE_NAME}` lists it");
                bad.push(Bad { path: path.join(name), problem });
            }
        }
        bad
    }

    /// What each manifest says of itself.
    pub fn facts(&self) -> Vec<Facts> {
        let mut facts = Vec::new();
        for (path, folder) in &self.folders {
            let Some(manifest) = &folder.manifest else { continue };
            let text = |key: &str| Some(manifest.get("options")?.get(key)?.as_str()?.to_owned());
            let skipped = manifest.get("skipped").and_then(Value::as_object);
            facts.push(Facts {
                folder: path.clone(),
                kind: text("kind"),
                source: text("source"),
                vocab_size: manifest.get("vocab_size").and_then(Value::as_u64),
                documents: folder.count("documents"),
                tokens: folder.count("tokens"),
                skipped: skipped.into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum(),
            });
        }
        facts
    }
}
