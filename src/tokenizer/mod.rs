//! Stand-in: overwritten at merge.
#![allow(missing_docs)]

use anyhow::{Result, anyhow};
use std::path::Path;

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    use_bos: bool,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Tokenizer {
    pub fn load(dir: &Path) -> Result<Self> {
        let inner = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json"))
            .map_err(|e| anyhow!("no tokenizer in {}: {e}", dir.display()))?;
        let config = std::fs::read_to_string(dir.join("tokenizer_config.json"))?;
        let config: serde_json::Value = serde_json::from_str(&config)?;
        let id = |key: &str| config[key].as_str().and_then(|t| inner.token_to_id(t));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        let use_bos = config["add_bos_token"].as_bool().unwrap_or(false);
        Ok(Self { inner, use_bos, bos, eos })
    }

    pub fn encode(&self, text: &str, bos: bool, eos: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, false).map_err(|e| anyhow!("{e}"))?;
        let mut ids = Vec::new();
        ids.extend(self.bos.filter(|_| bos));
        ids.extend(encoding.get_ids());
        ids.extend(self.eos.filter(|_| eos));
        Ok(ids)
    }

    pub fn encode_default(&self, text: &str) -> Result<Vec<u32>> {
        self.encode(text, self.use_bos, false)
    }

    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| anyhow!("{e}"))
    }

    pub fn decode_token(&self, id: u32) -> Result<String> {
        self.decode(&[id])
    }

    pub fn decode_stream_after(&self, _prompt: &[u32]) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, ids: Vec::new(), sent: 0 }
    }

    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    sent: usize,
}

impl DecodeStream<'_> {
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids).unwrap_or_default();
        if text.ends_with('\u{fffd}') || text.len() <= self.sent {
            return None;
        }
        let piece = text[self.sent..].to_owned();
        self.sent = text.len();
        Some(piece)
    }

    pub fn finish(self) -> Option<String> {
        let text = self.tokenizer.decode(&self.ids).unwrap_or_default();
        let piece = text.get(self.sent..).unwrap_or_default().to_owned();
        (!piece.is_empty()).then_some(piece)
    }
}
