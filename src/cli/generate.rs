//! `tinyllama generate`.

use crate::error::WithHint;
use crate::generate::engine::{self, GenerateOptions, Generation, peak_memory};
use crate::generate::load::{self, Loaded};
use crate::generate::sampler::SamplingParams;
use crate::generate::text::{StopMatcher, TextGeneration, generate_text, parse_ids};
use crate::tokenizer::Tokenizer;
use crate::{device, error, guard};
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
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
    finish_reason: engine::FinishReason,
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

    for i in 0..args.num_samples {
        let seed = args.seed.wrapping_add(i);
        let sample = one_sample(args, &loaded, &ids, seed);
        let result = sample.and_then(|sample| {
            finish_sample(args, &prompt, &sample, seed)?;
            Ok(sample)
        });
        match result {
            Ok(sample) => report_speed(args, &loaded, &sample.generation, i),
            Err(e) if is_broken_pipe(&e) => return Ok(error::exit::OK),
            Err(e) => return Err(e),
        }
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

/// Generates, writing text to stdout as it comes.
fn one_sample(args: &Args, loaded: &Loaded, ids: &[u32], seed: u64) -> Result<TextGeneration> {
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        sampling: args.sampling(seed),
        eos: loaded.eos.clone(),
        vocab_size: loaded.tokenizer.as_ref().map(|t| t.vocab_size()),
    };
    let mut show = |piece: &str| if args.streams() { write_stdout(piece) } else { Ok(()) };
    if let Some(tokenizer) = &loaded.tokenizer {
        return generate_text(&loaded.model, tokenizer, ids, &options, &args.stop, &mut show);
    }
    let mut text = String::new();
    let generation = engine::generate(&loaded.model, ids, &options, &mut |token| {
        let space = if text.is_empty() { "" } else { " " };
        let piece = format!("{space}{}", token.id);
        text.push_str(&piece);
        show(&piece).map(|()| true)
    })?;
    Ok(TextGeneration { text, generation })
}

/// Writes what streaming has not: the end of the line, the whole text, or the JSON object.
fn finish_sample(args: &Args, prompt: &str, sample: &TextGeneration, seed: u64) -> Result<()> {
    let TextGeneration { text, generation } = sample;
    if args.streams() {
        return write_stdout("\n");
    }
    if !args.json {
        return write_stdout(&format!("{text}\n"));
    }
    let new_tokens = generation.tokens.len();
    let object = JsonSample {
        prompt,
        text,
        tokens: &generation.tokens,
        logprobs: &generation.logprobs,
        finish_reason: generation.finish_reason,
        prompt_tokens: generation.timings.prompt_tokens,
        new_tokens,
        seed,
        tokens_per_sec: generation.timings.tokens_per_sec(new_tokens),
    };
    write_stdout(&format!("{}\n", serde_json::to_string(&object)?))
}

/// One line on stderr.
fn report_speed(args: &Args, loaded: &Loaded, generation: &Generation, i: u64) {
    let (t, gib) = (&generation.timings, |bytes: u64| bytes as f64 / (1u64 << 30) as f64);
    let memory = peak_memory(loaded.model.device());
    let memory = memory.map_or("unknown".into(), |bytes| format!("{:.2} GiB", gib(bytes)));
    eprintln!(
        "sample {}/{} | {} new tokens ({}) in {:.2} s | prefill {} tok, {:.1} tok/s | \
         decode {:.1} tok/s | peak memory {memory}, cache {:.3} GiB",
        i + 1,
        args.num_samples,
        generation.tokens.len(),
        generation.finish_reason.name(),
        (t.prefill + t.decode).as_secs_f64(),
        t.prompt_tokens,
        t.prefill_tokens_per_sec(),
        t.decode_tokens_per_sec(),
        gib(generation.cache_bytes),
    );
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
