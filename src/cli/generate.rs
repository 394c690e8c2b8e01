//! `tinyllama generate`.

use crate::error::WithHint;
use crate::generate::engine::{Engine, EngineOptions, Event, Request};
use crate::generate::load::{self, Loaded};
use crate::generate::plain::generate_plain;
use crate::generate::request::{FinishReason, GenerateOptions, Timings, Token, peak_memory};
use crate::generate::sampler::SamplingParams;
use crate::generate::text::{StopMatcher, TextStream, parse_ids};
use crate::tokenizer::Tokenizer;
use crate::{device, error, guard};
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tch::{Device, Kind};

/// Arguments of `generate`.
#[derive(clap::Args)]
#[command(after_help = "Text goes to stdout as it comes, timings to stderr. Without --prompt and \
    --prompt-file the prompt is read from stdin. An empty prompt starts with bos.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// File with the text to continue (one line break at its end is dropped)
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
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
          value_parser = clap::value_parser!(u64).range(1..))]
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
    /// The prompt is token ids ("1,15043"), and ids are printed; needs no tokenizer
    #[arg(long, conflicts_with_all = ["stop", "no_bos"])]
    ids: bool,
    /// By the plain loop instead of the engine: one sample after the other, for comparison
    #[arg(long)]
    plain: bool,
}

/// Which model, where, in which number format; shared by `generate` and `score`.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Checkpoint folder, or a run's `out_dir` for its newest checkpoint
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Number format of weights and activations [default: bf16-true on a GPU, 32-true on the CPU]
    #[arg(long)]
    precision: Option<InferencePrecision>,
    /// `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`
    #[arg(long, default_value = "auto")]
    pub device: String,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum InferencePrecision {
    #[value(name = "32-true")]
    Fp32True,
    #[value(name = "bf16-true")]
    Bf16True,
}

impl ModelArgs {
    /// Loads the checkpoint onto what [`ModelArgs::device`] names.
    pub fn load(&self, device: Device, with_tokenizer: bool) -> Result<Loaded> {
        let kind = self.precision.map(|precision| match precision {
            InferencePrecision::Fp32True => Kind::Float,
            InferencePrecision::Bf16True => Kind::BFloat16,
        });
        load::load(&self.checkpoint, device, kind, with_tokenizer)
    }
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
    let device = device::resolve(&args.model.device)?;
    guard::catch("generation", device, lower, || generate_all(&args, device))
}

fn generate_all(args: &Args, device: Device) -> Result<u8> {
    let prompt = read_prompt(args)?;
    let given_ids = if args.ids { Some(parse_ids(&prompt)?) } else { None };
    let loaded = args.model.load(device, !args.ids)?;
    let ids = match (given_ids, &loaded.tokenizer) {
        (Some(ids), _) => ids,
        (None, Some(tokenizer)) => encode_prompt(tokenizer, &prompt, args.no_bos)?,
        (None, None) => Vec::new(),
    };

    let mut samples = Samples::new(args, &loaded, &prompt, &ids)?;
    let done = match args.plain {
        true => samples.run_plain(&ids),
        false => samples.run(&ids),
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

/// The prompt of `--prompt`, `--prompt-file` or stdin, the latter two without a line break at the
/// end.
fn read_prompt(args: &Args) -> Result<String> {
    let mut text = String::new();
    if let Some(prompt) = &args.prompt {
        return Ok(prompt.clone());
    } else if let Some(path) = &args.prompt_file {
        text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the prompt file `{}`", path.display()))?;
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

/// All samples of the prompt. They are made at the same time, and shown one after the other.
struct Samples<'a> {
    args: &'a Args,
    loaded: &'a Loaded,
    prompt: &'a str,
    samples: Vec<Sample<'a>>,
    /// The sample whose text is written as it comes.
    turn: usize,
    timings: Timings,
    cache_bytes: u64,
}

struct Sample<'a> {
    /// `None` where ids are printed.
    stream: Option<TextStream<'a>>,
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<f64>,
    ended: Option<FinishReason>,
    time: Duration,
}

impl<'a> Samples<'a> {
    fn new(args: &'a Args, loaded: &'a Loaded, prompt: &'a str, ids: &[u32]) -> Result<Self> {
        let stream = loaded.tokenizer.as_ref().map(|t| TextStream::new(t, ids, &args.stop));
        let stream = stream.transpose()?;
        let sample = || Sample {
            stream: stream.clone(),
            text: String::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            ended: None,
            time: Duration::ZERO,
        };
        let samples = (0..args.num_samples).map(|_| sample()).collect();
        let timings = Timings { prompt_tokens: ids.len(), ..Default::default() };
        Ok(Self { args, loaded, prompt, samples, turn: 0, timings, cache_bytes: 0 })
    }

    fn options(&self, index: u64) -> GenerateOptions {
        GenerateOptions {
            max_new_tokens: self.args.max_new_tokens,
            sampling: self.args.sampling(self.args.seed.wrapping_add(index)),
            eos: self.loaded.eos.clone(),
            vocab_size: self.loaded.tokenizer.as_ref().map(|t| t.vocab_size()),
            top_logprobs: 0,
        }
    }

    /// By the engine: all samples together, the prompt read once.
    fn run(&mut self, ids: &[u32]) -> Result<()> {
        let (model, n) = (&self.loaded.model, self.samples.len());
        let options = self.options(0);
        let sizes = EngineOptions::for_samples(model, ids.len(), options.max_new_tokens, n);
        let mut engine = Engine::new(model, sizes);
        self.cache_bytes = sizes.cache_bytes(model);
        let start = Instant::now();
        let request = Request { prompt: ids.to_vec(), samples: n, options };
        let id = engine.submit(request)?;
        while !engine.is_idle() {
            for event in engine.step() {
                let time = start.elapsed();
                match event {
                    Event::Token { index, token, .. } => {
                        self.note_speed(index, time);
                        if !self.token(index, token, time)? {
                            engine.stop(id, index);
                            self.end(index, FinishReason::Stop)?;
                        }
                    }
                    Event::Finished { index, reason, .. } => self.end(index, reason)?,
                    Event::Failed { error, .. } => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// By the plain loop, one sample after the other.
    fn run_plain(&mut self, ids: &[u32]) -> Result<()> {
        for index in 0..self.samples.len() {
            let (start, model) = (Instant::now(), &self.loaded.model);
            let options = self.options(index as u64);
            let out = generate_plain(model, ids, &options, &mut |token| {
                self.token(index, token, start.elapsed())
            })?;
            self.cache_bytes = out.cache_bytes;
            self.timings.prefill += out.timings.prefill;
            self.timings.decode += out.timings.decode;
            self.timings.decoded_tokens += out.timings.decoded_tokens;
            self.end(index, out.finish_reason)?;
        }
        Ok(())
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
            prompt: self.prompt,
            text: &sample.text,
            tokens: &sample.tokens,
            logprobs: &sample.logprobs,
            finish_reason,
            prompt_tokens: self.timings.prompt_tokens,
            new_tokens,
            seed: self.args.seed.wrapping_add(index as u64),
            tokens_per_sec: new_tokens as f64 / sample.time.as_secs_f64().max(1e-9),
        };
        write_stdout(&format!("{}\n", serde_json::to_string(&object)?))
    }

    /// One line on stderr.
    fn report_speed(&self) {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        let memory = peak_memory(self.loaded.model.device());
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
