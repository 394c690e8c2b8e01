//! Decoding on the card: what its kernels choose is what the model's plain forward pass says.

use crate::common::card;
use crate::gpu::small_llama;
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use tinyllama::ffi::{self, SampleState};
use tinyllama::generate::card::covers;
use tinyllama::generate::engine::{Engine, EngineOptions, Event, Request, RequestId};
use tinyllama::generate::request::{FinishReason, GenerateOptions, Token};
use tinyllama::generate::sampler::{Sampler, SamplingParams};
use tinyllama::model::paged_cache::Batch;
use tinyllama::model::{AtUnit, GPT, ModelConfig, PagedCache};
use tinyllama::quant::{Scheme, quantise, to_card};

/// A bf16 model on the card whose logits differ enough that rounding rarely changes their order.
fn spread_model(config: &ModelConfig, device: Device) -> GPT {
    tch::manual_seed(5);
    let mut model = GPT::new(config, device);
    tch::no_grad(|| {
        let head = &model.lm_head.as_ref().unwrap().weight;
        head.shallow_clone().copy_(&(head * 5.0));
    });
    model.to_kind(Kind::BFloat16);
    assert!(covers(&model));
    model
}

#[test]
fn a_model_whose_weights_come_and_go_is_not_decoded_by_their_addresses() {
    let Some((device, _card)) = card("a_model_whose_weights_come_and_go") else { return };
    let mut model = spread_model(&small_llama(), device);
    model.at_unit = Some(AtUnit(Arc::new(|_, _| ())));
    assert!(!covers(&model));
}

#[test]
fn a_model_with_adapters_is_not_decoded_without_them() {
    let Some((device, _card)) = card("a_model_with_adapters_is_not_decoded_without_them") else {
        return;
    };
    for targets in [["v_proj"], ["o_proj"], ["gate_proj"], ["down_proj"]] {
        let mut model = spread_model(&small_llama(), device);
        model.add_lora(&targets, 4, 8.0, 0.0);
        assert!(!covers(&model), "{targets:?}");
    }
    let mut model = spread_model(&small_llama(), Device::Cpu);
    model.quantise_base(device, Kind::BFloat16, true).unwrap();
    assert!(!covers(&model), "NF4");
}

/// Tokens and end of each sample.
type Outputs = BTreeMap<(RequestId, usize), (Vec<Token>, Option<FinishReason>)>;

fn note(out: &mut Outputs, event: Event) {
    match event {
        Event::Token { request, index, token } => {
            out.entry((request, index)).or_default().0.push(token);
        }
        Event::Finished { request, index, reason } => {
            out.entry((request, index)).or_default().1 = Some(reason);
        }
        Event::Failed { error, .. } => panic!("{error:#}"),
    }
}

fn finish(engine: &mut Engine) -> Outputs {
    let mut out = Outputs::new();
    while !engine.is_idle() {
        for event in engine.step() {
            note(&mut out, event);
        }
    }
    assert_eq!(engine.blocks().0, engine.blocks().1, "every block came back");
    out
}

fn prompt(i: usize, tokens: usize) -> Vec<u32> {
    (0..tokens).map(|t| ((t * t * 31 + t * 7 + i * 131) % 500) as u32).collect()
}

fn greedy(new: usize) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens: new,
        sampling: SamplingParams::greedy(),
        ..Default::default()
    }
}

/// Each token is the most likely one by the plain fp32 pass over all of prompt and output, or as good as, and its
/// log-probability is that.
fn check_greedy(model: &GPT, prompt: &[u32], tokens: &[Token]) {
    let _no_grad = tch::no_grad_guard();
    let mut reference = GPT::empty(&model.config, model.device());
    for ((_, mut to), (_, from)) in
        reference.named_parameters().into_iter().zip(model.named_parameters())
    {
        to.copy_(&from.to_kind(Kind::Float));
    }
    reference.fused = false;
    check_by(&reference, prompt, tokens);
}

/// The same by a pass of this model.
fn check_by(model: &GPT, prompt: &[u32], tokens: &[Token]) {
    let _no_grad = tch::no_grad_guard();
    let all: Vec<i64> =
        prompt.iter().copied().chain(tokens.iter().map(|t| t.id)).map(i64::from).collect();
    let ids = Tensor::from_slice(&all).unsqueeze(0).to_device(model.device());
    let logprobs = model.forward(&ids, None).log_softmax(-1, Kind::Float).squeeze_dim(0); // (T, V)
    for (i, token) in tokens.iter().enumerate() {
        let row = logprobs.get((prompt.len() + i) as i64 - 1); // (V,)
        let (best, own) = (row.max().double_value(&[]), row.double_value(&[token.id as i64]));
        assert!(best - own < 0.15, "token {i}: {own} of the chosen one, {best} of the best");
        assert!((token.logprob - own).abs() < 0.15, "token {i}: {} told, {own}", token.logprob);
    }
}

#[test]
fn what_the_card_chooses_is_the_most_likely_by_the_plain_pass() {
    let Some((device, _card)) = card("what_the_card_chooses_is_the_most_likely_by_the_plain_pass")
    else {
        return;
    };
    let wide = ModelConfig { head_size: 128, n_head: 4, n_query_groups: 1, ..small_llama() };
    for config in [small_llama(), wide] {
        let model = spread_model(&config, device);
        // 1, 3 and 8 rows by matrix-vector products, 20 by the forward pass; few blocks: some give theirs back.
        for (requests, blocks) in [(1, 64), (3, 64), (8, 200), (20, 400), (20, 24)] {
            let sizes = EngineOptions { blocks, max_sequences: 32, ..Default::default() };
            let mut engine = Engine::new(&model, sizes);
            let mut asked = BTreeMap::new();
            for i in 0..requests {
                let (prompt, new) = (prompt(i, 1 + i * 23 % 90), 40 + 3 * i % 17);
                let options = greedy(new);
                let id =
                    engine.submit(Request { prompt: prompt.clone(), samples: 1, options }).unwrap();
                asked.insert(id, (prompt, new));
            }
            let out = finish(&mut engine);
            assert_eq!(out.len(), requests);
            for ((id, _), (tokens, reason)) in out {
                let (prompt, new) = &asked[&id];
                assert_eq!((tokens.len(), reason), (*new, Some(FinishReason::Length)));
                check_greedy(&model, prompt, &tokens);
            }
            assert_eq!(engine.counters().preempted > 0, blocks == 24, "{requests}, {blocks}");
        }
    }
}

#[test]
fn samples_share_a_prompt_on_the_card_and_draw_by_their_own_seeds() {
    let Some((device, _card)) =
        card("samples_share_a_prompt_on_the_card_and_draw_by_their_own_seeds")
    else {
        return;
    };
    let model = spread_model(&small_llama(), device);
    let run = |decode_kernels: bool, samples: usize, seed: u64, sampling: SamplingParams| {
        let sizes = EngineOptions { blocks: 200, decode_kernels, ..Default::default() };
        let mut engine = Engine::new(&model, sizes);
        let sampling = SamplingParams { seed, ..sampling };
        let options = GenerateOptions { max_new_tokens: 30, sampling, ..Default::default() };
        engine.submit(Request { prompt: prompt(3, 21), samples, options }).unwrap();
        let ids = |(tokens, _): (Vec<Token>, _)| tokens.iter().map(|t| t.id).collect::<Vec<_>>();
        finish(&mut engine).into_values().map(ids).collect::<Vec<_>>()
    };
    let warm = SamplingParams { temperature: 0.9, top_k: Some(20), ..Default::default() };
    let six = run(true, 6, 40, warm.clone());
    assert_eq!(six, run(true, 6, 40, warm.clone()), "the same in a second run");
    let alone: Vec<_> = (40..46).map(|seed| run(true, 1, seed, warm.clone()).remove(0)).collect();
    let cpu = run(false, 6, 40, warm);
    // The first tokens come of the same logits; later rounding may part two runs.
    for other in [alone, cpu] {
        let same = |n: usize| (0..6).filter(|&i| six[i][..n] == other[i][..n]).count();
        assert_eq!(same(1), 6, "{six:?}, {other:?}");
        assert!(same(4) >= 4, "{six:?}, {other:?}");
    }
    let penalty = SamplingParams { repetition_penalty: 1e9, ..SamplingParams::greedy() };
    for ids in run(true, 3, 0, penalty) {
        let mut sorted: Vec<u32> = ids.iter().copied().chain(prompt(3, 21)).collect();
        sorted.sort_unstable();
        let before = prompt(3, 21).into_iter().collect::<std::collections::HashSet<_>>().len();
        sorted.dedup();
        assert_eq!(sorted.len(), before + ids.len(), "no token comes twice");
    }
}

/// The largest difference from `want`, relative to its norm.
fn relative(got: &Tensor, want: &Tensor) -> f64 {
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    (got - &want).norm().double_value(&[]) / want.norm().double_value(&[])
}

#[test]
fn packed_weights_on_the_card_are_those_of_the_cpu() {
    let Some((device, _card)) = card("packed_weights_on_the_card_are_those_of_the_cpu") else {
        return;
    };
    let _no_grad = tch::no_grad_guard();
    tch::manual_seed(6);
    // 704 and 576 are no multiples of 128: blocks at the edge are padded.
    let config = ModelConfig { n_embd: 576, n_head: 9, n_query_groups: 3, ..small_llama() };
    let model = GPT::new(&config, Device::Cpu);
    let head = &model.lm_head.as_ref().unwrap().weight;
    head.shallow_clone().copy_(&(head * 5.0));
    for scheme in [
        Scheme::Int4 { group: 32 },
        Scheme::Int4 { group: 64 },
        Scheme::Int8 { group: 32 },
        Scheme::Int8 { group: 64 },
    ] {
        let on_card = to_card(quantise(&model, scheme).unwrap(), device).unwrap();
        assert!(covers(&on_card));
        let cpu = quantise(&model, scheme).unwrap();
        let mut row = vec![0.0; 576];
        let got = on_card.h[1].attn.proj.packed.as_ref().unwrap().dequantize().unwrap(); // (576, 576)
        for n in [0, 7, 8, 575] {
            cpu.h[1].proj.dequantise_row(n, &mut row);
            let want = Tensor::from_slice(&row).to_kind(Kind::BFloat16);
            assert_eq!(got.get(n as i64).to_device(Device::Cpu), want, "{scheme:?}, row {n}");
        }
        let mlp = on_card.packed().nth(2).unwrap().dequantize().unwrap(); // (1408, 576)
        assert_eq!(mlp.size(), [1408, 576]);

        // Prefill by dequantised products, decoding by the codes; both near the fp32 pass of the CPU.
        for requests in [1, 12] {
            let sizes = EngineOptions { blocks: 200, max_sequences: 16, ..Default::default() };
            let mut engine = Engine::new(&on_card, sizes);
            for i in 0..requests {
                let options = greedy(20);
                engine.submit(Request { prompt: prompt(i, 20 + i), samples: 1, options }).unwrap();
            }
            for ((id, _), (tokens, _)) in finish(&mut engine) {
                let prompt = prompt(id as usize, 20 + id as usize);
                check_by(&on_card, &prompt, &tokens); // what they stand for, in bf16
            }
        }
    }
}

#[test]
fn an_int8_cache_on_the_card_is_near_the_plain_pass() {
    let Some((device, _card)) = card("an_int8_cache_on_the_card_is_near_the_plain_pass") else {
        return;
    };
    let mut model = spread_model(&small_llama(), device);
    model.cache_kind = Some(Kind::Int8);
    // Two samples copy a block with its scales; 20 requests leave the matrix-vector kernels.
    for requests in [1, 20] {
        let sizes = EngineOptions { blocks: 500, max_sequences: 48, ..Default::default() };
        let mut engine = Engine::new(&model, sizes);
        for i in 0..requests {
            let options = greedy(30);
            engine.submit(Request { prompt: prompt(i, 20 + i), samples: 2, options }).unwrap();
        }
        for ((id, _), (tokens, _)) in finish(&mut engine) {
            check_greedy(&model, &prompt(id as usize, 20 + id as usize), &tokens);
        }
    }
}

#[test]
fn prompts_read_together_are_those_read_alone() {
    let Some((device, _card)) = card("prompts_read_together_are_those_read_alone") else { return };
    let _no_grad = tch::no_grad_guard();
    let model = spread_model(&small_llama(), device);
    let prompts: Vec<Vec<u32>> = (0..5).map(|i| prompt(i, 3 + 37 * i)).collect();
    let tables: Vec<Vec<u32>> = (0..5).map(|i| (i * 12..i * 12 + 12).collect()).collect();
    let read = |parts: &[(&[u32], usize, &[u32])], cache: &mut PagedCache| {
        model.hidden_paged(&Batch::new(parts, device), cache) // (N, C)
    };
    let cache = || PagedCache::new(&model.config, 60, Kind::BFloat16, device);
    // The first of them in two pieces: its second has tokens in the cache.
    let mut together = cache();
    let head: (&[u32], usize, &[u32]) = (&prompts[4][..100], 0, &tables[4]);
    let _ = read(&[head], &mut together);
    let mut parts: Vec<(&[u32], usize, &[u32])> = vec![(&prompts[4][100..], 100, &tables[4])];
    parts.extend((0..4).map(|i| (&prompts[i][..], 0, &tables[i][..])));
    let got = read(&parts, &mut together); // (N, C)
    let mut at = 0;
    for (i, from) in [(4, 100), (0, 0), (1, 0), (2, 0), (3, 0)] {
        let alone = read(&[(&prompts[i], 0, &tables[i])], &mut cache()); // (T, C)
        let n = (prompts[i].len() - from) as i64;
        let error = relative(&got.narrow(0, at, n), &alone.narrow(0, from as i64, n));
        assert!(error < 0.02, "prompt {i}: {error}");
        at += n;
    }
}

#[test]
fn requests_end_stop_and_come_while_others_run_on_the_card() {
    let Some((device, _card)) = card("requests_end_stop_and_come_while_others_run_on_the_card")
    else {
        return;
    };
    let model = spread_model(&small_llama(), device);
    let mut engine =
        Engine::new(&model, EngineOptions { blocks: 200, max_sequences: 16, ..Default::default() });
    let request = |i: usize, options| Request { prompt: prompt(i, 30 + i), samples: 1, options };
    let id = engine.submit(request(0, greedy(60))).unwrap();
    let long = finish(&mut engine).remove(&(id, 0)).unwrap().0;

    // An end token, alternatives (which the card does not make), a cancelled one, and one that comes later.
    let end = GenerateOptions { eos: vec![long[20].id], ..greedy(60) };
    let first = long.iter().position(|t| t.id == long[20].id).unwrap();
    let ended = engine.submit(request(0, end)).unwrap();
    let with_top =
        engine.submit(request(0, GenerateOptions { top_logprobs: 2, ..greedy(9) })).unwrap();
    let cancelled = engine.submit(request(5, greedy(100))).unwrap();
    let (mut out, mut later) = (Outputs::new(), None);
    for step in 0.. {
        if step == 10 {
            engine.cancel(cancelled);
            later = Some(engine.submit(request(7, greedy(25))).unwrap());
        }
        for event in engine.step() {
            note(&mut out, event);
        }
        if engine.is_idle() {
            break;
        }
    }
    let (tokens, reason) = &out[&(ended, 0)];
    assert_eq!((tokens.len(), *reason), (first + 1, Some(FinishReason::Eos)));
    let (tokens, _) = &out[&(with_top, 0)];
    assert!(tokens.len() == 9 && tokens.iter().all(|t| t.top.len() == 2));
    check_greedy(&model, &prompt(0, 30), tokens);
    assert_eq!(out[&(cancelled, 0)].1, None);
    let (tokens, _) = &out[&(later.unwrap(), 0)];
    assert_eq!(tokens.len(), 25);
    check_greedy(&model, &prompt(7, 37), tokens);
    assert_eq!(engine.blocks().0, engine.blocks().1);
}

#[test]
fn an_engine_that_was_reset_while_it_ran_on_the_card_answers_as_a_new_one() {
    let Some((device, _card)) =
        card("an_engine_that_was_reset_while_it_ran_on_the_card_answers_as_a_new_one")
    else {
        return;
    };
    let model = spread_model(&small_llama(), device);
    // Blocks for one round: those that the forgotten rows wrote are written by the rows that come.
    let sizes = EngineOptions { blocks: 40, max_sequences: 16, ..Default::default() };
    let mut engine = Engine::new(&model, sizes);
    let ask = |engine: &mut Engine, rows: usize| -> BTreeMap<RequestId, Vec<u32>> {
        let ask = |i| {
            let prompt = prompt(10 * rows + i, 5 + i);
            let request = Request { prompt: prompt.clone(), samples: 1, options: greedy(50) };
            (engine.submit(request).unwrap(), prompt)
        };
        (0..rows).map(ask).collect()
    };
    for rows in [8, 1, 6] {
        ask(&mut engine, rows);
        for _ in 0..20 {
            engine.step();
        }
        assert!(!engine.is_idle()); // a step is under way on the card
        engine.reset();
        assert!(engine.is_idle() && engine.step().is_empty());
        assert_eq!(engine.blocks(), (40, 40));
    }
    let asked = ask(&mut engine, 3);
    let out = finish(&mut engine);
    assert_eq!(out.len(), 3);
    for ((id, _), (tokens, reason)) in out {
        assert_eq!((tokens.len(), reason), (50, Some(FinishReason::Length)));
        check_greedy(&model, &asked[&id], &tokens);
    }
}

#[test]
fn logits_that_are_not_finite_fail_their_request_on_the_card_alone() {
    let Some((device, _card)) =
        card("logits_that_are_not_finite_fail_their_request_on_the_card_alone")
    else {
        return;
    };
    let model = spread_model(&small_llama(), device);
    tch::no_grad(|| {
        let _ = model.wte.weight.get(499).fill_(f64::NAN);
    });
    let mut engine = Engine::new(&model, EngineOptions { blocks: 100, ..Default::default() });
    let submit = |engine: &mut Engine, prompt: Vec<u32>| {
        engine.submit(Request { prompt, samples: 1, options: greedy(9) }).unwrap()
    };
    let good = submit(&mut engine, vec![1, 2]);
    let (mut made, mut failed, mut bad) = (0, Vec::new(), None);
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                Event::Token { request, .. } => made += usize::from(request == good),
                Event::Failed { request, error } => failed.push((request, format!("{error:#}"))),
                Event::Finished { .. } => {}
            }
        }
        // Prompts that are read together share the kernels' tiles, and a NaN there.
        if bad.is_none() {
            bad = Some(submit(&mut engine, vec![1, 499]));
        }
    }
    assert_eq!(made, 9);
    assert!(failed.len() == 1 && Some(failed[0].0) == bad, "{failed:?}");
    assert!(failed[0].1.contains("not finite"), "{failed:?}");
}

#[test]
fn the_card_draws_what_the_sampler_draws() {
    let Some((device, _card)) = card("the_card_draws_what_the_sampler_draws") else { return };
    let parameters = |temperature, top_k, top_p, repetition_penalty| SamplingParams {
        temperature,
        top_k,
        top_p,
        repetition_penalty,
        seed: 0,
    };
    let all = [
        parameters(0.0, None, 1.0, 1.0),
        parameters(1.0, None, 1.0, 1.0),
        parameters(0.8, Some(50), 1.0, 1.0),
        parameters(0.7, None, 0.9, 1.2),
        parameters(1.3, Some(40), 0.5, 0.8),
        parameters(1.0, Some(1), 1.0, 1.0),
    ];
    for (vocab, padded, kind) in
        [(32000, 32000, Kind::Float), (1003, 1024, Kind::BFloat16), (50000, 50000, Kind::Float)]
    {
        tch::manual_seed(9);
        let rows = 32;
        let logits = (Tensor::randn([rows, padded], (Kind::Float, device)) * 3.0).to_kind(kind);
        for params in &all {
            let per_row = |row: i64| SamplingParams { seed: row as u64, ..params.clone() };
            let seen: Vec<u32> = (0..40).map(|i| (i * 97) % vocab as u32).collect();
            let drawn: Vec<u32> = (0..rows)
                .map(|row| {
                    let mut sampler =
                        Sampler::new(&per_row(row), &seen, vocab, Device::Cpu).unwrap();
                    sampler.follow(&[seen[0]; 3]);
                    let row = logits.get(row).narrow(0, 0, vocab).to_device(Device::Cpu);
                    sampler.sample(&row).unwrap()
                })
                .collect();
            let got =
                draw_on_card(&logits, vocab, &seen, &(0..rows).map(per_row).collect::<Vec<_>>());
            assert_eq!(got, drawn, "{vocab} {kind:?} {params:?}");
        }
    }
}

/// The fourth draw of each row.
fn draw_on_card(logits: &Tensor, vocab: i64, seen: &[u32], params: &[SamplingParams]) -> Vec<u32> {
    use rand_chacha::rand_core::SeedableRng;
    let device = logits.device();
    let b = params.len() as i64;
    let floats = |f: &dyn Fn(&SamplingParams) -> f64| {
        let values: Vec<f32> = params.iter().map(|p| f(p) as f32).collect();
        Tensor::from_slice(&values).to_device(device)
    };
    let fill = |n: i64| Tensor::full([b], n, (Kind::Int, device));
    let mut bits = vec![0u32; (vocab as usize).div_ceil(32)];
    seen.iter().for_each(|&id| bits[id as usize / 32] |= 1 << (id % 32));
    let bits: Vec<i32> = bits.into_iter().map(|word| word as i32).collect();
    let keys: Vec<i32> = params
        .iter()
        .flat_map(|p| rand_chacha::ChaCha8Rng::seed_from_u64(p.seed).get_seed())
        .collect::<Vec<u8>>()
        .chunks(4)
        .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let state = SampleState {
        temperature: floats(&|p| p.temperature),
        top_k: floats(&|p| p.top_k.unwrap_or(0) as f64).to_kind(Kind::Int),
        top_p: floats(&|p| p.top_p),
        repetition_penalty: floats(&|p| p.repetition_penalty),
        seen: Tensor::from_slice(&bits).to_device(device).repeat([b, 1]),
        key: Tensor::from_slice(&keys).view([b, 8]).to_device(device),
        count: fill(3),
        positions: fill(7),
        next: fill(-1),
        log_prob: Tensor::zeros([b], (Kind::Float, device)),
        not_finite: fill(0),
        ids: Tensor::zeros([b, 4], (Kind::Int, device)),
    };
    let embedding = Tensor::randn([vocab, 64], (Kind::BFloat16, device));
    let x = Tensor::zeros([b, 64], (Kind::BFloat16, device));
    ffi::sample(logits, &state, params.len(), vocab, &embedding, &x).unwrap();
    let next: Vec<i64> = Vec::try_from(&state.next.to_kind(Kind::Int64)).unwrap();
    assert!(x.equal(&embedding.index_select(0, &state.next.to_kind(Kind::Int64))));
    assert_eq!(state.count, fill(4));
    assert_eq!(state.positions, fill(8));
    next.into_iter().map(|id| id as u32).collect()
}
