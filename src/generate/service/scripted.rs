//! A service without a model, for tests of what stands on it: it says given texts, a byte a token.

use super::{Open, Order, Sample, Service, Shared, Status, TextStream, Update, lock};
use crate::generate::engine::RequestId;
use crate::generate::request::{FinishReason, Token};
use crate::tokenizer::Tokenizer;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const EOS: u32 = 1;

/// What it says, and how fast.
#[derive(Clone)]
pub struct Script {
    /// A sample of seed s says text s modulo their number, then eos; with `ignore_eos` it says it again.
    pub texts: Vec<String>,
    /// Time of a step, which makes one token of each sample that runs.
    pub step: Duration,
    pub context: usize,
    pub max_running: usize,
    pub max_waiting: usize,
    /// A request fails when its first sample has so many tokens.
    pub fails_after: Option<usize>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            texts: vec!["Llamas eat grass.".into(), "Hay, mostly.".into()],
            step: Duration::from_millis(1),
            context: 256,
            max_running: 64,
            max_waiting: 64,
            fails_after: None,
        }
    }
}

/// A byte-level tokenizer without merges: `<s>` is 0, `</s>` 1, a byte's id is byte + 2.
pub fn byte_tokenizer() -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    write_byte_tokenizer(dir.path());
    Tokenizer::load(dir.path()).unwrap()
}

fn write_byte_tokenizer(dir: &Path) {
    // The characters that byte-level BPE writes bytes as.
    let mut shifted = 256u32..;
    let letters = (0..256u32).map(|b| match b {
        33..=126 | 161..=172 | 174..=255 => b,
        _ => shifted.next().unwrap(),
    });
    let letters = letters.map(|c| char::from_u32(c).unwrap().to_string());
    let special = ["<s>".to_string(), "</s>".to_string()];
    let vocab: serde_json::Map<_, _> =
        special.into_iter().chain(letters).zip((0..).map(serde_json::Value::from)).collect();
    let added = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let bytes = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": false});
    let json = serde_json::json!({"version": "1.0", "added_tokens": [added(0, "<s>"), added(1, "</s>")],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "vocab": vocab, "merges": [],
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false}});
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    let config = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true,
        "tokenizer_class": "PreTrainedTokenizerFast"});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

impl Service {
    /// Says what the script says; all else is as of a service with a model.
    pub fn scripted(script: Script) -> Self {
        let tokenizer = Arc::new(byte_tokenizer());
        let Script { context, max_running, max_waiting, .. } = script;
        let shared = Arc::new(Shared::default());
        let (orders, taken) = channel();
        let theirs = (tokenizer.clone(), shared.clone());
        let thread =
            std::thread::spawn(move || Stage::new(script, &theirs.0).run(taken, &theirs.1));
        let (orders, thread) = (std::sync::Mutex::new(Some(orders)), Some(thread));
        let next = AtomicU64::new(0);
        Self { tokenizer, context, max_running, max_waiting, next, orders, shared, thread }
    }
}

struct Stage<'a> {
    script: Script,
    tokenizer: &'a Tokenizer,
    open: Vec<(Open<'a>, Rest)>,
    status: Status,
    counted: usize,
}

/// What a request's samples have yet to say.
struct Rest {
    tokens: Vec<VecDeque<u32>>,
    /// Of prompt and output.
    room: usize,
    most: usize,
    top: usize,
}

impl<'a> Stage<'a> {
    fn new(script: Script, tokenizer: &'a Tokenizer) -> Self {
        Self { script, tokenizer, open: Vec::new(), status: Status::default(), counted: 0 }
    }

    fn run(mut self, orders: Receiver<Order>, shared: &Shared) {
        loop {
            self.report(shared);
            if self.open.is_empty() {
                match orders.recv() {
                    Ok(order) => self.take(order),
                    Err(_) => return,
                }
            }
            orders.try_iter().for_each(|order| self.take(order));
            std::thread::sleep(self.script.step);
            self.step();
        }
    }

    fn take(&mut self, order: Order) {
        let (id, request, on_update) = match order {
            Order::Take(id, request, on_update) => (id, request, on_update),
            Order::Cancel(id) => return self.cancel(|open| open.id == id),
        };
        self.counted += request.n;
        self.status.prompt_tokens += request.prompt.len() as u64;
        let text = TextStream::new(self.tokenizer, &request.prompt, &request.stop).unwrap();
        let sample = || Sample { text: text.clone(), tokens: vec![], new_tokens: 0, ended: false };
        let samples = (0..request.n).map(|_| sample()).collect();
        let tokens = (0..request.n as u64).map(|i| {
            let texts = &self.script.texts;
            let text =
                &texts[(request.sampling.seed.wrapping_add(i) % texts.len() as u64) as usize];
            let bytes: Vec<u32> = text.bytes().map(|b| b as u32 + 2).collect();
            match request.ignore_eos {
                true => bytes.iter().copied().cycle().take(request.max_new_tokens + 1).collect(),
                false => bytes.into_iter().chain([EOS]).collect(),
            }
        });
        let rest = Rest {
            tokens: tokens.collect(),
            room: self.script.context - request.prompt.len(),
            most: request.max_new_tokens,
            top: request.top_logprobs.unwrap_or(0),
        };
        let with_logprobs = request.top_logprobs.is_some();
        self.open.push((Open { id, on_update, with_logprobs, samples }, rest));
    }

    fn cancel(&mut self, which: impl Fn(&Open) -> bool) {
        for (mut open, _) in self.open.extract_if(.., |(open, _)| which(open)) {
            self.status.cancelled += 1;
            for (index, sample) in open.samples.iter().enumerate().filter(|(_, s)| !s.ended) {
                let (reason, new_tokens) = (FinishReason::Cancelled, sample.new_tokens);
                (open.on_update)(Update::Finished { index, reason, new_tokens });
            }
        }
    }

    fn step(&mut self) {
        let mut budget = self.script.max_running;
        let (mut failed, mut unwanted): (Vec<RequestId>, Vec<RequestId>) = (vec![], vec![]);
        for (open, rest) in &mut self.open {
            for index in 0..open.samples.len() {
                if open.samples[index].ended || budget == 0 {
                    continue;
                }
                budget -= 1;
                self.status.new_tokens += 1;
                if self.script.fails_after == Some(open.samples[index].new_tokens) {
                    failed.push(open.id);
                    break;
                }
                if !speak(open, rest, index) {
                    unwanted.push(open.id);
                    break;
                }
            }
        }
        for (mut open, _) in self.open.extract_if(.., |(open, _)| failed.contains(&open.id)) {
            self.status.failed += 1;
            (open.on_update)(Update::Failed { message: "the script fails here".into() });
        }
        self.cancel(|open| unwanted.contains(&open.id));
        let done = |open: &Open| open.samples.iter().all(|sample| sample.ended);
        self.status.finished += self.open.extract_if(.., |(open, _)| done(open)).count() as u64;
    }

    fn report(&mut self, shared: &Shared) {
        let samples = self.open.iter().flat_map(|(open, _)| &open.samples);
        let all = samples.filter(|sample| !sample.ended).count();
        let running = all.min(self.script.max_running);
        let mut state = lock(&shared.state);
        state.on_the_way -= std::mem::take(&mut self.counted);
        let (free_blocks, all_blocks) = (1024usize.saturating_sub(running), 1024);
        state.status =
            Status { running, waiting: all - running, free_blocks, all_blocks, ..self.status };
        if all == 0 {
            shared.idle.notify_all();
        }
    }
}

/// A sample's next token; whether somebody wants more.
fn speak(open: &mut Open, rest: &mut Rest, index: usize) -> bool {
    let id = rest.tokens[index].pop_front().unwrap_or(EOS);
    let top = (0..rest.top as u32).map(|i| ((id + i) % 258, -0.25 - f64::from(i))).collect();
    let told = open.token(index, Token { id, logprob: -0.25, is_eos: id == EOS, top });
    rest.room -= usize::from(index == 0);
    let reason = match () {
        _ if told.stopped => FinishReason::Stop,
        _ if id == EOS => FinishReason::Eos,
        _ if open.samples[index].new_tokens >= rest.most => FinishReason::Length,
        _ if rest.room == 0 => FinishReason::Context,
        _ => return told.wanted,
    };
    open.finish(index, reason);
    true
}
