//! Speculative decoding: the model's own output, greedily; the model's own distribution, drawn.

use crate::small_models::{
    EOS, alphabet, checkpoint, greedy, ids_of, random_ids, run_program, tiny, tokens_of, with_seed,
    write_tokenizer,
};
use std::collections::HashMap;
use tch::Device;
use tinyllama::generate::network::NetworkRef;
use tinyllama::generate::request::{FinishReason, GenerateOptions};
use tinyllama::generate::speculative::{Acceptance, Draft, check_tokenizers, generate_speculative};
use tinyllama::model::GPT;
use tinyllama::tokenizer::Tokenizer;

fn speculate(
    model: &GPT,
    draft: Draft,
    most: usize,
    prompt: &[u32],
    options: &GenerateOptions,
) -> (Vec<u32>, FinishReason, Acceptance) {
    let (out, acceptance) =
        generate_speculative(model, draft, most, prompt, options, &mut |_| Ok(true)).unwrap();
    assert_eq!(out.logprobs.len(), out.tokens.len());
    (out.tokens, out.finish_reason, acceptance)
}

#[test]
fn greedy_output_is_the_models_own() {
    let model = tiny("tiny-llama-1.1b", 2);
    let other = tiny("tiny-llama-1.1b", 1);
    for i in 0..100 {
        let prompt = &random_ids(200)[i..i + 1 + i % 30];
        let options = greedy(12);
        let expected = tokens_of(&model, prompt, &options);
        for draft in
            [Draft::Model((&other).into()), Draft::Model((&model).into()), Draft::Lookup(3)]
        {
            let most = 1 + i % 7;
            let (tokens, _, acceptance) = speculate(&model, draft, most, prompt, &options);
            assert_eq!(tokens, expected, "prompt {i}, {most} proposals of {draft:?}");
            if matches!(draft, Draft::Model(NetworkRef::Dense(draft)) if std::ptr::eq(draft, &model))
            {
                assert_eq!(
                    acceptance.accepted, acceptance.proposed,
                    "its own proposals are all kept"
                );
                assert!(acceptance.passes < 12);
            }
        }
    }
}

#[test]
fn each_way_to_stop_gives_its_reason_and_nothing_behind_it() {
    let model = alphabet();
    let eos = GenerateOptions { eos: vec![EOS], ..greedy(40) };
    let mut expected = ids_of("efghijklm");
    expected.push(EOS);
    let (tokens, reason, _) =
        speculate(&model, Draft::Model((&model).into()), 8, &ids_of("d"), &eos);
    assert_eq!((tokens, reason), (expected, FinishReason::Eos));
    let (tokens, reason, _) =
        speculate(&model, Draft::Model((&model).into()), 8, &ids_of("a"), &greedy(6));
    assert_eq!((tokens, reason), (ids_of("bcdefg"), FinishReason::Length));
    let prompt = ids_of("n").repeat(58);
    let (tokens, reason, _) =
        speculate(&model, Draft::Model((&model).into()), 8, &prompt, &greedy(30));
    assert_eq!((tokens, reason), (ids_of("opqrst"), FinishReason::Context));
    let mut left = 5;
    let (out, _) = generate_speculative(
        &model,
        Draft::Model((&model).into()),
        8,
        &ids_of("a"),
        &eos,
        &mut |_| {
            left -= 1;
            Ok(left > 0)
        },
    )
    .unwrap();
    assert_eq!((out.tokens, out.finish_reason), (ids_of("bcdef"), FinishReason::Stop));
    let (tokens, ..) =
        speculate(&model, Draft::Model((&model).into()), 8, &ids_of("a"), &greedy(0));
    assert!(tokens.is_empty());
}

/// How often each pair of fourth and fifth token came in these runs.
fn count(
    model: &GPT,
    draft: Option<Draft>,
    runs: impl Iterator<Item = usize>,
) -> HashMap<Vec<u32>, f64> {
    let _no_grad = tch::no_grad_guard();
    let prompt = ids_of("ab");
    let mut counts = HashMap::new();
    for run in runs {
        let mut options = with_seed(run as u64);
        (options.max_new_tokens, options.sampling.top_k) = (5, Some(3));
        let tokens = match draft {
            Some(draft) => speculate(model, draft, 4, &prompt, &options).0,
            None => tokens_of(model, &prompt, &options),
        };
        *counts.entry(tokens[3..].to_vec()).or_default() += 1.0;
    }
    counts
}

/// Chi-square of the fourth and fifth token behind a fixed prompt, over pairs that the model would say alone as well;
/// both depend on all before them.
fn chi_square(model: &GPT, draft: Draft, runs: usize) -> (f64, f64) {
    chi_square_of(&count(model, Some(draft), 0..runs), &count(model, None, runs..2 * runs))
}

/// Of two counts of equally many draws, with the degrees of freedom.
fn chi_square_of(ours: &HashMap<Vec<u32>, f64>, theirs: &HashMap<Vec<u32>, f64>) -> (f64, f64) {
    let mut keys: Vec<&Vec<u32>> = ours.keys().chain(theirs.keys()).collect();
    keys.sort();
    keys.dedup();
    let of = |counts: &HashMap<Vec<u32>, f64>, key| counts.get(key).copied().unwrap_or(0.0);
    let pairs = keys.into_iter().map(|key| (of(ours, key), of(theirs, key)));
    // Rare pairs together, so that the statistic is close to its distribution.
    let (mut rare, mut sum, mut freedom) = ((0.0, 0.0), 0.0, -1.0);
    let mut add = |(a, b): (f64, f64)| {
        sum += (a - b) * (a - b) / (a + b);
        freedom += 1.0;
    };
    for (a, b) in pairs {
        match a + b < 20.0 {
            true => rare = (rare.0 + a, rare.1 + b),
            false => add((a, b)),
        }
    }
    if rare.0 + rare.1 >= 20.0 {
        add(rare);
    }
    (sum, freedom)
}

/// The chi-square value that 1 % of fair samples exceed (Wilson and Hilferty).
fn one_percent(freedom: f64) -> f64 {
    let a = 2.0 / (9.0 * freedom);
    freedom * (1.0 - a + 2.326 * a.sqrt()).powi(3)
}

#[test]
fn draws_have_the_models_distribution() {
    let (model, other) = (tiny("tiny-llama-1.1b", 2), tiny("tiny-llama-1.1b", 1));
    for draft in [Draft::Model((&other).into()), Draft::Lookup(2)] {
        let (chi_square, freedom) = chi_square(&model, draft, 700);
        // A twentieth beyond what 1 % of fair samples exceed: weights and so draws differ from run to run.
        assert!(chi_square < 1.2 * one_percent(freedom), "{chi_square} of {freedom}, {draft:?}");
    }
}

/// By hand: `cargo test --release --test suite speculative::two_hundred -- --ignored --nocapture`.
#[test]
#[ignore = "40 minutes of one core"]
fn two_hundred_thousand_draws_have_the_models_distribution() {
    const RUNS: usize = 200_000;
    let (model, other) = (tiny("tiny-llama-1.1b", 2), tiny("tiny-llama-1.1b", 1));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // A model belongs to one thread: each has copies.
    let copies: Vec<(GPT, GPT)> =
        (0..threads).map(|_| (copy_of(&model), copy_of(&other))).collect();
    let (mut ours, mut theirs) = (HashMap::new(), HashMap::new());
    std::thread::scope(|scope| {
        let part = |(at, (model, other)): (usize, (GPT, GPT))| {
            scope.spawn(move || {
                let draft = Some(Draft::Model((&other).into()));
                let runs = |from: usize| (from + at..from + RUNS).step_by(threads);
                (count(&model, draft, runs(0)), count(&model, None, runs(RUNS)))
            })
        };
        let parts: Vec<_> = copies.into_iter().enumerate().map(part).collect();
        for part in parts {
            let (a, b) = part.join().unwrap();
            a.into_iter().for_each(|(pair, n)| *ours.entry(pair).or_default() += n);
            b.into_iter().for_each(|(pair, n)| *theirs.entry(pair).or_default() += n);
        }
    });
    assert_eq!((ours.values().sum(), theirs.values().sum()), (RUNS as f64, RUNS as f64));
    let (chi_square, freedom) = chi_square_of(&ours, &theirs);
    println!(
        "chi-square {chi_square:.1} at {freedom} degrees; 1 % of fair samples exceed {:.1}",
        one_percent(freedom)
    );
    assert!(chi_square < one_percent(freedom));
}

fn copy_of(model: &GPT) -> GPT {
    let copy = GPT::empty(&model.config, Device::Cpu);
    for ((_, mut to), (_, from)) in
        copy.named_parameters().into_iter().zip(model.named_parameters())
    {
        to.copy_(&from);
    }
    copy
}

#[test]
fn a_draft_with_another_tokenizer_is_refused_by_name_of_the_first_difference() {
    let load = |extra: usize| {
        let dir = tempfile::tempdir().unwrap();
        write_tokenizer(dir.path(), extra);
        Tokenizer::load(dir.path()).unwrap()
    };
    check_tokenizers(&load(0), &load(0)).unwrap();
    let error = check_tokenizers(&load(0), &load(2)).unwrap_err();
    assert_eq!(::tinyllama::error::exit_code(&error), 2);
    let expected =
        "model and draft have different tokenizers: 258 ids in the model's, 260 in the draft's";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn generate_speculates_and_says_how_it_went() {
    let dir = checkpoint(&alphabet());
    let common = ["--prompt", "a", "--temperature", "0", "--max-new-tokens", "20"];
    let (_, expected, _) = run_program("generate", dir.path(), &common, "");
    let draft = ["--draft", dir.path().to_str().unwrap(), "--draft-tokens", "4"];
    for draft in [&draft[..], &["--draft-lookup"], &["--draft-lookup", "5"]] {
        let (code, out, err) =
            run_program("generate", dir.path(), &[&common[..], draft].concat(), "");
        assert_eq!((code, &out), (0, &expected), "{err}");
        assert!(err.contains("proposals kept") && err.contains("tokens a pass"), "{err}");
    }
    let nowhere = ["--prompt", "a", "--draft", "/nowhere"];
    let (code, _, err) = run_program("generate", dir.path(), &nowhere, "");
    assert!(code != 0 && err.contains("/nowhere"), "{err}");
}
