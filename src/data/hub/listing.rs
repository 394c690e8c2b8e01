//! Which files a dataset has at a commit, and which of them are asked for.
//!
//! The listing is that of folders, a page of 1000 files at a time: the one in a dataset's description, which is one
//! request, is not complete for 50,000 files and more.

use super::client::{Client, Failure};
use super::{HubSource, is_inside, pattern};
use crate::bail_hint;
use crate::data::documents::{Schema, Selection};
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Files that an error names.
const NAMED: usize = 8;
/// Attempts of the first requests: without network that is to be said soon.
const FIRST_TRIES: u32 = 3;

/// A file of a dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubFile {
    /// Path in the dataset.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Name of its bytes: their SHA-256 under LFS, else what git calls them.
    pub etag: String,
    /// Whether `etag` is their SHA-256.
    pub is_sha256: bool,
}

#[derive(Deserialize)]
struct Description {
    sha: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl HubFile {
    fn new(entry: Entry) -> Result<Self> {
        let (etag, bytes, is_sha256) = match entry.lfs {
            Some(lfs) => (lfs.oid, lfs.size, true),
            None => (entry.oid, entry.size, false),
        };
        // Both become names of files here.
        if !is_inside(&entry.path) || !is_hash(&etag, if is_sha256 { 64 } else { 40 }) {
            bail_hint!(
                "check `HF_ENDPOINT`: this is not what the Hub answers";
                "expected files inside the dataset with their hashes, got `{}` with `{etag}`", entry.path
            );
        }
        Ok(Self { path: entry.path, bytes, etag, is_sha256 })
    }
}

fn is_hash(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

impl Client {
    /// The commit that a branch, a tag or an abbreviation stands for.
    pub(super) fn commit(&self, revision: &str) -> Result<String> {
        let url = self.url("/api", "revision", revision, "");
        let answer = self.json::<Description>(&url, FIRST_TRIES).map_err(|failure| failure.error);
        let (Description { sha }, _) = answer
            .with_context(|| format!("cannot look up `{}` at `{revision}`", self.repository))?;
        match is_hash(&sha, 40) {
            true => Ok(sha),
            false => Err(anyhow!("`{url}`: expected a commit, got `{sha}`"))
                .hint("check `HF_ENDPOINT`: this is not what the Hub answers"),
        }
    }

    /// The files to read, sorted by path.
    ///
    /// SlimPajama lies in folders `train`, `validation` and `test`: without a pattern those of `split` are taken, where
    /// there is such a folder.
    pub(super) fn files(
        &self,
        source: &HubSource,
        commit: &str,
        selection: &Selection,
        split: &str,
    ) -> Result<Vec<HubFile>> {
        let in_split = [format!("{split}/*")];
        let all = ["*".to_owned()];
        let by_split = selection.schema == Schema::SlimPajama;
        let found = match &source.patterns[..] {
            [] if by_split => match self.matching(&in_split, commit, selection)? {
                found if found.is_empty() => self.matching(&all, commit, selection)?,
                found => found,
            },
            [] => self.matching(&all, commit, selection)?,
            patterns => self.matching(patterns, commit, selection)?,
        };
        if found.is_empty() {
            return self.nothing(source, commit, selection);
        }
        Ok(found)
    }

    fn matching(
        &self,
        patterns: &[String],
        commit: &str,
        selection: &Selection,
    ) -> Result<Vec<HubFile>> {
        let mut found = BTreeMap::new();
        for folder in folders(patterns) {
            for file in self.tree(commit, folder, usize::MAX)? {
                if is_wanted(&file.path, patterns, selection) {
                    found.insert(file.path.clone(), file);
                }
            }
        }
        Ok(found.into_values().collect())
    }

    /// Files below a folder; none where it does not exist.
    fn tree(&self, commit: &str, folder: &str, pages: usize) -> Result<Vec<HubFile>> {
        let mut files = Vec::new();
        let mut next = Some(self.url("/api", "tree", commit, folder) + "?recursive=true");
        for page in 0..pages {
            let Some(url) = next.take() else { break };
            let tries = if page == 0 { FIRST_TRIES } else { self.tries };
            let entries: Vec<Entry> = match self.json(&url, tries) {
                Ok((entries, link)) => {
                    next = link;
                    entries
                }
                Err(Failure { no_entry: true, .. }) => break,
                Err(failure) => {
                    let listing = format!("cannot list the files of `{}`", self.repository);
                    return Err(failure.error.context(listing));
                }
            };
            let of_files = entries.into_iter().filter(|entry| entry.kind == "file");
            files.extend(of_files.map(HubFile::new).collect::<Result<Vec<_>>>()?);
        }
        Ok(files)
    }

    /// No file is what was asked for: says which there are.
    fn nothing(
        &self,
        source: &HubSource,
        commit: &str,
        selection: &Selection,
    ) -> Result<Vec<HubFile>> {
        let kind = selection.schema.name();
        let asked = match &source.patterns[..] {
            [] => format!("can be read as {kind}"),
            patterns => format!("matches `{}`", patterns.join("`, `")),
        };
        let subsets = match selection.subsets.is_empty() {
            true => String::new(),
            false => format!(" in the subsets `{}`", selection.subsets.join("`, `")),
        };
        let there = self.tree(commit, "", 1)?;
        let mut names: Vec<String> =
            there.iter().take(NAMED).map(|file| format!("`{}`", file.path)).collect();
        if there.len() > NAMED {
            names.push("...".into());
        }
        let hint = format!(
            "among its files are {}; name some with `--pattern`, and their kind (`{kind}` now)",
            names.join(", ")
        );
        Err(anyhow!("no file of `{}`, commit {commit}, {asked}{subsets}", source.repository))
            .usage(hint)
    }
}

/// Whether a file matches. A pattern that ends in `*` names no format: it means the files that the kind reads.
fn is_wanted(path: &str, patterns: &[String], selection: &Selection) -> bool {
    let file = Path::new(path);
    let takes = |p: &String| {
        pattern::matches(p, path) && (!p.ends_with('*') || selection.schema.takes(file))
    };
    patterns.iter().any(takes)
        && selection.takes_file(Path::new(""), file)
        && !path.split('/').any(|part| part.starts_with('.'))
}

/// Folders that hold all matches, none inside another.
fn folders(patterns: &[String]) -> Vec<&str> {
    let all: BTreeSet<&str> = patterns.iter().map(|p| pattern::folder(p)).collect();
    let holds = |outer: &str, inner: &str| {
        outer.is_empty() && !inner.is_empty()
            || inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('/'))
    };
    all.iter().filter(|inner| !all.iter().any(|outer| holds(outer, inner))).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_folder_is_listed_twice() {
        let list = |patterns: &[&str]| {
            let patterns: Vec<String> = patterns.iter().map(|p| (*p).into()).collect();
            folders(&patterns).into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(list(&["a/*", "a/b/*", "ab/*", "a/c"]), ["a", "ab"]);
        assert_eq!(list(&["a/*", "*"]), [""]);
    }

    #[test]
    fn a_pattern_without_a_format_takes_what_the_kind_reads() {
        let json = Selection::all(Schema::Json, None);
        let wanted = |pattern: &str, path| is_wanted(path, &[pattern.to_owned()], &json);
        assert!(wanted("*", "data/a.jsonl.zst") && wanted("data/*.txt", "data/a.txt"));
        assert!(!wanted("*", "README.md") && !wanted("*", ".cache/a.jsonl"));
    }
}
