//! Text to ids and back: `tokenizer.json` (Hugging Face) and `tokenizer.model` (SentencePiece BPE).
//!
//! Read first: [`Tokenizer`]. A folder's `tokenizer.json` wins over its `tokenizer.model`, as in
//! litgpt. The two differ on purpose in one place: a literal `</s>` in the text is the special
//! token for a `tokenizer.json` and plain characters for a `tokenizer.model`.
//!
//! Bos and eos follow litgpt: ids from `tokenizer_config.json`, then `generation_config.json`;
//! where there is neither, from the SentencePiece model or among the usual names (`<s>`, `</s>`,
//! `<|endoftext|>`, `<|begin_of_text|>`, `<|end_of_text|>`, `<bos>`, `<eos>`, `<|im_end|>`). By
//! default bos is put if `add_bos_token` says so, if the class is `LlamaTokenizer`, or (where both
//! are silent) if the file's own post-processor puts it or the file is a SentencePiece model.

mod added;
mod bpe_trainer;
pub mod chat_template;
mod compile;
mod cuts;
mod decode;
pub(crate) mod documents;
mod encoder;
mod export;
mod fast;
mod hf;
mod merges;
mod sentencepiece;
mod sp_bpe;
mod sp_normalizer;
mod special;
mod splitter;
pub mod train;
mod word_cache;

pub use chat_template::ChatTemplate;
pub use decode::DecodeStream;
pub use encoder::Encoder;

use crate::error::WithHint;
use anyhow::{Context, Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use thiserror::Error;

/// What can be wrong with a tokenizer's files or with ids.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum TokenizerError {
    #[error("no tokenizer in {}: looked for {}", path.display(), looked_for.join(", "))]
    NotFound { path: PathBuf, looked_for: Vec<&'static str> },
    #[error("cannot read {}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is broken: {problem}", path.display())]
    BrokenJson { path: PathBuf, problem: String },
    #[error("{} is no usable SentencePiece model: {problem}", path.display())]
    BrokenModel { path: PathBuf, problem: String },
    #[error("{} is {what}; expected a SentencePiece BPE model", path.display())]
    Unsupported { path: PathBuf, what: String },
    #[error("{} names `{key}` {token:?}, a token the tokenizer does not have", path.display())]
    UnknownSpecial { path: PathBuf, key: String, token: String },
    #[error(
        "token id {id} at position {position} is out of range: the vocabulary has {vocab_size} ids"
    )]
    IdOutOfRange { id: u32, position: usize, vocab_size: usize },
}

/// Files of a tokenizer that travel with a checkpoint.
const FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// A tokenizer. `Send + Sync`: encode from as many threads as you like.
pub struct Tokenizer {
    backend: Backend,
    table: Option<decode::Detokenizer>,
    vocab: Vocab,
    special: special::Special,
    /// States of encoders that are not in use, for [`Tokenizer::encode`].
    states: Mutex<Vec<fast::State>>,
}

enum Backend {
    Json(Box<hf::Json>),
    SentencePiece(Box<sentencepiece::SentencePiece>),
}

/// What [`Tokenizer::describe`] tells.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Description {
    /// File format and model.
    pub kind: String,
    /// Normaliser.
    pub normalizer: String,
    /// Pre-tokenizer: how text is cut before merging.
    pub pre_tokenizer: String,
}

impl Tokenizer {
    /// Loads a folder (`tokenizer.json` wins over `tokenizer.model`), or one of these files.
    ///
    /// # Errors
    /// A folder without either; a broken file; a SentencePiece model that is not BPE.
    pub fn load(path: &Path) -> Result<Self> {
        let file =
            if path.is_dir() { find_in(path) } else { path.is_file().then(|| path.to_path_buf()) };
        let Some(file) = file else {
            let looked_for = vec!["tokenizer.json", "tokenizer.model"];
            return Err(TokenizerError::NotFound { path: path.into(), looked_for }).hint(
                "name a folder with one of these files; `scripts/fetch_llama_tokenizer.sh` fetches \
                 Llama's, `tinyllama tokenizer train` makes one",
            );
        };
        let json = file.extension().is_some_and(|e| e == "json");
        let loaded = if json { Self::load_json(&file) } else { Self::load_model(&file) };
        match loaded {
            Err(e @ TokenizerError::Unsupported { .. }) => Err(e).hint(
                "convert it with transformers (`AutoTokenizer.from_pretrained(..).save_pretrained(..)`) \
                 and use the `tokenizer.json` that gives",
            ),
            Err(e @ (TokenizerError::BrokenJson { .. } | TokenizerError::BrokenModel { .. })) => {
                Err(e).hint("fetch the file again; a download that broke off leaves such a file")
            }
            other => Ok(other?),
        }
    }

    fn load_json(file: &Path) -> Result<Self, TokenizerError> {
        let json = hf::Json::load(file)?;
        let vocab = Vocab::new(json.vocab().into_iter());
        let own =
            special::Own { bos: None, eos: None, template: json.template(), sentencepiece: false };
        let special = special::Special::find(dir_of(file), &vocab, &own)?;
        Ok(Self {
            table: json.detokenizer(),
            backend: Backend::Json(Box::new(json)),
            vocab,
            special,
            states: Mutex::default(),
        })
    }

    fn load_model(file: &Path) -> Result<Self, TokenizerError> {
        let model = sentencepiece::SentencePiece::load(file)?;
        let vocab = model.vocab();
        refuse_added_tokens(file, &vocab)?;
        let (bos, eos) = model.controls();
        let own = special::Own { bos, eos, template: Vec::new(), sentencepiece: true };
        let special = special::Special::find(dir_of(file), &vocab, &own)?;
        let table = Some(model.detokenizer());
        Ok(Self {
            table,
            backend: Backend::SentencePiece(Box::new(model)),
            vocab,
            special,
            states: Mutex::default(),
        })
    }

    /// Number of ids, added tokens included: the largest id + 1. A model's vocabulary may be padded
    /// beyond it, never smaller.
    pub fn vocab_size(&self) -> usize {
        self.vocab.tokens.len()
    }

    /// Id of the token that begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// Id of the token that ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.special.eos
    }

    /// Whether [`Self::encode_default`] puts bos.
    pub fn use_bos(&self) -> bool {
        self.special.use_bos
    }

    /// Text of `ids`. Special tokens add nothing; the space Llama's tokenizers put before a text is
    /// taken off again; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.check_ids(ids)?;
        Ok(self.decode_lossy(ids))
    }

    /// Text of one token in the middle of a text: Llama's leading space stays.
    pub fn decode_token(&self, id: u32) -> Result<String> {
        self.check_ids(&[id])?;
        Ok(match &self.table {
            Some(table) => table.decode_token(id),
            None => self.decode_lossy(&[id]),
        })
    }

    /// Decodes a text token by token, from its start.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self, &[])
    }

    /// Decodes what follows `prompt` token by token: the prompt's text is not given out, and the
    /// space before the first new word is kept.
    pub fn decode_stream_after(&self, prompt: &[u32]) -> DecodeStream<'_> {
        DecodeStream::new(self, prompt)
    }

    /// The token of an id, as the tokenizer's file spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.vocab.tokens.get(id as usize)?.clone()
    }

    /// Whether special tokens are found in a text by their names: in a `tokenizer.json` they are.
    pub fn finds_special_tokens(&self) -> bool {
        matches!(self.backend, Backend::Json(_))
    }

    /// The id of a token, as the tokenizer's file spells it.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.vocab.id_of(token)
    }

    /// Files of the tokenizer in `dir` that a checkpoint must carry (those that exist).
    pub fn files(dir: &Path) -> Vec<PathBuf> {
        FILES.iter().map(|name| dir.join(name)).filter(|path| path.is_file()).collect()
    }

    /// Whether a folder has a tokenizer.
    pub fn is_in(dir: &Path) -> bool {
        find_in(dir).is_some()
    }

    /// Writes `tokenizer.json` and a minimal `tokenizer_config.json` that `transformers` loads.
    ///
    /// A `tokenizer.model` is converted. The ids it then gives are SentencePiece's, but for what
    /// that format cannot say: a literal `</s>` in a text is the special token; a space is put
    /// after a user-defined symbol; character rules go by grapheme; equal scores may merge in
    /// another order (seen in 1 of 40,000 texts, in a run of spaces).
    pub fn write_hf(&self, dir: &Path) -> Result<()> {
        let json = match &self.backend {
            Backend::Json(json) => json.source.clone(),
            Backend::SentencePiece(model) => {
                export::tokenizer_json(&model.model, self.special.bos.filter(|_| self.use_bos()))?
            }
        };
        let name = |id: Option<u32>| id.and_then(|id| self.token(id));
        let config = export::tokenizer_config(
            name(self.special.bos),
            name(self.special.eos),
            self.special.use_bos,
        )?;
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        for (file, bytes) in [("tokenizer.json", json), ("tokenizer_config.json", config)] {
            let path = dir.join(file);
            std::fs::write(&path, bytes)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// What kind of tokenizer this is, in words.
    pub fn describe(&self) -> Description {
        let (kind, normalizer, pre_tokenizer) = match &self.backend {
            Backend::Json(json) => json.describe(),
            Backend::SentencePiece(model) => model.describe(),
        };
        Description { kind, normalizer, pre_tokenizer }
    }

    /// The fast way to encode, where the form of the tokenizer is known.
    fn fast(&self) -> Option<&fast::Fast> {
        match &self.backend {
            Backend::Json(json) => json.fast.as_ref(),
            Backend::SentencePiece(model) => model.fast.as_ref(),
        }
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab_size = self.vocab_size();
        match ids.iter().position(|&id| id as usize >= vocab_size) {
            None => Ok(()),
            Some(position) => {
                Err(TokenizerError::IdOutOfRange { id: ids[position], position, vocab_size })
                    .hint("are these ids from another tokenizer?")
            }
        }
    }

    fn table(&self) -> Option<&decode::Detokenizer> {
        self.table.as_ref()
    }

    fn decode_lossy(&self, ids: &[u32]) -> String {
        match (&self.table, &self.backend) {
            (Some(table), _) => table.decode(ids),
            (None, Backend::Json(json)) => json.decode(ids),
            (None, Backend::SentencePiece(model)) => model.detokenizer().decode(ids),
        }
    }
}

/// Tokens by id and ids by token.
struct Vocab {
    tokens: Vec<Option<String>>,
    ids: HashMap<String, u32>,
}

impl Vocab {
    fn new(pairs: impl Iterator<Item = (String, u32)>) -> Self {
        let ids: HashMap<String, u32> = pairs.collect();
        let len = ids.values().max().map_or(0, |&id| id as usize + 1);
        let mut tokens = vec![None; len];
        for (token, &id) in &ids {
            tokens[id as usize] = Some(token.clone());
        }
        Self { tokens, ids }
    }

    fn id_of(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }
}

fn find_in(dir: &Path) -> Option<PathBuf> {
    FILES[..2].iter().map(|name| dir.join(name)).find(|path| path.is_file())
}

fn dir_of(file: &Path) -> &Path {
    file.parent().unwrap_or(Path::new("."))
}

/// `added_tokens.json` beside a `tokenizer.model` adds tokens the model does not know; ignoring it
/// would shift nothing but lose them silently.
fn refuse_added_tokens(file: &Path, vocab: &Vocab) -> Result<(), TokenizerError> {
    let path = dir_of(file).join("added_tokens.json");
    let Ok(text) = std::fs::read(&path) else {
        return Ok(());
    };
    let added: HashMap<String, u32> = serde_json::from_slice(&text)
        .map_err(|e| TokenizerError::BrokenJson { path: path.clone(), problem: e.to_string() })?;
    let unknown = added.iter().filter(|(token, id)| vocab.id_of(token) != Some(**id));
    match unknown.min_by_key(|(_, id)| **id) {
        None => Ok(()),
        Some((token, id)) => Err(TokenizerError::Unsupported {
            path: file.into(),
            what: format!("a model extended by {} (id {id}, {token:?})", path.display()),
        }),
    }
}
