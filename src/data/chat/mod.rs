//! Conversations for finetuning: read ([`rows`]), laid out as tokens ([`encode`]), packed into rows ([`set`]).

pub mod encode;
mod layout;
mod pairs;
mod rows;
mod set;
mod special;

pub use encode::{Encoded, encode, is_refused};
pub use pairs::{Pair, read_pairs};
pub use rows::{Conversation, Found, read};
pub use set::{ChatSet, ChatSets, open, open_pairs};
pub use special::with_special_tokens;

use crate::config::{ChatDataConfig, RunConfig};
use crate::error::WithHint;
use crate::tokenizer::chat_template::{NAMES, SpecialTokens};
use crate::tokenizer::{ChatTemplate, Tokenizer};
use anyhow::{Context, Result, anyhow};
use std::path::Path;

/// The template that `data.template` names.
///
/// # Errors
/// `auto`, where the tokenizer's folder has none; a name or file that is not there; a text that is no Jinja.
pub fn template(
    config: &RunConfig,
    data: &ChatDataConfig,
    tokenizer: &Tokenizer,
) -> Result<ChatTemplate> {
    let dir = config.tokenizer_dir.as_deref().unwrap_or(Path::new("."));
    let name = data.template.as_str();
    if name == "auto" {
        return ChatTemplate::load(dir, tokenizer)?
            .ok_or_else(|| anyhow!("`{}` has no chat template", dir.display()))
            .usage(format!(
                "set `finetune.data.template` to one of {}, or a file",
                NAMES.join(", ")
            ));
    }
    let tokens = SpecialTokens::load(dir, tokenizer)?;
    let file = Path::new(name);
    if NAMES.contains(&name) || !file.is_file() {
        return ChatTemplate::named(name, tokens).context("`finetune.data.template`");
    }
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read the chat template `{name}`"))?;
    Ok(ChatTemplate::new(&text, &format!("`{name}`"), tokens)?)
}
