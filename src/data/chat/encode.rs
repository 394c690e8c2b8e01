//! Conversations to ids, with what of them is a target.

use super::Conversation;
use crate::config::LossOn;
use crate::tokenizer::{ChatTemplate, Tokenizer};
use anyhow::{Result, anyhow};
use std::ops::Range;

/// A conversation as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Its tokens, of the whole text at once.
    pub ids: Vec<u32>,
    /// Of each token whether it is to be predicted.
    pub trained: Vec<bool>,
}

/// A conversation in a template's words. The end-of-text token is put behind it where neither the template nor a token
/// of its own ends the assistant's turns, as behind the samples of TinyLlama's chat models.
///
/// Targets of [`LossOn::Assistant`] are the tokens of which some character is the assistant's: those of the text up to
/// and with its turn that the text up to its turn (`add_generation_prompt`) has not, as in
/// `apply_chat_template(return_assistant_tokens_mask=True)`. Of [`LossOn::All`], every token but the beginning-of-text.
///
/// # Errors
/// The template refuses the messages, or writes a turn otherwise once another follows it, so that what the assistant
/// said cannot be found in the whole.
pub fn encode(
    conversation: &Conversation,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    loss_on: LossOn,
) -> Result<Encoded> {
    let text = template.render(conversation, false)?;
    let mut ids = template.encode(tokenizer, &text)?;
    let bos = tokenizer.bos_id();
    let mut trained = match loss_on {
        LossOn::All => ids.iter().enumerate().map(|(i, id)| i > 0 || Some(*id) != bos).collect(),
        LossOn::Assistant => {
            let mut trained = vec![false; ids.len()];
            for said in assistant_spans(conversation, template, &text)? {
                let from = tokens_before(&ids, &text, said.start, template, tokenizer)?.0;
                let (whole, is_border) = tokens_before(&ids, &text, said.end, template, tokenizer)?;
                // A token that is partly behind the border is partly before it too.
                let to = if is_border { whole } else { (whole + 1).min(ids.len()) };
                trained[from..to].fill(true);
            }
            trained
        }
    };
    if let Some(eos) = tokenizer.eos_id()
        && !ends_itself(&ids, &text, template, tokenizer)
    {
        ids.push(eos);
        trained.push(trained.last().copied().unwrap_or(false));
    }
    Ok(Encoded { ids, trained })
}

/// Whether the assistant's turns end with a token that a model can stop at: eos, or one of the template's own.
fn ends_itself(ids: &[u32], text: &str, template: &ChatTemplate, tokenizer: &Tokenizer) -> bool {
    let own = template.end_ids(tokenizer);
    let eos = tokenizer.eos_id();
    let ends = |id: &u32| Some(*id) == eos || own.contains(id);
    // Behind it white space may follow: `<|im_end|>\n`.
    let behind = text.len() - text.trim_end().len();
    ids.iter().rev().take(1 + behind).any(ends)
}

/// Where in `text` the assistant speaks.
fn assistant_spans(
    conversation: &Conversation,
    template: &ChatTemplate,
    text: &str,
) -> Result<Vec<Range<usize>>> {
    let mut spans = Vec::new();
    for (i, turn) in conversation.iter().enumerate() {
        if turn.role != "assistant" {
            continue;
        }
        let before = template.render(&conversation[..i], true)?;
        let with = template.render(&conversation[..=i], false)?;
        for part in [&before, &with] {
            if !text.starts_with(part.as_str()) {
                let at = text.bytes().zip(part.bytes()).take_while(|(a, b)| a == b).count();
                return Err(anyhow!(
                    "the chat template {} writes turn {} otherwise when others follow it: the texts differ from character {} \
                     on, so that the assistant's part cannot be told",
                    template.origin(),
                    i + 1,
                    text.get(..at).map_or(at, |text| text.chars().count())
                ));
            }
        }
        spans.push(before.len()..with.len());
    }
    Ok(spans)
}

/// How many of the text's tokens lie wholly before byte `at`, and whether the next one begins there.
///
/// The text up to `at` is encoded alone: as many ids as both have in common lie before it.
fn tokens_before(
    ids: &[u32],
    text: &str,
    at: usize,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<(usize, bool)> {
    if at == text.len() {
        return Ok((ids.len(), true));
    }
    let part = template.encode(tokenizer, &text[..at])?;
    let common = part.iter().zip(ids).take_while(|(a, b)| a == b).count();
    Ok((common, common == part.len()))
}
