//! The engine: whatever it does at the same time, each sequence is what the plain loop says alone.

use crate::small_models::{
    EOS, VOCAB, alphabet, families, greedy, ids_of, random_ids, tiny, tokens_of, with_seed,
    write_tokenizer,
};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use tch::Kind;
use tinyllama::generate::engine::{Engine, EngineOptions, Event, Request, RequestId};
use tinyllama::generate::load::Loaded;
use tinyllama::generate::request::{FinishReason, GenerateOptions};
use tinyllama::generate::sampler::SamplingParams;
use tinyllama::generate::service::{Refused, Service, TextRequest, Update};
use tinyllama::generate::{Network, generate_plain};
use tinyllama::model::GPT;
use tinyllama::tokenizer::Tokenizer;

/// Tokens and end of each sample, by request and index.
type Outputs = BTreeMap<(RequestId, usize), (Vec<u32>, Option<FinishReason>)>;

/// Steps until nothing is left.
fn finish(engine: &mut Engine) -> Outputs {
    let mut out = Outputs::new();
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                Event::Token { request, index, token } => {
                    out.entry((request, index)).or_default().0.push(token.id);
                }
                Event::Finished { request, index, reason } => {
                    let ended = &mut out.entry((request, index)).or_default().1;
                    assert_eq!(ended.replace(reason), None, "ended once");
                }
                Event::Failed { error, .. } => panic!("{error:#}"),
            }
        }
    }
    assert_eq!(engine.blocks().0, engine.blocks().1, "every block came back");
    out
}

fn plain(
    model: &GPT,
    prompt: &[u32],
    options: &GenerateOptions,
) -> (Vec<u32>, Option<FinishReason>) {
    let out = generate_plain(model, prompt, options, &mut |_| Ok(true)).unwrap();
    (out.tokens, Some(out.finish_reason))
}

/// Draws at a temperature that is not 1.
fn warm(seed: u64) -> GenerateOptions {
    let mut options = with_seed(seed);
    options.sampling.temperature = 0.7;
    options
}

fn request(prompt: Vec<u32>, samples: usize, options: GenerateOptions) -> Request {
    Request { prompt, samples, options }
}

fn sizes(blocks: usize) -> EngineOptions {
    EngineOptions { blocks, ..Default::default() }
}

/// 64 prompts of 1 to 63 tokens, no two with the same options.
fn mixed() -> Vec<(Vec<u32>, GenerateOptions)> {
    let one = |i: usize| {
        let prompt: Vec<u32> = random_ids(200)[i..i + 1 + i * 31 % 63].to_vec();
        let sampling = SamplingParams {
            temperature: [0.0, 0.7, 1.0, 1.3][i % 4],
            top_k: [None, Some(5), Some(50)][i % 3],
            top_p: [1.0, 0.9][i % 2],
            repetition_penalty: [1.0, 1.2, 1.0][i % 3],
            seed: i as u64,
        };
        let options =
            GenerateOptions { max_new_tokens: 1 + i * 7 % 40, sampling, ..Default::default() };
        (prompt, options)
    };
    (0..64).map(one).collect()
}

#[test]
fn many_requests_at_a_time_say_what_each_says_alone() {
    for (name, model) in families() {
        // With few blocks sequences give theirs back; with few tokens a step prompts are read in pieces.
        for (blocks, max_sequences, max_step_tokens) in [(512, 64, 512), (12, 64, 512), (64, 7, 5)]
        {
            let sizes =
                EngineOptions { blocks, max_sequences, max_step_tokens, ..Default::default() };
            let mut engine = Engine::new(&model, sizes);
            let mut asked = BTreeMap::new();
            for (prompt, options) in mixed() {
                let id = engine.submit(request(prompt.clone(), 1, options.clone())).unwrap();
                asked.insert(id, (prompt, options));
            }
            let out = finish(&mut engine);
            assert_eq!(out.len(), 64);
            for ((id, _), got) in out {
                let (prompt, options) = &asked[&id];
                assert_eq!(got, plain(&model, prompt, options), "{name}, {sizes:?}, request {id}");
            }
            assert_eq!(engine.counters().preempted > 0, blocks == 12, "{name}, {sizes:?}");
        }
    }
}

#[test]
fn requests_that_come_while_others_run_change_nothing() {
    let model = tiny("tiny-llama-1.1b", 2);
    let mut engine = Engine::new(&model, sizes(64));
    let first = engine.submit(request(random_ids(9), 1, with_seed(3))).unwrap();
    let mut tokens = Vec::new();
    for step in 0.. {
        if step == 4 {
            engine.submit(request(random_ids(30), 2, with_seed(4))).unwrap();
        }
        for event in engine.step() {
            if let Event::Token { request, token, .. } = event {
                tokens.extend((request == first).then_some(token.id));
            }
        }
        if engine.is_idle() {
            break;
        }
    }
    assert_eq!(tokens, tokens_of(&model, &random_ids(9), &with_seed(3)));
}

#[test]
fn samples_share_their_prompt_and_draw_with_seeds_of_their_own() {
    let model = tiny("tiny-llama-1.1b", 2);
    for prompt in [5, 16, 37] {
        // 5 samples alone need 3 + 5 blocks at most for a prompt of 37; with 6, some read it again.
        for blocks in [64, 6] {
            let mut engine = Engine::new(&model, sizes(blocks));
            let prompt = random_ids(prompt);
            let id = engine.submit(request(prompt.clone(), 5, warm(100))).unwrap();
            let out = finish(&mut engine);
            assert_eq!(out.len(), 5);
            for index in 0..5 {
                let alone = plain(&model, &prompt, &warm(100 + index as u64));
                assert_eq!(out[&(id, index)], alone, "{} tokens, {blocks} blocks", prompt.len());
            }
        }
    }
    let prompt = random_ids(37);
    let mut engine = Engine::new(&model, sizes(64));
    engine.submit(request(prompt, 5, with_seed(100))).unwrap();
    engine.step();
    assert_eq!(engine.sequences(), (5, 0));
    assert_eq!(engine.blocks(), (64 - 2 - 5, 64), "two full blocks once, the third one each");
}

#[test]
fn a_prompt_that_begins_like_an_earlier_one_is_not_read_again() {
    let model = tiny("tiny-llama-1.1b", 2);
    let mut engine = Engine::new(&model, sizes(16));
    let mut other = random_ids(50);
    other[40] ^= 1;
    let prompts = [random_ids(50), random_ids(50), other, random_ids(48)];
    let mut cached = 0;
    for (prompt, expected) in prompts.iter().zip([0, 48, 32, 32]) {
        let id = engine.submit(request(prompt.clone(), 1, greedy(8))).unwrap();
        let out = finish(&mut engine);
        assert_eq!(out[&(id, 0)], plain(&model, prompt, &greedy(8)));
        let now = engine.counters().cached_prompt_tokens;
        assert_eq!(now - cached, expected, "the last token is always read");
        cached = now;
    }
    // A conversation goes on: what was generated is known as well.
    let mut longer = random_ids(44);
    longer.extend(tokens_of(&model, &longer.clone(), &greedy(8)));
    engine.submit(request(random_ids(44), 1, greedy(8))).unwrap();
    finish(&mut engine);
    let before = engine.counters().cached_prompt_tokens;
    let id = engine.submit(request(longer.clone(), 1, greedy(8))).unwrap();
    let out = finish(&mut engine);
    assert_eq!(engine.counters().cached_prompt_tokens - before, 48);
    assert_eq!(out[&(id, 0)], plain(&model, &longer, &greedy(8)));
}

#[test]
fn each_way_to_end_frees_the_blocks() {
    let model = alphabet();
    let mut engine = Engine::new(&model, sizes(64));
    let eos = GenerateOptions { eos: vec![EOS], ..greedy(40) };
    let by_eos = engine.submit(request(ids_of("j"), 1, eos)).unwrap();
    let by_length = engine.submit(request(ids_of("a"), 2, greedy(3))).unwrap();
    let by_context = engine.submit(request(ids_of("a").repeat(60), 1, greedy(9))).unwrap();
    let nothing = engine.submit(request(ids_of("a"), 1, greedy(0))).unwrap();
    let out = finish(&mut engine);
    let mut expected = ids_of("klm");
    expected.push(EOS);
    assert_eq!(out[&(by_eos, 0)], (expected, Some(FinishReason::Eos)));
    assert_eq!(out[&(by_length, 1)], (ids_of("bcd"), Some(FinishReason::Length)));
    assert_eq!(out[&(by_context, 0)], (ids_of("bcde"), Some(FinishReason::Context)));
    assert_eq!(out[&(nothing, 0)], (vec![], Some(FinishReason::Length)));

    let cancelled = engine.submit(request(ids_of("n"), 3, greedy(40))).unwrap();
    let stopped = engine.submit(request(ids_of("n"), 2, greedy(5))).unwrap();
    engine.step();
    engine.cancel(cancelled);
    engine.stop(stopped, 1);
    let out = finish(&mut engine);
    assert_eq!(out.keys().collect::<Vec<_>>(), [&(stopped, 0)]);
}

#[test]
fn alternatives_are_the_most_likely_ids_and_their_logprobs() {
    let model = tiny("tiny-llama-1.1b", 2);
    let prompt = random_ids(7);
    let options = GenerateOptions { top_logprobs: 3, ..greedy(1) };
    let mut engine = Engine::new(&model, sizes(8));
    engine.submit(request(prompt.clone(), 1, options)).unwrap();
    let Some(Event::Token { token, .. }) = engine.step().into_iter().next() else { panic!() };
    let ids: Vec<i64> = prompt.iter().map(|&id| id as i64).collect();
    let logits = model.forward(&tch::Tensor::from_slice(&ids).unsqueeze(0), None);
    let logprobs = logits.select(1, -1).squeeze_dim(0).log_softmax(-1, Kind::Double);
    let (values, ids) = logprobs.topk(3, 0, true, true);
    for (i, &(id, logprob)) in token.top.iter().enumerate() {
        assert_eq!(id as i64, ids.int64_value(&[i as i64]));
        assert!((logprob - values.double_value(&[i as i64])).abs() < 1e-5);
    }
    assert_eq!((token.top.len(), token.top[0].0), (3, token.id));
}

#[test]
fn a_request_whose_logits_are_not_finite_fails_alone() {
    let model = tiny("tiny-llama-1.1b", 2);
    let poison = 200;
    tch::no_grad(|| drop(model.wte.weight.get(poison).fill_(f64::NAN)));
    let healthy: Vec<u32> = (1..20).collect();
    let mut engine = Engine::new(&model, sizes(64));
    let good = engine.submit(request(healthy.clone(), 1, greedy(1))).unwrap();
    let bad = engine.submit(request(vec![5, poison as u32], 2, greedy(4))).unwrap();
    let events = engine.step();
    let failed = |event: &Event| matches!(event, Event::Failed { request, .. } if *request == bad);
    assert!(events.iter().any(failed), "{events:?}");
    let said = |event: &Event| matches!(event, Event::Token { request, .. } if *request == good);
    assert!(events.iter().any(said), "{events:?}");
    assert!(engine.is_idle());
    assert_eq!(engine.blocks(), (64, 64));
}

#[test]
fn requests_that_cannot_be_are_refused_with_numbers() {
    let model = tiny("tiny-llama-1.1b", 1);
    let mut engine = Engine::new(&model, sizes(2));
    let refused = |engine: &mut Engine, prompt: Vec<u32>, options: GenerateOptions| {
        let error = engine.submit(request(prompt, 1, options)).unwrap_err();
        assert_eq!(tinyllama::error::exit_code(&error), 2);
        error.to_string()
    };
    let small = "the cache is too small: 40 tokens of prompt and output, room for 32";
    assert_eq!(refused(&mut engine, random_ids(30), greedy(10)), small);
    assert_eq!(refused(&mut engine, vec![], greedy(10)), "the prompt has no tokens");
    let mut hot = greedy(1);
    hot.sampling.temperature = -1.0;
    assert!(refused(&mut engine, random_ids(3), hot).contains("`temperature`"));
    assert!(engine.is_idle());
}

// ---------------------------------------------------------------------------------------- service

fn service(model: GPT, blocks: usize, max_waiting: usize) -> Service {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(dir.path(), 0);
    let tokenizer = Some(Tokenizer::load(dir.path()).unwrap());
    let sizes = EngineOptions { max_sequences: 4, ..sizes(blocks) };
    let network = Network::Dense(Box::new(model));
    Service::start(Loaded { network, tokenizer, eos: vec![EOS] }, sizes, max_waiting).unwrap()
}

fn text_request(prompt: &str, max_new_tokens: usize) -> TextRequest {
    TextRequest {
        prompt: ids_of(prompt),
        n: 1,
        max_new_tokens,
        sampling: SamplingParams::greedy(),
        stop: Vec::new(),
        ignore_eos: false,
        top_logprobs: None,
    }
}

/// Updates of a request, in order.
fn ask(service: &Service, request: TextRequest) -> Receiver<Update> {
    let (sender, updates) = channel();
    service.submit(request, Box::new(move |update| sender.send(update).is_ok())).unwrap();
    updates
}

/// Text, end and number of tokens of sample 0.
fn told(updates: Receiver<Update>) -> (String, FinishReason, usize) {
    let mut all = String::new();
    for update in updates {
        match update {
            Update::Piece { text, .. } => all.push_str(&text),
            Update::Finished { reason, new_tokens, .. } => return (all, reason, new_tokens),
            Update::Failed { message } => panic!("{message}"),
        }
    }
    panic!("no end after `{all}`")
}

#[test]
fn a_service_tells_text_and_the_end_of_it() {
    let service = service(alphabet(), 64, 64);
    assert_eq!(told(ask(&service, text_request("a", 4))), ("bcde".into(), FinishReason::Length, 4));
    let to_eos = text_request("i", 40);
    assert_eq!(told(ask(&service, to_eos.clone())), ("jklm".into(), FinishReason::Eos, 5));
    let stop = TextRequest { stop: vec!["fgh".into(), "xx".into()], ..text_request("a", 20) };
    assert_eq!(told(ask(&service, stop)), ("bcde".into(), FinishReason::Stop, 7));
    let on = TextRequest { ignore_eos: true, max_new_tokens: 7, ..to_eos };
    let (text, reason, _) = told(ask(&service, on));
    assert!(text.starts_with("jklm") && reason == FinishReason::Length, "{text}");

    let with = TextRequest { top_logprobs: Some(2), ..text_request("a", 3) };
    let updates: Vec<Update> = ask(&service, with).iter().collect();
    let tokens = updates.iter().flat_map(|update| match update {
        Update::Piece { tokens, .. } => tokens.clone(),
        _ => Vec::new(),
    });
    let ids: Vec<u32> = tokens.map(|t| (t.top.len() == 2).then_some(t.id).unwrap()).collect();
    assert_eq!(ids, ids_of("bcd"));
    assert!(service.wait_until_idle(Duration::from_secs(60)));
    let status = service.status();
    assert_eq!((status.finished, status.free_blocks, status.running), (5, 64, 0));
}

#[test]
fn whoever_loses_interest_ends_the_request_and_frees_its_blocks() {
    let service = service(tiny("tiny-llama-1.1b", 2), 64, 64);
    let gone = |_: Update| false;
    service.submit(text_request("abc", 60), Box::new(gone)).unwrap();
    let (sender, updates) = channel();
    let request = TextRequest { n: 2, ignore_eos: true, ..text_request("abc", 60) };
    let id = service.submit(request, Box::new(move |update| sender.send(update).is_ok())).unwrap();
    let first = updates.recv().unwrap();
    service.cancel(id);
    let rest: Vec<Update> = std::iter::once(first).chain(updates).collect();
    let cancelled = |update: &&Update| {
        matches!(update, Update::Finished { reason: FinishReason::Cancelled, .. })
    };
    assert_eq!(rest.iter().filter(cancelled).count(), 2, "{rest:?}");
    assert!(service.wait_until_idle(Duration::from_secs(60)));
    let status = service.status();
    assert_eq!((status.cancelled, status.free_blocks), (2, 64));
}

#[test]
fn a_full_queue_and_a_stopping_service_refuse() {
    let service = service(tiny("tiny-llama-1.1b", 2), 64, 2);
    let (wait, go) = channel::<()>();
    // The first update holds the engine's thread until all others have been handed in.
    let hold = move |_: Update| go.recv().is_err();
    service.submit(text_request("abc", 2), Box::new(hold)).unwrap();
    let mut taken = Vec::new();
    let refused = loop {
        match service.submit(text_request("abc", 2), Box::new(|_| true)) {
            Ok(id) => taken.push(id),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Refused::QueueFull { limit: 2, .. }), "{refused}");
    assert_eq!(taken.len(), 5, "4 may run and 2 may wait");
    service.stop_accepting();
    let refused = service.submit(text_request("abc", 2), Box::new(|_| true)).unwrap_err();
    assert!(matches!(refused, Refused::Stopping), "{refused}");
    drop(wait);
    assert!(service.wait_until_idle(Duration::from_secs(60)), "what was taken is finished");
}

#[test]
fn a_service_refuses_what_cannot_be() {
    let service = service(tiny("tiny-llama-1.1b", 2), 2, 64);
    let submit = |request| service.submit(request, Box::new(|_| true)).unwrap_err().to_string();
    // The model's context is 64, but the whole cache holds 32.
    let long = "the prompt has 32 tokens, the context is 32";
    assert_eq!(submit(text_request(&"a".repeat(32), 2)), long);
    assert_eq!(submit(text_request("", 2)), "the prompt has no tokens");
    let mut odd = text_request("a", 2);
    odd.sampling.top_p = 2.0;
    assert!(submit(odd).contains("`top_p`"));
    assert!(
        submit(TextRequest { stop: vec![String::new()], ..text_request("a", 2) }).contains("stop")
    );
    let fills: Vec<Update> = ask(&service, text_request(&"a".repeat(28), 10)).iter().collect();
    let Some(Update::Finished { reason, .. }) = fills.last() else { panic!("{fills:?}") };
    assert_eq!(*reason, FinishReason::Length);
    let foreign = TextRequest { prompt: vec![VOCAB as u32], ..text_request("a", 2) };
    let foreign: Vec<Update> = ask(&service, foreign).iter().collect();
    assert!(matches!(&foreign[..], [Update::Failed { message }] if message.contains("vocabulary")));
}
