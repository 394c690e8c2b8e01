//! Tokenizers: ids equal to SentencePiece's, round trips, streams, training, the command line.

use assert_cmd::Command;
use proptest::prelude::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::TempDir;
use tinyllama::tokenizer::Tokenizer;
use tinyllama::tokenizer::train::{self, Kind, Options};

mod fast;

const MODELS: [&str; 4] = ["llama", "rules", "loose", "unused"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer").join(name)
}

fn load(name: &str) -> Tokenizer {
    Tokenizer::load(&golden(&format!("{name}.model"))).unwrap()
}

fn goldens() -> Value {
    serde_json::from_slice(&std::fs::read(golden("goldens.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A few kilobytes of prose and code to train on.
fn corpus() -> String {
    let prose = "It was the best of times, it was the worst of times, it was the age of wisdom. ";
    let code = "def area(width, height):\n    if width < 0:\n        return 0\n    return width * height\n";
    let other = "Stra\u{df}e caf\u{e9} \u{4f60}\u{597d} 12345 \u{1f600}\n";
    [[prose, code, other].concat().repeat(20).as_str(), include_str!("tokenizer.rs")].concat()
}

fn trained(kind: Kind, vocab_size: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (bos, eos) = ("<s>".to_string(), "</s>".to_string());
    let options = Options { kind, vocab_size, bos, eos, use_bos: kind == Kind::Llama };
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
        for (text, expected) in
            golden["texts"].as_array().unwrap().iter().zip(golden["ids"].as_array().unwrap())
        {
            let got = tokenizer.encode(text.as_str().unwrap(), false, false).unwrap();
            if got != ids(expected) {
                wrong.push((text.clone(), got, ids(expected)));
            }
        }
        assert!(wrong.is_empty(), "{name}: {} wrong, first {:?}", wrong.len(), wrong[0]);
        assert_eq!(tokenizer.vocab_size() as u64, golden["vocab_size"].as_u64().unwrap());
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

#[test]
fn a_literal_control_symbol_is_text_to_a_model_and_special_to_a_json() {
    let eos = SENTENCEPIECE.eos_id().unwrap();
    assert!(!SENTENCEPIECE.encode("a</s>b", false, false).unwrap().contains(&eos));
    let eos = LLAMA.eos_id().unwrap();
    assert!(LLAMA.encode("a</s>b", false, false).unwrap().contains(&eos));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn decoding_an_encoded_text_gives_it_back(text in hard_text()) {
        prop_assume!(!text.contains('\u{2581}'));
        for tokenizer in [&*BYTES, &*LLAMA, &*SENTENCEPIECE] {
            let special = ["<s>", "</s>", "<unk>"].iter().any(|token| text.contains(token));
            if std::ptr::eq(tokenizer, &*SENTENCEPIECE) || !special {
                let ids = tokenizer.encode(&text, true, true).unwrap();
                prop_assert_eq!(&tokenizer.decode(&ids).unwrap(), &text);
            }
        }
    }

    #[test]
    fn pieces_of_a_stream_joined_are_the_decoded_whole(
        ids in prop::collection::vec(0u32..400, 0..40), cut in 0usize..40,
    ) {
        let rules = load("rules");
        for tokenizer in [&*BYTES, &*LLAMA, &*SENTENCEPIECE, &rules] {
            let whole = tokenizer.decode(&ids).unwrap();
            let mut stream = tokenizer.decode_stream();
            let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
            text.extend(stream.finish());
            prop_assert_eq!(&text, &whole);

            let (prompt, rest) = ids.split_at(cut.min(ids.len()));
            let mut prompt_stream = tokenizer.decode_stream();
            let mut text: String = prompt.iter().filter_map(|&id| prompt_stream.push(id)).collect();
            let mut stream = tokenizer.decode_stream_after(prompt);
            text.extend(rest.iter().filter_map(|&id| stream.push(id)));
            text.extend(stream.finish());
            prop_assert_eq!(&text, &whole);
        }
    }

    #[test]
    fn cutting_before_words_changes_no_id_of_a_llama_json(text in hard_text()) {
        static WHOLE: LazyLock<tokenizers::Tokenizer> = LazyLock::new(|| {
            let dir = trained(Kind::Llama, 500);
            tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap()
        });
        prop_assert!(LLAMA.describe().pre_tokenizer.contains("no token reaches across"));
        let whole = WHOLE.encode(text.as_str(), false).unwrap();
        prop_assert_eq!(LLAMA.encode(&text, false, false).unwrap(), whole.get_ids());
    }

    #[test]
    fn a_damaged_model_is_refused_or_works_but_never_panics(at in 0usize..8826, byte in any::<u8>()) {
        let mut bytes = std::fs::read(golden("llama.model")).unwrap();
        bytes[at] = byte;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.model");
        std::fs::write(&path, bytes).unwrap();
        if let Ok(tokenizer) = Tokenizer::load(&path) {
            let ids = tokenizer.encode("The quick <sep> caf\u{e9} 12 \u{1f600}", false, false).unwrap();
            tokenizer.decode(&ids).unwrap();
        }
    }
}

#[test]
fn a_stream_holds_back_half_a_character_and_keeps_the_space_after_a_prompt() {
    let t = &*SENTENCEPIECE;
    let ids = t.encode("the \u{1f600}", false, false).unwrap();
    let mut stream = t.decode_stream();
    let pieces: Vec<Option<String>> = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(pieces[0].as_deref(), Some("the"));
    assert_eq!(pieces[ids.len() - 2], None);
    assert_eq!(pieces[ids.len() - 1].as_deref(), Some("\u{1f600}"));

    let word = t.id_of("\u{2581}the").unwrap();
    assert_eq!(t.decode(&[word]).unwrap(), "the");
    assert_eq!(t.decode_token(word).unwrap(), " the");
    assert_eq!(t.decode_stream_after(&[word]).push(word).as_deref(), Some(" the"));
    let mut padded_row = t.decode_stream();
    assert_eq!(padded_row.push(1_000_000), None);
}

#[test]
fn a_stream_equals_the_whole_for_decoders_without_a_byte_table_too() {
    let dir = trained(Kind::ByteBpe, 300);
    let path = dir.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["decoder"] = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": false});
    std::fs::write(&path, json.to_string()).unwrap();
    let tokenizer = Tokenizer::load(&path).unwrap();
    let ids = tokenizer.encode("if width < 0: return", true, true).unwrap();
    let mut stream = tokenizer.decode_stream();
    let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
    text.extend(stream.finish());
    assert_eq!(text, tokenizer.decode(&ids).unwrap());
    assert!(text.starts_with("i f ") || text.starts_with("if "), "{text}");
}

#[test]
fn bos_and_eos_are_put_once_where_asked_and_nowhere_else() {
    let (bos, eos) = (LLAMA.bos_id().unwrap(), LLAMA.eos_id().unwrap());
    assert!(LLAMA.use_bos() && !BYTES.use_bos());
    let plain = LLAMA.encode("hello", false, false).unwrap();
    assert!(!plain.contains(&bos) && !plain.contains(&eos)); // the file's post-processor adds bos
    assert_eq!(LLAMA.encode_default("hello").unwrap(), [&[bos], plain.as_slice()].concat());
    let both = LLAMA.encode("<s>hello</s>", true, true).unwrap();
    assert_eq!((both[0], both[both.len() - 1]), (bos, eos));
    assert_eq!(both.iter().filter(|&&id| id == bos || id == eos).count(), 2);
    assert_eq!(LLAMA.encode("", true, true).unwrap(), [bos, eos]);
    assert_eq!(BYTES.encode_default("hi").unwrap(), BYTES.encode("hi", false, false).unwrap());
}

#[test]
fn a_tokenizer_without_bos_says_so() {
    let dir = trained(Kind::ByteBpe, 300);
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "</s>"}"#).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (None, Some(1)));
    assert!(tokenizer.encode("a", true, false).unwrap_err().to_string().contains("no bos token"));
}

#[test]
fn training_gives_the_same_bytes_on_every_run() {
    for kind in [Kind::ByteBpe, Kind::Llama] {
        let (a, b) = (trained(kind, 450), trained(kind, 450));
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let read = |dir: &TempDir| std::fs::read(dir.path().join(name)).unwrap();
            assert_eq!(read(&a), read(&b), "{kind:?} {name}");
        }
        assert_eq!(Tokenizer::load(a.path()).unwrap().vocab_size(), 450);
    }
}

#[test]
fn a_trained_tokenizer_shortens_text_and_splits_digits() {
    for tokenizer in [&*BYTES, &*LLAMA] {
        let text = "it was the age of wisdom";
        assert!(tokenizer.encode(text, false, false).unwrap().len() <= 16);
        let digits = tokenizer.encode("12345", false, false).unwrap();
        assert!(digits.len() >= 5, "{digits:?}");
    }
}

#[test]
fn the_json_written_for_a_model_gives_the_same_ids_and_bos_rule() {
    for name in ["llama", "rules"] {
        let (tokenizer, dir) = (load(name), tempfile::tempdir().unwrap());
        tokenizer.write_hf(dir.path()).unwrap();
        let json = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(json.vocab_size(), tokenizer.vocab_size());
        assert_eq!(
            (json.bos_id(), json.eos_id(), json.use_bos()),
            (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.use_bos())
        );
        // Where the formats agree: no control or user-defined symbol in the text, no rule that
        // reads more than one character (the crate applies those by grapheme).
        let same = [
            "Hello world",
            "  two  spaces ",
            "x = 3.14159",
            "\u{4f60}\u{597d} \u{1f600}",
            "a\u{e9}\u{df}b",
        ];
        for text in same {
            let ids = tokenizer.encode(text, true, true).unwrap();
            assert_eq!(json.encode(text, true, true).unwrap(), ids, "{name} {text:?}");
            assert_eq!(
                json.decode(&ids).unwrap(),
                tokenizer.decode(&ids).unwrap(),
                "{name} {text:?}"
            );
        }
    }
}

#[test]
fn a_json_wins_over_a_model_in_one_folder_and_its_files_are_listed() {
    let dir = trained(Kind::ByteBpe, 300);
    std::fs::copy(golden("llama.model"), dir.path().join("tokenizer.model")).unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().vocab_size(), 300);
    let names: Vec<_> = Tokenizer::files(dir.path())
        .iter()
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    assert_eq!(names, ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]);
    let model = Tokenizer::load(&dir.path().join("tokenizer.model")).unwrap();
    assert_eq!(model.vocab_size(), 620);
}

#[test]
fn many_threads_encode_as_one() {
    let text = corpus();
    let expected = LLAMA.encode(&text, false, false).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(LLAMA.encode(&text, false, false).unwrap(), expected));
        }
    });
}

/// Message and hint of a refused tokenizer.
fn refusal(path: &Path) -> String {
    format!("{:#}", Tokenizer::load(path).err().expect("must be refused"))
}

#[test]
fn a_missing_tokenizer_is_refused_with_the_names_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path(), &dir.path().join("nothing"), &dir.path().join("nothing.json")] {
        let text = refusal(path);
        assert!(text.contains("looked for tokenizer.json, tokenizer.model"), "{text}");
        assert!(text.contains(&path.display().to_string()), "{text}");
    }
}

#[test]
fn broken_files_are_refused_with_path_and_place() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("tokenizer.json");
    let model = dir.path().join("tokenizer.model");
    let whole = std::fs::read(trained(Kind::ByteBpe, 300).path().join("tokenizer.json")).unwrap();
    for (bytes, problem) in [
        (&whole[..whole.len() / 2], "EOF while parsing"),
        (b"[]".as_slice(), "it has no `model`"),
        (br#"{"model": {"type": "BPE"}}"#.as_slice(), "is broken"),
    ] {
        std::fs::write(&json, bytes).unwrap();
        let text = refusal(&json);
        assert!(text.contains(problem) && text.contains("tokenizer.json"), "{text}");
    }
    let whole = std::fs::read(golden("llama.model")).unwrap();
    for bytes in [&whole[..4001], b"", b"version https://git-lfs.github.com/spec/v1"] {
        std::fs::write(&model, bytes).unwrap();
        assert!(
            refusal(&model).contains("is no usable SentencePiece model"),
            "{}",
            refusal(&model)
        );
    }
    std::fs::write(&json, b"{").unwrap();
    assert!(refusal(dir.path()).contains("tokenizer.json is broken"));
}

#[test]
fn a_unigram_model_is_refused_by_name() {
    let text = refusal(&golden("unigram.model"));
    assert!(
        text.contains("is a SentencePiece unigram model; expected a SentencePiece BPE model"),
        "{text}"
    );
}

#[test]
fn a_model_with_added_tokens_beside_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden("llama.model"), dir.path().join("tokenizer.model")).unwrap();
    std::fs::write(dir.path().join("added_tokens.json"), r#"{"</s>": 2, "<pad>": 620}"#).unwrap();
    let text = refusal(dir.path());
    assert!(text.contains("added_tokens.json (id 620, \"<pad>\")"), "{text}");
}

#[test]
fn a_config_that_names_a_token_the_tokenizer_lacks_is_refused() {
    let dir = trained(Kind::ByteBpe, 300);
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"bos_token": "<|none|>"}"#)
        .unwrap();
    let text = refusal(dir.path());
    assert!(text.contains("`bos_token` \"<|none|>\""), "{text}");
}

#[test]
fn an_id_out_of_range_is_refused_with_its_position() {
    let text = BYTES.decode(&[5, 70_000]).unwrap_err().to_string();
    let size = BYTES.vocab_size();
    assert_eq!(
        text,
        format!("token id 70000 at position 1 is out of range: the vocabulary has {size} ids")
    );
    assert!(BYTES.decode_token(70_000).is_err());
}

/// Runs `tinyllama tokenizer ARGS` with `stdin`: exit code, stdout, stderr.
fn cli(args: &[&str], stdin: &str) -> (i32, String, String) {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tinyllama"));
    let out = command.arg("tokenizer").args(args).write_stdin(stdin).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

#[test]
fn the_command_line_trains_on_every_format_and_encodes_and_decodes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let lines: String =
        corpus().lines().map(|line| format!("{}\n", serde_json::json!({"text": line}))).collect();
    std::fs::write(path("a.txt"), corpus()).unwrap();
    std::fs::write(path("b.jsonl"), &lines).unwrap();
    std::fs::write(path("c.jsonl.zst"), zstd::encode_all(lines.as_bytes(), 3).unwrap()).unwrap();
    write_parquet(&path("d.parquet"), &corpus());
    let (a, b, c, d) = (path("a.txt"), path("b.jsonl"), path("c.jsonl.zst"), path("d.parquet"));
    let mut train = vec!["train", "--vocab-size", "420", "--input", &a, &b, &c, &d, "--out"];
    let out = path("out");
    train.push(&out);
    let (code, stdout, stderr) = cli(&train, "");
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
    assert!(stderr.contains("420 tokens"), "{stderr}");

    let (code, stdout, _) =
        cli(&["encode", "--tokenizer", &out, "--bos", "--eos"], "the worst  of times\n");
    assert_eq!(code, 0);
    let (_, back, _) = cli(&["decode", "--tokenizer", &out], &stdout);
    assert_eq!(back, "the worst  of times\n\n");
    let encode = ["encode", "--tokenizer", &out, "--text", "a", "--json"];
    let object: Value = serde_json::from_str(&cli(&encode, "").1).unwrap();
    assert_eq!(object["tokens"], serde_json::json!(["a"]));
    let (_, info, _) = cli(&["info", "--tokenizer", &out], "");
    assert!(info.contains("vocab size     420") && info.contains("bos            0 <s>"), "{info}");
    let info: Value =
        serde_json::from_str(&cli(&["info", "--json", "--tokenizer", &out], "").1).unwrap();
    assert_eq!(info["eos"], serde_json::json!({"id": 1, "token": "</s>"}));
}

#[test]
fn the_command_line_says_what_is_wrong_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("x.jsonl");
    std::fs::write(&text, "{\"text\": \"a\"}\n{\"body\": \"b\"}\n").unwrap();
    let (text, out) = (text.to_str().unwrap(), dir.path().to_str().unwrap());
    let small = ["train", "--vocab-size", "200", "--input", text, "--out", out];
    let (code, _, stderr) = cli(&small, "");
    assert_eq!(code, 2);
    assert!(stderr.contains("200 is too small") && stderr.contains("259 or more"), "{stderr}");
    let no_key = ["train", "--vocab-size", "300", "--input", text, "--out", out];
    let (code, _, stderr) = cli(&no_key, "");
    assert_eq!(code, 2);
    assert!(stderr.contains("row 2: no text under `text` (its fields are `"), "{stderr}");
    assert!(stderr.contains("--text-field"), "{stderr}");
    let missing = ["train", "--vocab-size", "300", "--input", "none.txt", "--out", out];
    let (code, _, stderr) = cli(&missing, "");
    assert_eq!(code, 1);
    assert!(stderr.contains("cannot open `none.txt`"), "{stderr}");

    let model = golden("llama.model");
    let model = model.to_str().unwrap();
    let (code, _, stderr) = cli(&["decode", "--tokenizer", model, "1", "x"], "");
    assert_eq!(code, 2);
    assert!(stderr.contains("\"x\" is no token id"), "{stderr}");
    let (code, stdout, stderr) = cli(&["decode", "--tokenizer", model, "620"], "");
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(stderr.contains("token id 620 at position 0 is out of range"), "{stderr}");
}

/// One column `content`, as StarCoderData has it.
fn write_parquet(path: &str, text: &str) {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    let schema = "message schema { optional binary id (UTF8); optional binary content (UTF8); }";
    let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
    let file = std::fs::File::create(path).unwrap();
    let properties = std::sync::Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for value in ["id", text] {
        let mut column = group.next_column().unwrap().unwrap();
        let values = [ByteArray::from(value)]; // two rows, the second null
        column.typed::<ByteArrayType>().write_batch(&values, Some(&[1, 0]), None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}
