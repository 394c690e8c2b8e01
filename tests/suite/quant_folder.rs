//! Folders of quantised matrices: `convert --to hf --quantize`.

use crate::small_models::{checkpoint, families, greedy, random, random_ids, run_program};
use assert_cmd::cargo::cargo_bin_cmd;
use serde_json::Value;
use std::fs;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use tinyllama::checkpoint::tensors::{self, TensorFile};
use tinyllama::checkpoint::{self, MAX_SHARD_BYTES, Source, Target, convert};
use tinyllama::generate::NetworkRef;
use tinyllama::generate::engine::generate;
use tinyllama::model::{GPT, ModelConfig};
use tinyllama::quant::{self, QuantLlama, QuantMatrix, Scheme};

const FILE: &str = "quantized.safetensors";

/// A Llama whose widths the groups divide, with random weights.
fn llama(tie_embeddings: bool) -> GPT {
    random(&ModelConfig {
        block_size: 64,
        vocab_size: 258,
        padded_vocab_size: 258,
        n_layer: 2,
        n_head: 4,
        n_query_groups: 2,
        n_embd: 128,
        head_size: 32,
        intermediate_size: 384,
        tie_embeddings,
        ..ModelConfig::preset("tiny-llama-1.1b").unwrap()
    })
}

fn quantised(from: &Path, scheme: Scheme, max_shard_bytes: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::HuggingFace { max_shard_bytes, quantise: Some(scheme) };
    let source = Source::open(from).unwrap();
    let done = convert(&source, &dir.path().join("q"), target, None, &|_, _| {}).unwrap();
    let files = fs::read_dir(dir.path().join("q")).unwrap().map(|file| file.unwrap());
    let weights = files.filter(|file| file.path().extension().is_some_and(|e| e == "safetensors"));
    let bytes: u64 = weights.map(|file| file.metadata().unwrap().len()).sum();
    assert!((done.bytes..done.bytes + 50_000).contains(&bytes), "{bytes}, told {}", done.bytes);
    dir
}

/// Every row of every matrix, and the norms.
fn values(model: &QuantLlama) -> Vec<Vec<f32>> {
    let row = |m: &QuantMatrix, i| {
        let mut out = vec![0.0; m.columns()];
        m.dequantise_row(i, &mut out);
        out
    };
    let rows = |m: &QuantMatrix| (0..m.rows()).map(|i| row(m, i)).collect::<Vec<_>>();
    let mut out = rows(&model.wte);
    for block in &model.h {
        out.extend([block.norm_1.clone(), block.norm_2.clone()]);
        out.extend(block.qkv.0.iter().chain(&block.gate_up.0).flat_map(rows));
        out.extend(rows(&block.proj).into_iter().chain(rows(&block.down)));
    }
    out.push(model.ln_f.clone());
    out.extend(model.lm_head.iter().flat_map(rows));
    out
}

#[test]
fn a_folder_has_the_bits_of_rounding_at_load() {
    let schemes = [32, 64, 128]
        .into_iter()
        .flat_map(|group| [Scheme::Int4 { group }, Scheme::Int8 { group }]);
    for (i, scheme) in schemes.enumerate() {
        let mut model = llama(i % 2 == 0);
        let kind = if i < 3 { Kind::BFloat16 } else { Kind::Float };
        model.to_kind(kind);
        let from = checkpoint(&model);
        // The second time in many files.
        for max_shard_bytes in [MAX_SHARD_BYTES, 60_000] {
            let dir = quantised(from.path(), scheme, max_shard_bytes);
            let path = dir.path().join("q");
            assert_eq!(path.join(FILE).exists(), max_shard_bytes > 60_000);
            assert!(!path.join("model.safetensors").exists(), "others would read it");
            let source = Source::open(&path).unwrap();
            assert!(source.is_quantised());
            let norm = source.tensor("model.norm.weight").unwrap();
            assert_eq!(norm.kind(), kind, "norms stay as they are");

            let stored = quant::load(&source, Scheme::Stored).unwrap();
            let rounded = quant::load(&Source::open(from.path()).unwrap(), scheme).unwrap();
            assert!(values(&stored) == values(&rounded), "{scheme:?}");
            assert_eq!(stored.wte.format(), rounded.wte.format());
            let say = |model: &QuantLlama| {
                let model = NetworkRef::Quantised(model);
                let out = generate(model, &random_ids(20), &greedy(12), &mut |_| Ok(true)).unwrap();
                (out.tokens, out.logprobs)
            };
            assert_eq!(say(&stored), say(&rounded), "bit for bit");

            let dense = source.load_model(Kind::Float, Device::Cpu).unwrap();
            let first = dense.named_parameters().swap_remove(0).1;
            let first: Vec<f32> = Vec::try_from(&first.detach().view([-1])).unwrap();
            let rows = values(&stored)[..258].concat();
            assert!(first == rows, "the dense embedding");
            let back = quant::load(&source, scheme).unwrap(); // from fp32 that lies on the grid
            assert_eq!(back.wte.rows(), 258);
        }
    }
}

#[test]
fn every_parameter_of_a_dense_load_is_what_the_matrices_say() {
    let from = checkpoint(&llama(false));
    let dir = quantised(from.path(), Scheme::Int4 { group: 64 }, MAX_SHARD_BYTES);
    let source = Source::open(&dir.path().join("q")).unwrap();
    let stored = quant::load(&source, Scheme::Stored).unwrap();
    let dense = source.load_model(Kind::Float, Device::Cpu).unwrap();
    let mut theirs = values(&stored).concat();
    let mut ours = Vec::new();
    for (_, p) in dense.named_parameters() {
        ours.extend(Vec::<f32>::try_from(&p.detach().view([-1])).unwrap());
    }
    // In another order: `down` before `gate_up` and so on.
    ours.sort_by(f32::total_cmp);
    theirs.sort_by(f32::total_cmp);
    assert!(ours == theirs);
}

fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let output = cargo_bin_cmd!("tinyllama").args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_programs_commands_take_such_a_folder() {
    let from = checkpoint(&llama(false));
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let hf = from.path().display().to_string();
    let ok = |args: &[&str]| {
        let (code, out, err) = run(args);
        assert_eq!(code, Some(0), "{args:?}: {err}");
        (out, err)
    };
    let (_, err) = ok(&["convert", &hf, &path("q"), "--to", "hf", "--quantize", "int4"]);
    assert!(err.contains("wrote") && err.contains("3 other file(s)"), "{err}");
    let config: Value =
        serde_json::from_str(&fs::read_to_string(path("q/config.json")).unwrap()).unwrap();
    let told = serde_json::json!(
        {"quant_method": "tinyllama", "version": 1, "bits": 4, "group_size": 64});
    assert_eq!(config["quantization_config"], told);

    let (out, _) = ok(&["inspect", &path("q")]);
    assert!(out.contains("quantised by tinyllama") && out.contains("int4:64"), "{out}");
    let tokens = |folder: &str, more: &[&str]| {
        let args = [&["--prompt", "Hi", "--temperature", "0", "--json"], more].concat();
        let (code, out, err) = run_program("generate", Path::new(folder), &args, "");
        assert_eq!(code, 0, "{err}");
        serde_json::from_str::<Value>(&out).unwrap()["tokens"].clone()
    };
    assert_eq!(tokens(&path("q"), &[]), tokens(&hf, &["--quantize", "int4"]));
    let dense = tokens(&path("q"), &["--precision", "32-true"]);
    ok(&["convert", &path("q"), &path("fp32"), "--to", "hf"]);
    assert_eq!(tokens(&path("fp32"), &[]), dense);
    let score = |folder: &str, more: &[&str]| {
        let args =
            [&["score", "--checkpoint", folder, "--text", "One two", "--json"], more].concat();
        ok(&args).0
    };
    let cpu = ["--device", "cpu"];
    assert_eq!(score(&path("q"), &cpu), score(&hf, &[&cpu[..], &["--quantize", "int4"]].concat()));
    let few = ["--device", "cpu", "--new-tokens", "3", "--prompt-tokens", "4", "--repeats", "1"];
    ok(&[&["bench", "decode", "--checkpoint", &path("q")], &few[..]].concat());
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let from = checkpoint(&llama(false));
    let dir = tempfile::tempdir().unwrap();
    let (hf, to) = (from.path().display().to_string(), dir.path().join("to"));
    let refused = |from: &str, to: &Path, more: &[&str], code: i32, told: &[&str]| {
        let to = to.display().to_string();
        let (got, _, err) = run(&[&["convert", from, &to], more].concat());
        assert_eq!(got, Some(code), "{err}");
        told.iter().for_each(|told| assert!(err.contains(told), "{told}: {err}"));
        assert!(err.contains("hint: "), "{err}");
    };
    for bad in ["int5", "int4:48", "stored", "Q4_0"] {
        let told = ["expected `int4` or `int8`, with groups of 32, 64 or 128", bad];
        refused(&hf, &to, &["--to", "hf", "--quantize", bad], 2, &told);
    }
    let told = ["`--quantize int4`: expected one of F32", "for `--to gguf`"];
    refused(&hf, &to, &["--to", "gguf", "--quantize", "int4"], 2, &told);
    let told = ["`--quantize int4`: expected nothing", "`--to hf`"];
    refused(&hf, &to, &["--to", "litgpt", "--quantize", "int4"], 2, &told);
    refused(&hf, from.path(), &["--to", "hf", "--quantize", "int4"], 2, &["exists already"]);
    let neox = checkpoint(&families()[2].1);
    let neox = neox.path().display().to_string();
    refused(&neox, &to, &["--to", "hf", "--quantize", "int4"], 2, &["cannot be quantised"]);
    let odd = checkpoint(&random(&ModelConfig { n_embd: 96, ..llama(false).config }));
    let odd = odd.path().display().to_string();
    let told = ["attn.qkv.weight`: rows of 96 values, expected a multiple of 64", "int4:32"];
    refused(&odd, &to, &["--to", "hf", "--quantize", "int4"], 2, &told);
    assert!(!to.exists());
}

#[test]
fn a_damaged_folder_is_told_of() {
    let from = checkpoint(&llama(false));
    let dir = quantised(from.path(), Scheme::Int4 { group: 32 }, MAX_SHARD_BYTES);
    let folder = dir.path().join("q");
    let file = folder.join(FILE);
    let all = TensorFile::open(&file).unwrap().all().unwrap();
    let refused = |change: &dyn Fn(&str, &Tensor) -> Option<Tensor>, told: &str| {
        let changed = all.iter().filter_map(|(name, t)| Some((name.clone(), change(name, t)?)));
        tensors::write(&file, &changed.collect::<Vec<_>>()).unwrap();
        let loaded = Source::open(&folder).and_then(|s| quant::load(&s, Scheme::Stored).map(drop));
        let error = format!("{:#}", loaded.unwrap_err());
        assert!(error.contains(told), "{told}: {error}");
    };
    let stem = "model.layers.1.mlp.down_proj";
    let only = |end: &'static str, change: fn(&Tensor) -> Option<Tensor>| {
        let name = format!("{stem}.{end}");
        move |n: &str, t: &Tensor| if n == name { change(t) } else { Some(t.shallow_clone()) }
    };
    for (end, left) in [("codes", "scales"), ("scales", "codes"), ("minimums", "codes")] {
        let told = format!("`{stem}.{end}`: missing");
        refused(&only(end, |_| None), &told);
        assert_ne!(end, left);
    }
    let half = |t: &Tensor| Some(t.to_kind(Kind::Float));
    refused(&only("scales", half), "down_proj.scales`: expected dtype F16, got F32");
    refused(&only("minimums", half), "down_proj.minimums`: expected dtype F16, got F32");
    let told = "down_proj.codes`: expected dtype U8 (4 bits) or I8, got F16";
    refused(&only("codes", |t| Some(t.to_kind(Kind::Half))), told);
    let narrow = |t: &Tensor| Some(t.narrow(1, 0, 5).contiguous());
    let told = "down_proj.scales`: expected shape [128, 384 / 32, 64 or 128], got [128, 5]";
    refused(&only("scales", narrow), told);
    let told = "down_proj.minimums`: expected shape [128, 12], got [128, 5]";
    refused(&only("minimums", narrow), told);
    refused(&only("codes", |t| Some(t.view([-1]))), "down_proj.codes`: expected a matrix");
    // 8 bits have no minimum.
    let told = "down_proj.minimums`: not expected beside codes of 8 bits";
    refused(&only("codes", |t| Some(t.repeat([1, 2]).to_kind(Kind::Int8))), told);
    // A whole matrix of another size is the architecture's matter.
    let fewer = |n: &str, t: &Tensor| {
        let t = t.shallow_clone();
        Some(if n.starts_with(stem) { t.narrow(0, 0, 64).contiguous() } else { t })
    };
    refused(&fewer, "down_proj.weight`: expected shape [128, 384], got [64, 384]");
    let gone = |n: &str, t: &Tensor| (!n.starts_with(stem)).then(|| t.shallow_clone());
    refused(&gone, "down_proj.weight`: missing");

    fs::remove_file(&file).unwrap();
    let error = Source::open(&folder).map(drop).unwrap_err().to_string();
    assert!(error.contains("looked for `quantized.safetensors`"), "{error}");
    // Weights that another program quantised.
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    let config = config.replace("\"tinyllama\"", "\"gptq\"");
    fs::write(folder.join("config.json"), config).unwrap();
    let error = format!("{:#}", checkpoint::load_config(&folder).unwrap_err());
    assert!(error.contains("expected `tinyllama`") && error.contains("got `gptq`"), "{error}");
}
