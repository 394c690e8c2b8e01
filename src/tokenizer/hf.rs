//! `tokenizer.json`: Hugging Face's format, run by the `tokenizers` crate.

use super::decode::{Detokenizer, Invalid, Leading, Token};
use super::fast::Fast;
use super::sentencepiece::{byte_of, cuts_are_exact};
use super::{TokenizerError, compile};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

/// Larger ids are taken for damage: tables are as long as the largest id.
const MAX_IDS: u32 = 1 << 24;

/// A `tokenizer.json`.
pub(super) struct Json {
    tokenizer: tokenizers::Tokenizer,
    /// Its tables, if it is of a form that has them.
    pub(super) fast: Option<Fast>,
    /// The file as it was read, for [`super::Tokenizer::write_hf`].
    pub(super) source: Vec<u8>,
}

impl Json {
    /// Reads the file. `truncation` and `padding` in it are ignored: they would cut documents
    /// short.
    pub(super) fn load(path: &Path) -> Result<Self, TokenizerError> {
        let source = std::fs::read(path)
            .map_err(|source| TokenizerError::Io { path: path.into(), source })?;
        let broken = |problem: String| TokenizerError::BrokenJson { path: path.into(), problem };
        // Parsed twice: the crate's own errors say neither what is wrong nor where.
        let value: Value = serde_json::from_slice(&source).map_err(|e| broken(e.to_string()))?;
        if !value.get("model").is_some_and(Value::is_object) {
            return Err(broken("it has no `model`, so it is no tokenizer".into()));
        }
        let mut tokenizer =
            tokenizers::Tokenizer::from_bytes(&source).map_err(|e| broken(e.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| broken(e.to_string()))?;
        if let Some(id) = tokenizer.get_vocab(true).into_values().find(|&id| id >= MAX_IDS) {
            return Err(broken(format!("it has token id {id}, expected ids below {MAX_IDS}")));
        }
        let added = tokenizer.get_added_tokens_decoder().into_iter().collect();
        let fast = compile::json(&value, &tokenizer.get_vocab(false), added);
        if fast.is_none() {
            cut_words(&mut tokenizer);
        }
        Ok(Self { tokenizer, fast, source })
    }

    /// Ids of `text`, without what the post-processor would add.
    pub(super) fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let encoding =
            self.tokenizer.encode_fast(text, false).map_err(anyhow::Error::from_boxed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of ids where [`Self::detokenizer`] has no table.
    pub(super) fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    /// Ids the post-processor puts around a text.
    pub(super) fn template(&self) -> Vec<u32> {
        self.tokenizer.encode_fast("", true).map(|e| e.get_ids().to_vec()).unwrap_or_default()
    }

    /// Token -> id, added tokens included.
    pub(super) fn vocab(&self) -> HashMap<String, u32> {
        self.tokenizer.get_vocab(true)
    }

    /// One line each on the model, the normaliser and the pre-tokenizer, for `tokenizer info`.
    pub(super) fn describe(&self) -> (String, String, String) {
        let json = serde_json::from_slice(&self.source).unwrap_or(Value::Null);
        let kind = format!("tokenizer.json, {}", names(&json["model"]));
        let no_pre_tokenizer = json["pre_tokenizer"].is_null();
        let cut = match &self.fast {
            Some(_) if no_pre_tokenizer => FREE_CUT.to_string(),
            None if no_pre_tokenizer && self.tokenizer.get_pre_tokenizer().is_some() => {
                "none (cut before U+2581, same ids)".to_string()
            }
            _ => names(&json["pre_tokenizer"]),
        };
        (kind, names(&json["normalizer"]), cut)
    }

    /// A byte table, for the decoders of the Llama and GPT families. Others (WordPiece, CTC) have
    /// none and decode through the crate.
    pub(super) fn detokenizer(&self) -> Option<Detokenizer> {
        let decoder = serde_json::to_value(self.tokenizer.get_decoder()?).ok()?;
        let rule = Rule::of(&decoder)?;
        let added = self.tokenizer.get_added_tokens_decoder();
        let vocab = self.vocab();
        let ids = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let mut tokens: Vec<Token> = (0..ids).map(|_| Token::Skip).collect();
        for (text, id) in vocab {
            if !added.get(&id).is_some_and(|token| token.special) {
                tokens[id as usize] = Token::Text(rule.bytes(&text).into());
            }
        }
        let leading = if rule.strip { Leading::DropOne } else { Leading::Keep };
        let invalid = if rule.byte_fallback { Invalid::EachByte } else { Invalid::Maximal };
        Some(Detokenizer::new(tokens, leading, invalid))
    }
}

/// What `tokenizer info` says of text that is cut for speed alone.
pub(super) const FREE_CUT: &str = "none (cut where no token reaches across, same ids)";

/// Without a pre-tokenizer a whole document is one word to the crate, merged through one long queue
/// and never cached. For files that have no fast way, only: where cutting before each run of U+2581 changes no id (see
/// [`cuts_are_exact`]), such a cut is put in.
fn cut_words(tokenizer: &mut tokenizers::Tokenizer) {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else {
        return;
    };
    let plain = bpe.dropout.is_none()
        && !bpe.ignore_merges
        && bpe.continuing_subword_prefix.is_none()
        && bpe.end_of_word_suffix.is_none();
    let vocab = tokenizer.get_vocab(false);
    let exact = plain
        && tokenizer.get_pre_tokenizer().is_none()
        && vocab.contains_key("\u{2581}")
        && vocab.keys().all(|piece| cuts_are_exact(piece));
    let pattern = SplitPattern::Regex("\u{2581}+".into());
    match Split::new(pattern, SplitDelimiterBehavior::MergedWithNext, false) {
        Ok(split) if exact => drop(tokenizer.with_pre_tokenizer(Some(split))),
        _ => {}
    }
}

/// Type names of a part of a `tokenizer.json`: `Sequence(Prepend, Replace)`.
fn names(part: &Value) -> String {
    let kind = part["type"].as_str().unwrap_or("none");
    let inner = ["normalizers", "pretokenizers"].iter().find_map(|key| part[*key].as_array());
    match inner {
        Some(parts) => {
            format!("{kind}({})", parts.iter().map(names).collect::<Vec<_>>().join(", "))
        }
        None => kind.to_string(),
    }
}

/// How a decoder turns a token into bytes.
#[derive(Default)]
struct Rule {
    byte_level: Option<HashMap<char, u8>>,
    replace: Vec<(String, String)>,
    byte_fallback: bool,
    fuse: bool,
    strip: bool,
}

impl Rule {
    /// Recognises `ByteLevel`, `Metaspace`, and `[Replace.., ByteFallback, Fuse, Strip]`.
    fn of(decoder: &Value) -> Option<Self> {
        let mut rule = Rule::default();
        match decoder["type"].as_str()? {
            "ByteLevel" => rule.byte_level = Some(byte_level_chars()),
            "Metaspace" => {
                rule.replace.push((decoder["replacement"].as_str()?.into(), " ".into()));
                rule.strip = decoder["prepend_scheme"].as_str() != Some("never");
            }
            "Sequence" => {
                for (i, step) in decoder["decoders"].as_array()?.iter().enumerate() {
                    rule.add(step, i)?;
                }
            }
            _ => return None,
        }
        Some(rule)
    }

    fn add(&mut self, step: &Value, i: usize) -> Option<()> {
        match step["type"].as_str()? {
            "ByteLevel" if i == 0 => self.byte_level = Some(byte_level_chars()),
            "Replace" if i == self.replace.len() => {
                let from = step["pattern"]["String"].as_str()?;
                self.replace.push((from.into(), step["content"].as_str()?.into()));
            }
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => self.fuse = true,
            "Strip" if self.fuse => {
                let leading = step["start"] == 1 && step["stop"] == 0 && step["content"] == " ";
                leading.then_some(())?;
                self.strip = true;
            }
            _ => return None,
        }
        Some(())
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        if let Some(chars) = &self.byte_level {
            let bytes: Option<Vec<u8>> = token.chars().map(|c| chars.get(&c).copied()).collect();
            return bytes.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        if let Some(byte) = byte_of(token).filter(|_| self.byte_fallback) {
            return vec![byte];
        }
        let mut text = token.to_string();
        for (from, to) in &self.replace {
            text = text.replace(from.as_str(), to);
        }
        text.into_bytes()
    }
}

/// GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the other 68 bytes
/// for U+0100 and up, in order.
pub(super) fn byte_level_chars() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut stand_ins = (0x100u32..).filter_map(char::from_u32);
    let char_of = |b: u8| match printable(b) {
        true => Some(char::from(b)),
        false => stand_ins.next(),
    };
    (0..=255u8).map(char_of).zip(0..=255u8).filter_map(|(c, b)| Some((c?, b))).collect()
}
