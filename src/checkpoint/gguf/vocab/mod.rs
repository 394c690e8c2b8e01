//! The tokenizer inside a file, both ways.
//!
//! `tokenizer.ggml.model` is `gpt2` (byte-level BPE with merges; [`bpe`] has its `tokenizer.json`)
//! or `llama` (SentencePiece's pieces with scores; [`pieces`] has its `tokenizer.model`).

pub mod bpe;
pub mod pieces;

use super::{GgufError, Metadata};
use serde_json::{Value as Json, json};
use std::collections::HashMap;

/// `tokenizer.ggml.token_type`; the numbers are SentencePiece's too.
pub mod kind {
    #![allow(missing_docs)]
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// Ids with a meaning, and what goes around a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Special {
    /// Beginning of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
    /// End of a turn, where that is another token.
    pub eot: Option<u32>,
    /// End of a message after which the same speaker goes on, where that is another token.
    pub eom: Option<u32>,
    /// What the vocabulary cannot say.
    pub unk: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Whether encoding puts `bos` before a text.
    pub add_bos: bool,
    /// Whether encoding puts `eos` behind a text.
    pub add_eos: bool,
    /// Jinja template of chats.
    pub chat_template: Option<String>,
}

/// Keys of the ids.
const IDS: [&str; 6] = [
    "bos_token_id",
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "unknown_token_id",
    "padding_token_id",
];

impl Special {
    /// Of a file; where it does not say whether `bos` is put before a text, llama.cpp's default.
    ///
    /// # Errors
    /// A wrong type; an id that is no token.
    pub fn of(m: &Metadata) -> Result<Self, GgufError> {
        let tokens = m.strings("tokenizer.ggml.tokens")?.len() as u64;
        let id = |name: &str| {
            let key = format!("tokenizer.ggml.{name}");
            match m.find_u64(&key)? {
                Some(id) if id >= tokens => {
                    Err(GgufError::key(&key, format!("an id below {tokens}"), id))
                }
                id => Ok(id.map(|id| id as u32)),
            }
        };
        let [bos, eos, eot, eom, unk, pad] = IDS;
        let with_bos = match m.str("tokenizer.ggml.model")? {
            "llama" => true,
            _ => m.find_str("tokenizer.ggml.pre")?.is_some_and(bpe::puts_bos),
        };
        Ok(Self {
            bos: id(bos)?,
            eos: id(eos)?,
            eot: id(eot)?,
            eom: id(eom)?,
            unk: id(unk)?,
            pad: id(pad)?,
            add_bos: m.find_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(with_bos),
            add_eos: m.find_bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            chat_template: m.find_str("tokenizer.chat_template")?.map(str::to_owned),
        })
    }

    /// In the order of [`IDS`].
    fn ids(&self) -> [Option<u32>; IDS.len()] {
        [self.bos, self.eos, self.eot, self.eom, self.unk, self.pad]
    }

    /// Ids that end an answer, each once.
    pub fn ends(&self) -> Vec<u32> {
        let mut ends = Vec::new();
        for id in [self.eos, self.eot, self.eom].into_iter().flatten() {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        ends
    }

    /// Sets the keys.
    pub fn put(&self, m: &mut Metadata) {
        for (name, id) in IDS.into_iter().zip(self.ids()) {
            if let Some(id) = id {
                m.set(format!("tokenizer.ggml.{name}"), id);
            }
        }
        m.set("tokenizer.ggml.add_bos_token", self.add_bos);
        m.set("tokenizer.ggml.add_eos_token", self.add_eos);
        if let Some(template) = &self.chat_template {
            m.set("tokenizer.chat_template", template.as_str());
        }
    }
}

/// `tokenizer_config.json` of a file.
///
/// # Errors
/// As [`Special::of`].
pub fn tokenizer_config(m: &Metadata) -> Result<Json, GgufError> {
    let special = Special::of(m)?;
    let tokens = m.strings("tokenizer.ggml.tokens")?;
    let text = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize));
    let llama = m.str("tokenizer.ggml.model")? == "llama";
    let mut out = json!({
        "tokenizer_class": if llama { "LlamaTokenizer" } else { "PreTrainedTokenizerFast" },
        "bos_token": text(special.bos),
        "eos_token": text(special.eos),
        "unk_token": text(special.unk),
        "pad_token": text(special.pad),
        "add_bos_token": special.add_bos,
        "add_eos_token": special.add_eos,
        "clean_up_tokenization_spaces": false,
    });
    if let Some(template) = &special.chat_template {
        out["chat_template"] = template.as_str().into();
    }
    Ok(out)
}

/// Tokens by id, and the types of those that are listed in `added_tokens`.
///
/// # Errors
/// An id beyond `rows`, or two tokens of one id.
fn dense(
    json: &Json,
    rows: usize,
    kind_of: impl Fn(&str) -> i32,
) -> Result<(Vec<String>, Vec<i32>), GgufError> {
    let wrong = |expected: String, got: &Json| GgufError::key("model.vocab", expected, got);
    let mut found: HashMap<usize, (&str, i32)> = HashMap::new();
    let place = |token: &str, id: &Json| {
        let id_or = id.as_u64().filter(|&id| id < rows as u64).map(|id| id as usize);
        id_or.ok_or_else(|| wrong(format!("an id below {rows} for {token:?}"), id))
    };
    let vocab = json.pointer("/model/vocab").and_then(Json::as_object);
    let none = Json::Null;
    let vocab = vocab.ok_or_else(|| wrong("an object of tokens and ids".to_owned(), &none))?;
    for (token, id) in vocab {
        if found.insert(place(token, id)?, (token, kind_of(token))).is_some() {
            return Err(wrong("one token an id".to_owned(), id));
        }
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let content = token["content"].as_str().unwrap_or("");
        let special = token["special"].as_bool().unwrap_or(false);
        let kind = if special { kind::CONTROL } else { kind::USER_DEFINED };
        let kind = if kind_of(content) == kind::UNKNOWN { kind::UNKNOWN } else { kind };
        found.insert(place(content, &token["id"])?, (content, kind));
    }
    // Rows of the embedding without a token get names that no text has.
    let token = |id: usize| match found.get(&id) {
        Some((text, kind)) => ((*text).to_owned(), *kind),
        None => (format!("[PAD{id}]"), kind::UNUSED),
    };
    Ok((0..rows).map(token).unzip())
}

/// Merges of a `tokenizer.json`, which writes them as pairs or as `left right`.
fn merges(json: &Json) -> Result<Vec<(&str, &str)>, GgufError> {
    let list = json.pointer("/model/merges").and_then(Json::as_array);
    let list = list.ok_or_else(|| GgufError::key("model.merges", "an array", "none"))?;
    let wrong = |merge: &Json| GgufError::key("model.merges", "pairs of tokens", merge);
    list.iter().map(|merge| pair_of(merge).ok_or_else(|| wrong(merge))).collect()
}

fn pair_of(merge: &Json) -> Option<(&str, &str)> {
    match merge {
        Json::String(text) => text.split_once(' '),
        other => Some((other.get(0)?.as_str()?, other.get(1)?.as_str()?)),
    }
}

/// `tokenizer.ggml.token_type`, `NORMAL` for all where the file has none.
fn types(m: &Metadata, tokens: usize) -> Result<Vec<i32>, GgufError> {
    let key = "tokenizer.ggml.token_type";
    match m.find_i32s(key)? {
        None => Ok(vec![kind::NORMAL; tokens]),
        Some(types) if types.len() == tokens => Ok(types),
        Some(types) => Err(GgufError::key(key, format!("{tokens} types"), types.len())),
    }
}
