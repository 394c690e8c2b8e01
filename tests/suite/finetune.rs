//! Finetuning: conversations as tokens, adapters as PEFT's, and the verb itself.

mod runs;
mod told;

use crate::common::{alone, card, quickstart_like};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Output;
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::adapter::{self, Adapter};
use tinyllama::checkpoint::{self};
use tinyllama::config::{self, LoraConfig, LossOn, OptimizerConfig, Precision, TrainConfig};
use tinyllama::data::Batch;
use tinyllama::data::chat::{self, Encoded};
use tinyllama::model::{GPT, Mlp};
use tinyllama::ops::LossScalars;
use tinyllama::tokenizer::chat_template::{Message, SpecialTokens};
use tinyllama::tokenizer::{ChatTemplate, Tokenizer};
use tinyllama::train::objective::{Dpo, Objective};
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::step::{MicroStep, train_step};

#[derive(Deserialize)]
struct Case {
    template: String,
    loss_on: LossOn,
    messages: Vec<Message>,
    ids: Vec<u32>,
    labels: Vec<i64>,
}

#[test]
fn conversations_are_laid_out_as_transformers_lays_them_out() {
    let dir = Path::new("data/quickstart/tokenizer");
    let tokenizer = Tokenizer::load(dir).unwrap();
    let text = std::fs::read_to_string("tests/golden/chat_layout/layout.json").unwrap();
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    assert_eq!(cases.len(), 50);
    for case in cases {
        let tokens = SpecialTokens::load(dir, &tokenizer).unwrap();
        let template = ChatTemplate::named(&case.template, tokens).unwrap();
        let Encoded { ids, trained } =
            chat::encode(&case.messages, &template, &tokenizer, case.loss_on).unwrap();
        let label = |(id, trained): (&u32, &bool)| if *trained { i64::from(*id) } else { -100 };
        let labels: Vec<i64> = ids.iter().zip(&trained).map(label).collect();
        let of = format!("{}, {:?}, {:?}", case.template, case.loss_on, case.messages);
        assert_eq!(ids, case.ids, "{of}");
        assert_eq!(labels, case.labels, "{of}");
    }
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_refused() {
    let dir = Path::new("data/quickstart/tokenizer");
    let tokenizer = Tokenizer::load(dir).unwrap();
    let text = "{% for m in messages %}{{ m.role }}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}";
    let template = ChatTemplate::new(text, "`odd`", SpecialTokens::default()).unwrap();
    let talk =
        ["user", "assistant", "user", "assistant"].map(|role| Message::new(role, "x")).to_vec();
    let error = chat::encode(&talk, &template, &tokenizer, LossOn::Assistant).unwrap_err();
    assert!(
        error.to_string().contains("`odd` writes turn 2 otherwise when others follow it"),
        "{error}"
    );
    assert!(chat::encode(&talk, &template, &tokenizer, LossOn::All).is_ok());
}

const LORA: &str = "tests/golden/lora";

#[derive(Deserialize)]
struct Golden {
    steps: Vec<Step>,
    logits: Vec<f64>,
}

#[derive(Deserialize)]
struct Step {
    input: Vec<Vec<i64>>,
    target: Vec<Vec<i64>>,
    loss: f64,
}

fn golden() -> Golden {
    serde_json::from_str(&std::fs::read_to_string(format!("{LORA}/steps.json")).unwrap()).unwrap()
}

fn matrix(rows: &[Vec<i64>]) -> Tensor {
    Tensor::from_slice(&rows.concat()).view([rows.len() as i64, -1])
}

/// The golden model with adapters at every matrix.
fn adapted(dir: &str, device: Device) -> GPT {
    let base = format!("{LORA}/base");
    let mut model = checkpoint::load_model(base.as_ref(), Kind::Float, device).unwrap();
    let all = adapter::targets(&["all".to_owned()]).unwrap();
    model.add_lora(&all, 4, 12.0, 0.0);
    Adapter::open(format!("{LORA}/{dir}").as_ref()).unwrap().load_into(&model).unwrap();
    model
}

fn largest(difference: &Tensor) -> f64 {
    difference.abs().max().double_value(&[])
}

/// Trains the golden steps: how far the losses are from PEFT's.
fn train(model: &mut GPT, graph: bool) -> Vec<f64> {
    let config = OptimizerConfig { betas: [0.9, 0.999], weight_decay: 0.0, ..Default::default() };
    let mut optimizer = AdamW::new(model, Precision::Fp32True, &config).unwrap();
    let train = TrainConfig { max_norm: None, ..Default::default() };
    let mut micro = MicroStep::new(graph);
    let step = |step: &Step| {
        let target = matrix(&step.target);
        let n_targets = target.not_equal(-100).sum(Kind::Int64).int64_value(&[]);
        let batch = Batch { input: matrix(&step.input), target, documents: None, n_targets };
        optimizer.zero_grad();
        let out =
            train_step(model, &mut optimizer, &mut micro, &[batch], 5e-3, &train, None).unwrap();
        out.loss.to_device(Device::Cpu).double_value(&[]) - step.loss
    };
    golden().steps.iter().map(step).collect()
}

#[test]
fn on_the_card_lora_trains_as_pefts() {
    let Some((device, _card)) = card("on_the_card_lora_trains_as_pefts") else { return };
    for graph in [false, true] {
        let mut model = adapted("start", device);
        for (i, off) in train(&mut model, graph).iter().enumerate() {
            assert!(off.abs() < 1e-4, "graph {graph}, step {i}: {off}");
        }
    }
}

#[test]
fn twenty_steps_of_lora_equal_pefts() {
    let _alone = alone();
    let Golden { steps, logits } = golden();
    let mut model = adapted("start", Device::Cpu);
    for (i, off) in train(&mut model, false).iter().enumerate() {
        assert!(off.abs() < 1e-5, "step {i}: {off}");
    }
    for (((name, ours), (_, theirs)), (_, before)) in model
        .adapters()
        .iter()
        .zip(adapted("end", Device::Cpu).adapters())
        .zip(adapted("start", Device::Cpu).adapters())
    {
        let moved = largest(&(ours - &before));
        assert!(largest(&(ours - &theirs)) < 1e-3 * moved + 1e-5, "{name}");
    }
    let want = Tensor::from_slice(&logits).to_kind(Kind::Float).view([2, 12, 61]);
    let got = model.forward(&matrix(&steps[0].input), None);
    assert!(largest(&(got - want)) < 1e-4);
}

#[test]
fn merged_adapters_compute_what_they_compute_beside_the_weights() {
    let _alone = alone();
    let Golden { steps, logits } = golden();
    let ids = matrix(&steps[0].input);
    let want = Tensor::from_slice(&logits).to_kind(Kind::Float).view([2, 12, 61]);
    let beside = adapted("end", Device::Cpu).forward(&ids, None);
    assert!(largest(&(&beside - &want)) < 1e-5, "PEFT's logits");
    // A folder of adapters is opened as the merged model.
    let merged = checkpoint::load_model(format!("{LORA}/end").as_ref(), Kind::Float, Device::Cpu);
    assert!(largest(&(merged.unwrap().forward(&ids, None) - &beside)) < 1e-5);
}

#[test]
fn adapters_of_adapters_are_all_added() {
    let _alone = alone();
    let (base, end) = (format!("{LORA}/base"), format!("{LORA}/end"));
    let weight = |dir: &Path| {
        let model = checkpoint::load_model(dir, Kind::Float, Device::Cpu).unwrap();
        model.h[1].attn.qkv.weight.shallow_clone()
    };
    let delta = weight(end.as_ref()) - weight(base.as_ref());
    assert!(largest(&delta) > 1e-3);
    // The same adapters once more, of the model that they make.
    let dir = copied_adapters();
    set_base(dir.path(), &Path::new(&end).canonicalize().unwrap().to_string_lossy());
    let want = weight(base.as_ref()) + delta * 2.0;
    assert!(largest(&(weight(dir.path()) - &want)) < 1e-5);
    let merged = dir.path().join("merged");
    // `convert` adds to any checkpoint, whatever base the adapters name.
    set_base(dir.path(), "gone");
    let adapters = dir.path().to_string_lossy();
    let mut convert = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
    convert.args(["convert", &end, &merged.to_string_lossy(), "--to", "hf", "--merge", &adapters]);
    convert.assert().success();
    assert!(largest(&(weight(&merged) - &want)) < 1e-5);
    let own = dir.path().to_string_lossy();
    set_base(dir.path(), &own);
    let error = format!("{:#}", checkpoint::load_config(dir.path()).unwrap_err());
    assert!(error.contains("are their own base"), "{error}");
}

#[derive(Deserialize)]
struct GoldenDpo {
    beta: f64,
    input: Vec<Vec<i64>>,
    target: Vec<Vec<i64>>,
    margins: Vec<f64>,
    loss: f64,
}

#[test]
fn preferences_have_the_loss_and_the_gradients_of_plain_pytorch() {
    let _alone = alone();
    let text = std::fs::read_to_string(format!("{LORA}/dpo.json")).unwrap();
    let golden: GoldenDpo = serde_json::from_str(&text).unwrap();
    let mut model = adapted("end", Device::Cpu);
    let base = format!("{LORA}/base");
    // The reference: the model without its adapters, or a copy.
    let copy = checkpoint::load_model(base.as_ref(), Kind::Float, Device::Cpu).unwrap();
    for reference in [None, Some(copy)] {
        AdamW::new(&mut model, Precision::Fp32True, &OptimizerConfig::default()).unwrap();
        let dpo = Dpo::new(golden.beta, reference);
        let pairs = golden.margins.len() as i64;
        let (input, target) = (matrix(&golden.input), matrix(&golden.target));
        let batch = Batch { input, target, documents: None, n_targets: pairs };
        let margins = Vec::<f64>::try_from(dpo.margins(&model, &batch).to_kind(Kind::Double));
        for (got, want) in margins.unwrap().iter().zip(&golden.margins) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
        let objective = Objective::Dpo(Box::new(dpo));
        let scalars = LossScalars { scale: 1.0 / pairs as f64, ..LossScalars::SUM };
        let loss = objective.loss(&model, &batch, scalars);
        assert!((loss.double_value(&[]) - golden.loss).abs() < 1e-6, "{loss:?}");
        loss.backward();
        let wants = adapted("dpo", Device::Cpu).adapters();
        for ((name, ours), (_, want)) in model.adapters().iter().zip(wants) {
            let size = largest(&want);
            assert!(largest(&(ours.grad() - &want)) < 1e-4 * size + 1e-7, "{name} of {size}");
        }
        let taken = Vec::<f64>::try_from(objective.take().unwrap().to_kind(Kind::Double)).unwrap();
        let mean = golden.margins.iter().sum::<f64>() / pairs as f64;
        let right = golden.margins.iter().filter(|m| **m > 0.0).count() as f64 / pairs as f64;
        assert!((taken[0] - mean).abs() < 1e-5 && (taken[1] - right).abs() < 1e-6, "{taken:?}");
    }
}

#[test]
fn qlora_is_lora_beside_the_rounded_weights() {
    let _alone = alone();
    let Golden { steps, .. } = golden();
    let (ids, target) = (matrix(&steps[0].input), matrix(&steps[0].target));
    let mut packed = adapted("end", Device::Cpu);
    packed.quantise_base(Device::Cpu, Kind::Float, true).unwrap();
    let plain = adapted("end", Device::Cpu);
    for (plain, packed) in plain.h.iter().zip(&packed.h) {
        let (Mlp::LLaMA(a), Mlp::LLaMA(b)) = (&plain.mlp, &packed.mlp) else { panic!() };
        let pairs = [
            (&plain.attn.qkv, &packed.attn.qkv),
            (&plain.attn.proj, &packed.attn.proj),
            (&a.fc_1, &b.fc_1),
            (&a.fc_2, &b.fc_2),
            (&a.proj, &b.proj),
        ];
        for (plain, packed) in pairs {
            let rounded = packed.nf4.as_ref().unwrap().dequantize(Kind::Float).unwrap();
            assert!(largest(&(&rounded - &plain.weight)) > 0.0, "it was rounded");
            tch::no_grad(|| plain.weight.shallow_clone().copy_(&rounded));
        }
    }
    let gradients = |model: &GPT| {
        model.requires_grad(true);
        let loss = model.loss(&ids, &target, None, LossScalars::SUM);
        loss.backward();
        let grads: Vec<Tensor> = model.adapters().iter().map(|(_, t)| t.grad()).collect();
        (loss.double_value(&[]), grads)
    };
    for recomputed in [0, 2] {
        packed.recomputed_blocks = recomputed;
        packed.adapters().iter().chain(&plain.adapters()).for_each(|(_, t)| {
            if t.grad().defined() {
                let _ = t.grad().zero_();
            }
        });
        let ((loss, grads), (want, wants)) = (gradients(&packed), gradients(&plain));
        assert!((loss - want).abs() < 1e-4, "{loss} {want}");
        for (got, want) in grads.iter().zip(&wants) {
            assert!(largest(&(got - want)) < 1e-4 * largest(want) + 1e-7);
        }
    }
}

#[test]
fn adapters_are_written_as_they_were_read() {
    let model = adapted("end", Device::Cpu);
    let dir = tempfile::tempdir().unwrap();
    let lora = LoraConfig { r: 4, alpha: 12.0, dropout: 0.0, targets: vec!["all".into()] };
    let base = PathBuf::from(format!("{LORA}/base"));
    adapter::save(dir.path(), &model, &model.adapters(), &base, &lora).unwrap();
    let read = |dir: &Path| {
        let file = checkpoint::tensors::TensorFile::open(&dir.join("adapter_model.safetensors"));
        let file = file.unwrap();
        let all = file.names().into_iter().map(|name| {
            let rows = file.shape(&name).unwrap()[0];
            let tensor = file.rows(&name, 0..rows).unwrap().to_owned();
            (name, tensor)
        });
        all.collect::<std::collections::BTreeMap<_, _>>()
    };
    let (ours, theirs) = (read(dir.path()), read(format!("{LORA}/end").as_ref()));
    assert!(ours.keys().eq(theirs.keys()), "{:?}", ours.keys());
    for (name, tensor) in ours {
        assert_eq!(tensor, theirs[&name], "{name}");
    }
}

#[test]
fn adapters_of_another_model_are_refused_with_names_and_shapes() {
    let dir = copied_adapters();
    let other = dir.path().join("other");
    let mut config = tinyllama::model::ModelConfig::preset("tiny-llama-1.1b").unwrap();
    (config.n_layer, config.n_embd, config.n_head, config.n_query_groups) = (1, 48, 6, 2);
    (config.head_size, config.intermediate_size) = (8, 56);
    (config.vocab_size, config.padded_vocab_size) = (61, 61);
    checkpoint::save(&other, &GPT::new(&config, Device::Cpu)).unwrap();
    set_base(dir.path(), &other.to_string_lossy());
    let error = format!("{:#}", checkpoint::load_config(dir.path()).unwrap_err());
    assert!(error.contains("are not of the model in"), "{error}");
    assert!(error.contains("shape [4, 32] does not fit rank 4 of a matrix of 48 x 48"), "{error}");
    set_base(dir.path(), "nowhere");
    let error = format!("{:#}", checkpoint::load_config(dir.path()).unwrap_err());
    assert!(error.contains("are of `nowhere`, which is no folder here"), "{error}");
}

#[test]
fn adapters_of_another_rank_than_they_say_or_without_their_other_half_are_refused() {
    let dir = copied_adapters();
    set_base(dir.path(), &Path::new(LORA).join("base").canonicalize().unwrap().to_string_lossy());
    let config = dir.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["r"] = 8.into();
    std::fs::write(&config, json.to_string()).unwrap();
    let error = format!("{:#}", checkpoint::load_config(dir.path()).unwrap_err());
    assert!(error.contains("does not fit rank 8 of a matrix"), "{error}");
    std::fs::write(&config, text).unwrap();
    checkpoint::load_config(dir.path()).unwrap();

    let weights = dir.path().join("adapter_model.safetensors");
    let all = Tensor::read_safetensors(&weights).unwrap();
    let gone = all.iter().find(|(name, _)| name.ends_with("lora_B.weight")).unwrap().0.clone();
    let rest: Vec<_> = all.iter().filter(|(name, _)| *name != gone).collect();
    let rest: Vec<(&str, &Tensor)> = rest.iter().map(|(name, t)| (&name[..], t)).collect();
    std::fs::remove_file(&weights).unwrap();
    Tensor::write_safetensors(&rest, &weights).unwrap();
    let error = format!("{:#}", checkpoint::load_config(dir.path()).unwrap_err());
    assert!(error.contains(&format!("without `{gone}`")), "{error}");
}

fn copied_adapters() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(format!("{LORA}/end/{file}"), dir.path().join(file)).unwrap();
    }
    dir
}

fn set_base(dir: &Path, base: &str) {
    let path = dir.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["base_model_name_or_path"] = base.into();
    std::fs::write(&path, json.to_string()).unwrap();
}
