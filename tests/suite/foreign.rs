//! Checkpoints of other programs. `tests/golden/foreign` holds one small Llama as transformers, litgpt, TinyLlama, Meta
//! and llama2.c save it, written by real torch (`scripts/golden/foreign.py`).

use crate::common::{alone, tiny_llama, tiny_neox};
use crate::pretrain::{self, Setup};
use assert_cmd::cargo::cargo_bin_cmd;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind};
use tinyllama::checkpoint::gguf::mix::Mix;
use tinyllama::checkpoint::gguf::{GgufFile, GgufWriter, Metadata};
use tinyllama::checkpoint::tensors::TensorFile;
use tinyllama::checkpoint::{self, Change, MAX_SHARD_BYTES, Source, Target, Tensors};
use tinyllama::data::packed::PackedWriter;
use tinyllama::model::{GPT, ModelConfig, RopeScaling, RopeType};
use tinyllama::tokenizer::Tokenizer;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/foreign").join(name)
}

fn run(args: &[&str]) -> (Option<i32>, String) {
    let output = cargo_bin_cmd!("tinyllama").args(args).output().unwrap();
    let all = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&all).into_owned())
}

fn convert(from: &Path, to: &Path, more: &[&str]) -> (Option<i32>, String) {
    run(&[&["convert", &shown(from), &shown(to)], more].concat())
}

/// The same without a program of its own.
fn made(from: &Path, to: &Path, target: Target) {
    checkpoint::convert(&Source::open(from).unwrap(), to, target, None, &|_, _| ()).unwrap();
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Both hold the same parameters, bit for bit.
fn same(a: &Path, b: &Path) {
    let open = |path| Source::open(&checkpoint::resolve(path).unwrap()).unwrap();
    let changes = Change::between(&open(a), &open(b)).unwrap();
    assert!(changes.is_empty(), "{a:?}: {changes:?}");
}

#[test]
fn every_programs_file_is_the_same_model() {
    let _alone = alone();
    for (name, format) in [
        ("hf-bin", "Hugging Face, PyTorch files"),
        ("hf-bin/pytorch_model-00002-of-00002.bin", "Hugging Face, PyTorch files"),
        ("litgpt", "litgpt"),
        ("litgpt/lit_model.pth", "litgpt"),
        ("tinyllama/iter-000007-ckpt.pth", "TinyLlama, QKV packed by group"),
        ("lightning/iter-000007-ckpt.pth", "TinyLlama, QKV packed by group"),
        ("meta", "Meta"),
        ("meta/consolidated.01.pth", "Meta"),
        ("llama2c.bin", "llama2.c"),
        ("llama2c-v1.bin", "llama2.c"),
    ] {
        let path = checkpoint::resolve(&golden(name)).unwrap();
        let source = Source::open(&path).unwrap();
        assert_eq!(source.format(), format, "{name}");
        same(&golden(name), &golden("hf"));
        let c = &source.config;
        let sizes = (c.n_layer, c.n_head, c.n_query_groups, c.n_embd, c.head_size, c.block_size);
        assert_eq!(sizes, (2, 4, 2, 32, 8, 64), "{name}");
        assert_eq!(c.norm_eps, 1e-5, "{name}");
    }
}

#[test]
fn adamw_of_a_tinyllama_checkpoint_comes_along_and_training_continues() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let expected = TensorFile::open(&golden("moments.safetensors")).unwrap();
    for name in ["tinyllama", "lightning"] {
        let (from, to) = (golden(name).join("iter-000007-ckpt.pth"), dir.path().join(name));
        let (code, said) = convert(&from, &to, &["--to", "hf"]);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("the optimizer's state at step 3"), "{said}");
        let (state, moments, _) = checkpoint::load_train_state(&to).unwrap();
        assert_eq!((state.step, state.iter, state.tokens), (3, 7, 3 * 8 * 64));
        for moment in ["exp_avg", "exp_avg_sq"] {
            let theirs = |name: &str| expected.tensor(&format!("{moment}.{name}")).unwrap();
            let ours = |name: &str, shape: &[i64]| {
                moments.get(&format!("{moment}.{name}"), Kind::Float, shape).unwrap()
            };
            let qkv = ["q", "k", "v"]
                .map(|x| theirs(&format!("model.layers.1.self_attn.{x}_proj.weight")));
            let qkv = tch::Tensor::cat(&qkv, 0);
            assert!(ours("transformer.h.1.attn.qkv.weight", &[64, 32]).equal(&qkv), "{name}");
            let up = theirs("model.layers.0.mlp.up_proj.weight");
            assert!(ours("transformer.h.0.mlp.fc_2.weight", &[48, 32]).equal(&up), "{name}");
        }
    }
    // A run of that architecture goes on from it.
    let setup = Setup::new();
    fs::create_dir(setup.path("small")).unwrap();
    let mut writer = PackedWriter::new(&setup.path("small"), "small", 1000, 60);
    writer.add(&(0..4000).map(|i| i * i % 60).collect::<Vec<u32>>()).unwrap();
    writer.finish().unwrap();
    let data = format!("data.train=[{{path: {}}}]", setup.path("small").display());
    let resume = shown(&dir.path().join("tinyllama"));
    let more = [
        "--set",
        "model_config.vocab_size=64",
        "--set",
        "model_config.padded_vocab_size=64",
        "--set",
        "model_config.block_size=64",
        "--set",
        "train.max_seq_length=16",
        "--set",
        "train.max_steps=6",
        "--set",
        &data,
        "--set",
        "data.val=null",
        "--resume",
        &resume,
    ];
    let output = setup.run("on", &more);
    let said = pretrain::text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("holds no position in it"), "{said}");
    let steps: Vec<u64> = setup.losses("on").iter().map(|row| row.0).collect();
    assert_eq!(steps, [4, 5, 6]);
}

#[test]
fn from_hugging_face_to_gguf_and_back_is_the_same() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let scaling = |rope_type| RopeScaling {
        original_max_position_embeddings: Some(8192),
        ..RopeScaling::new(rope_type, 8.0)
    };
    let llama3 = RopeScaling {
        low_freq_factor: Some(1.0),
        high_freq_factor: Some(4.0),
        ..scaling(RopeType::Llama3)
    };
    let models = [
        ModelConfig { tie_embeddings: true, bias: true, attn_bias: true, ..tiny_llama() },
        ModelConfig {
            rope_scaling: Some(llama3),
            block_size: 131_072,
            rope_base: 500_000.0,
            ..tiny_llama()
        },
        ModelConfig { rope_scaling: Some(RopeScaling::new(RopeType::Linear, 4.0)), ..tiny_llama() },
    ];
    for (i, config) in models.into_iter().enumerate() {
        tch::manual_seed(5);
        let (hf, file, back) =
            (path(&format!("hf{i}")), path(&format!("{i}.gguf")), path(&format!("back{i}")));
        checkpoint::save(&hf, &GPT::new(&config, Device::Cpu)).unwrap();
        made(&hf, &file, Target::Gguf { mix: None });
        made(
            &file,
            &back,
            Target::HuggingFace { max_shard_bytes: MAX_SHARD_BYTES, quantise: None },
        );
        assert_eq!(
            fs::read(hf.join("model.safetensors")).unwrap(),
            fs::read(back.join("model.safetensors")).unwrap()
        );
        let json = |dir: &Path| -> Value {
            serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
        };
        let (want, got) = (json(&hf), json(&back));
        for key in [
            "rope_theta",
            "rope_scaling",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "tie_word_embeddings",
        ] {
            assert_eq!(got[key], want[key], "{key}");
        }
        // Where a checkpoint is expected, the file is one.
        let loaded = checkpoint::load_model(&file, Kind::Float, Device::Cpu).unwrap();
        assert_eq!(loaded.config.n_layer, config.n_layer);
    }
}

#[test]
fn each_scheme_of_gguf_is_written_and_close_to_the_model() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let hf = dir.path().join("hf");
    let config = ModelConfig { n_embd: 256, head_size: 64, intermediate_size: 512, ..tiny_llama() };
    tch::manual_seed(6);
    let model = GPT::new(&config, Device::Cpu);
    checkpoint::save(&hf, &model).unwrap();
    let name = "transformer.h.1.mlp.fc_1.weight";
    let named =
        |model: &GPT| model.named_parameters().into_iter().find(|(n, _)| n == name).unwrap().1;
    let ours = named(&model);
    for (scheme, stored, error) in [
        ("F16", "F16", 5e-4),
        ("BF16", "BF16", 4e-3),
        ("Q8_0", "Q8_0", 0.01),
        ("Q6_K", "Q6_K", 0.03),
        ("Q4_K_M", "Q4_K", 0.1),
        ("Q4_0", "Q4_0", 0.15),
    ] {
        let file = dir.path().join(format!("{scheme}.gguf"));
        made(&hf, &file, Target::Gguf { mix: Mix::from_name(scheme) });
        let opened = GgufFile::open(&file).unwrap();
        assert_eq!(opened.tensor("blk.1.ffn_gate.weight").unwrap().kind.to_string(), stored);
        let loaded = checkpoint::load_model(&file, Kind::Float, Device::Cpu).unwrap();
        let relative = (named(&loaded) - &ours).norm() / ours.norm();
        let relative = f64::try_from(relative).unwrap();
        assert!(relative < error && relative > 0.0, "{scheme}: {relative}");
    }
}

#[test]
fn a_tokenizer_goes_into_gguf_and_comes_out() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/quickstart/tokenizer");
    let tokenizer = Tokenizer::load(&quickstart).unwrap();
    let rows = tokenizer.vocab_size() as i64 + 5;
    let hf = dir.path().join("hf");
    let config = ModelConfig { vocab_size: rows, padded_vocab_size: rows, ..tiny_llama() };
    checkpoint::save(&hf, &GPT::new(&config, Device::Cpu)).unwrap();
    let files = Tokenizer::files(&quickstart);
    checkpoint::copy_files(&files, &hf).unwrap();
    let (file, back) = (dir.path().join("m.gguf"), dir.path().join("back"));
    for (from, to, format) in [(&hf, &file, "gguf"), (&file, &back, "hf")] {
        let (code, said) = convert(from, to, &["--to", format]);
        assert_eq!(code, Some(0), "{said}");
    }
    let again = Tokenizer::load(&back).unwrap();
    assert_eq!((again.bos_id(), again.eos_id()), (tokenizer.bos_id(), tokenizer.eos_id()));
    for text in [
        "Hello, world!",
        "  two spaces\n\tand a tab",
        "naïve 東京 🙂",
        "def f(x):\n    return x + 1\n",
        "1234567",
    ] {
        assert_eq!(
            again.encode_default(text).unwrap(),
            tokenizer.encode_default(text).unwrap(),
            "{text:?}"
        );
    }
    // And is used where the file itself is the checkpoint.
    let checkpoint = shown(&file);
    let (code, said) = run(&[
        "generate",
        "--checkpoint",
        &checkpoint,
        "--prompt",
        "Hello",
        "--max-new-tokens",
        "2",
    ]);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn what_cannot_be_read_or_written_is_told_and_leaves_nothing() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let copy = |from: &str, name: &str| {
        let to = path(name);
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(golden(from)).unwrap().flatten() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        to
    };
    let out = path("out");
    let refused = |from: &Path, more: &[&str], told: &[&str]| {
        let (code, said) = convert(from, &out, more);
        assert!(code == Some(1) || code == Some(2), "{from:?}: {said}");
        for told in told {
            assert!(said.contains(told), "{from:?}: expected {told:?} in: {said}");
        }
        assert!(!out.exists(), "{from:?}");
    };
    let hf = ["--to", "hf"];

    // Missing shards.
    let bin = copy("hf-bin", "bin");
    fs::remove_file(bin.join("pytorch_model-00002-of-00002.bin")).unwrap();
    refused(&bin, &hf, &["missing in", "pytorch_model-00002-of-00002.bin", "copy all 2 shards"]);
    let meta = copy("meta", "meta");
    fs::remove_file(meta.join("consolidated.01.pth")).unwrap();
    refused(&meta, &hf, &["expected 2 `consolidated.*.pth` files, got 1"]);

    // A key that is missing, one left over that is much like it, LoRA.
    let (from, model) = (path("keys"), golden("hf"));
    fs::create_dir(&from).unwrap();
    fs::copy(model.join("config.json"), from.join("config.json")).unwrap();
    let rewrite = |edit: &dyn Fn(&mut Tensors)| {
        let mut all = TensorFile::open(&model.join("model.safetensors")).unwrap().all().unwrap();
        edit(&mut all);
        checkpoint::tensors::write(&from.join("model.safetensors"), &all).unwrap();
    };
    rewrite(&|all| {
        let (name, _) = all.iter_mut().find(|(name, _)| name == "model.norm.weight").unwrap();
        *name = "model.norms.weight".into();
    });
    refused(
        &from,
        &hf,
        &[
            "`model.norm.weight`: missing, expected shape [32]; is it `model.norms.weight`?",
            "`model.norms.weight`: not expected in this model",
        ],
    );
    rewrite(&|all| {
        let lora = tch::Tensor::zeros([2, 32], tch::kind::FLOAT_CPU);
        all.push(("model.layers.0.self_attn.q_proj.lora_A.weight".into(), lora));
    });
    refused(
        &from,
        &hf,
        &["LoRA adapters that are not merged", "merge them into the weights first"],
    );
    // Integers.
    rewrite(&|all| {
        let norm = all.iter_mut().find(|(name, _)| name == "model.norm.weight").unwrap();
        norm.1 = norm.1.to_kind(Kind::Int);
    });
    refused(&from, &hf, &["`model.norm.weight`: expected a float dtype, got Int"]);

    // The shapes of a preset under another's configuration.
    let fits = path("fits");
    let preset = ModelConfig::preset("pythia-14m").unwrap();
    checkpoint::save(&fits, &GPT::new(&preset, Device::Cpu)).unwrap();
    let text = fs::read_to_string(fits.join("config.json")).unwrap();
    fs::write(
        fits.join("config.json"),
        text.replace("\"hidden_size\": 128", "\"hidden_size\": 64"),
    )
    .unwrap();
    refused(&fits, &hf, &["expected shape [", "the tensors are those of the preset pythia-14m"]);

    // Architectures.
    let other = copy("hf", "other");
    let text = fs::read_to_string(other.join("config.json")).unwrap();
    let text = text.replace("LlamaForCausalLM", "MixtralForCausalLM");
    fs::write(other.join("config.json"), text).unwrap();
    refused(
        &other,
        &hf,
        &["MixtralForCausalLM", "expected `LlamaForCausalLM` or `GPTNeoXForCausalLM`"],
    );
    let neox = path("neox");
    checkpoint::save(&neox, &GPT::new(&tiny_neox(), Device::Cpu)).unwrap();
    refused(
        &neox,
        &["--to", "gguf"],
        &["expected `llama`, got gpt_neox", "`--to hf` takes every model"],
    );
    refused(
        &golden("hf"),
        &["--to", "hf", "--quantize", "Q8_0"],
        &["`--quantize Q8_0`: expected `int4` or `int8`", "`int4:32`, for `--to hf`"],
    );

    // A training checkpoint that does not say what it is.
    let lone = path("lone.pth");
    fs::copy(golden("tinyllama/iter-000007-ckpt.pth"), &lone).unwrap();
    refused(
        &lone,
        &hf,
        &["does not say its architecture", "`model_config.yaml` or `config.json` beside"],
    );

    // Settings that are no numbers.
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", "llama");
    for key in [
        "embedding_length",
        "attention.head_count",
        "feed_forward_length",
        "block_count",
        "context_length",
    ] {
        metadata.set(format!("llama.{key}"), 32u32);
    }
    metadata.set("llama.vocab_size", 64u32);
    metadata.set("llama.attention.layer_norm_rms_epsilon", f32::NAN);
    GgufWriter::create(&path("nan.gguf"), &metadata, &[]).unwrap().finish().unwrap();
    refused(&path("nan.gguf"), &hf, &["layer_norm_rms_epsilon`: expected a finite number"]);

    // A llama2.c file of version 2, any file, and each cut short.
    let mut header = b"24ka".to_vec();
    for n in [2i32, 32, 48, 2, 4, 2, 64, 64] {
        header.extend(n.to_le_bytes());
    }
    fs::write(path("v2.bin"), &header).unwrap();
    refused(&path("v2.bin"), &hf, &["version 2, expected 0 or 1"]);
    fs::write(path("any.gguf"), b"no model").unwrap();
    refused(&path("any.gguf"), &hf, &["is no checkpoint of a format that is known here"]);
    let gguf = path("whole.gguf");
    assert_eq!(convert(&golden("hf"), &gguf, &["--to", "gguf"]).0, Some(0));
    for whole in [
        golden("llama2c.bin"),
        golden("tinyllama/iter-000007-ckpt.pth"),
        golden("lightning/iter-000007-ckpt.pth"),
        gguf,
    ] {
        let bytes = fs::read(&whole).unwrap();
        for percent in 0..100 {
            fs::write(path("cut"), &bytes[..bytes.len() * percent / 100]).unwrap();
            let opened = checkpoint::resolve(&path("cut")).and_then(|path| Source::open(&path));
            assert!(opened.is_err(), "{whole:?} at {percent} %");
        }
    }
}

#[test]
fn a_pickle_that_would_run_code_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    // GLOBAL posix.system, its argument, REDUCE; behind PyTorch's number and version as an old file has them.
    let mut file =
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}."
            .to_vec();
    let marker = dir.path().join("ran");
    let command = format!("touch {}", marker.display());
    file.extend(b"\x80\x02cposix\nsystem\n");
    file.extend([b'X']);
    file.extend((command.len() as u32).to_le_bytes());
    file.extend(command.as_bytes());
    file.extend(b"\x85R.\x80\x02].");
    let path = dir.path().join("evil.pth");
    fs::write(&path, file).unwrap();
    let (code, said) = convert(&path, &dir.path().join("out"), &["--to", "hf"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the file wants to call `posix.system`"), "{said}");
    assert!(!marker.exists());
}
