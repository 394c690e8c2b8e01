//! `tinyllama generate`.

use super::model_args::ModelArgs;
use crate::error::WithHint;
use crate::generate::engine::{Engine, EngineOptions, Event, Request};
use crate::generate::load::{self, Form, Loaded};
use crate::generate::plain::generate_plain;
use crate::generate::request::{
    FinishReason, GenerateOptions, Generation, Timings, Token, peak_memory,
};
use crate::generate::sampler::SamplingParams;
use crate::generate::speculative::{Draft, check_tokenizers, generate_speculative};
use crate::generate::text::{StopMatcher, TextStream, parse_ids};
use crate::tokenizer::Tokenizer;
use crate::{device, error, guard};
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use std::collections::HashMap;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tch::Device;

/// Arguments of `generate`.
#[derive(clap::Args)]
#[command(after_help = "Text goes to stdout as it comes, timings to stderr. Without --prompt and \
    --prompt-file the prompt is read from stdin. An empty prompt starts with bos.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with the text to continue (one line break at its end is dropped)
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Each line of --prompt-file or stdin is a prompt of its own; all are continued at the same time
    #[arg(long, conflicts_with_all = ["prompt", "plain"])]
    lines: bool,
    /// Stop after this many new tokens
    #[arg(long, value_name = "N", default_value_t = 50)]
    max_new_tokens: usize,
    /// Divides the logits; 0 takes the most likely token each time
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f64,
    /// Choose among the K most likely tokens; 0: among all
    #[arg(long, value_name = "K", default_value_t = 50)]
    top_k: u32,
    /// Choose among the most likely tokens that together reach probability P; 1: among all
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,
    /// Above 1: makes tokens of prompt and output less likely (positive logits divided by it)
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f64,
    /// Seed of the draws; sample i of --num-samples uses SEED + i
    #[arg(long, default_value_t = 1234)]
    seed: u64,
    /// End the text where this string begins; repeatable
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Number of continuations
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u64).range(1..=100_000))]
    num_samples: u64,
    /// Print each text when it is complete
    #[arg(long)]
    no_stream: bool,
    /// Print one JSON object a sample
    #[arg(long)]
    json: bool,
    /// Do not put bos before the prompt
    #[arg(long)]
    no_bos: bool,
    /// Prompts are token ids ("1,15043"), and ids are printed; needs no tokenizer
    #[arg(long, conflicts_with_all = ["stop", "no_bos"])]
    ids: bool,
    /// By the plain loop instead of the engine: one sample after the other, for comparison
    #[arg(long)]
    plain: bool,
    /// Speculative decoding: the checkpoint of a smaller model with the same tokenizer proposes tokens
    #[arg(long, value_name = "DIR", conflicts_with_all = ["lines", "plain"])]
    draft: Option<PathBuf>,
    /// Speculative decoding without a second model: proposes what followed the last N tokens (or fewer) before
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "3",
          conflicts_with_all = ["lines", "plain", "draft"],
          value_parser = clap::value_parser!(u64).range(1..))]
    draft_lookup: Option<u64>,
    /// At most so many proposals at a time
    #[arg(long, value_name = "K", default_value_t = 8,
          value_parser = clap::value_parser!(u64).range(1..=64))]
    draft_tokens: u64,
}

/// One object a sample.
#[derive(Serialize)]
struct JsonSample<'a> {
    prompt: &'a str,
    text: &'a str,
    tokens: &'a [u32],
    logprobs: &'a [f64],
    finish_reason: FinishReason,
    prompt_tokens: usize,
    new_tokens: usize,
    seed: u64,
    tokens_per_sec: f64,
}

/// Runs `generate`.
pub fn run(args: Args) -> Result<u8> {
    args.sampling(0).validate()?;
    StopMatcher::new(&args.stop)?;
    let lower = "lower `--max-new-tokens`, shorten the prompt, use `--precision bf16-true` or \
                 `--device cpu`";
    let device = device::resolve(&args.model.load.device)?;
    guard::catch("generation", device, lower, || generate_all(&args, device))
}

fn generate_all(args: &Args, device: Device) -> Result<u8> {
    let text = read_prompt(args)?;
    let texts: Vec<&str> = if args.lines { text.lines().collect() } else { vec![&text] };
    // Ids of all lines are checked before the model is loaded.
    let ids =
        args.ids.then(|| texts.iter().map(|text| parse_ids(text)).collect::<Result<Vec<_>>>());
    let ids = ids.transpose()?;
    let loaded = args.model.load(device, !args.ids)?;
    let ids = match (ids, &loaded.tokenizer) {
        (Some(ids), _) => ids,
        (None, Some(tokenizer)) => {
            let encode = |text: &&str| encode_prompt(tokenizer, text, args.no_bos);
            texts.iter().map(encode).collect::<Result<_>>()?
        }
        (None, None) => Vec::new(),
    };
    let prompts: Vec<Prompt> =
        texts.into_iter().zip(ids).map(|(text, ids)| Prompt { text, ids }).collect();
    let mut samples = Samples::new(args, &loaded, &prompts)?;
    let drafter = args.draft.as_ref().map(|dir| load_draft(dir, &loaded)).transpose()?;
    let draft = match (&drafter, args.draft_lookup) {
        (Some(drafter), _) => Some(Draft::Model(drafter.network.borrow())),
        (None, Some(longest)) => Some(Draft::Lookup(longest as usize)),
        (None, None) => None,
    };
    let done = match draft {
        Some(draft) => samples.run_speculative(draft),
        None if args.plain => samples.run_plain(),
        None => samples.run(),
    };
    match done {
        Ok(()) => samples.report_speed(),
        Err(e) if is_broken_pipe(&e) => {}
        Err(e) => return Err(e),
    }
    Ok(error::exit::OK)
}

impl Args {
    fn sampling(&self, seed: u64) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: (self.top_k > 0).then_some(self.top_k as i64),
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            seed,
        }
    }

    fn streams(&self) -> bool {
        !self.json && !self.no_stream
    }
}

/// What a file says that an argument names.
pub(super) fn text_of_file(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the file `{}`", path.display()))
        .hint("name a file of UTF-8 text that can be read")
}

/// The prompt of `--prompt`, `--prompt-file` or stdin, the latter two without a line break at the
/// end.
fn read_prompt(args: &Args) -> Result<String> {
    let mut text = String::new();
    if let Some(prompt) = &args.prompt {
        return Ok(prompt.clone());
    } else if let Some(path) = &args.prompt_file {
        text = text_of_file(path)?;
    } else {
        if std::io::stdin().is_terminal() {
            eprintln!("reading the prompt from the terminal; Ctrl-D ends it");
        }
        std::io::stdin().read_to_string(&mut text).context("cannot read the prompt from stdin")?;
    }
    let trimmed = text.strip_suffix('\n').unwrap_or(&text);
    Ok(trimmed.strip_suffix('\r').unwrap_or(trimmed).to_owned())
}

/// Ids of the prompt. An empty one becomes bos; where the tokenizer has none, eos, which separates
/// documents in such models.
fn encode_prompt(tokenizer: &Tokenizer, prompt: &str, no_bos: bool) -> Result<Vec<u32>> {
    let ids = match no_bos {
        true => tokenizer.encode(prompt, false, false)?,
        false => tokenizer.encode_default(prompt)?,
    };
    if !ids.is_empty() {
        return Ok(ids);
    }
    let start = if no_bos { None } else { tokenizer.bos_id().or(tokenizer.eos_id()) };
    start
        .map(|id| vec![id])
        .ok_or_else(|| anyhow!("the prompt is empty and there is no bos to start from"))
        .usage("give a prompt, or leave `--no-bos` out")
}

/// The second model, on the first one's device.
fn load_draft(dir: &Path, loaded: &Loaded) -> Result<Loaded> {
    let device = loaded.network.borrow().device();
    let draft = load::load(dir, device, Form::Usual, loaded.tokenizer.is_some())?;
    // Without a tokenizer, whoever gives ids answers for their meaning.
    if let (Some(ours), Some(theirs)) = (&loaded.tokenizer, &draft.tokenizer) {
        check_tokenizers(ours, theirs)?;
    }
    Ok(draft)
}

struct Prompt<'a> {
    text: &'a str,
    ids: Vec<u32>,
}

/// All samples of all prompts. They are made at the same time, and shown one after the other.
struct Samples<'a> {
    args: &'a Args,
    loaded: &'a Loaded,
    prompts: &'a [Prompt<'a>],
    /// Those of the first prompt, then those of the second ..
    samples: Vec<Sample<'a>>,
    /// The sample whose text is written as it comes.
    turn: usize,
    timings: Timings,
    cache_bytes: u64,
}

struct Sample<'a> {
    prompt: &'a Prompt<'a>,
    seed: u64,
    /// `None` where ids are printed.
    stream: Option<TextStream<'a>>,
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<f64>,
    ended: Option<FinishReason>,
    time: Duration,
}

impl<'a> Samples<'a> {
    fn new(args: &'a Args, loaded: &'a Loaded, prompts: &'a [Prompt<'a>]) -> Result<Self> {
        let mut samples = Vec::new();
        for prompt in prompts {
            let stream =
                loaded.tokenizer.as_ref().map(|t| TextStream::new(t, &prompt.ids, &args.stop));
            let stream = stream.transpose()?;
            samples.extend((0..args.num_samples).map(|i| Sample {
                prompt,
                seed: args.seed.wrapping_add(i),
                stream: stream.clone(),
                text: String::new(),
                tokens: Vec::new(),
                logprobs: Vec::new(),
                ended: None,
                time: Duration::ZERO,
            }));
        }
        let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
        let timings = Timings { prompt_tokens, ..Default::default() };
        Ok(Self { args, loaded, prompts, samples, turn: 0, timings, cache_bytes: 0 })
    }

    fn options(&self, seed: u64) -> GenerateOptions {
        GenerateOptions {
            max_new_tokens: self.args.max_new_tokens,
            sampling: self.args.sampling(seed),
            eos: self.loaded.eos.clone(),
            vocab_size: self.loaded.tokenizer.as_ref().map(|t| t.vocab_size()),
            top_logprobs: 0,
        }
    }

    /// By the engine: all prompts and samples together, each prompt read once.
    fn run(&mut self) -> Result<()> {
        let (model, n) = (self.loaded.network.borrow(), self.args.num_samples as usize);
        let new = self.args.max_new_tokens;
        let needs: Vec<_> = self.prompts.iter().map(|prompt| (prompt.ids.len(), new, n)).collect();
        let sizes = EngineOptions::for_requests(model, &needs);
        let mut engine = Engine::new(model, sizes);
        self.cache_bytes = sizes.cache_bytes(model);
        let start = Instant::now();
        let mut first = HashMap::new(); // sample of each request
        for (i, prompt) in self.prompts.iter().enumerate() {
            let options = self.options(self.args.seed);
            let request = Request { prompt: prompt.ids.clone(), samples: n, options };
            first.insert(engine.submit(request)?, i * n);
        }
        let at = |request, index: usize| first[&request] + index;
        while !engine.is_idle() {
            for event in engine.step() {
                let time = start.elapsed();
                match event {
                    Event::Token { request, index, token } => {
                        let sample = at(request, index);
                        self.note_speed(sample, time);
                        if !self.token(sample, token, time)? {
                            engine.stop(request, index);
                            self.end(sample, FinishReason::Stop)?;
                        }
                    }
                    Event::Finished { request, index, reason } => {
                        self.end(at(request, index), reason)?;
                    }
                    Event::Failed { error, .. } => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// By the plain loop, one sample after the other.
    fn run_plain(&mut self) -> Result<()> {
        for index in 0..self.samples.len() {
            let (start, model) = (Instant::now(), self.loaded.dense("`--plain`")?);
            let (prompt, seed) = (self.samples[index].prompt, self.samples[index].seed);
            let options = self.options(seed);
            let out = generate_plain(model, &prompt.ids, &options, &mut |token| {
                self.token(index, token, start.elapsed())
            })?;
            self.add_timings(&out);
            self.end(index, out.finish_reason)?;
        }
        Ok(())
    }

    /// By speculative decoding, one sample after the other.
    fn run_speculative(&mut self, draft: Draft) -> Result<()> {
        for index in 0..self.samples.len() {
            let (start, model) = (Instant::now(), self.loaded.network.borrow());
            let (prompt, seed) = (self.samples[index].prompt, self.samples[index].seed);
            let (most, options) = (self.args.draft_tokens as usize, self.options(seed));
            let on_token = &mut |token| self.token(index, token, start.elapsed());
            let (out, acceptance) =
                generate_speculative(model, draft, most, &prompt.ids, &options, on_token)?;
            self.add_timings(&out);
            self.end(index, out.finish_reason)?;
            eprintln!(
                "draft | {} of {} proposals kept ({:.1} %) | {:.2} tokens a pass | {:.2}x the speed of \
                 one pass a token",
                acceptance.accepted,
                acceptance.proposed,
                100.0 * acceptance.rate(),
                out.timings.decoded_tokens as f64 / acceptance.passes.max(1) as f64,
                acceptance.speed_up(&out),
            );
        }
        Ok(())
    }

    fn add_timings(&mut self, out: &Generation) {
        self.cache_bytes = out.cache_bytes;
        self.timings.prefill += out.timings.prefill;
        self.timings.decode += out.timings.decode;
        self.timings.decoded_tokens += out.timings.decoded_tokens;
    }

    /// A token of a sample came so long after the start.
    fn note_speed(&mut self, index: usize, time: Duration) {
        match self.timings.prefill.is_zero() {
            true => self.timings.prefill = time,
            false => self.timings.decode = time.saturating_sub(self.timings.prefill),
        }
        self.timings.decoded_tokens += usize::from(!self.samples[index].tokens.is_empty());
    }

    /// Takes a sample's next token; whether more is wanted.
    fn token(&mut self, index: usize, token: Token, time: Duration) -> Result<bool> {
        let sample = &mut self.samples[index];
        sample.tokens.push(token.id);
        sample.logprobs.push(token.logprob);
        sample.time = time;
        let piece = match &mut sample.stream {
            Some(_) if token.is_eos => String::new(),
            Some(stream) => stream.push(token.id),
            None if sample.text.is_empty() => token.id.to_string(),
            None => format!(" {}", token.id),
        };
        self.add(index, &piece)?;
        Ok(!self.samples[index].stream.as_ref().is_some_and(TextStream::stopped))
    }

    /// Adds to a sample's text, and writes it where it is this sample's turn.
    fn add(&mut self, index: usize, piece: &str) -> Result<()> {
        self.samples[index].text.push_str(piece);
        match index == self.turn && self.args.streams() && !piece.is_empty() {
            true => write_stdout(piece),
            false => Ok(()),
        }
    }

    /// A sample has ended, unless it had before: writes what is due.
    fn end(&mut self, index: usize, reason: FinishReason) -> Result<()> {
        if self.samples[index].ended.is_some() {
            return Ok(());
        }
        let rest = self.samples[index].stream.as_mut().map(TextStream::finish).unwrap_or_default();
        self.add(index, &rest)?;
        self.samples[index].ended = Some(reason);
        while let Some(reason) = self.samples.get(self.turn).and_then(|sample| sample.ended) {
            self.finish(self.turn, reason)?;
            self.turn += 1;
            if let Some(next) = self.samples.get(self.turn).filter(|_| self.args.streams()) {
                write_stdout(&next.text)?;
            }
        }
        Ok(())
    }

    /// Writes what streaming has not: the end of the line, the whole text, or the JSON object.
    fn finish(&self, index: usize, finish_reason: FinishReason) -> Result<()> {
        let sample = &self.samples[index];
        if self.args.streams() {
            return write_stdout("\n");
        }
        if !self.args.json {
            return write_stdout(&format!("{}\n", sample.text));
        }
        let new_tokens = sample.tokens.len();
        let object = JsonSample {
            prompt: sample.prompt.text,
            text: &sample.text,
            tokens: &sample.tokens,
            logprobs: &sample.logprobs,
            finish_reason,
            prompt_tokens: sample.prompt.ids.len(),
            new_tokens,
            seed: sample.seed,
            tokens_per_sec: new_tokens as f64 / sample.time.as_secs_f64().max(1e-9),
        };
        write_stdout(&format!("{}\n", serde_json::to_string(&object)?))
    }

    /// One line on stderr.
    fn report_speed(&self) {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        let memory = peak_memory(self.loaded.network.borrow().device());
        let memory = memory.map_or("unknown".into(), |bytes| format!("{:.2} GiB", gib(bytes)));
        let t = &self.timings;
        let samples = match self.samples.as_slice() {
            [one] => format!("1 sample ({})", one.ended.map_or("-", FinishReason::name)),
            all => format!("{} samples", all.len()),
        };
        eprintln!(
            "{samples} | {} new tokens in {:.2} s | prefill {} tok, {:.1} tok/s | decode {:.1} tok/s | \
             peak memory {memory}, cache {:.3} GiB",
            self.samples.iter().map(|sample| sample.tokens.len()).sum::<usize>(),
            (t.prefill + t.decode).as_secs_f64(),
            t.prompt_tokens,
            t.prefill_tokens_per_sec(),
            t.decode_tokens_per_sec(),
            gib(self.cache_bytes),
        );
    }
}

/// Writes and flushes. A closed pipe is an error that [`is_broken_pipe`] knows.
pub fn write_stdout(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// Whether the reader of stdout has gone (`| head`): nothing is left to do, quietly.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<std::io::Error>().map(|e| e.kind());
    kind == Some(std::io::ErrorKind::BrokenPipe)
}
