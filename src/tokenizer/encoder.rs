//! Encoding many texts: one [`Encoder`] a thread keeps a cache of words and its buffers.
//!
//! Read first: [`Encoder::encode_into`]; then `fast`, which does the work where a tokenizer's form
//! is known, and `hf` and `sentencepiece`, the slow paths that define what is right.

use super::fast::{Fast, State};
use super::{Backend, Tokenizer};
use anyhow::{Context, Result, ensure};
use std::sync::PoisonError;

/// Turns texts into ids, one after the other. Made by [`Tokenizer::encoder`], one a thread.
///
/// It remembers words it has seen and their ids, which changes no id. It holds 32 MiB at most, of
/// which 21 are words; mostly 6.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    state: State,
}

impl Encoder<'_> {
    /// Appends the ids of `text` to `out`, with bos before and eos after where asked: what
    /// [`Tokenizer::encode`] gives.
    ///
    /// # Errors
    /// Asked for a bos or eos the tokenizer does not have. `out` then holds what it held.
    pub fn encode_into(
        &mut self,
        text: &str,
        bos: bool,
        eos: bool,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        self.tokenizer.encode_part(text, Part { bos, eos, continued: false }, &mut self.state, out)
    }

    /// Appends the ids of `text`, the part of a document that follows a
    /// [safe cut](Tokenizer::safe_cut): no space is put before it.
    ///
    /// # Errors
    /// The tokenizer allows no cuts, or has no eos that was asked for.
    pub fn continue_into(&mut self, text: &str, eos: bool, out: &mut Vec<u32>) -> Result<()> {
        let part = Part { bos: false, eos, continued: true };
        self.tokenizer.encode_part(text, part, &mut self.state, out)
    }
}

/// What stands around a text.
#[derive(Clone, Copy)]
struct Part {
    bos: bool,
    eos: bool,
    /// Text before it has been encoded already.
    continued: bool,
}

impl Tokenizer {
    /// An encoder for many texts. Cheap beside a document: its cache fills as it is used.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder { tokenizer: self, state: State::default() }
    }

    /// Ids of `text`, with bos before and eos after where asked. Neither is ever doubled, and what
    /// a `tokenizer.json`'s post-processor would add on its own is left out.
    ///
    /// # Errors
    /// Asked for a bos or eos the tokenizer does not have.
    pub fn encode(&self, text: &str, bos: bool, eos: bool) -> Result<Vec<u32>> {
        self.with_state(text, Part { bos, eos, continued: false })
    }

    /// Ids of `text`, with bos if the tokenizer [uses it](Self::use_bos), without eos: a prompt.
    pub fn encode_default(&self, text: &str) -> Result<Vec<u32>> {
        self.encode(text, self.use_bos(), false)
    }

    /// Ids of the part of a document that follows a [safe cut](Self::safe_cut).
    ///
    /// # Errors
    /// The tokenizer allows no cuts, or has no eos that was asked for.
    pub fn encode_continuation(&self, text: &str, eos: bool) -> Result<Vec<u32>> {
        self.with_state(text, Part { bos: false, eos, continued: true })
    }

    /// Ids of `text` by the slow way that the fast one is tested against: the `tokenizers` crate
    /// as the file says for a `tokenizer.json`, one merge of the whole text for a
    /// `tokenizer.model`. No bos, no eos.
    pub fn encode_reference(&self, text: &str) -> Result<Vec<u32>> {
        match &self.backend {
            Backend::Json(json) => json.encode(text),
            Backend::SentencePiece(model) => Ok(model.encode(text)),
        }
    }

    /// The last byte position inside `text` at which a document may be cut: the ids of
    /// `text[..cut]`, then those of the rest by [`Self::encode_continuation`], are those of the
    /// whole, whatever follows `text`. `None` where `text` has no such place, or where this
    /// tokenizer is not known to have any.
    pub fn safe_cut(&self, text: &str) -> Option<usize> {
        self.fast()?.safe_cut(text)
    }

    fn with_state(&self, text: &str, part: Part) -> Result<Vec<u32>> {
        let pool = || self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = pool().pop().unwrap_or_default();
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        let done = self.encode_part(text, part, &mut state, &mut ids);
        pool().push(state);
        ids.shrink_to_fit(); // callers keep many
        done.map(|()| ids)
    }

    fn encode_part(
        &self,
        text: &str,
        part: Part,
        state: &mut State,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        let bos = part.bos.then(|| self.special.bos.context("this tokenizer has no bos token"));
        let eos = part.eos.then(|| self.special.eos.context("this tokenizer has no eos token"));
        let (bos, eos) = (bos.transpose()?, eos.transpose()?);
        ensure!(
            text.len() < u32::MAX as usize,
            "a text of {} bytes: expected less than 4 GiB at once",
            text.len()
        );
        let start = out.len();
        out.extend(bos);
        let text_start = out.len();
        let fast = self.fast();
        if !fast.is_some_and(|fast| fast.encode(text, part.continued, state, out)) {
            out.truncate(start);
            ensure!(
                !part.continued || fast.is_some_and(Fast::needs_no_prefix),
                "this tokenizer cannot encode a document in parts: where it may be cut is not known"
            );
            let ids = self.encode_reference(text)?;
            out.extend(bos.into_iter().chain(ids));
        }
        if bos.is_some() && out.get(text_start) == bos.as_ref() {
            out.remove(start); // a literal bos at the text's start is the one that was asked for
        }
        if eos.is_some() && (out.len() == start || out.last() != eos.as_ref()) {
            out.extend(eos);
        }
        Ok(())
    }
}
