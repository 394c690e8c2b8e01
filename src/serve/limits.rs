//! What a request may ask for, and the fields that both kinds of completions share.

use super::error::ApiError;
use super::fields::{Fields, expected};
use crate::generate::sampler::SamplingParams;
use serde_json::Value;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// As many stop strings as OpenAI takes.
const MAX_STOPS: usize = 4;
/// As many alternatives to a token as OpenAI tells.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// Limits of one request. How many may wait is the service's.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of the body.
    pub body: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens of an answer.
    pub new_tokens: usize,
    /// Answers: `n` times the number of prompts.
    pub choices: usize,
    /// From the request to the end of its answers.
    pub time: Duration,
}

impl Limits {
    /// Defaults of `serve`.
    pub const BODY_KIB: usize = 1024;
    /// Answers of a request.
    pub const CHOICES: usize = 16;
    /// Time of a request.
    pub const SECONDS: u64 = 600;

    /// The defaults, with a model of this context.
    pub fn within(context: usize) -> Self {
        Self {
            body: Self::BODY_KIB << 10,
            prompt_tokens: context,
            new_tokens: context,
            choices: Self::CHOICES,
            time: Duration::from_secs(Self::SECONDS),
        }
    }
}

/// What both kinds of completions read.
#[derive(Clone, Debug)]
pub struct Common {
    /// Answers to each prompt.
    pub n: usize,
    /// `None`: not said.
    pub max_tokens: Option<usize>,
    /// Temperature and so on.
    pub sampling: SamplingParams,
    /// Strings that end an answer.
    pub stop: Vec<String>,
    /// Go on behind eos.
    pub ignore_eos: bool,
    /// By server-sent events.
    pub stream: bool,
    /// The last event tells the number of tokens.
    pub include_usage: bool,
}

impl Common {
    /// Reads the shared fields; defaults are OpenAI's.
    ///
    /// # Errors
    /// 400 with the first field that is wrong.
    pub fn read(fields: &mut Fields, limits: &Limits) -> Result<Self, ApiError> {
        let n = fields.integer("n", 1..=limits.choices, " (`--max-choices`)")?.unwrap_or(1);
        let why = " (`--max-new-tokens`)";
        let max_tokens = fields.integer("max_tokens", 1..=limits.new_tokens, why)?;
        let stream = fields.flag("stream")?;
        let common = Self {
            n,
            max_tokens,
            sampling: sampling(fields)?,
            stop: stop(fields)?,
            ignore_eos: fields.flag("ignore_eos")?,
            stream,
            include_usage: stream_options(fields, stream)?,
        };
        refuse_unsupported(fields)?;
        Ok(common)
    }
}

fn sampling(fields: &mut Fields) -> Result<SamplingParams, ApiError> {
    let temperature = fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0);
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
    // vLLM's way to say "all" is -1, llama.cpp's 0.
    let top_k = match fields.take("top_k") {
        None => None,
        Some(value) => match value.as_i64() {
            Some(-1 | 0) => None,
            Some(k) if (1..=1 << 24).contains(&k) => Some(k),
            _ => {
                let what = "a whole number from 1 to 16777216, or 0 or -1 for all";
                return Err(ApiError::field("top_k", expected(what, &value)));
            }
        },
    };
    let repetition_penalty = fields.number("repetition_penalty", 0.01..=100.0)?.unwrap_or(1.0);
    let seed = fields.seed("seed")?.unwrap_or_else(random);
    Ok(SamplingParams { temperature, top_k, top_p, repetition_penalty, seed })
}

/// A number that nobody can foretell; std seeds its hash maps by the system's randomness.
pub fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A string, or a list of up to four.
fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let value = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![Value::String(one)],
        Some(Value::Array(several)) if several.len() <= MAX_STOPS => several,
        Some(other) => {
            let what = format!("a string or a list of up to {MAX_STOPS} strings");
            return Err(ApiError::field("stop", expected(what, &other)));
        }
    };
    let text = |(i, value): (usize, Value)| match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        other => {
            let what = expected("a string that is not empty", &other);
            Err(ApiError::field(&format!("stop[{i}]"), what))
        }
    };
    value.into_iter().enumerate().map(text).collect()
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(value) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        return Err(ApiError::field("stream_options", "only goes with `stream`: true"));
    }
    let mut options = Fields::within("stream_options", value)?;
    let include_usage = options.flag("include_usage")?;
    options.ignore(&["include_obfuscation"]);
    options.finish()?;
    Ok(include_usage)
}

/// What OpenAI has and this server has not, unless it asks for what happens anyway.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let zero = |value: &Value| value.as_f64() == Some(0.0);
    let penalty = "use `repetition_penalty`";
    fields.refuse("presence_penalty", penalty, zero)?;
    fields.refuse("frequency_penalty", penalty, zero)?;
    fields.refuse("min_p", "use `top_p`", zero)?;
    let empty = |value: &Value| value.as_object().is_some_and(serde_json::Map::is_empty);
    fields.refuse("logit_bias", "leave it out", empty)?;
    // Who asks, and what becomes of the answer elsewhere.
    fields.ignore(&["user", "metadata", "store", "service_tier", "safety_identifier"]);
    fields.ignore(&["prompt_cache_key", "prompt_cache_retention"]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<Common, ApiError> {
        let time = Duration::from_secs(1);
        let limits = Limits { body: 1, prompt_tokens: 1, new_tokens: 100, choices: 8, time };
        let Value::Object(object) = value else { panic!("{value}") };
        let mut fields = Fields::new(object);
        let common = Common::read(&mut fields, &limits)?;
        fields.finish()?;
        Ok(common)
    }

    fn message(value: Value) -> String {
        read(value).err().unwrap().message
    }

    #[test]
    fn defaults_are_openais() {
        let common = read(json!({})).unwrap();
        let SamplingParams { temperature, top_k, top_p, repetition_penalty, seed } =
            common.sampling;
        assert_eq!((temperature, top_k, top_p, repetition_penalty), (1.0, None, 1.0, 1.0));
        assert_eq!((common.n, common.max_tokens, common.stream), (1, None, false));
        assert_ne!(seed, read(json!({})).unwrap().sampling.seed);
    }

    #[test]
    fn negative_and_huge_numbers_are_refused_with_the_limit() {
        let want = "`max_tokens`: expected a whole number from 1 to 100 (`--max-new-tokens`), got the \
                    number -1";
        assert_eq!(message(json!({"max_tokens": -1})), want);
        assert!(message(json!({"max_tokens": 10_000_000})).ends_with("got the number 10000000"));
        assert!(message(json!({"max_tokens": 0})).ends_with("got the number 0"));
        assert!(message(json!({"n": 9})).contains("from 1 to 8 (`--max-choices`)"));
        assert!(message(json!({"temperature": 2.1})).contains("from 0 to 2"));
        assert!(message(json!({"top_p": -0.1})).contains("from 0 to 1"));
        assert!(message(json!({"top_k": -2})).contains("or 0 or -1 for all"));
        assert_eq!(read(json!({"top_k": -1})).unwrap().sampling.top_k, None);
        assert_eq!(read(json!({"top_k": 7, "seed": 3})).unwrap().sampling.top_k, Some(7));
    }

    #[test]
    fn stop_is_a_string_or_up_to_four() {
        assert_eq!(read(json!({"stop": "a"})).unwrap().stop, ["a"]);
        assert_eq!(read(json!({"stop": ["a", "b"]})).unwrap().stop, ["a", "b"]);
        assert!(message(json!({"stop": [1]})).starts_with("`stop[0]`: expected a string"));
        assert!(message(json!({"stop": ""})).starts_with("`stop[0]`"));
        let want = "`stop`: expected a string or a list of up to 4 strings, got a list of 5 items";
        assert_eq!(message(json!({"stop": ["a", "b", "c", "d", "e"]})), want);
    }

    #[test]
    fn what_is_not_supported_is_refused_unless_it_changes_nothing() {
        assert!(read(json!({"presence_penalty": 0, "logit_bias": {}, "user": "me"})).is_ok());
        assert!(message(json!({"frequency_penalty": 0.5})).contains("use `repetition_penalty`"));
        assert!(message(json!({"logit_bias": {"1": 5}})).contains("not supported here"));
        assert!(message(json!({"stream_options": {}})).contains("only goes with `stream`"));
        let options = json!({"stream": true, "stream_options": {"include_usage": true}});
        assert!(read(options).unwrap().include_usage);
    }
}
