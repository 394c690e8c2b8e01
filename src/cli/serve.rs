//! `tinyllama serve`.

use super::bench::at_least_one;
use super::model_args::ModelArgs;
use crate::error::{WithHint, exit};
use crate::generate::engine::EngineOptions;
use crate::generate::load::{self, Loaded};
use crate::generate::service::Service;
use crate::serve::{Limits, Options};
use crate::tokenizer::ChatTemplate;
use crate::{device, guard, serve};
use anyhow::{Context, Result, anyhow};
use std::sync::Arc;
use std::time::Duration;
use tch::Device;

/// Answers that wait for a place unless told otherwise.
pub const MAX_QUEUE: usize = 256;

/// Arguments of `serve`.
#[derive(clap::Args)]
#[command(after_help = "Endpoints: /v1/models, /v1/completions, /v1/chat/completions, /health, \
    /metrics, and a chat page at /. docs/serving.md has the details.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Address to listen on; 0.0.0.0 lets other machines in
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port; 0: any that is free
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    port: u16,
    /// Clients must send `Authorization: Bearer KEY`
    #[arg(long, value_name = "KEY", env = "TINYLLAMA_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// How the API calls the model [default: the name of the checkpoint's folder]
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Built-in chat template instead of the checkpoint's: guanaco, chatml, zephyr, llama-2, alpaca
    #[arg(long, value_name = "NAME")]
    chat_template: Option<String>,
    /// Largest request, KiB
    #[arg(long, value_name = "KIB", default_value_t = Limits::BODY_KIB, value_parser = at_least_one)]
    max_body: usize,
    /// Longest prompt, tokens [default: the model's context]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_prompt_tokens: Option<usize>,
    /// Longest answer, tokens [default: the model's context]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_new_tokens: Option<usize>,
    /// Most answers of a request: `n` times its prompts
    #[arg(long, value_name = "N", default_value_t = Limits::CHOICES, value_parser = at_least_one)]
    max_choices: usize,
    /// Answers that may wait for a place; more are refused with 429
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUE)]
    max_queue: usize,
    /// Longest time of a request, seconds
    #[arg(long, value_name = "S", default_value_t = Limits::SECONDS, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    request_timeout: u64,
    /// After SIGINT or SIGTERM, running requests have so many seconds
    #[arg(long, value_name = "S", default_value_t = 60)]
    drain_timeout: u64,
    /// No line on stderr for each request
    #[arg(long)]
    quiet: bool,
}

/// Sizes of the engine; shared with `chat`.
#[derive(clap::Args)]
pub struct EngineArgs {
    /// Memory for keys and values, GiB [default: 1 on the CPU, 4 on a GPU]
    #[arg(long, value_name = "GIB")]
    cache_gib: Option<f64>,
    /// Sequences decoded at the same time
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_sequences: usize,
}

impl EngineArgs {
    /// For this model.
    ///
    /// # Errors
    /// A cache that could not hold one sequence; no sequence at all.
    pub fn sizes(&self, loaded: &Loaded) -> Result<EngineOptions> {
        let model = loaded.network.borrow();
        let gib = self.cache_gib.unwrap_or(if model.device().is_cuda() { 4.0 } else { 1.0 });
        let bytes = (gib.max(0.0) * (1u64 << 30) as f64) as u64;
        let sizes = EngineOptions::within(model, bytes, self.max_sequences);
        if sizes.blocks == 0 {
            return Err(anyhow!(
                "no room for a sequence: {gib} GiB of cache, {} sequences",
                self.max_sequences
            ))
            .usage("raise `--cache-gib` and `--max-sequences`");
        }
        Ok(sizes)
    }
}

/// Runs `serve`.
pub fn run(args: Args) -> Result<u8> {
    let device = device::resolve(&args.model.load.device)?;
    let lower = "lower `--cache-gib`, or use `--quantize int4` or `--precision bf16-true`";
    guard::catch("serving", device, lower, || start(&args, device))
}

fn start(args: &Args, device: Device) -> Result<u8> {
    let mut loaded = args.model.load(device, true)?;
    let template = template(args, &mut loaded)?;
    let sizes = args.engine.sizes(&loaded)?;
    let (model, whole) = (loaded.network.borrow(), loaded.network.borrow().config().max_length());
    let context = sizes.context(model);
    if (context as i64) < whole {
        eprintln!(
            "context     {context} tokens of the model's {whole}: the cache holds no more (`--cache-gib`)"
        );
    }
    let options = Options {
        host: args.host.clone(),
        port: args.port,
        api_key: args.api_key.clone().filter(|key| !key.is_empty()),
        model: args.model_name.clone().unwrap_or_else(|| args.model.name()),
        limits: Limits {
            body: args.max_body << 10,
            prompt_tokens: args.max_prompt_tokens.unwrap_or(context),
            new_tokens: args.max_new_tokens.unwrap_or(context),
            choices: args.max_choices,
            time: Duration::from_secs(args.request_timeout),
        },
        drain: Duration::from_secs(args.drain_timeout),
        log: !args.quiet,
    };
    let service = Arc::new(Service::start(loaded, sizes, args.max_queue)?);
    serve::run(service, template, &options)?;
    Ok(exit::OK)
}

/// The chat template; tokens that end its turns end answers.
fn template(args: &Args, loaded: &mut Loaded) -> Result<Option<ChatTemplate>> {
    let tokenizer = loaded.tokenizer.as_ref().context("no tokenizer")?;
    let name = args.chat_template.as_deref();
    let template = load::chat_template(args.model.path(), tokenizer, name)?;
    if let Some(template) = &template {
        loaded.eos.extend(template.end_ids(tokenizer));
    }
    Ok(template)
}
