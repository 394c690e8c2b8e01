//! What can be wrong with packed files.

use crate::error::WithHint;
use std::io;
use std::path::{Path, PathBuf};

/// What can be wrong with packed files.
#[derive(Debug, thiserror::Error)]
pub enum PackedError {
    /// No `.bin` file at a path or prefix.
    #[error("no packed `.bin` files at `{path}`")]
    NoFiles {
        /// Folder or prefix.
        path: PathBuf,
    },
    /// A folder that would mix training and validation.
    #[error("`{path}` holds both `train*` and `validation*` files")]
    MixedSplits {
        /// The folder.
        path: PathBuf,
    },
    /// A file or folder that cannot be read or written.
    #[error("cannot {action} `{path}`")]
    Io {
        /// `open`, `read`, `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Shorter than the header.
    #[error(
        "`{path}`: expected a 24-byte header that begins with `LITPKDS`, got {got} bytes; truncated?"
    )]
    Header {
        /// The file.
        path: PathBuf,
        /// Bytes there are.
        got: u64,
    },
    /// Another format.
    #[error("`{path}`: expected a packed file that begins with `LITPKDS`, got `{got}`")]
    Magic {
        /// The file.
        path: PathBuf,
        /// What it begins with.
        got: String,
    },
    /// Another version.
    #[error("`{path}`: expected packed format version 1, got {got}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        got: u64,
    },
    /// A dtype code that holds no token ids.
    #[error("`{path}`: expected an integer dtype (code 1 to 5 or 8), got code {got}")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// Its code.
        got: u8,
    },
    /// Too few or too many bytes.
    #[error(
        "`{path}`: expected {expected} bytes for {tokens} tokens, got {got}{}",
        if got < expected { "; truncated?" } else { "" }
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Tokens by the header.
        tokens: u64,
        /// Bytes that these need.
        expected: u64,
        /// Bytes there are.
        got: u64,
    },
    /// A size that it had not when the set was opened.
    #[error(
        "`{path}`: expected {expected} bytes as when it was opened, got {got}; was it cut under the running job?"
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Bytes at the start.
        expected: u64,
        /// Bytes now.
        got: u64,
    },
    /// An id that the model has no row for.
    #[error("`{path}`: token {at} has id {got}, outside the model's vocabulary of {vocab_size}")]
    Id {
        /// The file.
        path: PathBuf,
        /// Position in the file, from 0.
        at: u64,
        /// The id.
        got: i64,
        /// Number of ids.
        vocab_size: usize,
    },
    /// An id to write that is not the tokenizer's.
    #[error("`{path}`: cannot write id {got}, outside the tokenizer's vocabulary of {vocab_size}")]
    NewId {
        /// The file.
        path: PathBuf,
        /// The id.
        got: u32,
        /// Number of ids.
        vocab_size: usize,
    },
}

impl PackedError {
    /// What the user should do next.
    fn hint(&self) -> &'static str {
        match self {
            Self::NoFiles { .. } => "make them with `tinyllama prepare`, or correct the path",
            Self::MixedSplits { .. } => "name one split by its prefix: `FOLDER/train`",
            Self::Io { .. } => "check that the disk is there and not full, and the permissions",
            Self::Changed { .. } => {
                "leave the files of a running job as they are; put this one back"
            }
            Self::NewId { .. } => "the tokenizer's files do not fit each other; get them again",
            Self::Id { .. } => {
                "prepare the data with the model's tokenizer, or enlarge `padded_vocab_size`"
            }
            _ => "prepare or copy the file again; other formats go through `tinyllama prepare`",
        }
    }
}

/// A result of this module as `anyhow`, with the next action of its error.
pub fn explain<T>(result: Result<T>) -> anyhow::Result<T> {
    let hint = result.as_ref().err().map_or("", PackedError::hint);
    result.hint(hint)
}

/// Shorthand of this module.
pub type Result<T> = std::result::Result<T, PackedError>;

/// For `map_err`: names the action and the file.
pub(in crate::data) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> PackedError {
    let path = path.to_owned();
    move |source| PackedError::Io { action, path, source }
}
