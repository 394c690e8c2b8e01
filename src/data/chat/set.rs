//! Finetuning data: conversations as rows of tokens, in memory.

use super::layout::{self, Row};
use super::{Conversation, Encoded, Found, encode, is_refused, read, read_pairs};
use crate::config::{ChatDataConfig, LossOn, with_commas};
use crate::data::Batch;
use crate::data::permutation::Permutation;
use crate::error::WithHint;
use crate::ops::Documents;
use crate::tokenizer::{ChatTemplate, Tokenizer};
use anyhow::{Context, Result, anyhow};
use rayon::prelude::*;
use std::path::Path;
use tch::{Device, Tensor};

/// Training and validation conversations.
pub struct ChatSets {
    /// To learn from.
    pub train: ChatSet,
    /// To validate on.
    pub val: Option<ChatSet>,
    /// What was found and left out, a line each.
    pub told: Vec<String>,
}

/// Conversations in rows.
#[derive(Debug)]
pub struct ChatSet {
    conversations: Vec<Encoded>,
    /// Units of shuffling: packed, the conversations of a row; else those of a micro-batch, a row each.
    units: Vec<Row>,
    /// T
    block_size: usize,
    /// Rows (of preferences: pairs) of a unit.
    rows: usize,
    kind: Kind,
}

/// What a row holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Several conversations.
    Packed,
    /// One.
    Single,
    /// One; rows come in pairs, chosen and rejected.
    Pairs,
}

/// Reads and encodes what `data` names. `t`: tokens of a row; `micro`: rows of a micro-batch.
///
/// # Errors
/// As [`read`] and [`encode`]; nothing that could be learned.
pub fn open(
    data: &ChatDataConfig,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    (t, micro): (usize, usize),
    seed: u64,
) -> Result<ChatSets> {
    let found = load(data, "conversations", seed, |path| read(path, data.format))?;
    lay_out(found, |conversations| {
        let mut cut = Cut::default();
        let conversations: Vec<&Conversation> = conversations.iter().collect();
        let all = cut.encode(&conversations, template, tokenizer, data.loss_on)?;
        let kept: Vec<Encoded> =
            all.into_iter().flatten().filter_map(|encoded| cut.row(encoded, t)).collect();
        if kept.is_empty() {
            return Err(anyhow!("no conversation has a target within {t} tokens"))
                .usage("raise `train.max_seq_length`, or set `finetune.data.loss_on: all`");
        }
        Ok((ChatSet::new(kept, data.packing, t, micro), cut.told(t)))
    })
}

/// [`open`] of preferences.
///
/// # Errors
/// As [`open`]. A pair of which one answer has no target within `t` tokens is left out.
pub fn open_pairs(
    data: &ChatDataConfig,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    (t, micro): (usize, usize),
    seed: u64,
) -> Result<ChatSets> {
    lay_out(load(data, "preferences", seed, read_pairs)?, |pairs| {
        let both: Vec<&Conversation> =
            pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]).collect();
        let mut cut = Cut::default();
        let all = cut.encode(&both, template, tokenizer, LossOn::Assistant)?;
        let rows: Vec<Option<Encoded>> =
            all.into_iter().map(|encoded| cut.row(encoded?, t)).collect();
        let whole = rows.chunks_exact(2).filter(|pair| pair.iter().all(Option::is_some));
        let (whole, alike): (Vec<_>, Vec<_>) = whole.partition(|pair| pair[0] != pair[1]);
        cut.alike = alike.len() as u64;
        let kept: Vec<Encoded> = whole.into_iter().flatten().flatten().cloned().collect();
        if kept.is_empty() {
            return match cut.alike {
                0 => Err(anyhow!("no answers of a pair have a target within {t} tokens"))
                    .usage("raise `train.max_seq_length`"),
                n => Err(anyhow!(
                    "no pair is left: {} have the same answer twice within {t} tokens",
                    with_commas(n)
                ))
                .usage("look at the rows with `finetune CONFIG --samples 5`, or raise `train.max_seq_length`"),
            };
        }
        Ok((ChatSet::of_pairs(kept, t, micro), cut.told(t)))
    })
}

/// What was found: to train on, to validate on, and a line for each and for what was left out.
type Loaded<T> = (Vec<T>, Vec<T>, Vec<String>);

/// Both sets, each by `set`, which also tells what the length of a row cost.
fn lay_out<T>(
    (train, val, mut told): Loaded<T>,
    set: impl Fn(&[T]) -> Result<(ChatSet, Vec<String>)>,
) -> Result<ChatSets> {
    let mut set = |items: &[T], of: &str| -> Result<ChatSet> {
        let (set, cut) = set(items).with_context(|| of.to_owned())?;
        told.extend(cut);
        Ok(set)
    };
    let train = set(&train, "the training set")?;
    let val = if val.is_empty() { None } else { Some(set(&val, "the validation set")?) };
    told.push(train.describe());
    Ok(ChatSets { train, val, told })
}

/// What `train` and `val` hold, or a part of `train` in the latter's place.
fn load<T>(
    data: &ChatDataConfig,
    what: &str,
    seed: u64,
    read: impl Fn(&Path) -> Result<Found<T>>,
) -> Result<Loaded<T>> {
    let mut told = Vec::new();
    let mut found = |path: &Path| -> Result<Vec<T>> {
        let Found { items, skipped, examples } = read(path)?;
        told.push(format!("`{}`: {} {what}", path.display(), with_commas(items.len() as u64)));
        if skipped > 0 {
            let (n, examples) = (with_commas(skipped), examples.join("; "));
            told.push(format!("left out {n} row(s) that hold none: {examples}"));
        }
        Ok(items)
    };
    let mut train = found(&data.train)?;
    let val = match &data.val {
        Some(path) => found(path)?,
        None => split(&mut train, data.val_fraction, seed),
    };
    Ok((train, val, told))
}

/// Takes a part of the conversations out, by the seed.
fn split<T>(train: &mut Vec<T>, fraction: f64, seed: u64) -> Vec<T> {
    let n = train.len();
    let take = ((n as f64 * fraction).round() as usize).min(n.saturating_sub(1));
    let order = Permutation::new(n as u64, seed);
    let mut chosen = vec![false; n];
    (0..take).for_each(|i| chosen[order.at(i as u64) as usize] = true);
    let (val, rest): (Vec<_>, Vec<_>) =
        std::mem::take(train).into_iter().zip(chosen).partition(|(_, chosen)| *chosen);
    *train = rest.into_iter().map(|(conversation, _)| conversation).collect();
    val.into_iter().map(|(conversation, _)| conversation).collect()
}

/// What the length of a row cost.
#[derive(Default)]
struct Cut {
    conversations: u64,
    tokens: u64,
    dropped: u64,
    /// Pairs of which both answers were the same within the length.
    alike: u64,
    /// Conversations that the template refuses, and why it refuses the first.
    refused: u64,
    why: Option<String>,
}

impl Cut {
    /// Conversations as tokens; `None` for those that the template refuses by an exception of its own.
    ///
    /// # Errors
    /// It refuses all; as [`encode`] otherwise.
    fn encode(
        &mut self,
        conversations: &[&Conversation],
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
        loss_on: LossOn,
    ) -> Result<Vec<Option<Encoded>>> {
        let origin = template.origin();
        let one = |of: &&Conversation| encode(of, template, tokenizer, loss_on);
        let all: Vec<Result<Encoded>> = conversations.par_iter().map(one).collect();
        let none = all.iter().all(Result::is_err);
        let mut encoded = Vec::with_capacity(all.len());
        for (conversation, row) in conversations.iter().zip(all) {
            match row {
                Err(e) if none || !is_refused(&e) => {
                    return Err(e).with_context(|| format!("with the chat template {origin}"));
                }
                Err(e) => {
                    self.refused += 1;
                    let begins = conversation.first().map_or("", |turn| turn.content.as_str());
                    let begins: String = begins.chars().take(60).collect();
                    self.why.get_or_insert_with(|| {
                        format!("{origin}, of the one that begins `{begins}`: {e:#}")
                    });
                    encoded.push(None);
                }
                Ok(row) => encoded.push(Some(row)),
            }
        }
        Ok(encoded)
    }

    /// A conversation of at most `t` tokens; `None` where it has no target then. The first token has none before it to
    /// be predicted from.
    fn row(&mut self, mut encoded: Encoded, t: usize) -> Option<Encoded> {
        if encoded.ids.len() > t {
            self.conversations += 1;
            self.tokens += (encoded.ids.len() - t) as u64;
            encoded.ids.truncate(t);
            encoded.trained.truncate(t);
        }
        let has_target = encoded.trained.iter().skip(1).any(|trained| *trained);
        self.dropped += u64::from(!has_target);
        has_target.then_some(encoded)
    }

    fn told(&self, t: usize) -> Vec<String> {
        let Self { conversations, tokens, dropped, alike, refused, .. } = self;
        let mut told = Vec::new();
        if conversations + dropped > 0 {
            told.push(format!(
                "{} conversation(s) were cut at `train.max_seq_length` = {t}, by {} tokens; {} without a target were left out",
                with_commas(*conversations),
                with_commas(*tokens),
                with_commas(*dropped)
            ));
        }
        if *alike > 0 {
            told.push(format!(
                "{} pair(s) whose answers are the same within {t} tokens were left out",
                with_commas(*alike)
            ));
        }
        if let Some(why) = &self.why {
            let refused = with_commas(*refused);
            told.push(format!(
                "{refused} conversation(s) that the chat template refuses were left out: {why}"
            ));
        }
        told
    }
}

impl ChatSet {
    /// Lays conversations of at most `t` tokens out; `micro`: rows of a micro-batch.
    pub fn new(conversations: Vec<Encoded>, packing: bool, t: usize, micro: usize) -> Self {
        let (kind, units, rows) = match packing {
            true => (Kind::Packed, layout::pack(&conversations, t), 1),
            false => (Kind::Single, layout::group(&conversations, micro), micro),
        };
        Self { conversations, units, block_size: t, rows, kind }
    }

    /// Pairs of conversations, chosen and rejected in turns; `micro`: pairs of a micro-batch.
    pub fn of_pairs(conversations: Vec<Encoded>, t: usize, micro: usize) -> Self {
        let units = layout::group_pairs(&conversations, micro);
        Self { conversations, units, block_size: t, rows: micro, kind: Kind::Pairs }
    }

    /// Units that are shuffled: rows, or where each row holds one conversation, micro-batches.
    pub fn len(&self) -> u64 {
        self.units.len() as u64
    }

    /// Whether there is nothing in it; [`open`] makes no such set.
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// Tokens that are to be predicted.
    pub fn n_targets(&self) -> u64 {
        let targets =
            |c: &Encoded| c.trained.iter().skip(1).filter(|trained| **trained).count() as u64;
        self.conversations.iter().map(targets).sum()
    }

    /// Rows of a unit.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Units that make a micro-batch of `micro` rows.
    pub fn units_of(&self, micro: usize) -> usize {
        (micro / self.rows).max(1)
    }

    fn describe(&self) -> String {
        let tokens: usize = self.conversations.iter().map(|c| c.ids.len()).sum();
        let rows = self.units.len() * self.rows;
        let share = 100.0 * tokens as f64 / (rows * self.block_size) as f64;
        let rows = match self.kind {
            Kind::Packed => format!(
                "{} rows of {}, {share:.0} % full",
                with_commas(rows as u64),
                self.block_size
            ),
            Kind::Single => format!("micro-batches of {} of like length", self.rows),
            Kind::Pairs => format!("micro-batches of {} pairs of like length", self.rows),
        };
        format!(
            "{} tokens to learn from, {} of them targets, in {rows}",
            with_commas(tokens as u64),
            with_commas(self.n_targets())
        )
    }

    /// Some units as one batch. Tokens behind a row's last conversation are 0, targets of none. What a loss is the mean
    /// over (`n_targets`) are targets, of preferences pairs.
    ///
    /// # Shapes
    /// Packed: (n, T), with documents; else (n x rows, longest), right-padded; of pairs twice as many rows, chosen and
    /// rejected in turns.
    pub fn batch(&self, units: &[u64]) -> Batch {
        let units = units.iter().map(|&unit| &self.units[unit as usize]);
        let packed = self.kind == Kind::Packed;
        let rows: Vec<&[usize]> = match packed {
            true => units.map(Vec::as_slice).collect(),
            false => units.flat_map(|unit| unit.chunks(1)).collect(),
        };
        let length = |row: &&[usize]| row.iter().map(|&i| self.conversations[i].ids.len()).sum();
        let longest: usize = rows.iter().map(length).max().unwrap_or(0);
        // Kernels want multiples of 8, those of `fp8-mixed` 16 tokens in all.
        let t = if packed { self.block_size } else { longest.next_multiple_of(16) };
        let (mut input, mut target) = (vec![0_i64; rows.len() * t], vec![-100_i64; rows.len() * t]);
        let mut lengths = Vec::new();
        let mut n_targets = 0;
        for (r, row) in rows.iter().enumerate() {
            let (mut at, mut of_row) = (r * t, Vec::new());
            for &i in *row {
                let Encoded { ids, trained } = &self.conversations[i];
                for (k, &id) in ids.iter().enumerate() {
                    input[at + k] = id.into();
                    if k > 0 && trained[k] {
                        target[at + k - 1] = id.into();
                        n_targets += 1;
                    }
                }
                at += ids.len();
                of_row.push(ids.len() as i64);
            }
            let left = ((r + 1) * t - at) as i64;
            of_row.extend((left > 0).then_some(left));
            lengths.push(of_row);
        }
        let shape = [rows.len() as i64, t as i64];
        Batch {
            documents: packed.then(|| Documents::from_lengths(&lengths, Device::Cpu)),
            input: Tensor::from_slice(&input).view(shape), // (B, T)
            target: Tensor::from_slice(&target).view(shape), // (B, T)
            n_targets: if self.kind == Kind::Pairs { shape[0] / 2 } else { n_targets },
        }
    }
}
