//! Which tokens begin and end a text, by litgpt's rules.

use super::{TokenizerError, Vocab};
use serde_json::Value;
use std::path::Path;

/// Names tried where no file says which token is which.
const USUAL_BOS: [&str; 4] = ["<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"];
const USUAL_EOS: [&str; 6] =
    ["</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>"];

/// Begin and end of a text.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub(super) struct Special {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// Whether encoding puts bos by default.
    pub(super) use_bos: bool,
}

/// What the tokenizer file itself says, asked only where the two JSON files are silent.
pub(super) struct Own {
    /// Bos and eos it declares (SentencePiece).
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// Ids its post-processor puts around a text (Hugging Face).
    pub(super) template: Vec<u32>,
    /// A SentencePiece model, which is what the class `LlamaTokenizer` wraps.
    pub(super) sentencepiece: bool,
}

impl Special {
    /// Reads `tokenizer_config.json`, then `generation_config.json`, then asks the tokenizer.
    pub(super) fn find(dir: &Path, vocab: &Vocab, own: &Own) -> Result<Self, TokenizerError> {
        let config = read(&dir.join("tokenizer_config.json"))?;
        let generation = read(&dir.join("generation_config.json"))?;
        let no_files = config.is_none() && generation.is_none();
        let usual =
            |names: &[&str]| names.iter().find_map(|name| vocab.id_of(name)).filter(|_| no_files);

        let named = |key: &str| -> Result<Option<u32>, TokenizerError> {
            let Some(name) = config.as_ref().and_then(|c| token_name(&c[key])) else {
                return Ok(None);
            };
            match vocab.id_of(name) {
                Some(id) => Ok(Some(id)),
                None => Err(TokenizerError::UnknownSpecial {
                    path: dir.join("tokenizer_config.json"),
                    key: key.into(),
                    token: name.into(),
                }),
            }
        };
        let numbered = |key: &str| generation.as_ref().and_then(|g| first_id(&g[key]));
        let bos = named("bos_token")?.or_else(|| numbered("bos_token_id")).or(own.bos);
        let eos = named("eos_token")?.or_else(|| numbered("eos_token_id")).or(own.eos);
        let bos = bos.or_else(|| usual(&USUAL_BOS));
        let eos = eos.or_else(|| usual(&USUAL_EOS));

        let asked = config.as_ref().and_then(|c| c["add_bos_token"].as_bool());
        let class = config.as_ref().and_then(|c| c["tokenizer_class"].as_str());
        let by_template = bos.is_some() && own.template.first() == bos.as_ref();
        let use_bos = bos.is_some()
            && asked.unwrap_or(
                class == Some("LlamaTokenizer")
                    || by_template
                    || (own.sentencepiece && class.is_none()),
            );
        Ok(Self { bos, eos, use_bos })
    }
}

fn read(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(TokenizerError::Io { path: path.into(), source });
        }
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| TokenizerError::BrokenJson { path: path.into(), problem: e.to_string() })
}

/// `"<s>"` or `{"content": "<s>", ..}`.
fn token_name(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// `2` or the first of `[2, 32007]`.
fn first_id(value: &Value) -> Option<u32> {
    let value = value.as_array().map_or(value, |list| list.first().unwrap_or(&Value::Null));
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(config: Option<&str>, generation: Option<&str>, template: &[u32]) -> Special {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in
            [("tokenizer_config.json", config), ("generation_config.json", generation)]
        {
            if let Some(text) = text {
                std::fs::write(dir.path().join(name), text).unwrap();
            }
        }
        let vocab =
            Vocab::new(["<unk>", "<s>", "</s>", "<pad>"].map(String::from).into_iter().zip(0..));
        let own = Own { bos: None, eos: None, template: template.to_vec(), sentencepiece: false };
        Special::find(dir.path(), &vocab, &own).unwrap()
    }

    #[test]
    fn the_tokenizer_config_wins_over_the_generation_config() {
        let config = r#"{"bos_token": {"content": "<pad>"}, "eos_token": null}"#;
        let generation = r#"{"bos_token_id": 1, "eos_token_id": [2, 3]}"#;
        let got = find(Some(config), Some(generation), &[]);
        assert_eq!(got, Special { bos: Some(3), eos: Some(2), use_bos: false });
    }

    #[test]
    fn bos_is_used_if_asked_for_or_for_the_llama_class_or_by_the_template() {
        let use_bos = |config: &str, template: &[u32]| find(Some(config), None, template).use_bos;
        assert!(use_bos(r#"{"bos_token": "<s>", "add_bos_token": true}"#, &[]));
        assert!(use_bos(r#"{"bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"}"#, &[]));
        let off =
            r#"{"bos_token": "<s>", "tokenizer_class": "LlamaTokenizer", "add_bos_token": false}"#;
        assert!(!use_bos(off, &[1]));
        assert!(use_bos(r#"{"bos_token": "<s>"}"#, &[1]));
        assert!(!use_bos(r#"{"bos_token": "<s>"}"#, &[2]));
        assert!(!use_bos(r#"{"add_bos_token": true}"#, &[]));
    }

    #[test]
    fn usual_names_are_tried_only_without_both_files() {
        assert_eq!(find(None, None, &[]), Special { bos: Some(1), eos: Some(2), use_bos: false });
        assert_eq!(find(Some("{}"), None, &[]), Special::default());
    }
}
