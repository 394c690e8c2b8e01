//! The fast way to encode gives the slow way's ids, whole and in parts, on every text.

use super::{golden, goldens, ids, trained};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::LazyLock;
use tinyllama::tokenizer::Tokenizer;
use tinyllama::tokenizer::train::Kind;

const LLAMA3: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// A trained file of `kind` after `edit`.
fn edited(kind: Kind, edit: impl Fn(&mut Value)) -> Tokenizer {
    static FILES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
        [(Kind::Llama, 500), (Kind::ByteBpe, 450)].map(|(kind, size)| {
            std::fs::read(trained(kind, size).path().join("tokenizer.json")).unwrap()
        })
    });
    let file = &FILES[usize::from(kind == Kind::ByteBpe)];
    let mut json: Value = serde_json::from_slice(file).unwrap();
    edit(&mut json);
    of_json(&json)
}

fn of_json(json: &Value) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::load(dir.path()).unwrap()
}

fn add(json: &mut Value, content: &str, normalized: bool, flag: Option<&str>) {
    let tokens = json["added_tokens"].as_array_mut().unwrap();
    let mut token = json!({
        "id": 900 + tokens.len(), "content": content, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": normalized, "special": false,
    });
    if let Some(flag) = flag {
        token[flag] = true.into();
    }
    tokens.push(token);
}

fn metaspace(scheme: &str, split: bool) -> Value {
    json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": split})
}

fn byte_level(prefix: bool, regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex})
}

fn llama3(pattern: &str) -> Value {
    let split = json!({
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false,
    });
    json!({"type": "Sequence", "pretokenizers": [split, byte_level(false, false)]})
}

/// `tests/golden/tokenizer/llama.model` without its user-defined symbols, which have no fast way.
fn plain_model() -> Tokenizer {
    let mut bytes = std::fs::read(golden("llama.model")).unwrap();
    let user_defined = [0, 0, 0, 0, 0x18, 4]; // the end of a score of 0, then the type
    while let Some(at) = bytes.windows(6).position(|window| window == user_defined) {
        bytes[at + 5] = 3; // a control symbol
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), bytes).unwrap();
    Tokenizer::load(dir.path()).unwrap()
}

/// Every form that has a fast way, and whether its texts may be cut.
static FORMS: LazyLock<Vec<(&str, bool, Tokenizer)>> = LazyLock::new(|| {
    let llama = |edit: &dyn Fn(&mut Value)| edited(Kind::Llama, edit);
    let spaces = |pre: Value| {
        edited(Kind::Llama, move |json| {
            json["normalizer"] = Value::Null;
            json["pre_tokenizer"] = pre.clone();
            add(json, "<sep>", false, None);
            add(json, "the w", true, None);
        })
    };
    let bytes = |pre: Value| edited(Kind::ByteBpe, move |json| json["pre_tokenizer"] = pre.clone());
    vec![
        ("model", true, plain_model()),
        ("llama", true, llama(&|_| {})),
        (
            "llama without prefix",
            true,
            llama(&|json| {
                json["normalizer"]["normalizers"].as_array_mut().unwrap().remove(0);
            }),
        ),
        (
            "llama, more tokens",
            true,
            llama(&|json| {
                for token in ["<sep>", "<sep> ", "was", "</s></s>", "\u{4f60}\u{597d}"] {
                    add(json, token, false, None);
                }
            }),
        ),
        (
            "llama, normalised tokens",
            false,
            llama(&|json| {
                add(json, "<sep>", true, None);
                add(json, "was the", true, None);
            }),
        ),
        (
            "llama, tokens with flags",
            false,
            llama(&|json| {
                add(json, "was", false, Some("single_word"));
                add(json, "<sep>", false, Some("lstrip"));
                add(json, "<0x41>", true, Some("rstrip"));
            }),
        ),
        ("metaspace first", true, spaces(metaspace("first", false))),
        ("metaspace always", true, spaces(metaspace("always", false))),
        ("metaspace never", true, spaces(metaspace("never", false))),
        ("metaspace split", true, spaces(metaspace("first", true))),
        ("digits and bytes", true, edited(Kind::ByteBpe, |_| {})),
        ("gpt2", true, bytes(byte_level(false, true))),
        ("gpt2 with prefix", true, bytes(byte_level(true, true))),
        ("llama3", true, bytes(llama3(LLAMA3[0]))),
        ("qwen", true, bytes(llama3(LLAMA3[1]))),
        (
            "llama3, whole words",
            true,
            edited(Kind::ByteBpe, |json| {
                json["pre_tokenizer"] = llama3(LLAMA3[0]);
                json["model"]["ignore_merges"] = true.into();
                let merges = json["model"]["merges"].as_array_mut().unwrap();
                merges.truncate(merges.len() / 2); // later tokens are reached as whole words alone
            }),
        ),
        (
            "pythia",
            true,
            edited(Kind::ByteBpe, |json| {
                json["normalizer"] = json!({"type": "NFC"});
                json["pre_tokenizer"] = byte_level(false, true);
                (2..9).for_each(|len| add(json, &" ".repeat(len), true, None));
            }),
        ),
    ]
});

/// Texts with what breaks tokenizers.
fn hard_text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        5 => "[a-z]{1,6}", 4 => " {1,4}", 2 => "[\n\t\r]{1,3}", 2 => "\\PC{1,4}", 1 => any::<String>(),
        2 => prop::sample::select(vec![
            "it was the ", "was the", "<s>", "</s>", "<sep>", "<sep> ", "<0x41>", "\u{2581}", "\u{2581}\u{2581}the",
            "\u{4f60}\u{597d}\u{4f60}", "caf\u{e9}", "cafe\u{301}", "\0", "\u{a0}", "\u{3000}", "\u{85}", "12345", "\u{661}2",
            "'s", "'LL", "'\u{17f}", "don't", "\u{1f600}", "\u{1f468}\u{200d}\u{1f469}", "();\r\n", "----------------", "\u{37e}",
        ]).prop_map(String::from),
    ];
    prop::collection::vec(part, 0..14).prop_map(|parts| parts.concat())
}

fn same_ids(name: &str, tokenizer: &Tokenizer, text: &str) {
    let expected = tokenizer.encode_reference(text).unwrap();
    assert_eq!(tokenizer.encode(text, false, false).unwrap(), expected, "{name}: {text:?}");
}

#[test]
fn every_form_has_a_fast_way() {
    for (name, cuts, tokenizer) in FORMS.iter() {
        let cut = tokenizer.safe_cut("it was the end");
        assert_eq!(cut.is_some(), *cuts, "{name}");
        assert_eq!(tokenizer.safe_cut(""), None);
        assert_eq!(tokenizer.safe_cut("a"), None);
    }
    let odd = edited(Kind::Llama, |json| json["model"]["byte_fallback"] = false.into());
    assert_eq!(odd.safe_cut("it was the end"), None);
    same_ids("no byte fallback", &odd, "it was \u{4e2d}\u{4e2d} \u{4e2d}");
    assert!(odd.encode_continuation(" was", false).unwrap_err().to_string().contains("in parts"));
}

#[test]
fn golden_and_long_texts_have_the_same_ids() {
    let goldens = goldens();
    let mut texts: Vec<String> = goldens["models"]["llama"]["texts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap().to_string())
        .collect();
    texts.push(include_str!("fast.rs").to_string());
    for part in ["a", " ", "\u{2581}", "=", "\u{4e2d}", "\u{1f600}", "\n", "1", "ab", "th", "\t "] {
        texts.push(part.repeat(100_000 / part.len()));
        texts.push(["x", &part.repeat(300), "y"].concat());
    }
    for (name, _, tokenizer) in FORMS.iter() {
        texts.iter().for_each(|text| same_ids(name, tokenizer, text));
    }
}

#[test]
fn the_fast_ids_of_a_model_are_sentencepieces_own() {
    let (goldens, tokenizer) = (goldens(), plain_model());
    let golden = &goldens["models"]["llama"];
    let (texts, expected) =
        (golden["texts"].as_array().unwrap(), golden["ids"].as_array().unwrap());
    for (text, expected) in texts.iter().zip(expected) {
        let text = text.as_str().unwrap();
        if !["<sep>", "<|im", "xy z", "q\u{301}"].iter().any(|symbol| text.contains(symbol)) {
            assert_eq!(tokenizer.encode(text, false, false).unwrap(), ids(expected), "{text:?}");
        }
    }
}

#[test]
fn one_encoder_appends_text_after_text() {
    let (_, _, tokenizer) = &FORMS[1];
    let (bos, eos) = (tokenizer.bos_id().unwrap(), tokenizer.eos_id().unwrap());
    let (mut encoder, mut got, mut expected) = (tokenizer.encoder(), vec![7], vec![7]);
    for text in ["it was", "", "<s>it", "the end</s>", "it was"] {
        encoder.encode_into(text, true, true, &mut got).unwrap();
        expected.extend(tokenizer.encode(text, true, true).unwrap());
    }
    encoder.continue_into(" was", true, &mut got).unwrap();
    expected.extend(tokenizer.encode_continuation(" was", true).unwrap());
    assert_eq!(got, expected);
    assert_eq!(got.iter().filter(|&&id| id == bos).count(), 5);
    assert_eq!(got.iter().filter(|&&id| id == eos).count(), 6);
}

/// Random vocabularies over few characters: merges that cross spaces, overlap, and tie.
#[test]
fn random_vocabularies_have_the_same_ids() {
    let mut seed = 1u64;
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize % below
    };
    for _ in 0..150 {
        let mut tokens: Vec<String> = ["<unk>".to_string()].into();
        tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        let chars = ["\u{2581}", "a", "b", "c", "\u{e9}", "\u{4e2d}"];
        let first = tokens.len();
        tokens.extend(chars.iter().map(|c| c.to_string()));
        let mut merges = Vec::new();
        for _ in 0..random(25) {
            let [left, right] = [(); 2].map(|()| first + random(tokens.len() - first));
            let merged = [tokens[left].as_str(), &tokens[right]].concat();
            merges.push([tokens[left].clone(), tokens[right].clone()]);
            if !tokens.contains(&merged) {
                tokens.push(merged);
            }
        }
        let vocab: serde_json::Map<String, Value> =
            tokens.iter().zip(0..).map(|(token, id)| (token.clone(), json!(id))).collect();
        let tokenizer = edited(Kind::Llama, |json| {
            json["added_tokens"] = json!([]);
            json["post_processor"] = Value::Null;
            json["model"]["vocab"] = vocab.clone().into();
            json["model"]["merges"] = json!(merges);
        });
        for _ in 0..60 {
            let longest = if random(10) == 0 { 300 } else { 30 };
            let len = random(longest);
            let text: String = (0..len)
                .map(|_| {
                    ["a", "b", " ", "c", "\u{e9}", "\u{4e2d}", "x", "a", "\u{2581}"][random(9)]
                })
                .collect();
            same_ids(&format!("{merges:?}"), &tokenizer, &text);
            in_parts("random", &tokenizer, &text, &mut random);
        }
    }
}

/// Encodes what has been read of a text up to its last safe cut, again and again.
fn in_parts(name: &str, tokenizer: &Tokenizer, text: &str, random: &mut dyn FnMut(usize) -> usize) {
    let (mut encoder, mut got) = (tokenizer.encoder(), Vec::new());
    let (mut start, mut read, mut cuts) = (0, 0, Vec::new());
    while read < text.len() {
        read = (read + 1 + random(12)).min(text.len());
        while !text.is_char_boundary(read) {
            read += 1;
        }
        let Some(cut) = tokenizer.safe_cut(&text[start..read]) else {
            continue;
        };
        assert!(cut > 0 && start + cut < read, "{name}: {cut} in {:?}", &text[start..read]);
        let part = &text[start..start + cut];
        match start {
            0 => encoder.encode_into(part, false, false, &mut got).unwrap(),
            _ => encoder.continue_into(part, false, &mut got).unwrap(),
        }
        start += cut;
        cuts.push(start);
    }
    let rest = &text[start..];
    match start {
        0 => encoder.encode_into(rest, false, false, &mut got).unwrap(),
        _ => encoder.continue_into(rest, false, &mut got).unwrap(),
    }
    let whole = tokenizer.encode_reference(text).unwrap();
    assert_eq!(got, whole, "{name}: {text:?} cut at {cuts:?}");
}

#[test]
fn the_benchmark_tells_speeds_and_that_ids_agree() {
    let model = golden("llama.model");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/tokenizer/fast.rs");
    let out = assert_cmd::Command::cargo_bin("tinyllama")
        .unwrap()
        .args(["bench", "tokenizer", "--json", "--passes", "1", "--threads", "2", "--tokenizer"])
        .arg(&model)
        .arg("--input")
        .arg(&file)
        .assert()
        .success();
    let report: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    let row = &report["files"][0];
    let ids = Tokenizer::load(&model).unwrap().encode(include_str!("fast.rs"), false, false);
    assert_eq!(row["tokens"], ids.unwrap().len());
    assert_eq!(row["reference"]["documents_that_differ"], 0);
    assert!(row["tokens_per_sec_core"].as_f64().unwrap() > 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn hard_texts_have_the_same_ids(text in hard_text()) {
        for (name, _, tokenizer) in FORMS.iter() {
            same_ids(name, tokenizer, &text);
        }
    }

    #[test]
    fn parts_have_the_ids_of_the_whole(text in hard_text(), seed in any::<u64>()) {
        let mut seed = seed;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        for (name, _, tokenizer) in FORMS.iter() {
            in_parts(name, tokenizer, &text, &mut random);
        }
    }

    #[test]
    fn llamas_own_tokenizer_has_the_same_ids(text in hard_text()) {
        static REAL: LazyLock<Option<Tokenizer>> = LazyLock::new(|| {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("checkpoints/llama-tokenizer");
            dir.is_dir().then(|| Tokenizer::load(&dir).unwrap()) // fetched by a script
        });
        if let Some(tokenizer) = &*REAL {
            same_ids("llama 32,000", tokenizer, &text);
            in_parts("llama 32,000", tokenizer, &text, &mut |below| text.len() % below);
        }
    }
}
