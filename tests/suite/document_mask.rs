//! `data.document_mask`: rows of several documents train as if each had a row of its own.

use crate::common::{alone, card, max_difference, tiny_llama, tiny_neox};
use crate::gpu::small_llama;
use crate::pretrain::{Setup, text};
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use tinyllama::config::{
    AttentionBackend, DataOrder, DataSource, OptimizerConfig, Precision, TrainConfig, Weight,
};
use tinyllama::data::packed::{Access, PackedWriter};
use tinyllama::data::{Batch, Borders, DataLoader, LoaderOptions, ValidationSet};
use tinyllama::ffi;
use tinyllama::model::GPT;
use tinyllama::ops::{Documents, LossScalars};
use tinyllama::tokenizer::Tokenizer;
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::step::{MicroStep, train_step};

/// Lengths of the documents in two rows of 24 tokens.
const ROWS: [&[i64]; 2] = [&[5, 1, 11, 7], &[24]];

fn rows() -> Documents {
    Documents::from_lengths(&ROWS.map(<[i64]>::to_vec), Device::Cpu)
}

fn tokenizer_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/quickstart/tokenizer")
}

/// Loss and gradients, and the hidden states.
fn pass(model: &GPT, pieces: &[(Tensor, Tensor, Option<Documents>)]) -> (Vec<Tensor>, Vec<Tensor>) {
    model.requires_grad(true);
    let mut hidden = vec![];
    for (_, mut parameter) in model.named_parameters() {
        parameter.zero_grad();
    }
    for (input, target, documents) in pieces {
        let x = tch::no_grad(|| model.hidden(input, documents.as_ref(), None)); // (B, T, C)
        hidden.push(x.reshape([-1, x.size()[2]]));
        model.loss(input, target, documents.as_ref(), LossScalars::SUM).backward();
    }
    (hidden, model.named_parameters().iter().map(|(_, p)| p.grad().copy()).collect())
}

#[test]
fn a_document_in_a_row_of_several_has_the_states_and_gradients_that_it_has_alone() {
    let _alone = alone();
    for config in [tiny_llama(), tiny_neox()] {
        for (backend, recomputed) in
            [(AttentionBackend::Auto, 0), (AttentionBackend::Auto, 1), (AttentionBackend::Math, 0)]
        {
            tch::manual_seed(21);
            let mut model = GPT::new(&config, Device::Cpu);
            (model.attention, model.recomputed_blocks) = (backend, recomputed);
            let ids = || Tensor::randint(config.vocab_size, [2, 24], (Kind::Int64, Device::Cpu));
            let (input, target) = (ids(), ids());
            let mut alone = vec![];
            for (row, lengths) in (0..).zip(ROWS) {
                let mut at = 0;
                for &n in lengths {
                    let part = |x: &Tensor| x.narrow(0, row, 1).narrow(1, at, n);
                    alone.push((part(&input), part(&target), None));
                    at += n;
                }
            }
            let (want, want_gradients) = pass(&model, &alone);
            let (got, gradients) = pass(&model, &[(input, target, Some(rows()))]);
            let what = format!("{} {backend:?} {recomputed}", config.name);
            let error = max_difference(&got[0], &Tensor::cat(&want, 0));
            assert!(error < 2e-5, "{what}: hidden states {error:.1e}");
            for (got, want) in gradients.iter().zip(&want_gradients) {
                let error = max_difference(got, want) / want.abs().max().double_value(&[]);
                assert!(error < 1e-4, "{what}: gradients {error:.1e}");
            }
        }
    }
}

/// A packed set of documents of 1 to 40 ids, each ended by the tokenizer's end; all their ids.
fn packed(dir: &Path, borders: bool) -> Vec<u32> {
    let end = Tokenizer::load(&tokenizer_dir()).unwrap().eos_id().unwrap();
    let mut writer = PackedWriter::new(dir, "train", 700, 4096);
    let mut all = vec![];
    for d in 0..200_u32 {
        let mut document: Vec<u32> =
            (0..d * 7 % 40).map(|i| 300 + (d * 31 + i * 17) % 3000).collect();
        document.push(if borders { end } else { 299 });
        writer.add(&document).unwrap();
        all.extend(document);
    }
    writer.finish().unwrap();
    all
}

/// What batches must say of their rows: by the plainest of loops.
fn expected(input: &[i64], t: usize, first: i64, last: i64) -> (Vec<i32>, Vec<i32>) {
    let begins = |i: usize| i.is_multiple_of(t) || input[i - 1] == last || input[i] == first;
    let start = |i: usize| ((0..=i).rev().find(|&j| begins(j)).unwrap() % t) as i32;
    let next = |i: usize| (i + 1..input.len()).find(|&j| begins(j)).unwrap_or(input.len());
    let stop = |i: usize| (next(i) - i / t * t) as i32;
    ((0..input.len()).map(start).collect(), (0..input.len()).map(stop).collect())
}

fn agrees(batch: &Batch, t: usize, (first, last): (i64, i64)) {
    let ids: Vec<i64> = Vec::try_from(batch.input.reshape([-1])).unwrap();
    let documents = batch.documents.as_ref().unwrap();
    assert_eq!(documents.start.size(), batch.input.size());
    let values = |x: &Tensor| Vec::<i32>::try_from(x.reshape([-1])).unwrap();
    let got = (values(&documents.start), values(&documents.end));
    assert_eq!(got, expected(&ids, t, first, last));
}

#[test]
fn batches_for_training_and_validation_tell_where_documents_lie() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::load(&tokenizer_dir()).unwrap();
    let ends = [tokenizer.bos_id(), tokenizer.eos_id()].map(|id| i64::from(id.unwrap()));
    let ends = (ends[0], ends[1]);
    let borders = Some(Borders::of(&tokenizer).unwrap());
    for (name, with_borders) in [("with", true), ("without", false)] {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        packed(&path, with_borders);
        let options = LoaderOptions {
            sources: vec![DataSource { path: path.clone(), weight: Weight::default() }],
            order: DataOrder::Global,
            micro_batch_size: 3,
            block_size: 32,
            rank: 0,
            world: 1,
            seed: 5,
            vocab_size: 4096,
            prefetch: 2,
            access: Access::Mapped,
            borders,
        };
        let mut loader = DataLoader::train(options).unwrap();
        for _ in 0..40 {
            agrees(&loader.next().unwrap(), 32, ends);
        }
        let warned = loader.describe().iter().any(|line| line.contains("takes each block as one"));
        assert_eq!(warned, !with_borders);
        let mut set = ValidationSet::open(&path, 32, 3, 4096).unwrap();
        assert!(set.batch(0).unwrap().documents.is_none());
        set.borders = borders;
        set.batches().for_each(|batch| agrees(&batch.unwrap(), 32, ends));
    }
}

#[test]
fn runs_mask_documents_the_same_with_blocks_recomputed_resumed_and_on_two_ranks() {
    let setup = Setup::new();
    let path = |name: &str| setup.path(name).display().to_string();
    fs::create_dir(setup.path("packed")).unwrap();
    packed(&setup.path("packed"), true);
    let set = |key: &str, value: &str| ["--set".to_owned(), format!("{key}={value}")];
    let common = [
        set("data.train", &format!("[{{path: {}}}]", path("packed"))),
        set("data.val", &path("packed")),
        set("tokenizer_dir", &tokenizer_dir().display().to_string()),
        set("model_config.vocab_size", "4096"),
        set("train.max_steps", "6"),
        set("train.save_interval", "3"),
        set("eval.interval", "3"),
    ]
    .concat();
    let run = |out: &str, more: &[&str]| {
        let sets: Vec<&str> =
            common.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let output = setup.run(out, &sets);
        assert!(output.status.success(), "{}", text(&output));
        (setup.losses(out), text(&output))
    };
    let (plain, _) = run("plain", &[]);
    let (masked, told) = run("masked", &["--set", "data.document_mask=true"]);
    assert!(told.contains("attention stays within each"), "{told}");
    assert_ne!(plain, masked);
    let blocks =
        ["--set", "data.document_mask=true", "--set", "train.activation_checkpointing=block"];
    assert_eq!(run("blocks", &blocks).0, masked);
    let (ranks, _) = run("ranks", &["--set", "data.document_mask=true", "--set", "devices=2"]);
    for (got, want) in ranks.iter().zip(&masked) {
        assert!((got.1 - want.1).abs() < 1e-5, "{ranks:?} {masked:?}");
    }
    let third = format!("resume={}", setup.path("masked/step-00000003").display());
    let (resumed, _) = run("resumed", &["--set", "data.document_mask=true", "--set", &third]);
    assert_eq!(resumed, masked[masked.len() - resumed.len()..]);
}

#[test]
fn a_mask_that_cannot_be_is_refused_before_the_run() {
    let setup = Setup::new();
    let tokenizer = format!("tokenizer_dir={}", tokenizer_dir().display());
    let mask = ["--set", "data.document_mask=true"];
    let output = setup.run("none", &mask);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("`data.document_mask`: needs `tokenizer_dir`"));
    let cudnn = [&mask[..], &["--set", &tokenizer, "--set", "attention=cudnn"]].concat();
    let output = setup.run("cudnn", &cudnn);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("cuDNN's knows no documents"), "{}", text(&output));
    // A tokenizer that has no id for either border.
    let bare = setup.path("bare");
    fs::create_dir(&bare).unwrap();
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": { "type": "BPE", "vocab": { "a": 0, "b": 1 }, "merges": [] }
    });
    fs::write(bare.join("tokenizer.json"), json.to_string()).unwrap();
    let bare = format!("tokenizer_dir={}", bare.display());
    let output = setup.run("bare", &[&mask[..], &["--set", &bare]].concat());
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("has one with neither"), "{}", text(&output));
}

/// Losses of eight steps of two micro-batches whose documents differ from batch to batch.
fn steps(device: Device, attention: AttentionBackend, graph: bool) -> Vec<f64> {
    tch::manual_seed(22);
    let mut model = GPT::new(&small_llama(), device);
    (model.attention, model.fused) = (attention, graph || attention != AttentionBackend::Math);
    let precision = Precision::Bf16Mixed;
    let mut optimizer = AdamW::new(&mut model, precision, &OptimizerConfig::default()).unwrap();
    let (train, mut micro) = (TrainConfig::default(), MicroStep::new(graph));
    let batch = |i: i64| {
        let ids = || Tensor::randint(512, [2, 256], (Kind::Int64, Device::Cpu));
        let row = |a: i64| vec![a, 100, 256 - 100 - a];
        let documents = Documents::from_lengths(&[row(1 + i * 9), row(130 - i)], Device::Cpu);
        Batch { input: ids(), target: ids(), documents: Some(documents), n_targets: 512 }
    };
    let step = |i: i64| {
        optimizer.zero_grad();
        let batches = [batch(2 * i), batch(2 * i + 1)];
        let out = train_step(&model, &mut optimizer, &mut micro, &batches, 1e-3, &train, None);
        let out = out.unwrap();
        [out.loss.double_value(&[]), out.grad_norm.double_value(&[])]
    };
    (0..8).flat_map(step).collect()
}

#[test]
fn on_a_card_documents_change_from_batch_to_batch_in_a_graph_and_agree_with_the_formula() {
    let Some((device, _card)) = card(
        "on_a_card_documents_change_from_batch_to_batch_in_a_graph_and_agree_with_the_formula",
    ) else {
        return;
    };
    ffi::set_math_mode(true, true).unwrap();
    let launched = steps(device, AttentionBackend::Flash, false);
    let graph = steps(device, AttentionBackend::Flash, true);
    ffi::set_math_mode(true, false).unwrap();
    assert_eq!(launched, graph);
    let plain = steps(device, AttentionBackend::Math, false);
    for (got, want) in launched.iter().zip(&plain) {
        assert!((got / want - 1.0).abs() < 5e-3, "{launched:?} {plain:?}");
    }
}
