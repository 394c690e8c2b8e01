//! One preparation of a corpus in a run's YAML.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// One preparation of a corpus, the options of `tinyllama prepare` as keys.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct PrepareConfig {
    /// Schema of the source: `text`, `jsonl` (and `.json`), `csv`, `parquet`, `slimpajama`, `redpajama`, `starcoder`,
    /// `sft` (conversations, as guanaco's text).
    pub kind: String,
    /// File, folder or glob; or a dataset on the Hub, `hf://datasets/OWNER/NAME[@REVISION][/PATTERN]`.
    pub source: String,
    /// Folder of the packed files.
    pub out: PathBuf,
    /// Name of the split, the prefix of the files: `train` or `validation`.
    #[serde(default = "train_split")]
    pub split: String,
    /// Share of documents that goes to `validation_out`, e.g. 0.01; chosen by a hash of the document.
    #[serde(default)]
    pub validation_fraction: f64,
    /// Folder of the validation files.
    #[serde(default)]
    pub validation_out: Option<PathBuf>,
    /// Tokens in one packed file.
    #[serde(default = "chunk_tokens")]
    pub chunk_tokens: u64,
    /// Integers of the packed files: `auto` (the original's choice), `uint16` or `int32`.
    #[serde(default)]
    pub dtype: TokenDtype,
    /// Key or column that holds the text; default: `text`, or `content` in Parquet.
    #[serde(default)]
    pub text_field: Option<String>,
    /// Begin each document with the beginning-of-text id.
    #[serde(default)]
    pub bos: bool,
    /// End each document with the end-of-text id.
    #[serde(default = "yes")]
    pub eos: bool,
    /// Share of documents to use, above 0 and up to 1.0 (all); chosen by `seed` and a hash of the document.
    #[serde(default = "one")]
    pub percentage: f64,
    /// Picks the documents of a `percentage` below 1.0.
    #[serde(default)]
    pub seed: u64,
    /// Only these subsets: names of folders (StarCoderData's languages, RedPajama's parts), of SlimPajama the
    /// `redpajama_set_name` of a row. None: all.
    #[serde(default)]
    pub subsets: Vec<String>,
    /// Without these.
    #[serde(default)]
    pub exclude_subsets: Vec<String>,
    /// What a damaged row or file does.
    #[serde(default)]
    pub on_error: OnError,
}

/// What a damaged row (no JSON, no text, no UTF-8) or file (truncated, corrupt) does to a preparation.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Rows are left out and counted; a damaged file ends the preparation, which goes on when started again.
    #[default]
    SkipRows,
    /// Rows, and the rest of damaged files, are left out and counted.
    Skip,
    /// The first damaged row or file ends the preparation.
    Stop,
}

/// How ids lie in packed files, little-endian.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum TokenDtype {
    /// `uint16` where the vocabulary has fewer than 65,500 ids, else `int32`.
    #[default]
    Auto,
    /// 2 bytes, for vocabularies of up to 65,536 ids.
    Uint16,
    /// 4 bytes, signed.
    Int32,
}

impl PrepareConfig {
    /// A preparation with the defaults of `tinyllama prepare`.
    pub fn new(kind: &str, source: String, out: &Path) -> Self {
        Self {
            kind: kind.into(),
            source,
            out: out.into(),
            split: train_split(),
            validation_fraction: 0.0,
            validation_out: None,
            chunk_tokens: chunk_tokens(),
            dtype: TokenDtype::default(),
            text_field: None,
            bos: false,
            eos: true,
            percentage: 1.0,
            seed: 0,
            subsets: Vec::new(),
            exclude_subsets: Vec::new(),
            on_error: OnError::default(),
        }
    }
}

fn yes() -> bool {
    true
}

fn train_split() -> String {
    "train".into()
}

/// The published chunk: 2049 * 1024 tokens.
pub fn chunk_tokens() -> u64 {
    2049 * 1024
}

fn one() -> f64 {
    1.0
}
