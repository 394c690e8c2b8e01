//! `tokenizer.model`: SentencePiece BPE, ids equal to SentencePiece's on every text.
//!
//! Text is normalised ([`super::sp_normalizer`]), cut at user-defined symbols, and merged by score
//! ([`super::sp_bpe`]). Characters outside the vocabulary become `<0xNN>` byte tokens, or `<unk>`
//! (one for a run of them) in models without byte fallback. Control symbols such as a literal
//! `</s>` are text like any other: only [`super::Tokenizer::encode`]'s flags make their ids.

use super::decode::{Detokenizer, Invalid, Leading, Token};
use super::fast::Fast;
use super::hf::FREE_CUT;
use super::sp_bpe::{Merger, Piece, Work, ranks};
use super::sp_normalizer::{CharsMap, Normalizer, SPACE, UserSymbols};
use super::{TokenizerError, Vocab, compile};
use sentencepiece_model::{
    ModelType, SentencePiece as SentencePieceProto, SentencePieceModel, Type,
};
use std::collections::HashSet;
use std::path::Path;

/// A SentencePiece BPE model.
pub(super) struct SentencePiece {
    /// The parsed file, kept for the export to `tokenizer.json`.
    pub(super) model: SentencePieceModel,
    /// Its tables, if it is plain enough for them.
    pub(super) fast: Option<Fast>,
    normalizer: Normalizer,
    merger: Merger,
    unk: u32,
    /// Ids of `<0x00>` to `<0xFF>`; `None` without byte fallback.
    bytes: Option<[u32; 256]>,
    /// Whether the slow way may merge word by word (see [`cuts_are_exact`]); not where it is the
    /// reference of a fast one.
    cut_words: bool,
}

impl SentencePiece {
    /// Reads a model; refuses what cannot be reproduced exactly.
    pub(super) fn load(path: &Path) -> Result<Self, TokenizerError> {
        let data = std::fs::read(path)
            .map_err(|source| TokenizerError::Io { path: path.into(), source })?;
        let broken = |problem: String| TokenizerError::BrokenModel { path: path.into(), problem };
        let model = SentencePieceModel::from_slice(&data).map_err(|e| broken(e.to_string()))?;
        check_pieces(&model).map_err(broken)?;
        check_supported(path, &model)?;

        let spec = model.normalizer().cloned().unwrap_or_default();
        let rules = CharsMap::parse(spec.precompiled_charsmap())
            .ok_or_else(|| broken("its `precompiled_charsmap` is malformed".into()))?;
        let pieces = || model.pieces().iter().zip(0u32..);
        let normalizer = Normalizer {
            rules,
            add_dummy_prefix: spec.add_dummy_prefix(),
            remove_extra_whitespaces: spec.remove_extra_whitespaces(),
            symbols: UserSymbols::new(
                pieces()
                    .filter(|(p, _)| p.r#type() == Type::UserDefined)
                    .map(|(p, id)| (p.piece().to_string(), id)),
            ),
        };
        let mergeable: Vec<Piece> = pieces()
            .filter(|(p, _)| matches!(p.r#type(), Type::Normal | Type::Unused))
            .map(|(p, id)| Piece {
                text: p.piece().to_string(),
                id,
                score: p.score(),
                unused: p.r#type() == Type::Unused,
            })
            .collect();
        let bytes = byte_ids(&model).map_err(broken)?;
        let unk = pieces().find(|(p, _)| p.r#type() == Type::Unknown).map(|(_, id)| id);
        let unk = unk.ok_or_else(|| broken("it has no unknown piece".into()))?;
        let plain = normalizer.rules_are_empty() && !normalizer.remove_extra_whitespaces;
        let fast = bytes.filter(|_| plain && normalizer.symbols.is_empty()).and_then(|bytes| {
            compile::model(&mergeable, &ranks(&mergeable), bytes, normalizer.add_dummy_prefix)
        });
        Ok(Self {
            cut_words: fast.is_none()
                && mergeable.iter().all(|p| !p.unused && cuts_are_exact(&p.text)),
            merger: Merger::new(&mergeable, model.pieces().len() as u32),
            fast,
            normalizer,
            unk,
            bytes,
            model,
        })
    }

    /// Ids of `text`, without bos and eos: the slow way.
    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        let text = self.normalizer.normalize(text);
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut work = Work::default();
        let (mut word, mut at) = (0, 0); // bytes: start of the current word, position
        let mut after_space = true;
        while let Some(c) = text[at..].chars().next() {
            if let Some((len, id)) = self.normalizer.symbols.longest(&text[at..]) {
                self.merge(&text[word..at], &mut work, &mut ids);
                ids.push(id);
                (word, at, after_space) = (at + len, at + len, true);
                continue;
            }
            if self.cut_words && c == SPACE && !after_space {
                self.merge(&text[word..at], &mut work, &mut ids);
                word = at;
            }
            after_space = c == SPACE;
            at += c.len_utf8();
        }
        self.merge(&text[word..], &mut work, &mut ids);
        ids
    }

    fn merge(&self, text: &str, work: &mut Work, ids: &mut Vec<u32>) {
        self.merger.encode(text, work, |id, piece| match (id, &self.bytes) {
            (Some(id), _) => ids.push(id),
            (None, Some(bytes)) => ids.extend(piece.bytes().map(|b| bytes[b as usize])),
            (None, None) if ids.last() == Some(&self.unk) => {}
            (None, None) => ids.push(self.unk),
        });
    }

    /// Every piece in order of its id.
    pub(super) fn vocab(&self) -> Vocab {
        Vocab::new(self.model.pieces().iter().zip(0..).map(|(p, id)| (p.piece().to_string(), id)))
    }

    /// Ids of the bos and eos control pieces the model declares.
    pub(super) fn controls(&self) -> (Option<u32>, Option<u32>) {
        let trainer = self.model.trainer().cloned().unwrap_or_default();
        let find = |name: &str| {
            let is_it = |p: &SentencePieceProto| p.r#type() == Type::Control && p.piece() == name;
            self.model.pieces().iter().position(is_it).map(|id| id as u32)
        };
        (find(trainer.bos_piece()), find(trainer.eos_piece()))
    }

    /// Model, normaliser and cut, for `tokenizer info`.
    pub(super) fn describe(&self) -> (String, String, String) {
        let fallback =
            if self.bytes.is_some() { "byte fallback" } else { "<unk> for unknown characters" };
        let spec = self.model.normalizer().cloned().unwrap_or_default();
        let normalizer = format!(
            "{} (add_dummy_prefix {}, remove_extra_whitespaces {})",
            if spec.name().is_empty() { "unnamed" } else { spec.name() },
            spec.add_dummy_prefix(),
            spec.remove_extra_whitespaces()
        );
        let cut = match &self.fast {
            Some(_) => FREE_CUT,
            None if self.cut_words => "none (cut before U+2581, same ids)",
            None => "none",
        };
        (format!("tokenizer.model, SentencePiece BPE, {fallback}"), normalizer, cut.into())
    }

    /// Byte table for decoding, with SentencePiece's rules.
    pub(super) fn detokenizer(&self) -> Detokenizer {
        let unk_surface = self.model.trainer().map_or(" \u{2047} ", |t| t.unk_surface());
        let tokens = self.model.pieces().iter().map(|p| match p.r#type() {
            Type::Control => Token::Skip,
            Type::Unknown => Token::Verbatim(unk_surface.as_bytes().into()),
            Type::Byte => Token::Verbatim([byte_of(p.piece()).unwrap_or(b'?')].into()),
            _ => Token::Text(p.piece().replace(SPACE, " ").into_bytes().into()),
        });
        let leading =
            match (self.normalizer.remove_extra_whitespaces, self.normalizer.add_dummy_prefix) {
                (true, _) => Leading::DropAll,
                (false, true) => Leading::DropOne,
                (false, false) => Leading::Keep,
            };
        Detokenizer::new(tokens.collect(), leading, Invalid::EachByte)
    }
}

/// Whether cutting text before each run of U+2581 leaves `piece` reachable: it holds U+2581 nowhere
/// but in a run at its start. If that is so of all pieces, no merge crosses such a cut, and merging
/// word by word gives the same ids as merging the whole text, in linear time.
pub(super) fn cuts_are_exact(piece: &str) -> bool {
    !piece.trim_start_matches(SPACE).contains(SPACE)
}

/// `0x41` of `<0x41>`.
pub(super) fn byte_of(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

fn byte_ids(model: &SentencePieceModel) -> Result<Option<[u32; 256]>, String> {
    if !model.trainer().is_some_and(|t| t.byte_fallback()) {
        return Ok(None);
    }
    let mut ids = [u32::MAX; 256];
    for (piece, id) in model.pieces().iter().zip(0..).filter(|(p, _)| p.r#type() == Type::Byte) {
        match byte_of(piece.piece()) {
            Some(byte) => ids[byte as usize] = id,
            None => {
                return Err(format!("byte piece {:?} is not of the form <0xNN>", piece.piece()));
            }
        }
    }
    match ids.iter().position(|&id| id == u32::MAX) {
        Some(byte) => Err(format!("it declares byte fallback but has no piece <0x{byte:02X}>")),
        None => Ok(Some(ids)),
    }
}

/// Refuses what has no exact counterpart here, with the reason.
fn check_supported(path: &Path, model: &SentencePieceModel) -> Result<(), TokenizerError> {
    let refuse =
        |what: &str| Err(TokenizerError::Unsupported { path: path.into(), what: what.into() });
    let trainer = model.trainer().cloned().unwrap_or_default();
    match trainer.model_type() {
        ModelType::Bpe => {}
        ModelType::Unigram => return refuse("a SentencePiece unigram model"),
        ModelType::Word => return refuse("a SentencePiece word model"),
        ModelType::Char => return refuse("a SentencePiece char model"),
    }
    if trainer.treat_whitespace_as_suffix() {
        return refuse("a SentencePiece model with `treat_whitespace_as_suffix`");
    }
    if model.normalizer().is_some_and(|n| !n.escape_whitespaces()) {
        return refuse("a SentencePiece model without `escape_whitespaces`");
    }
    if model.denormalizer().is_some_and(|d| !d.precompiled_charsmap().is_empty()) {
        return refuse("a SentencePiece model with a denormaliser");
    }
    Ok(())
}

fn check_pieces(model: &SentencePieceModel) -> Result<(), String> {
    if model.pieces().is_empty() {
        return Err("it holds no pieces".into());
    }
    let mut seen = HashSet::new();
    for (id, piece) in model.pieces().iter().enumerate() {
        if piece.piece().is_empty() {
            return Err(format!("piece {id} is empty"));
        }
        if piece.score().is_nan() {
            return Err(format!("the score of piece {id} is not a number"));
        }
        if !seen.insert(piece.piece()) {
            return Err(format!(
                "piece {:?} appears twice, the second time as id {id}",
                piece.piece()
            ));
        }
    }
    Ok(())
}
