//! The answer to a request for text, whole or event by event.

use super::App;
use super::api::{
    Answer, ChatChoice, ChatLogprobs, ChatPiece, Delta, Head, Reply, TextChoice, TextLogprobs,
    Usage,
};
use super::error::ApiError;
use super::limits::random;
use super::logprobs;
use super::updates::{Told, Updates};
use crate::generate::service::TokenInfo;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

/// Which endpoint's shape.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `/v1/completions`
    Text,
    /// `/v1/chat/completions`
    Chat,
}

/// What an answer looks like.
pub struct Writer {
    app: Arc<App>,
    shape: Shape,
    head: Head,
    with_logprobs: bool,
    with_usage: bool,
    /// White space before the first word is the template's.
    trims: bool,
    choices: Vec<Choice>,
}

/// Where an answer stands.
#[derive(Default)]
struct Choice {
    /// The prompt, where it is to be repeated.
    echo: String,
    /// Something of it has been told.
    begun: bool,
    /// Characters so far.
    offset: usize,
}

impl Writer {
    /// For so many answers.
    pub fn new(app: &Arc<App>, shape: Shape, stream: bool, choices: usize) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let (prefix, object) = match (shape, stream) {
            (Shape::Text, _) => ("cmpl", "text_completion"),
            (Shape::Chat, false) => ("chatcmpl", "chat.completion"),
            (Shape::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let head = Head {
            id: format!("{prefix}-{:016x}{:x}", random(), COUNT.fetch_add(1, Relaxed)),
            object,
            created: now.as_secs(),
            model: app.model.clone(),
            system_fingerprint: concat!("tinyllama-", env!("CARGO_PKG_VERSION")),
        };
        let choices = (0..choices).map(|_| Choice::default()).collect();
        let (with_logprobs, with_usage, trims) = (false, false, false);
        Self { app: app.clone(), shape, head, with_logprobs, with_usage, trims, choices }
    }

    /// Each answer tells its tokens.
    pub fn with_logprobs(mut self, yes: bool) -> Self {
        self.with_logprobs = yes;
        self
    }

    /// The last event tells the number of tokens.
    pub fn with_usage(mut self, yes: bool) -> Self {
        self.with_usage = yes;
        self
    }

    /// Drops white space at an answer's beginning.
    pub fn trimming(mut self, yes: bool) -> Self {
        self.trims = yes;
        self
    }

    /// Each answer begins with its prompt, of which there are so many answers each.
    pub fn echoing(mut self, prompts: &[String], each: usize) -> Self {
        for (i, choice) in self.choices.iter_mut().enumerate() {
            choice.echo = prompts[i / each].clone();
        }
        self
    }

    /// The whole answer, once all is told.
    ///
    /// # Errors
    /// Those of [`Updates::next`].
    pub async fn whole(mut self, mut updates: Updates) -> Result<String, ApiError> {
        let mut texts = vec![String::new(); self.choices.len()];
        let mut tokens: Vec<Vec<TokenInfo>> = self.choices.iter().map(|_| Vec::new()).collect();
        let mut reasons = vec![None; self.choices.len()];
        while let Some(told) = updates.next().await {
            match told? {
                Told::Piece { choice, text, tokens: new } => {
                    texts[choice] += &self.begin(choice, text);
                    tokens[choice].extend(new);
                }
                Told::Finished { choice, reason } => {
                    texts[choice] += &self.begin(choice, String::new());
                    reasons[choice] = Some(reason);
                }
            }
        }
        let parts = texts.into_iter().zip(&tokens).zip(reasons).enumerate();
        let usage = Some(Some(Usage::new(updates.tokens())));
        Ok(match self.shape {
            Shape::Text => {
                let mut choices = Vec::new();
                for (index, ((text, tokens), finish_reason)) in parts {
                    let logprobs = self.text_logprobs(index, tokens);
                    choices.push(TextChoice { text, index, logprobs, finish_reason });
                }
                json(&Answer { head: &self.head, choices, usage })
            }
            Shape::Chat => {
                let choices = parts.map(|(index, ((content, tokens), finish_reason))| ChatChoice {
                    index,
                    message: Reply { role: "assistant", content, refusal: None },
                    logprobs: self.chat_logprobs(tokens),
                    finish_reason,
                });
                json(&Answer { head: &self.head, choices: choices.collect(), usage })
            }
        })
    }

    /// Events before any text.
    pub fn opening(&mut self, out: &mut String) {
        for index in 0..self.choices.len() {
            match self.shape {
                Shape::Chat => {
                    let content = Some(String::new());
                    let delta = Delta { role: Some("assistant"), content };
                    self.chat_event(out, index, delta, None, None);
                }
                Shape::Text if !self.choices[index].echo.is_empty() => {
                    let text = self.begin(index, String::new());
                    self.text_event(out, index, text, None, None);
                }
                Shape::Text => {}
            }
        }
    }

    /// The event of a piece of text.
    pub fn piece(&mut self, out: &mut String, index: usize, text: String, tokens: &[TokenInfo]) {
        let text = self.begin(index, text);
        if text.is_empty() && (tokens.is_empty() || !self.with_logprobs) {
            return;
        }
        match self.shape {
            Shape::Text => {
                let logprobs = self.text_logprobs(index, tokens);
                self.text_event(out, index, text, logprobs, None);
            }
            Shape::Chat => {
                let delta = Delta { role: None, content: Some(text) };
                self.chat_event(out, index, delta, self.chat_logprobs(tokens), None);
            }
        }
    }

    /// The event of an answer's end.
    pub fn finished(&mut self, out: &mut String, index: usize, reason: &'static str) {
        match self.shape {
            Shape::Text => self.text_event(out, index, String::new(), None, Some(reason)),
            Shape::Chat => self.chat_event(out, index, Delta::default(), None, Some(reason)),
        }
    }

    /// Events after all answers.
    pub fn closing(&mut self, out: &mut String, tokens: (usize, usize)) {
        if self.with_usage {
            let usage = Some(Some(Usage::new(tokens)));
            event(out, &Answer::<()> { head: &self.head, choices: Vec::new(), usage });
        }
        *out += "data: [DONE]\n\n";
    }

    /// A piece as it is told: behind the prompt where that is repeated, without the template's white space.
    fn begin(&mut self, index: usize, text: String) -> String {
        let (trims, choice) = (self.trims, &mut self.choices[index]);
        if choice.begun {
            return text;
        }
        let text = if trims { text.trim_start().to_owned() } else { text };
        let echo = std::mem::take(&mut choice.echo);
        choice.offset += echo.chars().count();
        choice.begun = !(text.is_empty() && trims);
        echo + &text
    }

    fn text_logprobs(&mut self, index: usize, tokens: &[TokenInfo]) -> Option<TextLogprobs> {
        let offset = &mut self.choices[index].offset;
        self.with_logprobs.then(|| logprobs::of_text(self.app.service.tokenizer(), tokens, offset))
    }

    fn chat_logprobs(&self, tokens: &[TokenInfo]) -> Option<ChatLogprobs> {
        self.with_logprobs.then(|| logprobs::of_chat(self.app.service.tokenizer(), tokens))
    }

    fn text_event(
        &self,
        out: &mut String,
        index: usize,
        text: String,
        logprobs: Option<TextLogprobs>,
        finish_reason: Option<&'static str>,
    ) {
        let choices = vec![TextChoice { text, index, logprobs, finish_reason }];
        event(out, &Answer { head: &self.head, choices, usage: self.with_usage.then_some(None) });
    }

    fn chat_event(
        &self,
        out: &mut String,
        index: usize,
        delta: Delta,
        logprobs: Option<ChatLogprobs>,
        finish_reason: Option<&'static str>,
    ) {
        let choices = vec![ChatPiece { index, delta, logprobs, finish_reason }];
        event(out, &Answer { head: &self.head, choices, usage: self.with_usage.then_some(None) });
    }
}

fn event<C: Serialize>(out: &mut String, answer: &Answer<C>) {
    *out += "data: ";
    *out += &json(answer);
    *out += "\n\n";
}

/// JSON of what has strings as keys and finite numbers, which always has one.
fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
