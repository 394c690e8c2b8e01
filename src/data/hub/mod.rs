//! Datasets of the Hugging Face Hub as sources of a preparation.
//!
//! A source is named as `hf://datasets/OWNER/NAME[@REVISION][/PATTERN]`, the form that `fsspec` and `datasets`
//! know; several patterns stand in braces, `{a/*.jsonl,b/*.jsonl}`, and the `/` of a revision is written `%2F`.
//! `tinyllama prepare KIND --hub OWNER/NAME --revision R --pattern P` is short for it. Patterns are those of
//! `snapshot_download(allow_patterns=...)`.
//!
//! All files that match are downloaded before the first is read, so the corpus has to fit on the disk beside what is
//! made of it; whether it does is asked for first. Of a larger one, prepare a pattern at a time into folders of their
//! own, which training mixes or chains, and delete the cache in between: what is prepared needs its source no more.
//!
//! Files lie where `huggingface_hub` keeps them ([`cache`]), so each is downloaded once for both. A commit is in their
//! paths: an interrupted preparation goes on with the commit it began with, whatever its branch does meanwhile.
//!
//! Read first: [`HubSource`], [`fetch`]; then `listing` (which files), `download`, `client` (requests, errors).

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod listing;
#[cfg(feature = "hub")]
mod part;
#[cfg(feature = "hub")]
mod pattern;

#[cfg(feature = "hub")]
pub use client::Client;

use super::documents::Selection;
use crate::error::WithHint;
use anyhow::{Result, anyhow};
use std::fmt;
use std::path::{Component, Path, PathBuf};

const SCHEME: &str = "hf://";
const FORM: &str =
    "name a dataset as `--hub OWNER/NAME` or `hf://datasets/OWNER/NAME[@REVISION][/PATTERN]`";

/// A dataset on the Hub, and which of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSource {
    /// `OWNER/NAME`.
    pub repository: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Files; none: all that the kind of corpus reads.
    pub patterns: Vec<String>,
}

/// Files of a dataset, as they lie in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Commit that they are of.
    pub commit: String,
    /// Their paths, sorted.
    pub files: Vec<PathBuf>,
}

impl HubSource {
    /// Some files of a dataset.
    ///
    /// # Errors
    /// What cannot be a name, a revision or a pattern.
    pub fn new(repository: &str, revision: &str, patterns: &[String]) -> Result<Self> {
        if !is_repository(repository) {
            return Err(anyhow!("`{repository}` is no name of a dataset on the Hub")).usage(FORM);
        }
        if !is_inside(revision) || revision.contains(char::is_whitespace) {
            return Err(anyhow!("`{revision}` is no revision of `{repository}`"))
                .usage("name a branch, a tag or a commit");
        }
        let several = patterns.len() > 1;
        let patterns = patterns.iter().map(|pattern| {
            let inside = pattern.trim_start_matches("./").trim_start_matches('/');
            if inside.is_empty() || several && inside.contains(['{', ',', '}']) {
                return Err(anyhow!("`{pattern}` is no pattern of files"))
                    .usage("name files as 'train/*.jsonl.zst'; where several are named, none may have `{`, `,`, `}`");
            }
            Ok(inside.to_owned() + if inside.ends_with('/') { "*" } else { "" })
        });
        let patterns = patterns.collect::<Result<_>>()?;
        Ok(Self { repository: repository.into(), revision: revision.into(), patterns })
    }

    /// Reads `hf://datasets/...`; `None`: the source is something else.
    ///
    /// # Errors
    /// As [`HubSource::new`]; a model or a space.
    pub fn parse(source: &str) -> Result<Option<Self>> {
        let Some(rest) = source.strip_prefix(SCHEME) else { return Ok(None) };
        let dataset = rest.strip_prefix("datasets/");
        let parts: Vec<&str> = dataset.unwrap_or_default().splitn(3, '/').collect();
        let [owner, name, ..] = parts[..] else {
            return Err(anyhow!("`{source}` is no dataset on the Hub")).usage(FORM);
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let pattern = parts.get(2).copied().unwrap_or_default();
        let patterns = match pattern.strip_prefix('{').and_then(|p| p.strip_suffix('}')) {
            Some(several) => several.split(',').map(str::to_owned).collect(),
            None if pattern.is_empty() => Vec::new(),
            None => vec![pattern.to_owned()],
        };
        let revision = revision.replace("%2F", "/");
        Self::new(&format!("{owner}/{name}"), &revision, &patterns).map(Some)
    }
}

impl fmt::Display for HubSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let revision = self.revision.replace('/', "%2F");
        write!(f, "{SCHEME}datasets/{}@{revision}", self.repository)?;
        match &self.patterns[..] {
            [] => Ok(()),
            [one] => write!(f, "/{one}"),
            several => write!(f, "/{{{}}}", several.join(",")),
        }
    }
}

/// `OWNER/NAME`, of letters, digits, `-`, `_` and `.`, as the Hub has them.
fn is_repository(name: &str) -> bool {
    let is_part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.contains("--")
            && !part.contains("..")
    };
    name.split('/').count() == 2 && name.split('/').all(is_part)
}

/// Whether a path stays inside the folder that it is joined to.
fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.contains(['\0', '\\'])
        && path.split('/').all(|part| !part.is_empty() && part != ".")
        && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Downloads those files of a dataset that are not in the cache, and says where all of them are. Of the `commit` that
/// an earlier call began with, or of the one that the revision is at now.
///
/// # Errors
/// No such dataset, revision or file; no access; no room on the disk; no network; a file that is not what the Hub lists.
#[cfg(feature = "hub")]
pub fn fetch(
    source: &HubSource,
    commit: Option<&str>,
    selection: &Selection,
    split: &str,
) -> Result<Fetched> {
    Client::from_env(&source.repository)?.fetch(source, commit, selection, split)
}

/// This program was built without it.
///
/// # Errors
/// Always.
#[cfg(not(feature = "hub"))]
pub fn fetch(source: &HubSource, _: Option<&str>, _: &Selection, _: &str) -> Result<Fetched> {
    Err(anyhow!("cannot download `{source}`: this program was built without the Hub")).usage(
        "build it with `cargo build --release --features hub`, or name downloaded files with `--source`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_read_as_it_is_written() {
        let patterns = |list: &[&str]| list.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        for (revision, list, text) in [
            ("main", &[][..], "hf://datasets/a/b.c@main"),
            ("refs/pr/1", &["x/*.zst"], "hf://datasets/a/b.c@refs%2Fpr%2F1/x/*.zst"),
            ("v1", &["x/*", "y"], "hf://datasets/a/b.c@v1/{x/*,y}"),
        ] {
            let source = HubSource::new("a/b.c", revision, &patterns(list)).unwrap();
            assert_eq!(source.to_string(), text);
            assert_eq!(HubSource::parse(text).unwrap(), Some(source));
        }
        let short = HubSource::parse("hf://datasets/a/b/x/").unwrap().unwrap();
        assert_eq!((short.revision.as_str(), &short.patterns[..]), ("main", &["x/*".into()][..]));
        assert_eq!(HubSource::parse("corpus/*.jsonl").unwrap(), None);
    }

    #[test]
    fn what_cannot_be_a_dataset_is_refused() {
        for source in ["hf://a/b", "hf://datasets/a", "hf://datasets/../b", "hf://datasets/a/b--c"]
        {
            assert!(HubSource::parse(source).is_err(), "{source}");
        }
        for (revision, pattern) in [("", "x"), ("..", "x"), ("a b", "x"), ("main", "")] {
            let patterns = [pattern.to_owned()];
            assert!(HubSource::new("a/b", revision, &patterns).is_err(), "{revision} {pattern}");
        }
        assert!(HubSource::new("a/b", "main", &["a,b".into(), "c".into()]).is_err());
    }

    #[test]
    fn a_path_stays_in_its_folder() {
        assert!(is_inside("a/b..c/.d"));
        for path in ["", "../x", "a/../../x", "/x", "a//x", "./x", "a/.", "a\\x", "a\0"] {
            assert!(!is_inside(path), "{path:?}");
        }
    }
}
