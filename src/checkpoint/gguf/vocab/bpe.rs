//! `gpt2`: byte-level BPE, as `tokenizer.json` has it.
//!
//! `tokenizer.ggml.pre` names the cut into words, which a `tokenizer.json` spells out.

use super::super::{GgufError, Metadata};
use super::{Special, dense, kind, merges};
use serde_json::{Value as Json, json};

/// Words of Llama 3: contractions in any case, up to three digits.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words of Qwen 2: Llama 3's with single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words of GPT-2.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

/// The known values of `tokenizer.ggml.pre`; a name after the first of a line is another spelling.
const KNOWN: [&[&str]; 5] = [
    &["default"],
    &["gpt-2"],
    &["smollm"],
    &["llama-bpe", "llama3", "llama-v3"],
    &["qwen2", "deepseek-r1-qwen"],
];

fn canonical(pre: &str) -> Option<&'static str> {
    KNOWN.iter().find(|names| names.contains(&pre)).map(|names| names[0])
}

/// Whether llama.cpp puts `bos` before texts where the file does not say.
pub fn puts_bos(pre: &str) -> bool {
    canonical(pre) == Some("llama-bpe")
}

/// `pre_tokenizer` of a `tokenizer.json`.
///
/// # Errors
/// A name that is not known here.
pub fn pre_tokenizer(pre: &str) -> Result<Json, GgufError> {
    let bytes = |words: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words});
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let sequence = |steps: Vec<Json>| json!({"type": "Sequence", "pretokenizers": steps});
    Ok(match canonical(pre) {
        Some("gpt-2") => bytes(true),
        Some("smollm") => {
            sequence(vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)])
        }
        Some("llama-bpe") => sequence(vec![split(LLAMA3), bytes(false)]),
        Some("qwen2") => sequence(vec![split(QWEN2), bytes(false)]),
        Some("default") => {
            let cuts = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];
            sequence(cuts.into_iter().map(split).chain([bytes(false)]).collect())
        }
        _ => {
            let expected = format!("one of {}", KNOWN.concat().join(", "));
            return Err(GgufError::key("tokenizer.ggml.pre", expected, pre));
        }
    })
}

/// The value of `tokenizer.ggml.pre` whose cut this `pre_tokenizer` is.
///
/// # Errors
/// None is.
pub fn pre_name(pre_tokenizer: &Json) -> Result<&'static str, GgufError> {
    let wanted = essence(pre_tokenizer);
    let same = |pre: &&str| self::pre_tokenizer(pre).is_ok_and(|json| essence(&json) == wanted);
    KNOWN.iter().map(|names| names[0]).find(same).ok_or_else(|| {
        let expected = format!("the cut of one of {}", KNOWN.concat().join(", "));
        GgufError::key("pre_tokenizer", expected, pre_tokenizer)
    })
}

/// The steps that decide the cut, in one spelling.
fn essence(json: &Json) -> Vec<String> {
    let flag = |key: &str, default: bool| json[key].as_bool().unwrap_or(default);
    match json["type"].as_str().unwrap_or("") {
        "Sequence" => {
            json["pretokenizers"].as_array().into_iter().flatten().flat_map(essence).collect()
        }
        "Digits" => vec![format!("digits {}", flag("individual_digits", false))],
        "ByteLevel" => {
            let (space, words) = (flag("add_prefix_space", true), flag("use_regex", true));
            vec![format!("bytes {space} {words}")]
        }
        "Split" => {
            let (regex, how) = (&json["pattern"]["Regex"], &json["behavior"]);
            vec![format!("split {regex} {how} {}", flag("invert", false))]
        }
        other => vec![format!("{other} {json}")],
    }
}

/// `tokenizer.json` of a file whose model is `gpt2`.
///
/// # Errors
/// Another model, missing keys, arrays of different lengths, an unknown `pre`.
pub fn tokenizer_json(m: &Metadata) -> Result<Json, GgufError> {
    let model = m.str("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(GgufError::key("tokenizer.ggml.model", "`gpt2`", model));
    }
    let (tokens, special) = (m.strings("tokenizer.ggml.tokens")?, Special::of(m)?);
    let types = super::types(m, tokens.len())?;
    let pre = m.find_str("tokenizer.ggml.pre")?.unwrap_or("default");
    let mut vocab = serde_json::Map::new();
    let mut added = Vec::new();
    for ((token, kind), id) in tokens.iter().zip(types).zip(0u32..) {
        match kind {
            kind::CONTROL | kind::USER_DEFINED | kind::UNKNOWN => added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": kind != kind::USER_DEFINED,
            })),
            kind::UNUSED => continue, // a row of the embedding that no text reaches
            _ => {}
        }
        if vocab.insert(token.clone(), id.into()).is_some() {
            return Err(GgufError::key("tokenizer.ggml.tokens", "each token once", token));
        }
    }
    let merges = m.strings("tokenizer.ggml.merges")?;
    let nfc = canonical(pre) == Some("qwen2"); // as published; llama.cpp leaves it out
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": nfc.then(|| json!({"type": "NFC"})),
        "pre_tokenizer": pre_tokenizer(pre)?,
        "post_processor": post_processor(tokens, &special),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": canonical(pre) == Some("llama-bpe"), "vocab": vocab,
            "merges": merges,
        },
    }))
}

/// Puts bos and eos around a text where the file says so.
fn post_processor(tokens: &[String], special: &Special) -> Json {
    let text = |id: Option<u32>, wanted: bool| {
        id.filter(|_| wanted).and_then(|id| Some((tokens.get(id as usize)?, id)))
    };
    let (bos, eos) = (text(special.bos, special.add_bos), text(special.eos, special.add_eos));
    if bos.is_none() && eos.is_none() {
        return Json::Null;
    }
    let around = |name: &str, type_id: u32| {
        let token =
            |(token, _): (&String, u32)| json!({"SpecialToken": {"id": token, "type_id": type_id}});
        let middle = json!({"Sequence": {"id": name, "type_id": type_id}});
        bos.map(token).into_iter().chain([middle]).chain(eos.map(token)).collect::<Vec<_>>()
    };
    let pair = [around("A", 0), around("B", 1)].concat();
    let named = bos
        .into_iter()
        .chain(eos)
        .map(|(token, id)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]})));
    json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": named.collect::<serde_json::Map<_, _>>(),
    })
}

/// Metadata of a byte-level `tokenizer.json`; `rows` is the length of the embedding.
///
/// # Errors
/// No byte-level BPE, an unknown cut, ids beyond `rows`.
pub fn metadata(json: &Json, rows: usize, special: &Special) -> Result<Metadata, GgufError> {
    let model = &json["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") || model["byte_fallback"] == true {
        return Err(GgufError::key("model", "a byte-level BPE", &model["type"]));
    }
    let pre = pre_name(&json["pre_tokenizer"])?;
    let normalizer = &json["normalizer"];
    if !(normalizer.is_null() || (pre == "qwen2" && normalizer["type"] == "NFC")) {
        return Err(GgufError::key("normalizer", "none", normalizer));
    }
    let (tokens, types) = dense(json, rows, |_| kind::NORMAL)?;
    let merges = merges(json)?.into_iter().map(|(left, right)| format!("{left} {right}"));
    let mut m = Metadata::default();
    m.set("tokenizer.ggml.model", "gpt2");
    m.set("tokenizer.ggml.pre", pre);
    m.set("tokenizer.ggml.tokens", tokens);
    m.set("tokenizer.ggml.token_type", types);
    m.set("tokenizer.ggml.merges", merges.collect::<Vec<_>>());
    special.put(&mut m);
    Ok(m)
}
