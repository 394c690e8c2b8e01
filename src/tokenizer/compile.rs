//! Which tokenizers the fast way can encode exactly, and their tables.
//!
//! Every condition here is one under which the tables say what the slow way does. A tokenizer that
//! meets none of the forms has no fast way and loses nothing but speed.

use super::added::{Added, Normalized};
use super::cuts::Neighbours;
use super::fast::{Chars, Fast, Prefix, Symbols, Words};
use super::hf::byte_level_chars;
use super::merges::Merges;
use super::sp_bpe::Piece;
use super::sp_normalizer::SPACE;
use super::splitter::{GPT2, Splitter};
use super::word_cache::MAX_ID;
use serde_json::Value;
use std::collections::HashMap;
use tokenizers::AddedToken;

/// How a `tokenizer.json` prepares text.
struct Form {
    prefix: Prefix,
    normalized: Normalized,
    nfc: bool,
    cut: Cut,
}

enum Cut {
    /// Anywhere that changes no id; before each space if the file says so.
    Free {
        each_space: bool,
    },
    Split(Splitter),
}

/// Tables for a `tokenizer.json`, its model's vocabulary and its added tokens.
pub(super) fn json(
    file: &Value,
    vocab: &HashMap<String, u32>,
    added: Vec<(u32, AddedToken)>,
) -> Option<Fast> {
    let (model, form) = (&file["model"], form(file)?);
    let plain = model["type"] == "BPE"
        && (model["dropout"].is_null() || model["dropout"] == 0.0)
        && ["continuing_subword_prefix", "end_of_word_suffix"]
            .iter()
            .all(|key| model[*key].is_null() || model[*key] == "");
    let small = vocab.values().all(|&id| id <= MAX_ID);
    if !plain || !small || !one_sequence(&file["post_processor"]) {
        return None;
    }
    let ignore_merges = model["ignore_merges"] == true;
    let merges = merges(&model["merges"], vocab)?;
    let (symbols, words, whole) = match form.cut {
        Cut::Split(splitter) => {
            let chars = byte_level_chars();
            let mut whole = HashMap::new();
            if ignore_merges {
                let bytes = |token: &str| {
                    token.chars().map(|c| chars.get(&c).copied()).collect::<Option<_>>()
                };
                whole = vocab.iter().filter_map(|(t, &id)| Some((bytes(t)?, id))).collect();
            }
            let mut ids = [u32::MAX; 256];
            for (c, byte) in &chars {
                ids[usize::from(*byte)] = *vocab.get(c.to_string().as_str())?;
            }
            (Symbols::Bytes(Box::new(ids)), Words::Split(splitter), whole)
        }
        Cut::Free { each_space } => {
            if ignore_merges || model["byte_fallback"] != true {
                return None;
            }
            let bytes = byte_tokens(vocab)?;
            let joined = || merges.iter().map(|merge| merge.text.as_str());
            if merges.iter().any(|merge| merge.pair.iter().any(|id| bytes.contains(id))) {
                return None; // bytes that merge are no characters, by which text is cut
            }
            let mut words = Neighbours::new(joined());
            if each_space {
                words.cut_before_spaces();
            }
            let symbols = Chars::new(single(vocab.iter().map(|(t, &id)| (t.as_str(), id))), bytes);
            (Symbols::Chars(Box::new(symbols)), Words::Cut(Box::new(words)), HashMap::new())
        }
    };
    let ranked = merges.iter().zip(0..).map(|(merge, rank)| (merge.pair, [rank, merge.id]));
    Some(Fast {
        merges: Merges::new(ranked),
        symbols,
        words,
        prefix: form.prefix,
        added: Added::new(added, form.normalized)?,
        nfc: form.nfc,
        whole,
    })
}

/// Tables for a `tokenizer.model` without character rules and user-defined symbols: its mergeable
/// pieces with their ranks, and its byte pieces.
pub(super) fn model(
    pieces: &[Piece],
    ranks: &[u32],
    bytes: [u32; 256],
    dummy_prefix: bool,
) -> Option<Fast> {
    let ids: HashMap<&str, u32> = pieces.iter().map(|p| (p.text.as_str(), p.id)).collect();
    let spelt = |p: &Piece| p.text.chars().all(|c| ids.contains_key(c.to_string().as_str()));
    if !pieces.iter().all(|p| !p.unused && p.id <= MAX_ID && spelt(p)) {
        return None;
    }
    let mut pairs = Vec::new();
    for (piece, &rank) in pieces.iter().zip(ranks) {
        for (cut, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(cut);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                pairs.push(([left, right], [rank, piece.id]));
            }
        }
    }
    let texts = || pieces.iter().map(|p| p.text.as_str());
    let symbols = Chars::new(single(texts().zip(pieces.iter().map(|p| p.id))), bytes);
    Some(Fast {
        merges: Merges::new(pairs.into_iter()),
        symbols: Symbols::Chars(Box::new(symbols)),
        words: Words::Cut(Box::new(Neighbours::new(texts()))),
        prefix: if dummy_prefix { Prefix::Always } else { Prefix::Never },
        added: Added::none(),
        nfc: false,
        whole: HashMap::new(),
    })
}

/// Recognises normaliser and pre-tokenizer.
fn form(file: &Value) -> Option<Form> {
    let (normalizer, pre) = (&file["normalizer"], &file["pre_tokenizer"]);
    let free = |each_space| Cut::Free { each_space };
    if let Some(prefix) = llama_normalizer(normalizer).filter(|_| pre.is_null()) {
        let (normalized, cut) = (Normalized::Spaces, free(false));
        return Some(Form { prefix, normalized, nfc: false, cut });
    }
    let nfc = normalizer["type"] == "NFC";
    if !nfc && !normalizer.is_null() {
        return None;
    }
    let (prefix, cut) = match pre["type"].as_str()? {
        "Metaspace" if !nfc => {
            let space = SPACE.to_string();
            if pre["replacement"].as_str() != Some(&space) {
                return None;
            }
            let scheme = match pre["add_prefix_space"] == false {
                true => "never",
                false => pre["prepend_scheme"].as_str().unwrap_or("always"),
            };
            let prefix = match scheme {
                "always" => Prefix::UnlessSpace,
                "first" => Prefix::FirstUnlessSpace,
                "never" => Prefix::Never,
                _ => return None,
            };
            (prefix, free(pre["split"] != false))
        }
        "ByteLevel" => byte_level(&[], pre)?,
        "Sequence" => {
            let (last, before) = pre["pretokenizers"].as_array()?.split_last()?;
            byte_level(before, last)?
        }
        _ => return None,
    };
    Some(Form { prefix, normalized: Normalized::Same, nfc, cut })
}

/// `Replace " " -> U+2581`, alone or after `Prepend U+2581`.
fn llama_normalizer(normalizer: &Value) -> Option<Prefix> {
    let space = SPACE.to_string();
    let is_replace = |part: &Value| {
        part["type"] == "Replace" && part["pattern"]["String"] == " " && part["content"] == *space
    };
    if is_replace(normalizer) {
        return Some(Prefix::Never);
    }
    match normalizer["normalizers"].as_array()?.as_slice() {
        [replace] if is_replace(replace) => Some(Prefix::Never),
        [prepend, replace]
            if prepend["type"] == "Prepend"
                && prepend["prepend"] == *space
                && is_replace(replace) =>
        {
            Some(Prefix::Always)
        }
        _ => None,
    }
}

/// `ByteLevel`, after nothing, `Digits` one by one, or a `Split` by a known pattern.
fn byte_level(before: &[Value], last: &Value) -> Option<(Prefix, Cut)> {
    if last["type"] != "ByteLevel" {
        return None;
    }
    let by_regex = last["use_regex"] != false;
    let digits = |part: &Value| part["type"] == "Digits" && part["individual_digits"] == true;
    let prefix_space = last["add_prefix_space"] != false;
    let splitter = match before {
        [] if by_regex => Splitter::of(GPT2, false)?,
        [part] if by_regex && digits(part) && !prefix_space => Splitter::of(GPT2, true)?,
        [part] if !by_regex && part["type"] == "Split" && !prefix_space => {
            if part["behavior"] != "Isolated" || part["invert"] != false {
                return None;
            }
            Splitter::of(part["pattern"]["Regex"].as_str()?, false)?
        }
        _ => return None,
    };
    let prefix = if prefix_space { Prefix::UnlessSpace } else { Prefix::Never };
    Some((prefix, Cut::Split(splitter)))
}

/// Whether a post-processor leaves a single text's own ids as they are.
fn one_sequence(post: &Value) -> bool {
    match post["type"].as_str() {
        None => post.is_null(),
        Some("ByteLevel") => true,
        Some("TemplateProcessing") => post["single"].as_array().is_some_and(|parts| {
            parts.iter().filter(|part| !part["Sequence"].is_null()).count() == 1
                && parts.iter().all(|part| part["Sequence"]["id"] != "B")
        }),
        Some("Sequence") => {
            post["processors"].as_array().is_some_and(|parts| parts.iter().all(one_sequence))
        }
        Some(_) => false,
    }
}

struct Merge {
    pair: [u32; 2],
    text: String,
    id: u32,
}

/// Merges, best first, written `"a b"` or `["a", "b"]`.
fn merges(list: &Value, vocab: &HashMap<String, u32>) -> Option<Vec<Merge>> {
    let merge = |merge: &Value| {
        let (left, right) = match (merge.as_str(), merge.as_array().map(Vec::as_slice)) {
            (Some(text), _) => text.split_once(' ')?,
            (_, Some([left, right])) => (left.as_str()?, right.as_str()?),
            _ => return None,
        };
        let text = [left, right].concat();
        Some(Merge { pair: [*vocab.get(left)?, *vocab.get(right)?], id: *vocab.get(&text)?, text })
    };
    let version = |merge: &&Value| merge.as_str().is_some_and(|m| m.starts_with("#version"));
    list.as_array()?.iter().filter(|m| !version(m)).map(merge).collect()
}

/// Ids of `<0x00>` to `<0xFF>`.
fn byte_tokens(vocab: &HashMap<String, u32>) -> Option<[u32; 256]> {
    let mut ids = [0; 256];
    for (byte, id) in ids.iter_mut().enumerate() {
        *id = *vocab.get(&format!("<0x{byte:02X}>"))?;
    }
    Some(ids)
}

/// The tokens of one character.
fn single<'t>(tokens: impl Iterator<Item = (&'t str, u32)>) -> impl Iterator<Item = (char, u32)> {
    tokens.filter_map(|(token, id)| {
        let mut chars = token.chars();
        let c = chars.next()?;
        chars.next().is_none().then_some((c, id))
    })
}
