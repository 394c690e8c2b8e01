//! How failures reach a user: `error: what`, `caused by: ...`, `hint: the next action`, and an exit code.

use std::fmt;

/// Exit codes of the program.
pub mod exit {
    /// Done.
    pub const OK: u8 = 0;
    /// A run-time failure.
    pub const FAILED: u8 = 1;
    /// Wrong usage or configuration; nothing was allocated.
    pub const USAGE: u8 = 2;
    /// Stopped by SIGINT, state saved.
    pub const INTERRUPTED: u8 = 130;
    /// Stopped by SIGTERM, state saved.
    pub const TERMINATED: u8 = 143;
}

/// An error with the next action for the user. Made by [`WithHint::hint`].
#[derive(Debug)]
struct Hinted {
    inner: anyhow::Error,
    hint: String,
    usage: bool,
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl std::error::Error for Hinted {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.inner.as_ref()) // so that a caller can match the typed error inside
    }
}

/// Attaches what the user should do next to an error.
pub trait WithHint<T> {
    /// Adds `hint: ...` to the printed error.
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T>;
    /// The same, for wrong usage or configuration: the program exits with 2.
    fn usage(self, hint: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> WithHint<T> for Result<T, E> {
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|e| Hinted { inner: e.into(), hint: hint.into(), usage: false }.into())
    }

    fn usage(self, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|e| Hinted { inner: e.into(), hint: hint.into(), usage: true }.into())
    }
}

/// `return Err(...)` with a message and a hint: `bail_hint!("next action"; "what: {x}")`.
#[macro_export]
macro_rules! bail_hint {
    ($hint:expr; $($message:tt)*) => {
        return $crate::error::WithHint::hint(Err(anyhow::anyhow!($($message)*)), $hint)
    };
}

/// The exit code that belongs to an error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let usage = error.chain().any(|e| {
        e.downcast_ref::<Hinted>().is_some_and(|h| h.usage) || e.is::<crate::config::ConfigError>()
    });
    if usage { exit::USAGE } else { exit::FAILED }
}

/// Prints an error chain to stderr in the house form.
pub fn report(error: &anyhow::Error) {
    eprintln!("error: {error}");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        if text != last {
            eprintln!("  caused by: {text}");
        }
        last = text;
    }
    if let Some(hint) = error.chain().find_map(|e| e.downcast_ref::<Hinted>()).map(|h| &h.hint) {
        eprintln!("\nhint: {hint}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_typed_error_can_be_matched_below_a_hint_and_is_told_once() {
        let typed = std::io::Error::from(std::io::ErrorKind::NotFound);
        let error = Err::<(), _>(typed).hint("look again").context("outer").unwrap_err();
        assert!(error.chain().any(|e| e.is::<std::io::Error>()));
        assert_eq!(exit_code(&error), exit::FAILED);
        let usage = Err::<(), _>(anyhow::anyhow!("bad")).usage("do this").unwrap_err();
        assert_eq!(exit_code(&usage), exit::USAGE);
    }
}
