//! Trains a BPE tokenizer on a corpus and writes it as `tokenizer.json`.
//!
//! Two kinds. `byte-bpe` (GPT-2's, with single digits as in SmolLM2): text is UTF-8 bytes, nothing
//! is ever unknown. `llama`: SentencePiece's shape, U+2581 for spaces, characters with a byte
//! fallback. The same corpus gives the same bytes on every run and with any number of threads.

pub use super::documents::{Texts, documents};

use super::bpe_trainer::{self, Word};
use super::export;
use super::sp_normalizer::SPACE;
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, mpsc};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

/// What to learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Byte-level BPE: GPT-2's word pattern, single digits
    ByteBpe,
    /// Llama's shape: U+2581 for spaces, byte fallback
    Llama,
}

/// Options of [`train`].
#[derive(Clone, Debug)]
pub struct Options {
    /// What to learn.
    pub kind: Kind,
    /// Ids of the finished tokenizer, special tokens and bytes included.
    pub vocab_size: usize,
    /// Token that begins a text.
    pub bos: String,
    /// Token that ends a text.
    pub eos: String,
    /// Whether encoding puts bos by default.
    pub use_bos: bool,
}

/// Share of the corpus's characters that become tokens of their own in [`Kind::Llama`]; the rest
/// fall back to bytes (SentencePiece's default).
const CHARACTER_COVERAGE: f64 = 0.9995;
/// SentencePiece's bound on a piece.
const LLAMA_MAX_CHARS: usize = 16;

/// Learns a tokenizer from `documents` and writes `tokenizer.json` and `tokenizer_config.json` into
/// `out`. Returns the number of ids, fewer than asked where the corpus is too small.
pub fn train(
    documents: impl Iterator<Item = Result<String>>,
    options: &Options,
    out: &Path,
) -> Result<usize> {
    let base = base_tokens(options)?;
    let words = match options.kind {
        Kind::ByteBpe => {
            let cut: PreTokenizerWrapper = serde_json::from_value(byte_pre_tokenizer())?;
            count_words(documents, |text, add| byte_words(&cut, text, add))?
        }
        Kind::Llama => count_words(documents, llama_words)?,
    };
    if words.is_empty() {
        return Err(anyhow!("the corpus holds no text"))
            .hint("check the files named with `--input`");
    }
    let (vocab, json) = match options.kind {
        Kind::ByteBpe => learn_bytes(base, words, options),
        Kind::Llama => learn_llama(base, words, options),
    };
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let config = export::tokenizer_config(
        Some(options.bos.clone()),
        Some(options.eos.clone()),
        options.use_bos,
    )?;
    for (name, bytes) in
        [("tokenizer.json", export::to_bytes(&json)?), ("tokenizer_config.json", config)]
    {
        let path = out.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(vocab)
}

/// The tokens every vocabulary starts with: special ones, then the 256 bytes.
fn base_tokens(options: &Options) -> Result<Vec<String>> {
    let Options { kind, vocab_size, bos, eos, .. } = options;
    if bos.is_empty() || eos.is_empty() {
        return Err(anyhow!("`--bos` and `--eos` must not be empty"))
            .usage("leave them out: <s>, </s>");
    }
    let mut tokens = match kind {
        Kind::ByteBpe => vec![bos.clone()],
        Kind::Llama => vec!["<unk>".to_string(), bos.clone()],
    };
    if !tokens.contains(eos) {
        tokens.push(eos.clone()); // one token may do for both, as <|endoftext|> does
    }
    match kind {
        Kind::ByteBpe => {
            let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
            bytes.sort_unstable();
            tokens.extend(bytes.into_iter().map(String::from));
        }
        Kind::Llama => tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>"))),
    }
    let least = tokens.len() + 1;
    if *vocab_size > 1 << 24 {
        return Err(anyhow!("a vocabulary of {vocab_size} ids is too large"))
            .usage("give `--vocab-size` of 16,777,216 or less");
    }
    if *vocab_size < least {
        let special = tokens.len() - 256;
        return Err(anyhow!(
            "a vocabulary of {vocab_size} is too small: 256 bytes and {special} special"
        ))
        .usage(format!("give `--vocab-size` of {least} or more"));
    }
    Ok(tokens)
}

/// Counts the words of all documents. The calling thread reads, the others cut.
fn count_words(
    documents: impl Iterator<Item = Result<String>>,
    cut: impl Fn(&str, &mut dyn FnMut(&str)) -> Result<()> + Sync,
) -> Result<HashMap<String, u64>> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let (sender, receiver) = mpsc::sync_channel::<String>(4 * workers);
    let receiver = Mutex::new(receiver);
    let next = || receiver.lock().ok().and_then(|queue| queue.recv().ok());
    let work = || -> Result<HashMap<String, u64>> {
        let mut counts = HashMap::new();
        let mut failure = None;
        while let Some(text) = next() {
            let done = cut(&text, &mut |word| match counts.get_mut(word) {
                Some(count) => *count += 1,
                None => drop(counts.insert(word.to_string(), 1)),
            });
            failure = failure.or(done.err()); // go on receiving: the reader waits for room
        }
        failure.map_or(Ok(counts), Err)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let mut read = Ok(());
        for document in documents {
            read = document.map(|text| drop(sender.send(text)));
            if read.is_err() {
                break;
            }
        }
        drop(sender);
        let mut total: HashMap<String, u64> = HashMap::new();
        for thread in threads {
            let counts = thread.join().map_err(|_| anyhow!("a counting thread panicked"))??;
            for (word, count) in counts {
                *total.entry(word).or_default() += count;
            }
        }
        read.map(|()| total)
    })
}

fn byte_pre_tokenizer() -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true},
        byte_level(),
    ]})
}

/// GPT-2's word pattern and byte alphabet.
fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})
}

/// Words in the byte alphabet, cut by the very code that encoding will run.
fn byte_words(cut: &PreTokenizerWrapper, text: &str, add: &mut dyn FnMut(&str)) -> Result<()> {
    let mut pieces = PreTokenizedString::from(text);
    cut.pre_tokenize(&mut pieces).map_err(anyhow::Error::from_boxed)?;
    let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    splits.into_iter().for_each(|(word, ..)| add(word));
    Ok(())
}

/// What a character is to [`llama_words`].
#[derive(PartialEq, Clone, Copy)]
enum Class {
    Space,
    Digit,
    Letter,
    Other,
}

fn class(c: char) -> Class {
    match c {
        SPACE => Class::Space,
        c if c.is_numeric() => Class::Digit,
        c if c.is_alphabetic() => Class::Letter,
        _ => Class::Other,
    }
}

/// Words that merges may not cross, as SentencePiece trains Llama: U+2581 only before a word or in
/// a run of its own, digits alone, letters apart from everything else.
fn llama_words(text: &str, add: &mut dyn FnMut(&str)) -> Result<()> {
    let text = format!("{SPACE}{}", text.replace(' ', "\u{2581}"));
    let run = |text: &str| {
        let kind = text.chars().next().map(class)?;
        Some((kind, text.find(|c| class(c) != kind).unwrap_or(text.len())))
    };
    let mut rest = text.as_str();
    while let Some((kind, mut len)) = run(rest) {
        match (kind, run(&rest[len..])) {
            (Class::Digit, _) => rest[..len].split_inclusive(|_| true).for_each(&mut *add),
            (Class::Space, Some((Class::Letter | Class::Other, word))) => {
                let spaces = len - SPACE.len_utf8(); // the last space belongs to the word
                if spaces > 0 {
                    add(&rest[..spaces]);
                }
                add(&rest[spaces..len + word]);
                len += word;
            }
            _ => add(&rest[..len]),
        }
        rest = &rest[len..];
    }
    Ok(())
}

fn learn_bytes(
    base: Vec<String>,
    words: HashMap<String, u64>,
    options: &Options,
) -> (usize, Value) {
    let (vocab, merges) = learn(base, words, options.vocab_size, usize::MAX);
    let bos = options.use_bos.then(|| id_in(&vocab, &options.bos));
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special_tokens(&vocab),
        "normalizer": null,
        "pre_tokenizer": byte_pre_tokenizer(),
        "post_processor": bos.map(|id| export::bos_template(&options.bos, id)),
        "decoder": byte_level(),
        "model": model(None, false, &vocab, &merges),
    });
    (vocab.len(), json)
}

fn learn_llama(
    mut base: Vec<String>,
    words: HashMap<String, u64>,
    options: &Options,
) -> (usize, Value) {
    let alphabet = alphabet(&words, (options.vocab_size - base.len()).div_ceil(2));
    let mut kept: HashMap<String, u64> = HashMap::new();
    for (word, count) in words {
        for part in
            word.split(|c| alphabet.binary_search(&c).is_err()).filter(|part| !part.is_empty())
        {
            *kept.entry(part.to_string()).or_default() += count;
        }
    }
    base.extend(alphabet.iter().map(|c| c.to_string()));
    let (vocab, merges) = learn(base, kept, options.vocab_size, LLAMA_MAX_CHARS);
    let bos = options.use_bos.then(|| id_in(&vocab, &options.bos));
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special_tokens(&vocab),
        "normalizer": {"type": "Sequence", "normalizers": export::llama_normalizer(true)},
        "pre_tokenizer": null,
        "post_processor": bos.map(|id| export::bos_template(&options.bos, id)),
        "decoder": export::llama_decoder(true),
        "model": model(Some("<unk>"), true, &vocab, &merges),
    });
    (vocab.len(), json)
}

/// The most frequent characters that make up [`CHARACTER_COVERAGE`] of the corpus, sorted; at most
/// `room`, always with U+2581.
fn alphabet(words: &HashMap<String, u64>, room: usize) -> Vec<char> {
    let mut counts: HashMap<char, u64> = HashMap::from([(SPACE, 0)]);
    for (word, count) in words {
        word.chars().for_each(|c| *counts.entry(c).or_default() += count);
    }
    let total: u64 = counts.values().sum();
    let mut order: Vec<(char, u64)> = counts.into_iter().collect();
    order.sort_by_key(|&(c, count)| (c != SPACE, std::cmp::Reverse(count), c));
    let wanted = (total as f64 * CHARACTER_COVERAGE).ceil() as u64;
    let mut covered = 0;
    let enough = |&(_, count): &(char, u64)| {
        let more = covered < wanted;
        covered += count;
        more
    };
    let mut chars: Vec<char> =
        order.into_iter().take_while(enough).take(room).map(|(c, _)| c).collect();
    chars.sort_unstable();
    chars
}

/// Words to ids, merges learnt: the grown vocabulary and the merges as ids.
fn learn(
    mut vocab: Vec<String>,
    words: HashMap<String, u64>,
    vocab_size: usize,
    max_chars: usize,
) -> (Vec<String>, Vec<(u32, u32)>) {
    let mut single: HashMap<char, u32> = HashMap::new();
    for (token, id) in vocab.iter().zip(0..) {
        let mut chars = token.chars();
        if let (Some(c), None) = (chars.next(), chars.next()) {
            single.insert(c, id);
        }
    }
    let mut words: Vec<(String, u64)> = words.into_iter().collect();
    words.sort_unstable();
    let words: Vec<Word> = (words.iter())
        .map(|(word, count)| {
            (word.chars().filter_map(|c| single.get(&c).copied()).collect(), *count)
        })
        .collect();
    let merges = bpe_trainer::learn(words, &mut vocab, vocab_size, max_chars);
    (vocab, merges)
}

fn model(unk: Option<&str>, byte_fallback: bool, vocab: &[String], merges: &[(u32, u32)]) -> Value {
    let ids = vocab.iter().zip(0u32..).map(|(token, id)| (token.clone(), id.into())).collect();
    let pairs =
        merges.iter().map(|&(a, b)| [vocab[a as usize].as_str(), &vocab[b as usize]]).collect();
    export::bpe(unk, byte_fallback, ids, pairs)
}

/// Everything before the first byte token.
fn special_tokens(vocab: &[String]) -> Vec<Value> {
    let is_byte = |token: &&String| *token == "<0x00>" || token.chars().count() == 1;
    let special = vocab.iter().zip(0u32..).take_while(|(token, _)| !is_byte(token));
    special.map(|(token, id)| export::added_token(token, id, true)).collect()
}

fn id_in(vocab: &[String], token: &str) -> u32 {
    vocab.iter().position(|t| t == token).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        let mut out = Vec::new();
        llama_words(text, &mut |word| out.push(word.replace(SPACE, "_"))).unwrap();
        out
    }

    #[test]
    fn llama_words_keep_one_space_before_and_stand_digits_alone() {
        assert_eq!(words("the cat, 12x"), ["_the", "_cat", ",", "_", "1", "2", "x"]);
        assert_eq!(words("    if x:\n"), ["____", "_if", "_x", ":\n"]);
        assert_eq!(words("a  1  "), ["_a", "__", "1", "__"]);
        assert_eq!(words(""), ["_"]);
    }

    #[test]
    fn merges_follow_counts_and_ties_follow_ids() {
        let counts = [("ab", 5), ("bc", 5), ("abc", 3)].map(|(w, n)| (w.to_string(), n));
        let vocab = ["a", "b", "c"].map(String::from).to_vec();
        let (vocab, merges) = learn(vocab, HashMap::from(counts), 5, usize::MAX);
        assert_eq!(vocab[3..], ["ab", "bc"]);
        assert_eq!(merges, [(0, 1), (1, 2)]);
    }

    #[test]
    fn rare_characters_are_left_to_the_byte_fallback() {
        let counts =
            HashMap::from([("\u{2581}aaaa".to_string(), 10_000), ("\u{4e2d}".to_string(), 1)]);
        assert_eq!(alphabet(&counts, 100), ['a', '\u{2581}']);
        assert_eq!(alphabet(&counts, 1), ['\u{2581}']);
    }
}
