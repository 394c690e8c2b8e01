//! Rows to tokens: what one worker does with a piece of a source.

use crate::config::PrepareConfig;
use crate::data::documents::{Piece, Row, Selection, Skipped, rows_of};
use crate::data::permutation::mix;
use crate::data::writer::TokenFormat;
use crate::tokenizer::{Encoder, Tokenizer};
use anyhow::{Context, Result, anyhow};

/// What all workers share.
pub(super) struct Work<'a> {
    pub(super) options: &'a PrepareConfig,
    pub(super) selection: &'a Selection,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) format: TokenFormat,
}

/// The documents of a piece, split by split.
#[derive(Default)]
pub(super) struct Encoded {
    pub(super) train: Split,
    pub(super) validation: Split,
    pub(super) skipped: Vec<Skipped>,
    /// Bytes of text.
    pub(super) text_bytes: u64,
}

/// Documents of one split.
#[derive(Default)]
pub(super) struct Split {
    /// Their ids, as they are written.
    pub(super) bytes: Vec<u8>,
    pub(super) documents: u64,
}

impl Work<'_> {
    /// Encodes a piece.
    pub(super) fn encode(
        &self,
        piece: Piece,
        encoder: &mut Encoder<'_>,
        ids: &mut Vec<u32>,
    ) -> Result<Encoded> {
        let mut out = Encoded::default();
        if let Piece::Part { text, first, last, key } = &piece {
            self.encode_part(text, (*first, *last), *key, encoder, ids, &mut out)?;
        }
        let mut result = Ok(());
        rows_of(piece, self.selection, |row| {
            if result.is_ok() {
                result = self.encode_row(row, encoder, ids, &mut out);
            }
        });
        result.map(|()| out)
    }

    fn encode_row(
        &self,
        row: Row,
        encoder: &mut Encoder<'_>,
        ids: &mut Vec<u32>,
        out: &mut Encoded,
    ) -> Result<()> {
        match row {
            Row::Skipped(skipped) => out.skipped.push(skipped),
            Row::Text(text) if text.is_empty() => out.skipped.push(left_out("empty")),
            Row::Text(text) => {
                let key = self.needs_key().then(|| crc32c::crc32c(text.as_bytes()));
                let key = key.unwrap_or_default();
                self.encode_part(&text, (true, true), key, encoder, ids, out)?;
            }
        }
        Ok(())
    }

    /// A document, or a part of one: whether it is the first and the last.
    fn encode_part(
        &self,
        text: &str,
        (first, last): (bool, bool),
        key: u32,
        encoder: &mut Encoder<'_>,
        ids: &mut Vec<u32>,
        out: &mut Encoded,
    ) -> Result<()> {
        let o = self.options;
        if !is_used(key, o.percentage, o.seed) {
            if first {
                out.skipped.push(left_out("beyond `percentage`"));
            }
            return Ok(());
        }
        ids.clear();
        let encoded = match first {
            true => encoder.encode_into(text, o.bos, o.eos && last, ids),
            false => encoder.continue_into(text, o.eos && last, ids),
        };
        encoded.with_context(|| {
            let start: String = text.chars().take(40).collect();
            format!("cannot tokenize the document of {} bytes that begins {start:?}", text.len())
        })?;
        let split = match goes_to_validation(key, o.validation_fraction) {
            true => &mut out.validation,
            false => &mut out.train,
        };
        split.documents += u64::from(last);
        out.text_bytes += text.len() as u64;
        self.format.encode(ids, &mut split.bytes).map_err(|id| {
            let n = self.tokenizer.vocab_size();
            anyhow!("the tokenizer gave id {id}, outside its vocabulary of {n}")
        })
    }

    fn needs_key(&self) -> bool {
        self.options.percentage < 1.0 || self.options.validation_fraction > 0.0
    }
}

/// A row that is left out on purpose, wherever it stands.
fn left_out(why: &str) -> Skipped {
    Skipped { why: why.into(), row: 0, detail: String::new(), damaged: false }
}

/// By the checksum of a document's text.
fn goes_to_validation(key: u32, fraction: f64) -> bool {
    f64::from(key) < fraction * (u32::MAX as f64 + 1.0)
}

/// Whether a document is in the share that is used; independent of [`goes_to_validation`].
fn is_used(key: u32, percentage: f64, seed: u64) -> bool {
    let hash = || mix(u64::from(key) ^ mix(seed));
    percentage >= 1.0 || (hash() as f64) < percentage * 2f64.powi(64)
}
