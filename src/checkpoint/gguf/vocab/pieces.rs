//! `llama`: SentencePiece's pieces with scores, as `tokenizer.model` has them; and a Llama's
//! `tokenizer.json`, whose merges become scores.

use super::super::{GgufError, Metadata};
use super::{Special, dense, kind, merges, types};
use serde_json::Value as Json;
use std::collections::{HashMap, HashSet};

/// A piece of a SentencePiece model: text, score, type (see [`kind`]).
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Text, U+2581 for spaces.
    pub text: String,
    /// Merges that make the piece with the highest score come first.
    pub score: f32,
    /// Type.
    pub kind: i32,
}

/// Pieces of a file whose model is `llama`.
///
/// # Errors
/// Another model, missing keys, arrays of different lengths.
pub fn pieces(m: &Metadata) -> Result<Vec<Piece>, GgufError> {
    let model = m.str("tokenizer.ggml.model")?;
    if model != "llama" {
        return Err(GgufError::key("tokenizer.ggml.model", "`llama`", model));
    }
    let tokens = m.strings("tokenizer.ggml.tokens")?;
    let (key, types) = ("tokenizer.ggml.scores", types(m, tokens.len())?);
    let scores = m.find_f32s(key)?.unwrap_or_default();
    if scores.len() != tokens.len() {
        return Err(GgufError::key(key, format!("{} scores", tokens.len()), scores.len()));
    }
    let piece =
        |((text, &score), kind): ((&String, &f32), i32)| Piece { text: text.clone(), score, kind };
    Ok(tokens.iter().zip(scores).zip(types).map(piece).collect())
}

/// `tokenizer.model` of a file whose model is `llama`: a SentencePiece BPE model without character
/// rules, with the dummy prefix of `tokenizer.ggml.add_space_prefix` (true where it is not given).
/// Unused pieces at the end, rows of the embedding that no text reaches, are left out.
///
/// # Errors
/// As [`pieces`] and [`Special::of`].
pub fn tokenizer_model(m: &Metadata) -> Result<Vec<u8>, GgufError> {
    let (mut pieces, special) = (pieces(m)?, Special::of(m)?);
    let used = pieces.iter().rposition(|piece| piece.kind != kind::UNUSED).map(|id| id as u32);
    let last = special.ids().into_iter().flatten().chain(used).max();
    pieces.truncate(last.map_or(0, |id| id as usize + 1));
    let mut out = Vec::new();
    for piece in &pieces {
        let mut one = Message::default();
        one.text(1, &piece.text);
        one.float(2, piece.score);
        one.int(3, piece.kind.into());
        Message::part(&mut out, 1, &one);
    }
    let mut trainer = Message::default();
    trainer.int(3, 2); // BPE
    trainer.int(4, pieces.len() as i64);
    trainer.int(35, pieces.iter().any(|piece| piece.kind == kind::BYTE).into());
    let unknown = pieces.iter().position(|piece| piece.kind == kind::UNKNOWN);
    let unknown = special.unk.or(unknown.map(|id| id as u32));
    // Field of the id, field of the piece, id.
    for (id_field, text_field, id) in
        [(40, 45, unknown), (41, 46, special.bos), (42, 47, special.eos), (43, 48, special.pad)]
    {
        trainer.int(id_field, id.map_or(-1, i64::from));
        if let Some(piece) = id.and_then(|id| pieces.get(id as usize)) {
            trainer.text(text_field, &piece.text);
        }
    }
    let mut normalizer = Message::default();
    normalizer.text(1, "identity");
    normalizer.int(3, m.find_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true).into());
    normalizer
        .int(4, m.find_bool("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false).into());
    normalizer.int(5, 1); // spaces are U+2581
    Message::part(&mut out, 2, &trainer);
    Message::part(&mut out, 3, &normalizer);
    Ok(out)
}

/// A protobuf message that is being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(out: &mut Vec<u8>, mut n: u64) {
        while n >= 0x80 {
            out.push(n as u8 | 0x80);
            n >>= 7;
        }
        out.push(n as u8);
    }

    fn int(&mut self, field: u64, n: i64) {
        Self::varint(&mut self.0, field << 3);
        Self::varint(&mut self.0, n as u64);
    }

    fn float(&mut self, field: u64, x: f32) {
        Self::varint(&mut self.0, field << 3 | 5);
        self.0.extend(x.to_le_bytes());
    }

    fn text(&mut self, field: u64, text: &str) {
        Self::varint(&mut self.0, field << 3 | 2);
        Self::varint(&mut self.0, text.len() as u64);
        self.0.extend(text.as_bytes());
    }

    /// Appends a message as a field of another.
    fn part(out: &mut Vec<u8>, field: u64, message: &Message) {
        Self::varint(out, field << 3 | 2);
        Self::varint(out, message.0.len() as u64);
        out.extend(&message.0);
    }
}

/// Metadata of the pieces of a `tokenizer.model`. `space` is its `add_dummy_prefix`; `rows` is the
/// length of the embedding, whose rows beyond the pieces get unused ones.
///
/// # Errors
/// More pieces than rows.
pub fn metadata(
    pieces: &[Piece],
    space: bool,
    rows: usize,
    special: &Special,
) -> Result<Metadata, GgufError> {
    if pieces.len() > rows {
        let expected = format!("at most {rows} pieces, the embedding's rows");
        return Err(GgufError::key("tokenizer.ggml.tokens", expected, pieces.len()));
    }
    let piece = |id: usize| match pieces.get(id) {
        Some(piece) => piece.clone(),
        None => Piece { text: format!("[PAD{id}]"), score: -1e4, kind: kind::UNUSED },
    };
    let pieces: Vec<Piece> = (0..rows).map(piece).collect();
    let mut m = Metadata::default();
    m.set("tokenizer.ggml.model", "llama");
    m.set("tokenizer.ggml.pre", "default");
    m.set("tokenizer.ggml.tokens", pieces.iter().map(|p| p.text.clone()).collect::<Vec<_>>());
    m.set("tokenizer.ggml.scores", pieces.iter().map(|p| p.score).collect::<Vec<_>>());
    m.set("tokenizer.ggml.token_type", pieces.iter().map(|p| p.kind).collect::<Vec<_>>());
    m.set("tokenizer.ggml.add_space_prefix", space);
    special.put(&mut m);
    Ok(m)
}

/// Pieces of a Llama's `tokenizer.json` (BPE with byte fallback), and whether they give the same ids on
/// every text. They do where the merges are all splits of each token and come token by token, as those
/// made from a `tokenizer.model` are; then a token's score is minus its place in that order. Otherwise
/// some texts may be cut elsewhere.
///
/// # Errors
/// No BPE with byte fallback; ids beyond `rows`.
pub fn of_tokenizer_json(json: &Json, rows: usize) -> Result<(Vec<Piece>, bool), GgufError> {
    let model = &json["model"];
    if model["byte_fallback"] != true {
        return Err(GgufError::key(
            "model.byte_fallback",
            "true, a Llama's",
            &model["byte_fallback"],
        ));
    }
    let unknown = model["unk_token"].as_str().unwrap_or("<unk>");
    let (tokens, types) = dense(json, rows, |token| match token {
        token if token == unknown => kind::UNKNOWN,
        token if is_byte(token) => kind::BYTE,
        _ => kind::NORMAL,
    })?;
    let merges = merges(json)?;
    let mut places: HashMap<String, usize> = HashMap::new();
    let (mut in_order, mut last) = (true, String::new());
    for (left, right) in &merges {
        let token = [*left, *right].concat();
        in_order &= token == last || !places.contains_key(&token);
        let next = places.len();
        places.entry(token.clone()).or_insert(next);
        last = token;
    }
    let normal: HashSet<&str> = tokens
        .iter()
        .zip(&types)
        .filter(|(_, kind)| **kind == kind::NORMAL)
        .map(|(t, _)| t.as_str())
        .collect();
    let splits = |text: &str| {
        let cuts = text.char_indices().skip(1).map(|(cut, _)| text.split_at(cut));
        cuts.filter(|(left, right)| normal.contains(left) && normal.contains(right)).count()
    };
    let all: usize = normal.iter().map(|text| splits(text)).sum();
    let distinct: HashSet<_> = merges.iter().collect();
    let exact = in_order && all == distinct.len();
    let worst = -(places.len() as f32);
    let piece = |(text, kind): (String, i32)| {
        let score = match (kind, places.get(&text)) {
            (kind::NORMAL, Some(&place)) => -(place as f32),
            (kind::NORMAL, None) => worst, // a character, or out of reach
            _ => 0.0,
        };
        Piece { text, score, kind }
    };
    Ok((tokens.into_iter().zip(types).map(piece).collect(), exact))
}

/// Whether a `tokenizer.json` puts a space (U+2581) before texts.
pub fn puts_space(json: &Json) -> bool {
    let steps = |part: &Json, list: &str| match part[list].as_array() {
        Some(steps) => steps.clone(),
        None => vec![part.clone()],
    };
    steps(&json["normalizer"], "normalizers").iter().any(|step| step["type"] == "Prepend")
        || steps(&json["pre_tokenizer"], "pretokenizers").iter().any(|step| {
            let never = step["prepend_scheme"] == "never" || step["add_prefix_space"] == false;
            step["type"] == "Metaspace" && !never
        })
}

/// Refuses a `tokenizer.json` whose normaliser does more than a Llama's: it puts a space before a text and writes spaces
/// as U+2581, and a file says nothing else.
///
/// # Errors
/// The first step that is another.
pub fn check_normalizer(json: &Json) -> Result<(), GgufError> {
    let whole = &json["normalizer"];
    let steps = whole["normalizers"].as_array().map_or(std::slice::from_ref(whole), Vec::as_slice);
    let is_known = |step: &&Json| match step["type"].as_str() {
        Some("Prepend") => step["prepend"] == "\u{2581}",
        Some("Replace") => step["pattern"]["String"] == " " && step["content"] == "\u{2581}",
        _ => step.is_null(),
    };
    match steps.iter().find(|step| !is_known(step)) {
        None => Ok(()),
        Some(step) => {
            let expected = "a space before the text, and spaces as U+2581";
            Err(GgufError::key("normalizer", expected, step))
        }
    }
}

/// `<0x41>`.
fn is_byte(text: &str) -> bool {
    let hex = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}
