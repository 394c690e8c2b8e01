//! What can be wrong with a PyTorch file.

use crate::error::WithHint;
use std::io;
use std::path::PathBuf;

/// What can be wrong with a PyTorch file.
#[derive(Debug, thiserror::Error)]
pub enum TorchFileError {
    /// The file cannot be opened or mapped.
    #[error("cannot {action} `{path}`")]
    Io {
        /// `open`, `map`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another format.
    #[error(
        "expected a `torch.save` file (a zip archive, or a pickle that begins with PyTorch's number), got {got}"
    )]
    Magic {
        /// What it begins with.
        got: String,
    },
    /// A PyTorch file of a kind that is not read.
    #[error("expected plain tensors as `torch.save` writes them, got {got}")]
    Unsupported {
        /// What was found.
        got: String,
    },
    /// Bytes that contradict each other or are missing.
    #[error("damaged or truncated at byte {at}: {reason}")]
    Damaged {
        /// Position in the file.
        at: u64,
        /// What was expected, and what is there.
        reason: String,
    },
    /// Python functions or classes outside the list of harmless ones. Nothing was called.
    #[error(
        "the file wants to call {}; expected only tensors, numbers, texts and containers",
        told(names, *more)
    )]
    Refused {
        /// Their full names, in the order of the file.
        names: Vec<String>,
        /// How many more there are.
        more: u64,
    },
    /// More of something than any real checkpoint has.
    #[error("expected at most {limit} {what}")]
    Limit {
        /// Of what, with its unit.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// A tensor that its storage does not hold.
    #[error("tensor `{}`: {reason}", shown(name))]
    Tensor {
        /// Its dotted path.
        name: String,
        /// What was expected, and what is there.
        reason: String,
    },
}

/// Letters of a text from a file that a message shows.
const SHOWN: usize = 160;

/// A text from a file for a message: printable, and cut if it is long.
pub(super) fn shown(text: &str) -> String {
    let mut letters = text.chars();
    let short: String = letters.by_ref().take(SHOWN).collect();
    let rest = if letters.next().is_some() { ".." } else { "" };
    format!("{}{rest}", short.escape_debug())
}

/// Names as one enumeration.
fn told(names: &[String], more: u64) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match more {
        0 => quoted.join(", "),
        _ => format!("{} and {more} more", quoted.join(", ")),
    }
}

impl TorchFileError {
    /// What the user should do next.
    fn hint(&self) -> &'static str {
        match self {
            Self::Io { .. } => "check that the file is there, and its permissions",
            Self::Magic { .. } => "name a `.pt`, `.pth`, `.ckpt` or `pytorch_model.bin` file",
            Self::Damaged { .. } | Self::Tensor { .. } => "copy or download the file again",
            Self::Refused { .. } => {
                "if you trust it, load it in Python and save it again with \
                 `torch.save(model.state_dict(), PATH)`, or convert it to safetensors"
            }
            _ => {
                "load it in Python and save it again with `torch.save(model.state_dict(), PATH)`, \
                 or convert it to safetensors"
            }
        }
    }
}

/// A result of this module as `anyhow`, with the next action of its error.
pub(super) fn explain<T>(result: Result<T>) -> anyhow::Result<T> {
    let hint = result.as_ref().err().map_or("", TorchFileError::hint);
    result.hint(hint)
}

/// Bytes that contradict each other.
pub(super) fn damaged(at: u64, reason: impl Into<String>) -> TorchFileError {
    TorchFileError::Damaged { at, reason: reason.into() }
}

/// A kind of file that is not read.
pub(super) fn unsupported(got: impl Into<String>) -> TorchFileError {
    TorchFileError::Unsupported { got: got.into() }
}

/// Shorthand of this module.
pub(super) type Result<T> = std::result::Result<T, TorchFileError>;
