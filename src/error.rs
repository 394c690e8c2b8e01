//! How failures reach a user: `error: what`, `caused by: ...`, `hint: the next action`, and an exit code.

use std::fmt;
use std::io::Write;

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

/// An error that this process need not explain, because another one does; printed as one line or not at all.
#[derive(Debug)]
pub struct Told {
    /// The line; empty: nothing.
    pub line: String,
    /// The exit code.
    pub code: u8,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

impl std::error::Error for Told {}

/// `return Err(...)` with a message and a hint: `bail_hint!("next action"; "what: {x}")`.
#[macro_export]
macro_rules! bail_hint {
    ($hint:expr; $($message:tt)*) => {
        return $crate::error::WithHint::hint(Err(anyhow::anyhow!($($message)*)), $hint)
    };
}

/// The exit code that belongs to an error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(told) = error.chain().find_map(|e| e.downcast_ref::<Told>()) {
        return told.code;
    }
    let usage = error.chain().any(|e| {
        e.downcast_ref::<Hinted>().is_some_and(|h| h.usage) || e.is::<crate::config::ConfigError>()
    });
    if usage { exit::USAGE } else { exit::FAILED }
}

/// Prints an error chain to stderr in the house form, in one write.
pub fn report(error: &anyhow::Error) {
    let text = match error.chain().find_map(|e| e.downcast_ref::<Told>()) {
        Some(told) if told.line.is_empty() => return,
        Some(told) => format!("{}\n", told.line),
        None => house_form(&causes(error), hint(error)),
    };
    // One write, so that lines of several processes stay whole; a closed stderr is no reason to panic.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// What happened, then each cause, without repetitions.
pub fn causes(error: &anyhow::Error) -> Vec<String> {
    let mut texts: Vec<String> = error.chain().map(|cause| cause.to_string()).collect();
    texts.dedup();
    texts
}

/// The next action for the user.
pub fn hint(error: &anyhow::Error) -> Option<&str> {
    error.chain().find_map(|e| e.downcast_ref::<Hinted>()).map(|h| h.hint.as_str())
}

/// `error: what`, `  caused by: ...`, an empty line, `hint: ...`.
pub fn house_form(causes: &[String], hint: Option<&str>) -> String {
    let mut text = String::new();
    for (i, cause) in causes.iter().enumerate() {
        text += if i == 0 { "error: " } else { "  caused by: " };
        text += cause;
        text.push('\n');
    }
    if let Some(hint) = hint {
        text += &format!("\nhint: {hint}\n");
    }
    text
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

    #[test]
    fn an_error_is_written_with_its_causes_once_and_its_hint() {
        let inner = Err::<(), _>(anyhow::anyhow!("the disk is full")).hint("make room");
        let error = inner.context("cannot save").unwrap_err();
        let text = house_form(&causes(&error), hint(&error));
        assert_eq!(text, "error: cannot save\n  caused by: the disk is full\n\nhint: make room\n");
        let told = anyhow::Error::from(Told { line: String::new(), code: 2 });
        assert_eq!(exit_code(&told), 2);
    }
}
