//! Texts of every kind: prepared ids beside those of Python's `tokenizers` and `sentencepiece`.
//!
//! `scripts/golden/texts.py` writes the texts and records the ids; `scripts/golden/texts.sh` does the same with
//! whole corpora.

use super::{options, tokenizer_dir};
use serde_json::Value;
use std::fs;
use std::path::Path;
use tinyllama::data::packed::PackedSet;
use tinyllama::data::prepare::prepare;
use tinyllama::tokenizer::Tokenizer;

#[test]
fn texts_of_every_kind_have_the_ids_of_tokenizers_and_of_sentencepiece() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let expected = fs::read(golden.join("texts/expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    for (peer, path) in
        [("tokenizers", tokenizer_dir()), ("sentencepiece", golden.join("tokenizer/llama.model"))]
    {
        let tokenizer = Tokenizer::load(&path).unwrap();
        for (kind, pattern) in [("jsonl", "texts/*.jsonl"), ("text", "texts/*.txt")] {
            let (dir, expected) = (tempfile::tempdir().unwrap(), &expected[kind]);
            let o = options(kind, &golden.join(pattern), &dir.path().join("out"));
            let manifest = prepare(&o, &tokenizer, Some(2)).unwrap();
            let skipped = serde_json::to_value(&manifest.counts.skipped).unwrap();
            assert_eq!(skipped, expected["skipped"], "{peer} {kind}");

            let set = PackedSet::open(&o.out).unwrap();
            let ids = set.read(0, set.len(), tokenizer.vocab_size()).unwrap();
            let (mut rest, documents) = (&ids[..], expected[peer].as_array().unwrap());
            assert_eq!(manifest.counts.documents, documents.len() as u64, "{peer} {kind}");
            for (i, want) in documents.iter().enumerate() {
                let want: Vec<i64> = serde_json::from_value(want.clone()).unwrap();
                let (got, after) = rest.split_at(want.len().min(rest.len()));
                let name = &expected["names"][i];
                assert_eq!(got, want, "{peer}, document {i} of {kind}, {name}");
                rest = after;
            }
            assert!(rest.is_empty(), "{peer} {kind}: {} ids after the last document", rest.len());
        }
    }
}
