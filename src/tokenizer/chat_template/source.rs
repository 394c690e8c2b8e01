//! Where a checkpoint keeps its template and the names of its special tokens.

use crate::error::WithHint;
use crate::tokenizer::{Backend, Tokenizer};
use anyhow::{Context, Result, anyhow};
use sentencepiece_model::Type;
use serde_json::Value;
use std::io::ErrorKind;
use std::path::Path;

/// What a template may call `bos_token` and so on (`None`: undefined there), and what else is a token by its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<String>,
    /// Ends a text or a turn.
    pub eos: Option<String>,
    /// Stands for what the vocabulary lacks.
    pub unk: Option<String>,
    /// Fills batches up.
    pub pad: Option<String>,
    /// Control pieces of a `tokenizer.model`, as `<|im_start|>`: its encoder would spell them out.
    pub controls: Vec<String>,
}

impl SpecialTokens {
    /// As `tokenizer_config.json` says, then `special_tokens_map.json`, then the tokenizer itself.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn load(dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let files = [json(dir, "tokenizer_config.json")?, json(dir, "special_tokens_map.json")?];
        let named = |key: &str| files.iter().flatten().find_map(|file| file.get(key)).map(content);
        let own = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
        Ok(Self {
            bos: named("bos_token").unwrap_or_else(|| own(tokenizer.bos_id())),
            eos: named("eos_token").unwrap_or_else(|| own(tokenizer.eos_id())),
            unk: named("unk_token").flatten(),
            pad: named("pad_token").flatten(),
            controls: controls(tokenizer),
        })
    }

    /// Names that are one token each wherever a prompt has them.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let ends = [&self.bos, &self.eos].into_iter().flatten();
        ends.chain(&self.controls).map(String::as_str).filter(|name| !name.is_empty())
    }
}

fn controls(tokenizer: &Tokenizer) -> Vec<String> {
    let Backend::SentencePiece(file) = &tokenizer.backend else { return Vec::new() };
    let pieces = file.model.pieces().iter().filter(|piece| piece.r#type() == Type::Control);
    pieces.map(|piece| piece.piece().to_owned()).collect()
}

/// A token is a string, or an object with its `content`.
fn content(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
}

/// The template's text and where it is from, as [`super::ChatTemplate::load`] takes it.
///
/// # Errors
/// Files that cannot be read; several templates and no `default`.
pub(crate) fn find(dir: &Path) -> Result<Option<(String, String)>> {
    let origin = |name: &str| format!("`{}`", dir.join(name).display());
    if let Some(text) = read(dir, "chat_template.jinja")? {
        return Ok(Some((text, origin("chat_template.jinja"))));
    }
    let name = "tokenizer_config.json";
    let Some(config) = json(dir, name)? else { return Ok(None) };
    let text = match &config["chat_template"] {
        Value::Null => return Ok(None),
        Value::String(text) => Some(text.as_str()),
        Value::Array(several) => several
            .iter()
            .find(|one| one["name"] == "default")
            .and_then(|one| one["template"].as_str()),
        _ => None,
    };
    let problem = "`chat_template` is neither a text nor a list with one named `default`";
    let text = text
        .ok_or_else(|| anyhow!("{}: {problem}", origin(name)))
        .hint("name a built-in template instead")?;
    Ok(Some((text.to_owned(), origin(name))))
}

fn json(dir: &Path, name: &str) -> Result<Option<Value>> {
    let Some(text) = read(dir, name)? else { return Ok(None) };
    let value = serde_json::from_str(&text);
    value.map(Some).with_context(|| format!("{} is no JSON", dir.join(name).display()))
}

fn read(dir: &Path, name: &str) -> Result<Option<String>> {
    let path = dir.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// `{% generation %}` marks for training what the assistant said. Here it becomes a block that is always taken, with the
/// same white space around it.
pub(super) fn without_generation(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out += before;
        let Some(end) = tag.find("%}") else {
            rest = tag;
            continue;
        };
        let (inside, after) = tag.split_at(end);
        out += &match inside.trim_matches(['-', '+', ' ', '\n', '\t']) {
            "generation" => inside.replace("generation", "if true"),
            "endgeneration" => inside.replace("endgeneration", "endif"),
            _ => inside.to_owned(),
        };
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_blocks_become_plain_ones() {
        let text = "{%- generation -%} {% x = 'generation' %}{% endgeneration %}{% open";
        let want = "{%- if true -%} {% x = 'generation' %}{% endif %}{% open";
        assert_eq!(without_generation(text), want);
    }

    #[test]
    fn a_template_is_found_in_each_of_its_places() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let text = || find(dir.path()).map(|found| found.map(|(text, _)| text));
        assert_eq!(text().unwrap(), None);
        write("tokenizer_config.json", r#"{"chat_template": null}"#);
        assert_eq!(text().unwrap(), None);
        write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
        assert_eq!(text().unwrap().as_deref(), Some("one"));
        let several = r#"{"chat_template": [{"name": "tool_use", "template": "a"},
            {"name": "default", "template": "b"}]}"#;
        write("tokenizer_config.json", several);
        assert_eq!(text().unwrap().as_deref(), Some("b"));
        write("tokenizer_config.json", r#"{"chat_template": [{"name": "x", "template": "a"}]}"#);
        assert!(text().unwrap_err().to_string().contains("`default`"));
        write("chat_template.jinja", "file");
        assert_eq!(text().unwrap().as_deref(), Some("file"));
    }
}
