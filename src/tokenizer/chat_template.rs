//! Conversations to prompts: the checkpoint's own Jinja template, or a built-in one by name.
//!
//! Templates are written for `transformers`, which gives them jinja2 with a few functions of its own. Here they run
//! by minijinja with the same settings; `tests/golden/chat/` holds what `transformers` says. Differences that are
//! left: `strftime_now` tells UTC, and lists print in JSON's form where Python prints its own.

mod builtin;
mod functions;
mod source;

pub use builtin::NAMES;
pub use source::SpecialTokens;
pub(crate) use source::find as find_template;

use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use aho_corasick::{AhoCorasick, MatchKind};
use anyhow::{Result, anyhow};
use functions::Raised;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Value, context};
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::path::Path;
use thiserror::Error;

/// Bounds the time and memory of one rendering; a conversation of 1 MB takes some 50,000.
const FUEL: u64 = 5_000_000;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// What can be wrong with a template, or with messages for it.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum TemplateError {
    /// It is no Jinja that is understood here.
    #[error("the chat template {origin} is broken at line {line}: {problem}")]
    Broken { origin: String, line: usize, problem: String },
    /// It called `raise_exception`: it is not made for such messages.
    #[error("the chat template does not take these messages: {0}")]
    Refused(String),
    /// It went wrong with these messages.
    #[error("the chat template {origin} failed at line {line}: {problem}")]
    Failed { origin: String, line: usize, problem: String },
}

/// A compiled template and the tokens that it may name.
pub struct ChatTemplate {
    environment: Environment<'static>,
    text: String,
    /// Where it is from, in backticks.
    origin: String,
    tokens: SpecialTokens,
    /// Finds [`SpecialTokens::names`] in a text, leftmost and longest first.
    names: AhoCorasick,
    stops: Vec<String>,
    trims_reply: bool,
}

impl ChatTemplate {
    /// The template of a checkpoint folder: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`, where
    /// of several the one named `default` counts. `None` where it has neither.
    ///
    /// # Errors
    /// Files that cannot be read; several templates and no `default`; a template that is no Jinja.
    pub fn load(dir: &Path, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some((text, origin)) = source::find(dir)? else { return Ok(None) };
        let tokens = SpecialTokens::load(dir, tokenizer)?;
        let template = Self::new(&text, &origin, tokens)
            .hint(format!("name another template: {}", NAMES.join(", ")))?;
        Ok(Some(template))
    }

    /// A built-in template, see [`NAMES`].
    ///
    /// # Errors
    /// Another name.
    pub fn named(name: &str, tokens: SpecialTokens) -> Result<Self> {
        let Some(builtin) = builtin::find(name) else {
            return Err(anyhow!("`{name}` is no chat template"))
                .usage(format!("choose one of {}", NAMES.join(", ")));
        };
        Ok(Self::new(builtin.source, &format!("`{name}`"), tokens)?)
    }

    /// Compiles a template from its text; `origin` says in errors where it is from.
    ///
    /// # Errors
    /// A text that is no Jinja.
    pub fn new(text: &str, origin: &str, tokens: SpecialTokens) -> Result<Self, TemplateError> {
        let broken = |error: minijinja::Error| TemplateError::Broken {
            origin: origin.into(),
            line: error.line().unwrap_or(1),
            problem: told(&error),
        };
        let mut environment = Environment::new();
        // As transformers sets jinja2 up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(broken)?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        functions::add_to(&mut environment);
        environment.add_template_owned("chat", source::without_generation(text)).map_err(broken)?;
        let names = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.names())
            .map_err(|error| TemplateError::Broken {
                origin: origin.into(),
                line: 1,
                problem: format!("the names of its tokens cannot be searched for: {error}"),
            })?;
        let (text, origin) = (text.to_owned(), origin.to_owned());
        // A built-in one that was saved with a checkpoint is known again.
        let (stops, trims_reply) = match builtin::of_source(&text) {
            Some(builtin) => {
                (builtin.stops.iter().map(|s| s.to_string()).collect(), builtin.trims_reply)
            }
            None => (builtin::stops_in(&text), false),
        };
        Ok(Self { environment, text, origin, tokens, names, stops, trims_reply })
    }

    /// The prompt; with `add_generation_prompt` it ends where the assistant's next answer begins.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] and [`TemplateError::Failed`].
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let SpecialTokens { bos, eos, unk, pad, .. } = &self.tokens;
        let token = |token: &Option<String>| token.clone().map_or(Value::UNDEFINED, Value::from);
        let template = self.environment.get_template("chat").map_err(|e| self.failed(&e))?;
        let values = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            bos_token => token(bos),
            eos_token => token(eos),
            unk_token => token(unk),
            pad_token => token(pad),
        };
        template.render(values).map_err(|e| self.failed(&e))
    }

    /// Ids of a rendered prompt. Bos goes before it where the tokenizer puts one by default and the template has not. A
    /// `tokenizer.json` finds special tokens in a text itself; for a `tokenizer.model`, whose encoder knows none, bos,
    /// eos and all control pieces are found by their names here.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode(&self, tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>> {
        let ids = match tokenizer.finds_special_tokens() {
            true => tokenizer.encode(prompt, false, false)?,
            false => self.encode_between(tokenizer, prompt)?,
        };
        let bos = tokenizer.bos_id().filter(|bos| tokenizer.use_bos() && ids.first() != Some(bos));
        Ok(bos.into_iter().chain(ids).collect())
    }

    /// Ids of the text between control tokens, and theirs.
    fn encode_between(&self, tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>> {
        let (mut ids, mut begin) = (Vec::new(), 0);
        for found in self.names.find_iter(prompt) {
            // A name that the vocabulary lacks is text.
            let Some(id) = tokenizer.id_of(&prompt[found.range()]) else { continue };
            if begin < found.start() {
                ids.extend(tokenizer.encode(&prompt[begin..found.start()], false, false)?);
            }
            ids.push(id);
            begin = found.end();
        }
        if begin < prompt.len() {
            ids.extend(tokenizer.encode(&prompt[begin..], false, false)?);
        }
        Ok(ids)
    }

    /// Strings that end the assistant's turn, beside the tokenizer's eos.
    pub fn stops(&self) -> &[String] {
        &self.stops
    }

    /// Ids of those of [`Self::stops`] that are one special token: such a token has no text that could be compared.
    pub fn end_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        self.stops.iter().filter_map(|stop| tokenizer.id_of(stop)).collect()
    }

    /// Whether an answer begins with white space that is no part of it (`### Assistant: Hello`).
    pub fn trims_reply(&self) -> bool {
        self.trims_reply
    }

    /// Its Jinja, as `chat_template.jinja` of a checkpoint holds it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Where the template is from: a name, or a file, in backticks.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    fn failed(&self, error: &minijinja::Error) -> TemplateError {
        let mut source = error.source();
        while let Some(cause) = source {
            if let Some(Raised(message)) = cause.downcast_ref() {
                return TemplateError::Refused(message.clone());
            }
            source = cause.source();
        }
        let (origin, line) = (self.origin.clone(), error.line().unwrap_or(1));
        TemplateError::Failed { origin, line, problem: told(error) }
    }
}

/// An error of minijinja in one line, without the place.
fn told(error: &minijinja::Error) -> String {
    let kind = error.kind().to_string();
    error.detail().map_or_else(|| kind.clone(), |detail| format!("{kind}: {detail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> SpecialTokens {
        let token = |text: &str| Some(text.to_string());
        SpecialTokens { bos: token("<s>"), eos: token("</s>"), ..Default::default() }
    }

    fn talk() -> Vec<Message> {
        vec![
            Message::new("system", "Be brief."),
            Message::new("user", "Hi"),
            Message::new("assistant", " Hello. "),
            Message::new("user", "Bye"),
        ]
    }

    fn render(name: &str) -> String {
        ChatTemplate::named(name, tokens()).unwrap().render(&talk(), true).unwrap()
    }

    #[test]
    fn built_in_templates_have_the_known_forms() {
        let want = "Be brief.\n\n### Human: Hi### Assistant: Hello.### Human: Bye### Assistant:";
        assert_eq!(render("guanaco"), want);
        let want = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
                    <|im_start|>assistant\n Hello. <|im_end|>\n<|im_start|>user\nBye<|im_end|>\n\
                    <|im_start|>assistant\n";
        assert_eq!(render("chatml"), want);
        let want = "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n Hello. </s>\n\
                    <|user|>\nBye</s>\n<|assistant|>\n";
        assert_eq!(render("zephyr"), want);
        let want = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s>\
                    <s>[INST] Bye [/INST]";
        assert_eq!(render("llama-2"), want);
        let want = "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.\n\n\
                    ### Instruction:\nBye\n\n### Response:\n";
        assert_eq!(render("alpaca"), want);
        for name in NAMES {
            assert!(!ChatTemplate::named(name, tokens()).unwrap().stops().is_empty(), "{name}");
        }
    }

    #[test]
    fn an_unknown_name_lists_those_that_exist() {
        let error = ChatTemplate::named("vicuna", tokens()).err().unwrap();
        assert!(error.to_string().contains("`vicuna` is no chat template"), "{error}");
        assert!(crate::error::hint(&error).unwrap().contains("guanaco, chatml"));
    }

    #[test]
    fn a_broken_template_is_told_with_its_line() {
        let error = ChatTemplate::new("a\n{% if %}", "`x.jinja`", tokens()).err().unwrap();
        let text = error.to_string();
        assert!(text.starts_with("the chat template `x.jinja` is broken at line 2: "), "{text}");
    }

    #[test]
    fn a_template_can_refuse_messages() {
        let text = "\n{{ raise_exception('roles ' + messages[0].role) }}";
        let template = ChatTemplate::new(text, "`x`", tokens()).unwrap();
        let error = template.render(&talk(), true).unwrap_err();
        assert!(matches!(&error, TemplateError::Refused(why) if why == "roles system"), "{error}");
    }

    #[test]
    fn a_failure_is_told_with_its_line() {
        let template = ChatTemplate::new("\n\n{{ messages.x.y }}", "`x`", tokens()).unwrap();
        let text = template.render(&talk(), true).unwrap_err().to_string();
        assert!(text.starts_with("the chat template `x` failed at line 3: "), "{text}");
    }

    #[test]
    fn a_template_that_never_ends_runs_out_of_fuel() {
        let text =
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(text, "`x`", tokens()).unwrap();
        assert!(matches!(template.render(&[], true), Err(TemplateError::Failed { .. })));
    }

    #[test]
    fn stops_are_found_in_a_template_of_a_checkpoint() {
        let template = ChatTemplate::new("<|im_start|>x<|im_end|>", "`x`", tokens()).unwrap();
        assert_eq!(template.stops(), ["<|im_end|>", "<|im_start|>"]);
    }
}
