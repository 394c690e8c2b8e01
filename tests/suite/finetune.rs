//! Finetuning: conversations as tokens, adapters as PEFT's, and the verb itself.

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
    assert!(error.contains("shape [4, 32] does not fit a matrix of 48 x 48"), "{error}");
    set_base(dir.path(), "nowhere");
    let error = format!("{:#}", checkpoint::load_config(dir.path()).unwrap_err());
    assert!(error.contains("are of `nowhere`, which is no folder here"), "{error}");
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

/// A tiny model with the quickstart's tokenizer, and conversations beside it.
struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base/final"); // a run's folder, as people name it
        quickstart_like(&base);
        let row = |i: usize| {
            let (question, answer) =
                (format!("What comes after {i}?"), format!("After it comes {}.", i + 1));
            format!("{{\"text\": \"### Human: {question}### Assistant: {answer}\"}}\n")
        };
        std::fs::write(dir.path().join("rows.jsonl"), (0..40).map(row).collect::<String>())
            .unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// Runs `finetune` with these lines of YAML.
    fn finetune(&self, yaml: &str, args: &[&str]) -> Output {
        let text = format!(
            "initial_checkpoint_dir: {}\nout_dir: {}\ndevice: cpu\nprecision: 32-true\n{yaml}",
            self.path("base"),
            self.path("out")
        );
        std::fs::write(self.path("run.yaml"), text).unwrap();
        let mut command = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
        command.args(["finetune", &self.path("run.yaml")]).args(args).output().unwrap()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Losses of the training steps in metrics.jsonl.
fn losses(out: &str) -> Vec<f64> {
    let lines = std::fs::read_to_string(format!("{out}/metrics.jsonl")).unwrap();
    let objects = lines.lines().map(|line| serde_json::from_str(line).unwrap());
    objects.filter_map(|object: serde_json::Value| object.get("loss")?.as_f64()).collect()
}

const STEPS: &str = "train: {max_seq_length: 96, global_batch_size: 4, micro_batch_size: 2, max_steps: 12, save_interval: 6}\n\
                     optimizer: {lr: 0.01}\n";

#[test]
fn lora_learns_is_resumed_and_its_folder_is_a_model() {
    let folder = Folder::new();
    let yaml = format!(
        "{STEPS}finetune:\n  method: lora\n  lora: {{r: 4, targets: [all], dropout: 0.1}}\n  data: {{train: {}, template: guanaco, val_fraction: 0.2}}\n",
        folder.path("rows.jsonl")
    );
    let output = folder.finetune(&yaml, &[]);
    assert!(output.status.success(), "{}", text(&output));
    let told = text(&output);
    assert!(told.contains("adapters    rank 4 at all"), "{told}");
    assert!(told.contains("40 conversations"), "{told}");
    let straight = losses(&folder.path("out"));
    assert_eq!(straight.len(), 12);
    assert!(straight[11] < 0.9 * straight[0], "{straight:?}");

    // From the middle on again: the same losses.
    std::fs::remove_dir_all(folder.path("out/final")).unwrap();
    std::fs::remove_dir_all(folder.path("out/step-00000012")).ok();
    let output = folder.finetune(&yaml, &["--resume", "auto"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("resume      step 6"), "{}", text(&output));
    assert_eq!(losses(&folder.path("out"))[6..], straight[6..]);

    // The folder of adapters is read as the merged model, by its tokenizer and template.
    let merged = folder.path("merged");
    let mut convert = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
    let output = convert
        .args(["convert", &folder.path("out/final"), &merged, "--to", "hf"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let score = |dir: &str| {
        let mut command = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
        let args = [
            "score",
            "--device",
            "cpu",
            "--precision",
            "32-true",
            "--text",
            "After it comes 3.",
            "--checkpoint",
            dir,
        ];
        let output = command.args(args).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(score(&folder.path("out/final")), score(&merged));
    assert!(Path::new(&merged).join("chat_template.jinja").is_file());
}

#[test]
fn all_weights_learn_and_rows_may_stay_apart() {
    let folder = Folder::new();
    let yaml = format!(
        "{STEPS}finetune:\n  data: {{train: {}, template: chatml, packing: false, loss_on: all}}\n",
        folder.path("rows.jsonl")
    );
    let output =
        folder.finetune(&yaml, &["--set", "data.epochs=1", "--set", "train.max_steps=null"]);
    assert!(output.status.success(), "{}", text(&output));
    let told = text(&output);
    assert!(told.contains("micro-batches of 2 of like length"), "{told}");
    assert!(told.contains("length      10 steps"), "40 conversations, 4 a step: {told}");
    let losses = losses(&folder.path("out"));
    assert!(losses[9] < 0.9 * losses[0], "{losses:?}");
    assert!(Path::new(&folder.path("out/final/model.safetensors")).is_file());
}

#[test]
fn qlora_learns_with_blocks_computed_again_and_few_bytes_of_state() {
    let folder = Folder::new();
    let yaml = format!(
        "{STEPS}finetune:\n  method: qlora\n  lora: {{r: 8, targets: [all], dropout: 0.0}}\n  data: {{train: {}, template: guanaco}}\n",
        folder.path("rows.jsonl")
    );
    let sets =
        ["precision=bf16-mixed", "optimizer.state=int8", "train.activation_checkpointing=block"];
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let output = folder.finetune(&yaml, &args);
    assert!(output.status.success(), "{}", text(&output));
    let losses = losses(&folder.path("out"));
    assert!(losses[11] < 0.9 * losses[0], "{losses:?}");
    let file = folder.path("out/final/adapter_model.safetensors");
    let file = checkpoint::tensors::TensorFile::open(file.as_ref()).unwrap();
    assert_eq!(file.names().len(), 2 * 7 * 2, "two matrices beside each of seven in two blocks");
    let shape = file.shape("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight");
    assert_eq!(shape, Some(vec![64, 8]));
}

#[test]
fn new_tokens_get_rows_and_are_saved_with_the_checkpoint() {
    let folder = Folder::new();
    let yaml = format!(
        "{STEPS}finetune:\n  data: {{train: {}, template: chatml, special_tokens: [\"<|im_start|>\", \"<|im_end|>\"]}}\n",
        folder.path("rows.jsonl")
    );
    let output = folder.finetune(&yaml, &[]);
    assert!(output.status.success(), "{}", text(&output));
    let dir = PathBuf::from(folder.path("out/final"));
    let tokenizer = Tokenizer::load(&dir).unwrap();
    let n = Tokenizer::load("data/quickstart/tokenizer".as_ref()).unwrap().vocab_size() as u32;
    assert_eq!(tokenizer.id_of("<|im_start|>"), Some(n));
    assert_eq!(tokenizer.encode("<|im_end|>", false, false).unwrap(), [n + 1]);
    let rows = i64::from((n + 2).next_multiple_of(8));
    assert_eq!(checkpoint::load_config(&dir).unwrap().padded_vocab_size, rows);
    // What the run wrote down runs again.
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("tinyllama");
    let config = folder.path("out/config.yaml");
    let args = ["finetune", &config, "--resume", "auto", "--set", "train.max_steps=13"];
    let output = command.args(args).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(losses(&folder.path("out")).len(), 13);
}

#[test]
fn two_ranks_finetune_as_one() {
    let folder = Folder::new();
    let pairs = folder.path("pairs.jsonl");
    let row = |i: usize| {
        format!(
            "{{\"prompt\": \"After {i}?\", \"chosen\": \"{}\", \"rejected\": \"No, no.\"}}\n",
            i + 1
        )
    };
    std::fs::write(&pairs, (0..40).map(row).collect::<String>()).unwrap();
    let rows = folder.path("rows.jsonl");
    let runs = [
        (
            "tokens",
            format!(
                "method: full, data: {{train: {rows}, template: chatml, special_tokens: [\"<|im_end|>\"]}}"
            ),
        ),
        (
            "apart",
            format!("method: full, data: {{train: {rows}, template: guanaco, packing: false}}"),
        ),
        (
            "lora",
            format!(
                "method: lora, lora: {{targets: [all], dropout: 0.0}}, data: {{train: {rows}, template: guanaco}}"
            ),
        ),
        (
            "dpo",
            format!(
                "method: dpo, lora: {{targets: [all], dropout: 0.0}}, data: {{train: {pairs}, template: guanaco}}"
            ),
        ),
        (
            "copy",
            format!(
                "method: dpo, dpo: {{reference: copy}}, data: {{train: {pairs}, template: guanaco}}"
            ),
        ),
    ];
    for (name, finetune) in &runs {
        let yaml = format!(
            "train: {{max_seq_length: 96, global_batch_size: 8, micro_batch_size: 2, max_steps: 6, save_interval: 3}}\n\
             optimizer: {{lr: 1e-3}}\nfinetune: {{{finetune}}}\n"
        );
        let run = |ranks: &str, more: &[&str]| {
            let out = folder.path(&format!("{name}-{ranks}"));
            let set = format!("out_dir={out}");
            let output =
                folder.finetune(&yaml, &[&["--set", &set, "--devices", ranks], more].concat());
            assert!(output.status.success(), "{name}, {ranks}: {}", text(&output));
            let lines = std::fs::read_to_string(format!("{out}/metrics.jsonl")).unwrap();
            let objects = lines.lines().map(|line| serde_json::from_str(line).unwrap());
            let numbers = |object: serde_json::Value| {
                let number = |key: &str| object.get(key).and_then(|n| n.as_f64());
                Some([
                    number("loss")?,
                    number("grad_norm")?,
                    number("reward_margin").unwrap_or(0.0),
                ])
            };
            objects.filter_map(numbers).collect::<Vec<[f64; 3]>>()
        };
        let (one, two) = (run("1", &[]), run("2", &[]));
        let alike = |one: &[[f64; 3]], two: &[[f64; 3]]| {
            let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-5 * a.abs() + 1e-7;
            one.len() == 6 && one.iter().flatten().zip(two.iter().flatten()).all(close)
        };
        assert!(alike(&one, &two), "{name}: {one:?} {two:?}");
        if *name == "lora" {
            // What two ranks saved, one goes on with.
            let from = folder.path("lora-2/step-00000003");
            let set = format!("out_dir={}", folder.path("lora-3"));
            let output = folder.finetune(&yaml, &["--set", &set, "--resume", &from]);
            assert!(output.status.success(), "{}", text(&output));
            let resumed = losses(&folder.path("lora-3"));
            assert_eq!(resumed.len(), 3);
            assert!(resumed.iter().zip(&one[3..]).all(|(a, b)| (a / b[0] - 1.0).abs() < 1e-5));
        }
    }
    let yaml = format!("{STEPS}finetune: {{{}}}\n", runs[2].1);
    let output = folder.finetune(&yaml, &["--set", "distributed.strategy=full_shard"]);
    assert!(text(&output).contains("take `ddp`"), "{}", text(&output));
}

#[test]
fn margins_rise_where_preferences_are_learned() {
    preferences_are_learned(
        &["lora: {targets: [all], dropout: 0.0}", "dpo: {reference: copy}"],
        &[],
        1e-6,
    );
}

#[test]
fn on_the_card_margins_rise() {
    if card("on_the_card_margins_rise").is_none() {
        return; // else not kept: the folder of the test takes the same lock
    }
    let sets = [
        "device=cuda",
        "precision=bf16-mixed",
        "optimizer.state=int8",
        "optimizer.cpu_offload=true",
    ];
    preferences_are_learned(&["lora: {targets: [all], dropout: 0.0}"], &sets, 1e-2);
    preferences_are_learned(&["dpo: {reference: copy}"], &sets[..2], 1e-2);
}

/// `off`: how far from nothing the first margin may be.
fn preferences_are_learned(methods: &[&str], sets: &[&str], off: f64) {
    let folder = Folder::new();
    let row = |i: usize| {
        format!(
            "{{\"prompt\": \"What comes after {i}?\", \"chosen\": \"After it comes {}.\", \"rejected\": \"No.\"}}\n",
            i + 1
        )
    };
    let rows = folder.path("pairs.jsonl");
    std::fs::write(&rows, (0..40).map(row).collect::<String>() + "{\"prompt\": \"x\"}\n").unwrap();
    for method in methods {
        let yaml = format!(
            "{STEPS}finetune:\n  method: dpo\n  {method}\n  data: {{train: {rows}, template: guanaco, val_fraction: 0.1}}\n"
        );
        let out = format!("out_dir={}", folder.path(&method[..3]));
        let sets = sets.iter().copied().chain([out.as_str()]);
        let args: Vec<&str> = sets.flat_map(|set| ["--set", set]).collect();
        let output = folder.finetune(&yaml, &args);
        let told = text(&output);
        assert!(output.status.success(), "{told}");
        assert!(told.contains("40 preferences") && told.contains("left out 1 row(s)"), "{told}");
        let lines = std::fs::read_to_string(folder.path(&method[..3]) + "/metrics.jsonl").unwrap();
        let objects: Vec<serde_json::Value> =
            lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |key: &str| -> Vec<f64> {
            objects.iter().filter_map(|object| object.get(key)?.as_f64()).collect()
        };
        let (margins, right) = (of("reward_margin"), of("reward_accuracy"));
        assert!(
            margins[0].abs() < off && margins[11] > margins[3] && margins[11] > 0.1,
            "{margins:?}"
        );
        assert_eq!(right[11], 1.0, "{right:?}");
        let val = of("val_loss");
        assert!(
            (val[0] - std::f64::consts::LN_2).abs() < 10.0 * off && val[val.len() - 1] < val[0],
            "{val:?}"
        );
    }
}

#[test]
fn every_shipped_configuration_of_finetuning_is_valid_and_survives_a_round_trip() {
    let folder = Folder::new();
    let base = format!("initial_checkpoint_dir={}", folder.path("base"));
    let mut seen = 0;
    for entry in std::fs::read_dir("configs/finetune").unwrap() {
        let path = entry.unwrap().path();
        let sets = [base.clone(), "train.max_seq_length=64".into()];
        let config = config::load_finetune(&path, &sets).unwrap_or_else(|e| panic!("{e:#}"));
        let again = config::parse_finetune(&config::to_yaml(&config).unwrap(), &[]).unwrap();
        assert_eq!(config, again, "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 6, "{seen}");
}

#[test]
fn what_cannot_be_finetuned_is_told_before_it_begins() {
    let folder = Folder::new();
    let rows = folder.path("rows.jsonl");
    let lora = |lora: &str| {
        format!(
            "{STEPS}finetune:\n  method: lora\n  lora: {lora}\n  data: {{train: {rows}, template: guanaco}}\n"
        )
    };
    for (yaml, code, words) in [
        (STEPS.to_owned(), 2, vec!["`finetune`: needs at least"]),
        (format!("{STEPS}finetune: {{method: full}}\n"), 2, vec!["`finetune.data.train`: needs"]),
        (lora("{targets: [q_porj]}"), 2, vec!["`q_porj` is no matrix", "`q_proj`"]),
        (lora("{r: 0, dropout: 1.5}"), 2, vec!["`finetune.lora.r`", "`finetune.lora.dropout`"]),
        (
            format!("{STEPS}finetune: {{data: {{train: {rows}}}}}\n"),
            2,
            vec!["has no chat template"],
        ),
        (
            format!("{STEPS}finetune: {{data: {{train: {rows}, template: nope}}}}\n"),
            2,
            vec!["`nope` is no chat template"],
        ),
        (
            format!(
                "model_name: pythia-1b\n{STEPS}finetune: {{data: {{train: {rows}, template: guanaco}}}}\n"
            ),
            2,
            vec!["another one than they name"],
        ),
        (
            format!(
                "{STEPS}finetune: {{data: {{train: {}/none.jsonl, template: guanaco}}}}\n",
                folder.path("")
            ),
            2,
            vec!["no sft files at"],
        ),
    ] {
        let output = folder.finetune(&yaml, &[]);
        let told = text(&output);
        assert_eq!(output.status.code(), Some(code), "{yaml}{told}");
        for word in words {
            assert!(told.contains(word), "`{word}` is not in {told}");
        }
        assert!(!Path::new(&folder.path("out")).exists(), "{yaml}");
    }
}

#[test]
fn conversations_without_a_target_are_left_out_and_none_left_is_an_error() {
    let folder = Folder::new();
    for (method, words) in [
        ("full", "no conversation has a target within 4 tokens"),
        ("dpo", "no answers of a pair have a target within 4 tokens"),
    ] {
        let rows = folder.path("few.jsonl");
        let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"What comes after three?\"}, \
                   {\"role\": \"assistant\", \"content\": \"Four.\"}], \"prompt\": \"What comes after three?\", \
                   \"chosen\": \"Four.\", \"rejected\": \"No.\"}\n";
        std::fs::write(&rows, row).unwrap();
        let yaml = format!(
            "train: {{max_seq_length: 4, global_batch_size: 1, micro_batch_size: 1, max_steps: 1}}\n\
             finetune: {{method: {method}, data: {{train: {rows}, template: guanaco}}}}\n"
        );
        let output = folder.finetune(&yaml, &[]);
        let told = text(&output);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(words) && told.contains("raise `train.max_seq_length`"), "{told}");
        assert!(!Path::new(&folder.path("out")).exists());
    }
}

#[test]
fn rows_that_hold_no_conversation_are_counted_and_the_first_shown() {
    let folder = Folder::new();
    let bad = folder.path("bad.jsonl");
    let good = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    std::fs::write(&bad, format!("{good}{{\"x\": 1}}\n{{\"messages\": 3}}\n7\n{{}}\n{good}"))
        .unwrap();
    let yaml = format!("{STEPS}finetune: {{data: {{train: {bad}, template: guanaco}}}}\n");
    let output = folder.finetune(
        &yaml,
        &[
            "--set",
            "train.max_steps=1",
            "--set",
            "train.micro_batch_size=1",
            "--set",
            "train.global_batch_size=1",
        ],
    );
    let told = text(&output);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("2 conversations"), "{told}");
    for words in [
        "left out 4 row(s)",
        "row 2: no `messages`",
        "row 3: `messages` is no list",
        "no JSON object",
    ] {
        assert!(told.contains(words), "`{words}` is not in {told}");
    }
    std::fs::write(&bad, "{\"x\": 1}\n").unwrap();
    let output = folder.finetune(&yaml, &["--resume", "false", "--set", "out_dir=elsewhere"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("no conversation in"), "{}", text(&output));
}
