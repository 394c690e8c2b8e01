//! Preparation through the command line and the library: every kind of source, and what can go wrong.

use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tinyllama::config::PrepareConfig;
use tinyllama::data::packed::PackedSet;
use tinyllama::data::prepare::{Manifest, prepare};
use tinyllama::tokenizer::Tokenizer;

mod dtype;
mod golden_texts;

fn tokenizer_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/quickstart/tokenizer")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&tokenizer_dir()).unwrap()
}

fn options(kind: &str, source: &Path, out: &Path) -> PrepareConfig {
    PrepareConfig::new(kind, source.display().to_string(), out)
}

/// The documents in a folder of packed files.
fn documents(out: &Path) -> Vec<String> {
    let (tokenizer, set) = (tokenizer(), PackedSet::open(out).unwrap());
    let eos = i64::from(tokenizer.eos_id().unwrap());
    let ids = set.read(0, set.len(), 4096).unwrap();
    let decode = |ids: &[i64]| {
        tokenizer.decode(&ids.iter().map(|&id| id as u32).collect::<Vec<_>>()).unwrap()
    };
    let mut texts: Vec<String> = ids.split(|&id| id == eos).map(decode).collect();
    assert_eq!(texts.pop().as_deref(), Some(""), "the last document ends with eos");
    texts
}

fn jsonl(path: &Path, texts: impl IntoIterator<Item = impl AsRef<str>>) {
    let lines = texts.into_iter().map(|t| json!({ "text": t.as_ref() }).to_string() + "\n");
    fs::write(path, lines.collect::<String>()).unwrap();
}

fn write_zst(path: &Path, bytes: &[u8]) {
    fs::write(path, zstd::encode_all(bytes, 3).unwrap()).unwrap();
}

fn write_gz(path: &Path, bytes: &[u8]) {
    let mut gz = flate2::write::GzEncoder::new(File::create(path).unwrap(), Default::default());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap();
}

/// A Parquet file with one optional string column; `None` is a null.
fn write_parquet(path: &Path, column: &str, kind: &str, rows: &[Option<&str>]) {
    let schema = format!("message schema {{ optional binary {column} {kind}; }}");
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let mut file =
        SerializedFileWriter::new(File::create(path).unwrap(), schema, Default::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    let mut writer = group.next_column().unwrap().unwrap();
    let levels: Vec<i16> = rows.iter().map(|r| r.is_some().into()).collect();
    let values: Vec<ByteArray> = rows.iter().flatten().map(|&text| text.into()).collect();
    let ColumnWriter::ByteArrayColumnWriter(typed) = writer.untyped() else { panic!() };
    typed.write_batch(&values, Some(&levels), None).unwrap();
    writer.close().unwrap();
    group.close().unwrap();
    file.close().unwrap();
}

/// Runs `tinyllama prepare`: exit code, stdout, stderr.
fn cli(kind: &str, source: &Path, out: &Path, more: &[&str]) -> (i32, String, String) {
    let mut command = assert_cmd::Command::cargo_bin("tinyllama").unwrap();
    command.args(["prepare", kind, "--source"]).arg(source).arg("--out").arg(out);
    if !more.contains(&"--tokenizer") {
        command.arg("--tokenizer").arg(tokenizer_dir());
    }
    let output = command.args(more).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_folder_of_texts_plain_and_compressed_is_prepared_once() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("texts"), dir.path().join("packed/books"));
    fs::create_dir_all(source.join("deeper/.cache")).unwrap();
    fs::write(source.join("a.txt"), "First.\r\n  Second line\n").unwrap();
    write_gz(&source.join("b.txt.gz"), b"gz");
    write_zst(&source.join("deeper/c.txt.zst"), "\u{e9}t\u{e9}".as_bytes());
    // Two frames, one file; compression is told by the bytes, not by the name.
    let frames =
        [zstd::encode_all(&b"one "[..], 3).unwrap(), zstd::encode_all(&b"two"[..], 3).unwrap()];
    fs::write(source.join("deeper/d.txt"), frames.concat()).unwrap();
    fs::write(source.join("e.txt"), b"caf\xe9").unwrap();
    fs::write(source.join("f.txt"), "").unwrap();
    fs::write(source.join("deeper/.cache/g.txt"), "hidden").unwrap();
    fs::write(source.join("picture.png"), b"\x89PNG").unwrap();

    let (code, stdout, stderr) = cli("text", &source, &out, &["--workers", "2", "--json"]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(documents(&out), ["First.\r\n  Second line\n", "gz", "\u{e9}t\u{e9}", "one two"]);
    let manifest: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(manifest["skipped"], json!({ "empty": 1, "not UTF-8": 1 }));
    assert!(stderr.contains("1 row skipped: not UTF-8 (first: "), "{stderr}");
    assert!(stderr.contains("e.txt, row 1: at byte 3)"), "{stderr}");
    let on_disk = fs::read_to_string(out.join("manifest.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&on_disk).unwrap(), manifest);

    let written = || fs::metadata(out.join("manifest.json")).unwrap().modified().unwrap();
    let before = written();
    let (code, again, stderr) = cli("text", &source, &out, &["--json"]);
    assert_eq!((code, again), (0, stdout), "{stderr}");
    assert!(stderr.contains("already prepared"), "{stderr}");
    assert_eq!(before, written());

    let (code, _, stderr) = cli("text", &source, &out, &["--bos", "--percentage", "0.5"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("`bos`: was false, now true"), "{stderr}");
    assert!(stderr.contains("`percentage`: was 1.0, now 0.5"), "{stderr}");
    assert!(stderr.contains("hint: choose another `out`"), "{stderr}");
    fs::write(source.join("a.txt"), "Longer or shorter").unwrap();
    let (_, _, stderr) = cli("text", &source, &out, &[]);
    assert!(stderr.contains("a.txt`: was 22 bytes, now 17 bytes"), "{stderr}");
}

#[test]
fn broken_rows_are_counted_by_reason_and_only_then_fatal_when_all_are_broken() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("x.jsonl"), dir.path().join("out"));
    let broken = b"{\n[1]\n\n{\"text\": \"\xff\"}\n{\"text\": null}\n{\"body\": \"x\"}\n";
    fs::write(&source, broken).unwrap();
    let (code, _, stderr) = cli("jsonl", &source, &out, &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("error: no document in"), "{stderr}");
    assert!(stderr.contains("1 row skipped: no JSON (first: "), "{stderr}");
    assert!(stderr.contains("x.jsonl, row 1: EOF while parsing"), "{stderr}");
    assert!(stderr.contains("x.jsonl, row 2: it is an array"), "{stderr}");
    assert!(stderr.contains("x.jsonl, row 4: "), "{stderr}");
    assert!(stderr.contains("`--text-field`"), "{stderr}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");

    let good = b"{\"text\": \"kept\"}\n{\"text\": \"no newline at the end\"}";
    fs::write(&source, [&broken[..], good].concat()).unwrap();
    let manifest = prepare(&options("jsonl", &source, &out), &tokenizer(), None).unwrap();
    assert_eq!(documents(&out), ["kept", "no newline at the end"]);
    let skipped: Vec<(&str, u64)> =
        manifest.counts.skipped.iter().map(|(why, n)| (why.as_str(), *n)).collect();
    let want =
        [("no JSON", 1), ("no JSON object", 1), ("no text under `text`", 2), ("not UTF-8", 1)];
    assert_eq!(skipped, want);

    let mut by_field = options("jsonl", &source, &dir.path().join("by_field"));
    by_field.text_field = Some("body".into());
    prepare(&by_field, &tokenizer(), None).unwrap();
    assert_eq!(documents(&by_field.out), ["x"]);
}

#[test]
fn a_slimpajama_folder_gives_the_files_of_its_split_without_github() {
    let dir = tempfile::tempdir().unwrap();
    for (split, name) in [("train/chunk1", "a"), ("train/chunk2", "b"), ("validation/chunk1", "v")]
    {
        let folder = dir.path().join("slim").join(split);
        fs::create_dir_all(&folder).unwrap();
        let row = |set: &str| {
            let text = format!("{name} {set}");
            json!({ "text": text, "meta": { "redpajama_set_name": set } })
        };
        let rows = format!("{}\n{}\n", row("RedPajamaGithub"), row("RedPajamaC4"));
        write_zst(&folder.join("example_0.jsonl.zst"), rows.as_bytes());
    }
    let (source, out) = (dir.path().join("slim"), dir.path().join("out"));
    let manifest = prepare(&options("slimpajama", &source, &out), &tokenizer(), None).unwrap();
    assert_eq!(documents(&out), ["a RedPajamaC4", "b RedPajamaC4"]);
    assert_eq!(manifest.counts.skipped["RedPajamaGithub"], 2);
    let mut validation = options("slimpajama", &source, &dir.path().join("val"));
    validation.split = "validation".into();
    prepare(&validation, &tokenizer(), None).unwrap();
    assert_eq!(documents(&validation.out), ["v RedPajamaC4"]);
}

#[test]
fn parquet_is_read_from_content_or_text_and_a_missing_column_lists_those_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [Some("one"), None, Some("two")];
    for (column, kind) in [("content", "(UTF8)"), ("text", "(UTF8)"), ("text", "")] {
        let (source, out) = (dir.path().join("x.parquet"), dir.path().join("out"));
        write_parquet(&source, column, kind, &rows);
        let manifest = prepare(&options("parquet", &source, &out), &tokenizer(), None).unwrap();
        assert_eq!(documents(&out), ["one", "two"], "{column} {kind}");
        assert_eq!(manifest.counts.skipped[&format!("no text under `{column}`")], 1);
        fs::remove_dir_all(&out).unwrap();
    }
    let source = dir.path().join("x.parquet"); // has the column `text`
    let (code, _, stderr) = cli("starcoder", &source, &dir.path().join("o"), &[]);
    assert_eq!(code, 2);
    assert!(stderr.contains("has no column `content`"), "{stderr}");
    assert!(stderr.contains("its columns are `text`; name one with `--text-field`"), "{stderr}");
    let (code, _, stderr) =
        cli("starcoder", &source, &dir.path().join("o"), &["--text-field", "text"]);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn what_cannot_be_prepared_is_said_before_anything_is_read_all_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("none"), dir.path().join("out"));
    let more = ["--percentage", "10", "--chunk-tokens", "0", "--validation-fraction", "1.5"];
    let more = [&more[..], &["--validation-out", out.to_str().unwrap()]].concat();
    let (code, _, stderr) = cli("text", &source, &out, &more);
    assert_eq!(code, 2);
    for problem in [
        "`percentage`: must be above 0 and at most 1.0 (all), got 10",
        "`chunk_tokens`: must be 1 to 268435456, got 0",
        "`validation_fraction`: must be in [0, 1), got 1.5",
        "`validation_out`: must not be `out`",
    ] {
        assert!(stderr.contains(problem), "{stderr}");
    }
    let (code, _, stderr) = cli("text", &source, &out, &[]);
    assert_eq!(code, 2);
    assert!(stderr.contains("no text files at"), "{stderr}");
    assert!(stderr.contains("hint: the path does not exist"), "{stderr}");
    let (code, _, stderr) = cli("books", &source, &out, &[]);
    assert_eq!(code, 2);
    assert!(stderr.contains("choose one of `text`, `jsonl`"), "{stderr}");

    fs::create_dir(&source).unwrap();
    std::os::unix::fs::symlink("/no/such", source.join("x.jsonl")).unwrap();
    let (code, _, stderr) = cli("jsonl", &source, &out, &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("cannot read `"), "{stderr}");
    assert!(!out.exists());
}

#[test]
fn a_truncated_archive_is_an_error_that_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain.jsonl");
    jsonl(&plain, (0..2000).map(|i| format!("document {i} {}", i * i)));
    let plain = fs::read(plain).unwrap();
    for name in ["x.jsonl.zst", "x.jsonl.gz"] {
        let source = dir.path().join(name);
        if name.ends_with("gz") {
            write_gz(&source, &plain)
        } else {
            write_zst(&source, &plain)
        }
        let bytes = fs::read(&source).unwrap();
        fs::write(&source, &bytes[..bytes.len() / 2]).unwrap();
        let out = dir.path().join("out");
        let error = prepare(&options("jsonl", &source, &out), &tokenizer(), None).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("cannot read `") && error.contains(name), "{error}");
        assert!(!out.exists());
    }
}

#[test]
fn an_interrupted_preparation_starts_over_and_a_second_process_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("x.jsonl");
    jsonl(&source, (0..200).map(|i| format!("document {i}")));
    let mut o = options("jsonl", &source, &dir.path().join("out"));
    (o.validation_fraction, o.validation_out) = (0.2, Some(dir.path().join("val")));
    let straight = prepare(&o, &tokenizer(), None).unwrap();

    // Killed in the middle: half a folder.
    fs::remove_dir_all(&o.out).unwrap();
    let unfinished = dir.path().join("out.unfinished");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join("train_0000000000.bin"), "half").unwrap();
    // Killed between the two folders: validation is in place, training is not.
    assert!(o.validation_out.as_ref().unwrap().join("manifest.json").exists());
    assert_eq!(prepare(&o, &tokenizer(), None).unwrap(), straight);
    assert!(!unfinished.exists());

    fs::remove_dir_all(&o.out).unwrap();
    fs::create_dir(&unfinished).unwrap();
    let lock = File::create(unfinished.join("lock")).unwrap();
    lock.try_lock().unwrap();
    let error = prepare(&o, &tokenizer(), None).unwrap_err().to_string();
    assert!(error.contains("another process is preparing into"), "{error}");
    drop(lock);
    assert_eq!(prepare(&o, &tokenizer(), None).unwrap(), straight);
}

#[test]
fn folders_that_hold_something_else_or_lost_a_file_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("x.jsonl");
    jsonl(&source, (0..200).map(|i| format!("document {i}")));
    let mut o = options("jsonl", &source, &dir.path().join("out"));
    (o.validation_fraction, o.validation_out) = (0.2, Some(dir.path().join("val")));
    fs::create_dir(&o.out).unwrap();
    fs::write(o.out.join("notes.txt"), "mine").unwrap();
    let error = prepare(&o, &tokenizer(), None).unwrap_err().to_string();
    assert!(error.contains("is not empty and has no `manifest.json`"), "{error}");
    fs::remove_file(o.out.join("notes.txt")).unwrap();
    prepare(&o, &tokenizer(), None).unwrap();

    let other = PrepareConfig { out: dir.path().join("other"), ..o.clone() };
    let error = prepare(&other, &tokenizer(), None).unwrap_err().to_string();
    assert!(error.contains("val` was prepared for"), "{error}");

    fs::remove_file(dir.path().join("val/validation_0000000000.bin")).unwrap();
    let error = prepare(&o, &tokenizer(), None).unwrap_err().to_string();
    assert!(error.contains("validation_0000000000.bin`: is missing"), "{error}");
}

#[test]
fn a_document_goes_to_the_same_side_whatever_its_neighbours_and_copies_stay_together() {
    let dir = tempfile::tempdir().unwrap();
    let texts: Vec<String> = (0..3000).map(|i| format!("Document number {i}.")).collect();
    let run = |name: &str, texts: &mut dyn Iterator<Item = &String>, percentage: f64, seed: u64| {
        let source = dir.path().join(format!("{name}.jsonl"));
        jsonl(&source, texts);
        let mut o = options("jsonl", &source, &dir.path().join(name).join("train"));
        (o.validation_fraction, o.validation_out) = (0.1, Some(dir.path().join(name).join("val")));
        (o.percentage, o.seed) = (percentage, seed);
        let manifest: Manifest = prepare(&o, &tokenizer(), None).unwrap();
        let mut sides = [documents(&o.out), documents(o.validation_out.as_ref().unwrap())];
        sides.iter_mut().for_each(|side| side.sort());
        (manifest, sides)
    };
    let (whole, sides) = run("whole", &mut texts.iter(), 1.0, 0);
    assert_eq!(whole.counts.documents + whole.counts.validation_documents, 3000);
    let share = whole.counts.validation_documents as f64 / 3000.0;
    assert!((share - 0.1).abs() < 0.03, "{share}");

    let (_, reversed) = run("reversed", &mut texts.iter().rev(), 1.0, 9);
    assert_eq!(reversed, sides);
    let (twice, _) = run("twice", &mut texts.iter().chain(&texts), 1.0, 0);
    assert_eq!(twice.counts.validation_documents, 2 * whole.counts.validation_documents);

    let (part, of_part) = run("part", &mut texts.iter(), 0.3, 1);
    let n = part.counts.documents + part.counts.validation_documents;
    assert_eq!(n + part.counts.skipped["beyond `percentage`"], 3000);
    assert!((n as f64 / 3000.0 - 0.3).abs() < 0.04, "{n}");
    assert!((part.counts.validation_documents as f64 / n as f64 - 0.1).abs() < 0.05, "{part:?}");
    assert!(of_part[1].iter().all(|text| sides[1].contains(text)));
    assert_ne!(of_part, run("other_seed", &mut texts.iter(), 0.3, 2).1);
}

#[test]
fn csv_and_json_arrays_are_corpora_too_and_chats_become_guanacos_text() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &str| {
        fs::write(dir.path().join(name), bytes).unwrap();
        dir.path().join(name)
    };
    let chat = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}"#;
    for (kind, source, want) in [
        ("csv", file("a.csv", "n,text\n1,\"one, two\"\n"), vec!["one, two"]),
        ("jsonl", file("a.json", "[{\"text\": \"x\"},\n {\"text\": \"y\"}]"), vec!["x", "y"]),
        ("redpajama", file("b.jsonl", "{\"text\": \"z\", \"meta\": {}}\n"), vec!["z"]),
        ("sft", file("c.jsonl", chat), vec!["### Human: Hi### Assistant: Yo"]),
    ] {
        let out = dir.path().join(format!("out_{kind}"));
        let (code, _, stderr) = cli(kind, &source, &out, &[]);
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(documents(&out), want, "{kind}");
    }
}

#[test]
fn subsets_are_folders_and_can_be_left_out() {
    let dir = tempfile::tempdir().unwrap();
    for language in ["rust", "python", "java"] {
        fs::create_dir_all(dir.path().join("star").join(language)).unwrap();
        let path = dir.path().join("star").join(language).join("train-0.parquet");
        write_parquet(&path, "content", "(UTF8)", &[Some(language)]);
    }
    let source = dir.path().join("star");
    for (i, (more, want)) in [
        (vec!["--subset", "rust", "--subset", "java"], vec!["java", "rust"]),
        (vec!["--exclude-subset", "java"], vec!["python", "rust"]),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(format!("out{i}"));
        let (code, _, stderr) = cli("starcoder", &source, &out, &more);
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(documents(&out), want);
    }
    let (code, _, stderr) =
        cli("starcoder", &source, &dir.path().join("none"), &["--subset", "cobol"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("of the subsets `cobol`"), "{stderr}");
}

#[test]
fn a_damaged_row_or_file_is_named_and_skipped_or_stops_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("texts");
    fs::create_dir(&source).unwrap();
    jsonl(&source.join("a.jsonl"), ["first"]);
    let lines: String = (0..20_000)
        .map(|i| json!({ "text": format!("{i} {}", i * i) }).to_string() + "\n")
        .collect();
    write_zst(&source.join("b.jsonl.zst"), lines.as_bytes());
    let bytes = fs::read(source.join("b.jsonl.zst")).unwrap();
    fs::write(source.join("b.jsonl.zst"), &bytes[..bytes.len() / 2]).unwrap();
    jsonl(&source.join("c.jsonl"), ["last"]);
    let out = dir.path().join("out");

    let (code, _, stderr) = cli("jsonl", &source, &out, &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("b.jsonl.zst` after row "), "{stderr}");
    assert!(stderr.contains("hint: copy the file again"), "{stderr}");
    let (code, stdout, stderr) = cli("jsonl", &source, &out, &["--on-error", "skip"]);
    assert_eq!(code, 1, "begun with another option: {stderr}");
    assert!(stderr.contains("`on_error`: was \"skip-rows\", now \"skip\""), "{stderr}{stdout}");
    fs::remove_dir_all(dir.path().join("out.unfinished")).unwrap();
    let (code, stdout, stderr) = cli("jsonl", &source, &out, &["--on-error", "skip", "--json"]);
    assert_eq!(code, 0, "{stderr}");
    let manifest: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(manifest["skipped"]["damaged file, the rest of it"], 1);
    let got = documents(&out);
    assert!(got.len() > 3, "rows before the damage are kept: {}", got.len());
    assert_eq!((got[0].as_str(), got[1].as_str()), ("first", "0 0"));
    assert_eq!(got.last().map(String::as_str), Some("last"));

    // The copy of a damaged file is taken where the preparation stopped.
    let out = dir.path().join("again");
    let (code, ..) = cli("jsonl", &source, &out, &[]);
    assert_eq!(code, 1);
    fs::write(source.join("b.jsonl.zst"), &bytes).unwrap();
    let (code, _, stderr) = cli("jsonl", &source, &out, &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("continues   after 1 of 3 source files: 1 documents"), "{stderr}");
    assert_eq!(documents(&out).len(), 20_002);

    fs::write(source.join("a.jsonl"), "{\"text\": \"first\"}\n{\"body\": 1, \"n\": 2}\n").unwrap();
    let (code, _, stderr) = cli("jsonl", &source, &dir.path().join("o"), &["--on-error", "stop"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("a.jsonl`, row 2: no text under `text`"), "{stderr}");
    assert!(stderr.contains("its fields are `body`, `n`"), "{stderr}");
}

#[test]
fn a_truncated_parquet_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("x.parquet");
    write_parquet(&source, "content", "(UTF8)", &[Some("one"), Some("two")]);
    let bytes = fs::read(&source).unwrap();
    fs::write(&source, &bytes[..bytes.len() - 20]).unwrap();
    let (code, _, stderr) = cli("parquet", &source, &dir.path().join("out"), &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("x.parquet` as Parquet"), "{stderr}");
    assert!(stderr.contains("a file cut short has no footer"), "{stderr}");
}

/// Files of a folder by name, with their bytes.
fn folder(dir: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    entries.map(|path| (name(&path), fs::read(&path).unwrap())).collect()
}

#[test]
fn killed_ten_times_a_preparation_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("texts");
    fs::create_dir(&source).unwrap();
    for file in 0..40 {
        let text =
            |i: usize| format!("file {file} row {i}: ") + &"some words of it ".repeat(i % 97);
        jsonl(&source.join(format!("{file:02}.jsonl")), (0..300).map(text));
    }
    let command = |out: &Path, workers: usize| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tinyllama"));
        command.args(["prepare", "jsonl", "--chunk-tokens", "5000", "--split", "x"]);
        command.arg("--source").arg(&source).arg("--tokenizer").arg(tokenizer_dir());
        command.arg("--out").arg(out.join("train")).arg("--validation-out").arg(out.join("val"));
        command.args(["--validation-fraction", "0.1", "--workers", &workers.to_string()]);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command
    };
    let straight = dir.path().join("straight");
    assert!(command(&straight, 3).status().unwrap().success());
    let out = dir.path().join("killed");
    let (mut kills, mut wait) = (0, 5);
    loop {
        let mut child = command(&out, 1 + kills % 3).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(wait));
        wait += 7;
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            break;
        }
        assert!(
            !out.join("train/manifest.json").exists() || out.join("val/manifest.json").exists()
        );
        kills += 1;
        assert!(kills < 200, "it never ends");
    }
    assert!(kills >= 3, "{kills} kills");
    for split in ["train", "val"] {
        let (mut got, mut want) = (folder(&out.join(split)), folder(&straight.join(split)));
        // The manifest names the folders, which differ.
        let manifest = |files: &mut std::collections::BTreeMap<String, Vec<u8>>| {
            let mut json: Value =
                serde_json::from_slice(&files.remove("manifest.json").unwrap()).unwrap();
            json["options"].take();
            json
        };
        assert_eq!(manifest(&mut got), manifest(&mut want));
        assert_eq!(got, want);
    }
    assert!(!dir.path().join("killed/train.unfinished").exists());
}

#[test]
fn a_long_text_is_encoded_in_parts_with_the_ids_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("long.txt");
    let sentence = "The union is strong, 1,234 times over; \u{fc}ber \u{4f60}\u{597d} \u{1f999}.\r\n\tNext  line";
    let text: String = (0..400_000).map(|i| format!("{sentence} {i} ")).collect();
    fs::write(&source, &text).unwrap();
    assert!(text.len() > 20 << 20);
    let (tokenizer, out) = (tokenizer(), dir.path().join("out"));
    prepare(&options("text", &source, &out), &tokenizer, Some(2)).unwrap();
    let set = PackedSet::open(&out).unwrap();
    let want = tokenizer.encode(&text, false, true).unwrap();
    assert_eq!(set.len(), want.len() as u64);
    let got = set.read(0, set.len(), 4096).unwrap();
    assert!(got.iter().zip(&want).all(|(got, want)| *got == i64::from(*want)));

    let mut bytes = text.into_bytes();
    let end = bytes.len();
    bytes[end - 1] = 0xff;
    fs::write(&source, &bytes).unwrap();
    let error = prepare(&options("text", &source, &dir.path().join("o")), &tokenizer, None);
    let error = format!("{:#}", error.unwrap_err());
    assert!(
        error.contains(&format!(
            "not UTF-8 (first: {}, row 1: at byte {}",
            source.display(),
            end - 1
        )),
        "{error}"
    );
}

#[test]
fn a_full_disk_ends_a_preparation_which_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let (source, disk) = (dir.path().join("texts"), dir.path().join("disk"));
    fs::create_dir_all(&source).unwrap();
    fs::create_dir(&disk).unwrap();
    for file in 0..8 {
        let text =
            |i: usize| format!("file {file} row {i}: ") + &"other words again ".repeat(i % 50);
        jsonl(&source.join(format!("{file}.jsonl")), (0..300).map(text));
    }
    let mount = |more: &str| {
        let mut command = std::process::Command::new("mount");
        let command = command.args(["-t", "tmpfs", "-o", more, "tmpfs"]).arg(&disk);
        command.output().is_ok_and(|output| output.status.success())
    };
    if !mount("size=120k") {
        eprintln!("skipped: this user may not mount a small file system");
        return;
    }
    let more = ["--chunk-tokens", "8000", "--workers", "2"];
    let full = cli("jsonl", &source, &disk.join("out"), &more);
    let room = mount("remount,size=64m");
    let done = cli("jsonl", &source, &disk.join("out"), &more);
    let got = if room { documents(&disk.join("out")).len() } else { 0 };
    std::process::Command::new("umount").arg(&disk).status().unwrap();
    assert_eq!(full.0, 1, "{}", full.2);
    assert!(full.2.contains("cannot write `") && full.2.contains("hint: "), "{}", full.2);
    assert!(full.2.contains("No space left"), "{}", full.2);
    assert!(room && done.0 == 0, "{}", done.2);
    assert_eq!(got, 2400);
}

#[test]
fn a_source_that_changed_since_is_told_even_at_the_same_size() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("x.txt");
    fs::write(&source, "one text").unwrap();
    let o = options("text", &source, &dir.path().join("out"));
    let first = prepare(&o, &tokenizer(), None).unwrap();
    fs::write(&source, "one text").unwrap(); // touched: read again, and found the same
    assert_eq!(prepare(&o, &tokenizer(), None).unwrap(), first);
    fs::write(&source, "two text").unwrap();
    let error = prepare(&o, &tokenizer(), None).unwrap_err().to_string();
    assert!(error.contains("x.txt`: has changed, at the same size"), "{error}");
}
