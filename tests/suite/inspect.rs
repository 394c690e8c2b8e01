//! `tinyllama inspect` and `bench data`, whole.

use crate::common::quickstart_like;
use assert_cmd::cargo::cargo_bin_cmd;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tinyllama::data::packed::PackedWriter;

fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let output = cargo_bin_cmd!("tinyllama").args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn json(args: &[&str]) -> (Option<i32>, Value) {
    let (code, out, err) = run(&[args, &["--json"]].concat());
    (code, serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}")))
}

/// 25 documents of 40 ids and an end (id 0), in files of 300 tokens.
fn dataset(dir: &Path) -> PathBuf {
    let path = dir.join("set");
    fs::create_dir_all(&path).unwrap();
    let mut writer = PackedWriter::new(&path, "train", 300, 4096);
    for d in 0..25u32 {
        let mut document: Vec<u32> = (0..40).map(|i| 300 + (d * 7 + i * 13) % 900).collect();
        document.push(0);
        writer.add(&document).unwrap();
    }
    writer.finish().unwrap();
    path
}

fn manifest(path: &Path, checksums: bool) {
    let mut outputs = serde_json::Map::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".bin") {
            let bytes = fs::read(entry.path()).unwrap();
            let value = match checksums {
                true => serde_json::json!({"bytes": bytes.len(), "crc32c": crc32c::crc32c(&bytes)}),
                false => bytes.len().into(),
            };
            outputs.insert(name, value);
        }
    }
    let text = serde_json::json!({
        "options": {"kind": "jsonl", "source": "corpus/*.jsonl", "out": path},
        "vocab_size": 1300, "outputs": outputs, "validation_outputs": {}, "documents": 25,
        "tokens": 1025, "skipped": {"empty": 3, "no `text`": 4},
    });
    fs::write(path.join("manifest.json"), text.to_string()).unwrap();
}

fn tokenizer() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("data/quickstart/tokenizer").display().to_string()
}

#[test]
fn a_set_is_told_with_and_without_its_manifest_and_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dataset(dir.path());
    let set = path.display().to_string();
    let (code, out, err) = run(&["inspect", &set, "--block-size", "40"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("files       4 of u16, 125 to 300 tokens each"), "{out}");
    assert!(out.contains("tokens\nblocks      25 of 41 tokens; 0 at the end stay out\n"), "{out}");
    assert!(out.contains("documents   not known"), "{out}");
    assert!(out.contains("fill        100.00 % of the tokens; no file ends in a run"), "{out}");

    manifest(&path, false);
    let (_, out, _) = run(&["inspect", &set]);
    assert!(out.contains("documents   25 by manifest, 41 tokens each"), "{out}");
    assert!(
        out.contains("jsonl from `corpus/*.jsonl`, a tokenizer of 1,300 ids, 7 rows skipped"),
        "{out}"
    );
    let args = [
        "inspect",
        &set,
        "--tokenizer",
        &tokenizer(),
        "--samples",
        "2",
        "--seed",
        "3",
        "--block-size",
        "50",
    ];
    let (code, report) = json(&args);
    assert_eq!((code, report["files"].as_u64()), (Some(0), Some(4)));
    assert_eq!(report["tokens"], 1025);
    assert_eq!(report["blocks"], 20);
    assert_eq!(report["samples"].as_array().unwrap().len(), 2);
    assert_eq!(report["samples"][0]["ids"].as_array().unwrap().len(), 51);
    assert!(!report["samples"][0]["text"].as_str().unwrap().is_empty());
    assert_eq!(json(&args).1, report, "a seed picks the same samples");
    let (_, prefix) = json(&["inspect", &format!("{set}/train_000000000")]);
    assert_eq!(prefix["documents"], 25);
    let (_, one) = json(&["inspect", &format!("{set}/train_0000000001.bin")]);
    assert_eq!(
        (&one["files"], &one["tokens"], &one["documents"]),
        (&1.into(), &300.into(), &Value::Null)
    );
}

#[test]
fn documents_are_counted_by_the_tokenizers_end_and_fill_at_the_ends_of_files_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let eos =
        tinyllama::tokenizer::Tokenizer::load(tokenizer().as_ref()).unwrap().eos_id().unwrap();
    let mut writer = PackedWriter::new(path, "train_slim_0", 2000, 4096);
    for document in [[9, 8, eos], [7, 6, eos]] {
        writer.add(&document).unwrap();
    }
    writer.add(&vec![1000; 1994]).unwrap(); // as the original filled a short chunk
    writer.add(&[5, 4, eos]).unwrap();
    writer.finish().unwrap();
    let set = path.display().to_string();
    let (code, report) = json(&["inspect", &set, "--tokenizer", &tokenizer()]);
    assert_eq!(code, Some(0));
    assert_eq!((&report["documents"], &report["documents_by"]), (&3.into(), &"eos".into()));
    assert_eq!((&report["fill_tokens"], &report["filled_files"]), (&1994.into(), &1.into()));
    let unread = json(&["inspect", &set]).1;
    assert_eq!((&unread["fill_tokens"], &unread["documents"]), (&1994.into(), &Value::Null));
}

#[test]
fn documents_are_counted_by_what_stands_between_them() {
    let dir = tempfile::tempdir().unwrap();
    let (corpus, out) = (dir.path().join("corpus.jsonl"), dir.path().join("packed"));
    std::fs::write(&corpus, "{\"text\": \"We the people\"}\n{\"text\": \"of the state\"}\n")
        .unwrap();
    let [corpus, out] = [corpus, out].map(|path| path.display().to_string());
    let tokenizer = tokenizer();
    for (more, by) in
        [(&["--bos", "--no-eos"][..], "bos"), (&["--no-eos"], "manifest"), (&["--bos"], "eos")]
    {
        let prepare = ["prepare", "jsonl", "--source", &corpus, "--tokenizer", &tokenizer];
        let (code, _, err) = run(&[&prepare[..], &["--out", &out], more].concat());
        assert_eq!(code, Some(0), "{err}");
        assert!(err.contains("2 documents, "), "{err}");
        let (_, report) = json(&["inspect", &out, "--tokenizer", &tokenizer]);
        let got = (&report["documents"], &report["documents_by"]);
        assert_eq!(got, (&2.into(), &by.into()), "{more:?}");
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn verify_finds_each_kind_of_damage_and_exits_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let path = dataset(dir.path());
    manifest(&path, true);
    let set = path.display().to_string();
    let file = |i: u32| path.join(format!("train_{i:010}.bin"));
    let (code, out, err) = run(&["inspect", &set, "--verify"]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("verified    4 file(s): ids below 1,300, 4 checksum(s)"), "{out}");

    let mut flipped = fs::read(file(0)).unwrap();
    flipped[40] ^= 1;
    fs::write(file(0), flipped).unwrap();
    let mut outside = fs::read(file(1)).unwrap();
    outside[25] = 0xff;
    fs::write(file(1), outside).unwrap();
    let cut = fs::read(file(2)).unwrap();
    fs::write(file(2), &cut[..cut.len() - 7]).unwrap();
    fs::remove_file(file(3)).unwrap();

    // Without reading all, what the sizes tell is found.
    let (code, shallow) = json(&["inspect", &set]);
    assert_eq!((code, shallow["bad"].as_array().unwrap().len()), (Some(1), 2));
    let (code, report) = json(&["inspect", &set, "--verify"]);
    assert_eq!(code, Some(1));
    let bad: Vec<&str> =
        report["bad"].as_array().unwrap().iter().map(|b| b["problem"].as_str().unwrap()).collect();
    assert!(bad[0].starts_with("expected CRC-32C "), "{bad:?}");
    assert!(bad[1].contains("outside the model's vocabulary of 1300"), "{bad:?}");
    assert!(bad[2].contains("expected 624 bytes for 300 tokens, got 617; truncated?"), "{bad:?}");
    assert!(bad[3].contains("is missing, `manifest.json` lists it"), "{bad:?}");
    let (code, out, _) = run(&["inspect", &set, "--verify"]);
    assert_eq!(code, Some(1));
    assert!(
        out.contains("bad         4 file(s):\n") && out.contains("train_0000000002.bin: "),
        "{out}"
    );
}

#[test]
fn what_is_no_dataset_is_said_to_be_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display().to_string();
    let (code, _, err) = run(&["inspect", &path]);
    assert_eq!(code, Some(2));
    assert!(err.contains("is no packed dataset, expected `.bin` files"), "{err}");
    fs::write(dir.path().join("pytorch_model.bin"), "PK").unwrap();
    assert!(run(&["inspect", &path]).2.contains("is no packed dataset"));
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let (code, _, err) = run(&["inspect", &path]);
    assert_eq!(code, Some(1));
    assert!(err.contains("config.json") && err.contains("not supported"), "{err}");
}

#[test]
fn dtypes_and_shapes_are_columns_in_a_quantised_folder_too() {
    let dir = tempfile::tempdir().unwrap();
    quickstart_like(&dir.path().join("model"));
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (code, _, err) =
        run(&["convert", &path("model"), &path("q"), "--to", "hf", "--quantize", "int4"]);
    assert_eq!(code, Some(0), "{err}");
    for (folder, dtypes) in [("model", &["F32"][..]), ("q", &["F32", "int4:32", "int4:64"])] {
        let (code, out, err) = run(&["inspect", &path(folder)]);
        assert_eq!(code, Some(0), "{err}");
        let longest = dtypes.iter().map(|dtype| dtype.len()).max().unwrap();
        let lines = out.lines().filter(|line| line.contains(".weight "));
        let lines: Vec<&str> = lines.collect();
        assert!(lines.len() > 10, "{out}");
        let shapes = lines.iter().map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert!(dtypes.contains(&words[1]) && words[2].parse::<i64>().is_ok(), "{line}");
            let dtype = line.find(&format!("  {} ", words[1])).unwrap() + 2;
            assert_eq!(line[dtype + longest..].find(words[2]), Some(1), "{line}");
            dtype
        });
        let places: std::collections::BTreeSet<usize> = shapes.collect();
        assert_eq!(places.len(), 1, "{out}");
    }
}

#[test]
fn bench_data_reads_in_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let set = dataset(dir.path()).display().to_string();
    let (code, report) =
        json(&["bench", "data", "--path", &set, "--block-size", "16", "--seconds", "0.02"]);
    assert_eq!(code, Some(0));
    let rows = report["rows"].as_array().unwrap();
    let access: Vec<_> = rows.iter().map(|r| r["access"].as_str().unwrap()).collect();
    assert_eq!(access, ["mapped", "opened"]);
    assert!(rows.iter().all(|r| r["tokens"].as_u64().unwrap() > 0));
    assert_eq!(run(&["bench", "data"]).0, Some(2));
}
