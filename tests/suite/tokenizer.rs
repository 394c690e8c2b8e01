//! Tokenizers: ids equal to SentencePiece's, round trips, streams, training, the command line.

use assert_cmd::Command;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::TempDir;
use tinyllama::tokenizer::train::{self, Kind, Options};
use tinyllama::tokenizer::{Tokenizer, TokenizerError};

const MODELS: [&str; 4] = ["llama", "rules", "loose", "unused"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/tokenizer")
        .join(name)
}

fn load(name: &str) -> Tokenizer {
    Tokenizer::load(&golden(&format!("{name}.model"))).unwrap()
}

fn goldens() -> Value {
    serde_json::from_slice(&std::fs::read(golden("goldens.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

/// A few kilobytes of prose and code to train on.
fn corpus() -> String {
    let prose = "It was the best of times, it was the worst of times, it was the age of wisdom. ";
    let code = "def area(width, height):\n    if width < 0:\n        return 0\n    return width * height\n";
    let other = "Stra\u{df}e caf\u{e9} \u{4f60}\u{597d} 12345 \u{1f600}\n";
    [prose, code, other].concat().repeat(20)
}

fn trained(kind: Kind, vocab_size: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (bos, eos) = ("<s>".to_string(), "</s>".to_string());
    let options = Options {
        kind,
        vocab_size,
        bos,
        eos,
        use_bos: kind == Kind::Llama,
    };
    train::train(std::iter::once(Ok(corpus())), &options, dir.path()).unwrap();
    dir
}

static BYTES: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::load(trained(Kind::ByteBpe, 400).path()).unwrap());
static LLAMA: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::load(trained(Kind::Llama, 500).path()).unwrap());
static SENTENCEPIECE: LazyLock<Tokenizer> = LazyLock::new(|| load("llama"));

/// Texts with what breaks tokenizers: runs of spaces, controls, emoji, half-known words.
fn hard_text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => "[a-z]{1,6}", 3 => " {1,4}", 1 => "[\n\t\r]{1,2}", 2 => "\\PC{1,4}", 1 => any::<String>(),
        1 => Just("it was the ".to_string()), 1 => Just("<s>".to_string()), 1 => Just("<0x41>".to_string()),
    ];
    prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}

#[test]
fn ids_of_tokenizer_model_equal_sentencepieces_on_every_golden_text() {
    let goldens = goldens();
    for name in MODELS {
        let (tokenizer, golden) = (load(name), &goldens["models"][name]);
        let mut wrong = Vec::new();
        for (text, expected) in golden["texts"]
            .as_array()
            .unwrap()
            .iter()
            .zip(golden["ids"].as_array().unwrap())
        {
            let got = tokenizer
                .encode(text.as_str().unwrap(), false, false)
                .unwrap();
            if got != ids(expected) {
                wrong.push((text.clone(), got, ids(expected)));
            }
        }
        assert!(
            wrong.is_empty(),
            "{name}: {} wrong, first {:?}",
            wrong.len(),
            wrong[0]
        );
        assert_eq!(
            tokenizer.vocab_size() as u64,
            golden["vocab_size"].as_u64().unwrap()
        );
        assert_eq!(tokenizer.bos_id().map(u64::from), golden["bos"].as_u64());
        assert_eq!(tokenizer.eos_id().map(u64::from), golden["eos"].as_u64());
    }
}

#[test]
fn text_of_ids_equals_sentencepieces_even_for_half_characters_and_control_ids() {
    let goldens = goldens();
    for name in MODELS {
        let tokenizer = load(name);
        for sample in goldens["models"][name]["decode"].as_array().unwrap() {
            let ids = ids(&sample["ids"]);
            assert_eq!(
                tokenizer.decode(&ids).unwrap(),
                sample["text"].as_str().unwrap(),
                "{name} {ids:?}"
            );
        }
    }
}
