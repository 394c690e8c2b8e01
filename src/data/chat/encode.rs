//! Conversations to ids, with what of them is a target.

use super::Conversation;
use crate::config::LossOn;
use crate::tokenizer::chat_template::TemplateError;
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
                let border = |at| border(&ids, &text, at, template, tokenizer);
                let (from, to) = (border(said.start)?.start, border(said.end)?.end);
                trained[from..to.max(from)].fill(true);
            }
            trained
        }
    };
    if let Some(eos) = tokenizer.eos_id()
        && !ends_itself(&text, template, tokenizer)
    {
        ids.push(eos);
        trained.push(trained.last().copied().unwrap_or(false));
    }
    Ok(Encoded { ids, trained })
}

/// Whether [`encode`] failed because the template refuses such messages by an exception of its own.
pub fn is_refused(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<TemplateError>(), Some(TemplateError::Refused(_)))
}

/// Whether a conversation ends with a token that a model can stop at: eos, or one of the template's own. White space may
/// follow: `<|im_end|>\n`.
fn ends_itself(text: &str, template: &ChatTemplate, tokenizer: &Tokenizer) -> bool {
    let own = template.stops().iter().filter(|stop| tokenizer.id_of(stop).is_some()).cloned();
    let eos = tokenizer.eos_id().and_then(|id| tokenizer.token(id));
    own.chain(eos).any(|token| text.trim_end().ends_with(&token))
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

/// The tokens that lie on both sides of byte `at`: none, or one; where it cannot be told, a few. Those before the range are
/// of the text before, those behind it of the text behind.
///
/// The text up to `at` is encoded alone: the ids that both have in common lie before it. Where its last ones are others
/// (white space at an end is cut otherwise than before a word), the text behind `at` is encoded too.
fn border(
    ids: &[u32],
    text: &str,
    at: usize,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<Range<usize>> {
    if at == text.len() {
        return Ok(ids.len()..ids.len());
    }
    let before = template.encode(tokenizer, &text[..at])?;
    let from = before.iter().zip(ids).take_while(|(a, b)| a == b).count();
    if from == before.len() {
        return Ok(from..from);
    }
    let behind = tokenizer.encode(&text[at..], false, false)?;
    let common = behind.iter().rev().zip(ids.iter().rev()).take_while(|(a, b)| a == b).count();
    let to = (ids.len() - common).max(from);
    Ok(if common == behind.len() { to..to } else { from..to })
}
