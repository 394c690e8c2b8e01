//! `dtype`: how ids lie in the packed files.

use super::{cli, jsonl, options, tokenizer, tokenizer_dir};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tinyllama::config::{DataOrder, DataSource, PrepareConfig, TokenDtype};
use tinyllama::data::packed::{Access, Dtype, PackedSet};
use tinyllama::data::prepare::{Manifest, prepare};
use tinyllama::data::{DataLoader, LoaderOptions};
use tinyllama::tokenizer::Tokenizer;

const TEXTS: [&str; 3] = ["One text.", "def f(x):\n    return x\n", "\u{4f60}\u{597d} \u{1f999}"];

/// The documents' ids, each ended by eos.
fn ids() -> Vec<u32> {
    let tokenizer = tokenizer();
    TEXTS.iter().flat_map(|text| tokenizer.encode(text, false, true).unwrap()).collect()
}

/// A corpus of the texts, prepared into `dir/NAME` with a dtype.
fn prepared(dir: &Path, name: &str, dtype: TokenDtype) -> PathBuf {
    let source = dir.join("x.jsonl");
    jsonl(&source, TEXTS);
    let o = PrepareConfig { dtype, ..options("jsonl", &source, &dir.join(name)) };
    prepare(&o, &tokenizer(), None).unwrap();
    o.out
}

fn file(out: &Path) -> Vec<u8> {
    fs::read(out.join("train_0000000000.bin")).unwrap()
}

#[test]
fn int32_is_written_as_asked_and_auto_as_ever() {
    let (dir, ids) = (tempfile::tempdir().unwrap(), ids());
    let header = |code: u8| {
        let mut header = b"LITPKDS\x01\0\0\0\0\0\0\0".to_vec();
        header.push(code);
        header.extend((ids.len() as u64).to_le_bytes());
        header
    };
    let wide = prepared(dir.path(), "wide", TokenDtype::Int32);
    let bytes = |id: &u32| (*id as i32).to_le_bytes();
    assert_eq!(file(&wide), [header(4), ids.iter().flat_map(bytes).collect()].concat());

    let auto = prepared(dir.path(), "auto", TokenDtype::Auto);
    let bytes = |id: &u32| (*id as u16).to_le_bytes();
    assert_eq!(file(&auto), [header(8), ids.iter().flat_map(bytes).collect()].concat());
    assert_eq!(file(&prepared(dir.path(), "narrow", TokenDtype::Uint16)), file(&auto));
    let dtype = |out: &Path| PackedSet::open(out).unwrap().file(0).dtype;
    assert_eq!((dtype(&wide), dtype(&auto)), (Dtype::I32, Dtype::U16));
}

#[test]
fn batches_are_the_same_whatever_the_dtype() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("y.jsonl");
    jsonl(&source, (0..300).map(|i| format!("document {i} of many, {}", i * i)));
    let loader = |name: &str, dtype: TokenDtype| {
        let o = PrepareConfig {
            chunk_tokens: 1000,
            dtype,
            ..options("jsonl", &source, &dir.path().join(name))
        };
        prepare(&o, &tokenizer(), None).unwrap();
        let options = LoaderOptions {
            sources: vec![DataSource { path: o.out, weight: 1.0.into() }],
            micro_batch_size: 4,
            block_size: 16,
            rank: 0,
            world: 1,
            seed: 5,
            vocab_size: 4096,
            prefetch: 2,
            order: DataOrder::Global,
            access: Access::Mapped,
            borders: None,
        };
        DataLoader::train(options).unwrap()
    };
    let mut wide = loader("wide", TokenDtype::Int32);
    let mut narrow = loader("narrow", TokenDtype::Auto);
    for _ in 0..40 {
        let (a, b) = (wide.next().unwrap(), narrow.next().unwrap());
        assert!(a.input.equal(&b.input) && a.target.equal(&b.target));
    }
}

/// The quickstart's tokenizer with so many ids.
fn with_ids(dir: &Path, n: u64) -> PathBuf {
    let path = dir.join(format!("tokenizer-{n}"));
    fs::create_dir(&path).unwrap();
    let read = |name: &str| fs::read(tokenizer_dir().join(name)).unwrap();
    let mut file: Value = serde_json::from_slice(&read("tokenizer.json")).unwrap();
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    let first = vocab.values().filter_map(Value::as_u64).max().unwrap() + 1;
    vocab.extend((first..n).map(|id| (format!("filler {id}"), id.into())));
    fs::write(path.join("tokenizer.json"), file.to_string()).unwrap();
    fs::write(path.join("tokenizer_config.json"), read("tokenizer_config.json")).unwrap();
    path
}

#[test]
fn a_tokenizer_larger_than_uint16_is_refused_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (large, out) = (with_ids(dir.path(), 65_537), dir.path().join("out"));
    let more = ["--tokenizer", large.to_str().unwrap(), "--dtype", "uint16"];
    let (code, _, stderr) = cli("jsonl", Path::new("/no/such"), &out, &more);
    assert_eq!(code, 2, "{stderr}");
    let want = "`dtype`: expected a vocabulary of at most 65536 ids for `uint16`, got a tokenizer of 65537, larger \
                than the dtype; say `auto` or `int32`";
    assert!(stderr.contains(want), "{stderr}");

    let source = dir.path().join("x.jsonl");
    jsonl(&source, TEXTS);
    let largest = Tokenizer::load(&with_ids(dir.path(), 65_536)).unwrap();
    let o = PrepareConfig { dtype: TokenDtype::Uint16, ..options("jsonl", &source, &out) };
    prepare(&o, &largest, None).unwrap();
    assert_eq!(PackedSet::open(&out).unwrap().file(0).dtype, Dtype::U16);

    let (code, _, stderr) = cli("jsonl", &source, &dir.path().join("o"), &["--dtype", "u16"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("`--dtype` is one of `auto`, `uint16`, `int32`"), "{stderr}");
}

#[test]
fn another_dtype_is_another_preparation_and_old_manifests_are_auto() {
    let dir = tempfile::tempdir().unwrap();
    let out = prepared(dir.path(), "out", TokenDtype::Auto);
    let source = dir.path().join("x.jsonl");
    let (code, _, stderr) = cli("jsonl", &source, &out, &["--dtype", "int32"]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("`dtype`: was \"auto\", now \"int32\""), "{stderr}");
    assert!(stderr.contains("hint: choose another `out`"), "{stderr}");

    let path = out.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let removed = manifest["options"].as_object_mut().unwrap().remove("dtype");
    assert_eq!(removed, Some(json!("auto")));
    fs::write(&path, manifest.to_string()).unwrap();
    assert_eq!(Manifest::read(&out).unwrap().unwrap().options.dtype, TokenDtype::Auto);
    let (code, _, stderr) = cli("jsonl", &source, &out, &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("already prepared"), "{stderr}");
}
