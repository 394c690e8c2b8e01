//! Tokens that a finetuning run adds to the vocabulary.

use crate::checkpoint::{self, write_json};
use crate::config::RunConfig;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use std::path::Path;

/// The run with those of `finetune.data.special_tokens` that its tokenizer lacks: a tokenizer of its own in
/// `out_dir/tokenizer`, and a model with rows for them. The run itself where there are none.
///
/// # Errors
/// A tokenizer that cannot be read, or written.
pub fn with_special_tokens(config: &RunConfig) -> Result<RunConfig> {
    let mut config = config.clone();
    let (Some(finetune), Some(dir)) = (&config.finetune, &config.tokenizer_dir) else {
        return Ok(config);
    };
    let tokenizer = Tokenizer::load(dir)?;
    let tokens = &finetune.data.special_tokens;
    let missing: Vec<&String> = tokens.iter().filter(|t| tokenizer.id_of(t).is_none()).collect();
    let (first, model) = (tokenizer.vocab_size(), config.model()?);
    let rows = (first + missing.len()) as i64;
    if tokens.is_empty() || missing.is_empty() && rows <= model.padded_vocab_size {
        return Ok(config);
    }
    if !missing.is_empty() {
        let out = config.out_dir.join("tokenizer");
        write(&tokenizer, dir, &out, &missing)?;
        config.tokenizer_dir = Some(out);
    }
    if rows > model.padded_vocab_size {
        let rows = (rows + 7) / 8 * 8; // as kernels want it
        config.model_config.insert("padded_vocab_size".into(), rows.into());
    }
    config.model_config.insert("vocab_size".into(), model.vocab_size.max(rows).into());
    Ok(config)
}

/// The tokenizer of `dir` with more tokens, as a `tokenizer.json`. Each file comes whole: other ranks may be reading.
fn write(tokenizer: &Tokenizer, dir: &Path, out: &Path, tokens: &[&String]) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot create `{}`", out.display()))?;
    let made = tempfile::tempdir_in(out)
        .with_context(|| format!("cannot create a folder in `{}`", out.display()))?;
    let path = made.path().join("tokenizer.json");
    match dir.join("tokenizer.json").is_file() {
        true => checkpoint::copy_files(&Tokenizer::files(dir), made.path())?,
        false => tokenizer.write_hf(made.path())?,
    }
    let text = std::fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut json: Value = serde_json::from_slice(&text)?;
    let added = json.as_object_mut().map(|json| json.entry("added_tokens").or_insert(json!([])));
    let added = added.and_then(Value::as_array_mut);
    let added = added.ok_or_else(|| anyhow!("`{}` has no list `added_tokens`", path.display()))?;
    for (token, id) in tokens.iter().zip(tokenizer.vocab_size()..) {
        added.push(json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }));
    }
    write_json(&path, &json)?;
    for file in Tokenizer::files(made.path()) {
        let target = out.join(file.file_name().unwrap_or_default());
        std::fs::rename(&file, &target)
            .with_context(|| format!("cannot write `{}`", target.display()))?;
    }
    Ok(())
}
