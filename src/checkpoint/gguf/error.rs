//! What can be wrong with a GGUF file: expected, got, where.

/// A fault of a file, of its metadata, or of what should be written.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GgufError {
    /// Truncated or damaged, or no GGUF file of a supported version.
    #[error("{what} at byte {at}: expected {expected}, got {got}")]
    Damaged {
        /// Position in the file.
        at: u64,
        /// What should lie there.
        what: String,
        /// What would be right.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A metadata key that is missing or has another type or value than it needs.
    #[error("metadata `{key}`: expected {expected}, got {got}")]
    Key {
        /// The key.
        key: String,
        /// What would be right.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A tensor whose type, shape or bytes do not fit.
    #[error("tensor `{name}`: expected {expected}, got {got}")]
    Tensor {
        /// Its name.
        name: String,
        /// What would be right.
        expected: String,
        /// What is there.
        got: String,
    },
}

impl GgufError {
    pub(super) fn damaged(
        at: usize,
        what: &str,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        let (expected, got) = (expected.to_string(), got.to_string());
        Self::Damaged { at: at as u64, what: what.to_owned(), expected, got }
    }

    pub(super) fn key(key: &str, expected: impl ToString, got: impl ToString) -> Self {
        let (expected, got) = (expected.to_string(), got.to_string());
        Self::Key { key: key.to_owned(), expected, got }
    }

    pub(super) fn tensor(name: &str, expected: impl ToString, got: impl ToString) -> Self {
        let (expected, got) = (expected.to_string(), got.to_string());
        Self::Tensor { name: name.to_owned(), expected, got }
    }
}
