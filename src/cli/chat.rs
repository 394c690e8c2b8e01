//! `tinyllama chat`: a conversation in the terminal.

use super::generate::{is_broken_pipe, write_stdout};
use super::model_args::ModelArgs;
use super::serve::EngineArgs;
use crate::error::{WithHint, exit};
use crate::generate::load;
use crate::generate::request::FinishReason;
use crate::generate::sampler::SamplingParams;
use crate::generate::service::{Service, TextRequest, Update};
use crate::tokenizer::ChatTemplate;
use crate::tokenizer::chat_template::Message;
use crate::{device, guard};
use anyhow::{Context, Result, anyhow};
use std::io::{BufRead, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use tch::Device;

const HELP: &str = "\
/reset          forget the conversation
/system TEXT    set the system prompt, or take it away without TEXT, and forget the conversation
/save FILE      write the conversation as JSON
/help           show this
/exit           end, as Ctrl-D does; Ctrl-C stops an answer";

/// Arguments of `chat`.
#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Built-in chat template instead of the checkpoint's: guanaco, chatml, zephyr, llama-2, alpaca
    #[arg(long, value_name = "NAME")]
    chat_template: Option<String>,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Longest answer, tokens
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_new_tokens: usize,
    /// Divides the logits; 0 takes the most likely token each time
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    /// Choose among the K most likely tokens; 0: among all
    #[arg(long, value_name = "K", default_value_t = 50)]
    top_k: u32,
    /// Choose among the most likely tokens that together reach probability P; 1: among all
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f64,
    /// Above 1: makes tokens of the conversation less likely
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Seed of the draws; each answer uses the next one
    #[arg(long, default_value_t = 1234)]
    seed: u64,
}

/// Runs `chat`.
pub fn run(args: Args) -> Result<u8> {
    args.sampling(0).validate()?;
    let device = device::resolve(&args.model.load.device)?;
    let lower = "lower `--cache-gib`, or use `--quantize int4` or `--precision bf16-true`";
    guard::catch("the chat", device, lower, || start(&args, device))
}

fn start(args: &Args, device: Device) -> Result<u8> {
    let mut loaded = args.model.load(device, true)?;
    let tokenizer = loaded.tokenizer.as_ref().context("no tokenizer")?;
    let name = args.chat_template.as_deref();
    let template = load::chat_template(args.model.path(), tokenizer, name)?
        .ok_or_else(|| anyhow!("the checkpoint has no chat template"))
        .usage("name one: `--chat-template chatml` (guanaco, chatml, zephyr, llama-2, alpaca)")?;
    loaded.eos.extend(template.end_ids(tokenizer));
    let sizes = args.engine.sizes(&loaded)?;
    let service = Service::start(loaded, sizes, 1)?;
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGINT, stop.clone())
        .context("cannot listen for Ctrl-C")?;
    let talks = std::io::stdin().is_terminal();
    if talks {
        eprintln!("{} | template {} | /help", args.model.name(), template.origin());
    }
    let system = args.system.clone();
    let mut chat =
        Chat { args, service, template, system, messages: Vec::new(), stop, talks, answers: 0 };
    chat.run()?;
    Ok(exit::OK)
}

impl Args {
    fn sampling(&self, answer: u64) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: (self.top_k > 0).then_some(self.top_k as i64),
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed.wrapping_add(answer),
        }
    }
}

struct Chat<'a> {
    args: &'a Args,
    service: Service,
    template: ChatTemplate,
    system: Option<String>,
    /// Without the system prompt.
    messages: Vec<Message>,
    /// Ctrl-C was pressed.
    stop: Arc<AtomicBool>,
    /// Somebody types.
    talks: bool,
    answers: u64,
}

impl Chat<'_> {
    fn run(&mut self) -> Result<()> {
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if self.talks {
                write_stdout("> ")?;
            }
            let Some(line) = lines.next() else { break };
            let line = line.context("cannot read what was typed")?;
            match line.trim() {
                "" => continue,
                "/exit" | "/quit" => break,
                text if text.starts_with('/') => self.command(text),
                text => match self.turn(text) {
                    // Who types can go on without that answer.
                    Err(error) if self.talks && !is_broken_pipe(&error) => {
                        self.messages.pop();
                        eprintln!("error: {error:#}");
                    }
                    done => done?,
                },
            }
        }
        if self.talks { write_stdout("\n") } else { Ok(()) }
    }

    fn command(&mut self, line: &str) {
        let (verb, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match verb {
            "/reset" => self.messages.clear(),
            "/system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_owned());
                self.messages.clear();
            }
            "/save" => match self.save(rest) {
                Ok(()) => eprintln!("saved {} messages in `{rest}`", self.all().len()),
                Err(error) => eprintln!("error: {error:#}"),
            },
            "/help" => eprintln!("{HELP}"),
            _ => eprintln!("`{verb}` is no command; /help shows them"),
        }
    }

    fn save(&self, file: &str) -> Result<()> {
        if file.is_empty() {
            return Err(anyhow!("/save needs the name of a file"));
        }
        let text = serde_json::to_string_pretty(&self.all())? + "\n";
        std::fs::write(Path::new(file), text).with_context(|| format!("cannot write `{file}`"))
    }

    /// System prompt and conversation.
    fn all(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        system.chain(self.messages.iter().cloned()).collect()
    }

    /// What somebody said, and the answer to it.
    fn turn(&mut self, text: &str) -> Result<()> {
        self.messages.push(Message::new("user", text));
        let prompt = self.prompt()?;
        self.stop.store(false, Relaxed);
        let (sender, updates) = channel();
        let request = TextRequest {
            prompt,
            n: 1,
            max_new_tokens: self.args.max_new_tokens,
            sampling: self.args.sampling(self.answers),
            stop: self.template.stops().to_vec(),
            ignore_eos: false,
            top_logprobs: None,
        };
        let on_update = Box::new(move |update| sender.send(update).is_ok());
        let id = self.service.submit(request, on_update)?;
        self.answers += 1;
        let stop = self.stop.clone();
        let answer = self.show(updates, || {
            if stop.swap(false, Relaxed) {
                self.service.cancel(id);
            }
        })?;
        self.messages.push(Message::new("assistant", answer));
        Ok(())
    }

    /// Ids of the conversation; its oldest turns go where it is too long.
    fn prompt(&mut self) -> Result<Vec<u32>> {
        let (context, tokenizer) = (self.service.context(), self.service.tokenizer());
        let room = context.saturating_sub(self.args.max_new_tokens).max(context / 2);
        let mut forgotten = 0;
        loop {
            let text = self.template.render(&self.all(), true)?;
            let ids = self.template.encode(tokenizer, &text)?;
            if ids.len() <= room || (self.messages.len() == 1 && ids.len() < context) {
                if forgotten > 0 {
                    eprintln!(
                        "(the context is full: the oldest {forgotten} messages are forgotten)"
                    );
                }
                return Ok(ids);
            }
            if self.messages.len() == 1 {
                return Err(anyhow!(
                    "this is too long: {} tokens with the system prompt, the context has {context}",
                    ids.len()
                ));
            }
            let turn = self.messages.len().min(3) - 1; // a question and its answer
            self.messages.drain(..turn);
            forgotten += turn;
        }
    }

    /// Writes the answer as it comes, and returns it.
    fn show(&self, updates: Receiver<Update>, check: impl Fn()) -> Result<String> {
        let (start, mut first) = (Instant::now(), None);
        let mut answer = String::new();
        let end = loop {
            check(); // also where pieces come without a pause
            match updates.recv_timeout(Duration::from_millis(50)) {
                Ok(Update::Piece { text, .. }) => {
                    first.get_or_insert_with(|| start.elapsed());
                    let trims = answer.is_empty() && self.template.trims_reply();
                    let text = if trims { text.trim_start() } else { &text };
                    write_stdout(text)?;
                    answer.push_str(text);
                }
                Ok(Update::Finished { reason, new_tokens, .. }) => break Ok((reason, new_tokens)),
                Ok(Update::Failed { message }) => break Err(anyhow!("{message}")),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break Err(anyhow!("the engine has ended")),
            }
        };
        write_stdout("\n")?;
        let (reason, new_tokens) = end?;
        if std::io::stderr().is_terminal() {
            let first = first.unwrap_or_default();
            let rest = (start.elapsed() - first).as_secs_f64().max(1e-9);
            let rate = new_tokens.saturating_sub(1) as f64 / rest;
            let why = match reason {
                FinishReason::Eos | FinishReason::Stop => "",
                FinishReason::Length => " | cut off at --max-new-tokens",
                FinishReason::Context => " | the context is full",
                FinishReason::Cancelled => " | stopped",
            };
            eprintln!(
                "[{new_tokens} tokens, {rate:.1} tok/s, first after {:.2} s{why}]",
                first.as_secs_f64()
            );
        }
        Ok(answer)
    }
}
