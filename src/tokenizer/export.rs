//! Writes Hugging Face's form of a tokenizer.

use super::sp_normalizer::SPACE;
use anyhow::{Context, Result};
use sentencepiece_model::{SentencePieceModel, Type};
use serde_json::{Value, json};
use std::collections::HashMap;
use tokenizers::normalizers::Precompiled;

/// A SentencePiece BPE model as `tokenizer.json`; `bos` is put before each text.
pub(super) fn tokenizer_json(model: &SentencePieceModel, bos: Option<u32>) -> Result<Vec<u8>> {
    let pieces = model.pieces();
    let of_type = |kinds: &'static [Type]| {
        pieces.iter().zip(0u32..).filter(move |(p, _)| kinds.contains(&p.r#type()))
    };
    let special = of_type(&[Type::Unknown, Type::Control, Type::UserDefined])
        .map(|(p, id)| added_token(p.piece(), id, p.r#type() != Type::UserDefined));
    let vocab: serde_json::Map<String, Value> =
        pieces.iter().zip(0u32..).map(|(p, id)| (p.piece().to_string(), id.into())).collect();
    let byte_fallback = model.trainer().is_some_and(|t| t.byte_fallback());
    let unk = of_type(&[Type::Unknown]).next().map(|(p, _)| p.piece());
    let bos = bos.and_then(|id| Some((pieces.get(id as usize)?.piece(), id)));
    let dummy_prefix = model.normalizer().is_none_or(|n| n.add_dummy_prefix());
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special.collect::<Vec<_>>(),
        "normalizer": normalizer(model)?,
        "pre_tokenizer": null,
        "post_processor": bos.map(|(token, id)| bos_template(token, id)),
        "decoder": llama_decoder(dummy_prefix),
        "model": bpe(unk, byte_fallback, vocab, merges(model)),
    });
    to_bytes(&tokenizer)
}

/// A minimal `tokenizer_config.json`, enough for `AutoTokenizer`.
pub(super) fn tokenizer_config(
    bos: Option<String>,
    eos: Option<String>,
    use_bos: bool,
) -> Result<Vec<u8>> {
    to_bytes(&json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": use_bos,
        "add_eos_token": false,
        "clean_up_tokenization_spaces": false,
    }))
}

/// Pretty JSON with a newline at the end.
pub(super) fn to_bytes(value: &Value) -> Result<Vec<u8>> {
    let mut bytes =
        serde_json::to_vec_pretty(value).context("cannot write the tokenizer as JSON")?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// An entry of `added_tokens`: matched in the raw text before anything else.
pub(super) fn added_token(content: &str, id: u32, special: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": special,
    })
}

/// A post-processor that puts `token` before each text.
pub(super) fn bos_template(token: &str, id: u32) -> Value {
    let special = |type_id: u32| json!({"SpecialToken": {"id": token, "type_id": type_id}});
    let text = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    json!({
        "type": "TemplateProcessing",
        "single": [special(0), text("A", 0)],
        "pair": [special(0), text("A", 0), special(1), text("B", 1)],
        "special_tokens": { token: {"id": token, "ids": [id], "tokens": [token]} },
    })
}

/// Llama's decoder: U+2581 is a space, `<0xNN>` a byte, and the dummy prefix goes.
pub(super) fn llama_decoder(dummy_prefix: bool) -> Value {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if dummy_prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

/// Llama's normaliser: a dummy prefix, then spaces as U+2581.
pub(super) fn llama_normalizer(dummy_prefix: bool) -> Vec<Value> {
    let prefix = json!({"type": "Prepend", "prepend": SPACE});
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    if dummy_prefix { vec![prefix, spaces] } else { vec![spaces] }
}

/// The `model` of a `tokenizer.json`.
pub(super) fn bpe(
    unk: Option<&str>,
    byte_fallback: bool,
    vocab: serde_json::Map<String, Value>,
    merges: Vec<[&str; 2]>,
) -> Value {
    json!({
        "type": "BPE", "dropout": null, "unk_token": unk, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": byte_fallback,
        "ignore_merges": false, "vocab": vocab, "merges": merges,
    })
}

fn normalizer(model: &SentencePieceModel) -> Result<Value> {
    let spec = model.normalizer().cloned().unwrap_or_default();
    let mut steps = Vec::new();
    if !spec.precompiled_charsmap().is_empty() {
        let rules = Precompiled::from(spec.precompiled_charsmap())
            .map_err(|e| anyhow::anyhow!("cannot convert the model's character rules: {e}"))?;
        steps.push(serde_json::to_value(rules)?);
    }
    if spec.remove_extra_whitespaces() {
        for (pattern, content) in [(r"\A +| +\z", ""), (" {2,}", " ")] {
            steps.push(
                json!({"type": "Replace", "pattern": {"Regex": pattern}, "content": content}),
            );
        }
    }
    steps.extend(llama_normalizer(spec.add_dummy_prefix()));
    Ok(json!({"type": "Sequence", "normalizers": steps}))
}

/// Every split of a piece into two pieces, best-scored piece first.
fn merges(model: &SentencePieceModel) -> Vec<[&str; 2]> {
    let normal = || model.pieces().iter().zip(0u32..).filter(|(p, _)| p.r#type() == Type::Normal);
    let ids: HashMap<&str, u32> = normal().map(|(p, id)| (p.piece(), id)).collect();
    let mut pieces: Vec<_> = normal().collect();
    pieces.sort_by(|(a, a_id), (b, b_id)| b.score().total_cmp(&a.score()).then(a_id.cmp(b_id)));
    let mut merges = Vec::new();
    for (piece, _) in pieces {
        let text = piece.piece();
        let mut splits: Vec<(u32, u32, [&str; 2])> = (text.char_indices().skip(1))
            .filter_map(|(cut, _)| {
                let (left, right) = text.split_at(cut);
                Some((*ids.get(left)?, *ids.get(right)?, [left, right]))
            })
            .collect();
        splits.sort();
        merges.extend(splits.into_iter().map(|(_, _, pair)| pair));
    }
    merges
}
