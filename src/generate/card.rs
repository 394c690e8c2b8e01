//! Decoding on a CUDA card: what running sequences need lies in its memory, and a step of all is one CUDA graph.
//!
//! A sequence has a *row* of each tensor of [`Card`]: its table of blocks, its position, its sampler. A step makes the
//! next token of every row, and the state for the step after it, without the CPU; so the next step can be launched
//! before the tokens of this one are known here. Up to [`DECODER_ROWS`] rows by matrix-vector products; beyond, by the
//! model's own forward pass with paged attention. Reference: what [`super::engine`] does without a card.

use super::sampler::SamplingParams;
use crate::ffi::{
    self, DECODER_ROWS, DecodeLayer, DecodeState, DecodeWeight, Decoder, DecoderParts, Graph,
    ReadBack, SampleState,
};
use crate::model::linear::Linear;
use crate::model::paged_cache::BLOCK;
use crate::model::{GPT, Mlp, PagedCache};
use anyhow::{Context, Result, bail};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// The last ids that the card keeps of each row.
const RING: i64 = 8;

/// State and captured steps of a model on its card.
pub struct Card<'m> {
    model: &'m GPT,
    /// Ids that are chosen from: those below this.
    vocab: i64,
    sample: SampleState,
    paged: DecodeState,
    decoder: Decoder,
    /// (B, C): embeddings of the next tokens
    x: Tensor,
    /// (min(B, 8), V) fp32
    logits: Tensor,
    /// (3, B) i32: ids, bits of their log-probabilities, whether a logit was not finite
    results: Tensor,
    /// By number of rows.
    graphs: BTreeMap<usize, Graph>,
    used: Vec<bool>,
    /// Rows were given up without telling the card.
    forgotten: bool,
}

/// A sequence whose prompt has been read.
#[derive(Debug)]
pub struct Newcomer<'a> {
    /// Its blocks.
    pub table: &'a [u32],
    /// Prompt and output so far.
    pub tokens: &'a [u32],
    /// Tokens drawn so far.
    pub drawn: usize,
    /// How tokens are chosen.
    pub sampling: &'a SamplingParams,
}

/// A block more for a row.
#[derive(Clone, Copy, Debug)]
pub struct Extension {
    /// Whose.
    pub row: usize,
    /// Which of its blocks.
    pub index: usize,
    /// Its number in the cache.
    pub block: u32,
}

/// Tokens on their way from the card.
#[derive(Debug)]
pub struct Chosen(ReadBack);

/// A token as the card tells of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its id.
    pub id: u32,
    /// Its log-probability; `None` where a logit was not finite.
    pub logprob: Option<f64>,
}

impl Chosen {
    /// One a row. The CPU waits for the step.
    ///
    /// # Errors
    /// CUDA's own.
    pub fn wait(self) -> Result<Vec<Choice>> {
        let numbers = self.0.wait()?; // (3 B,): i32 are exact in fp64
        let rows = numbers.len() / 3;
        let choice = |row: usize| Choice {
            id: numbers[row] as u32,
            logprob: (numbers[2 * rows + row] == 0.0)
                .then(|| f64::from(f32::from_bits(numbers[rows + row] as i32 as u32))),
        };
        Ok((0..rows).map(choice).collect())
    }
}

/// Whether the decode kernels cover a model: a Llama without biases in bf16, with heads of 64 or 128, whose weights all
/// stay in their places and have no adapters beside them.
pub fn covers(model: &GPT) -> bool {
    let c = &model.config;
    let llama = |mlp: &Mlp| match mlp {
        Mlp::LLaMA(mlp) => mlp.is_plain() && (mlp.gate_up_packed.is_some() || mlp.is_joined()),
        Mlp::GptNeox(_) => false,
    };
    model.device().is_cuda()
        && cfg!(cuda_kernels)
        && model.fused
        && model.kind() == Kind::BFloat16
        && model.at_unit.is_none() // else a pass has to fetch them
        && matches!(c.head_size, 64 | 128)
        && c.rope_n_elem() % 16 == 0
        && c.n_embd % 8 == 0
        && c.intermediate_size % 8 == 0
        && c.max_length() == c.block_size
        && !c.parallel_residual
        && !(c.bias || c.attn_bias)
        && model.h.iter().all(|block| {
            let plain = block.attn.qkv.is_plain() && block.attn.proj.is_plain();
            block.norm_1.bias.is_none() && plain && llama(&block.mlp)
        })
}

impl<'m> Card<'m> {
    /// Room for `rows` sequences whose keys and values are in `cache`.
    ///
    /// # Errors
    /// Sizes that the kernels do not cover (see [`covers`]); CUDA's own.
    pub fn new(model: &'m GPT, cache: &PagedCache, rows: usize) -> Result<Self> {
        let (c, device, b) = (&model.config, model.device(), rows as i64);
        let ints = |shape: &[i64]| Tensor::zeros(shape, (Kind::Int, device));
        let floats = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, device));
        let results = ints(&[3, b]);
        let positions = Tensor::full([b], -1, (Kind::Int, device));
        let vocab = c.padded_vocab_size;
        let sample = SampleState {
            temperature: floats(&[b]),
            top_k: ints(&[b]),
            top_p: floats(&[b]),
            repetition_penalty: floats(&[b]),
            seen: ints(&[b, words(vocab)]),
            key: ints(&[b, 8]),
            count: ints(&[b]),
            positions: positions.shallow_clone(),
            next: results.get(0),
            log_prob: results.get(1).view_dtype(Kind::Float),
            not_finite: results.get(2),
            ids: ints(&[b, RING]),
        };
        let (cos, sin) = model.rope.tables();
        let per_group = c.n_head / c.n_query_groups;
        let paged = DecodeState {
            table: ints(&[b, (c.block_size as usize).div_ceil(BLOCK) as i64]),
            positions,
            cos: cos.shallow_clone(),
            sin: sin.shallow_clone(),
            arrived: ints(&[b * c.n_query_groups * ((per_group + 7) / 8)]),
            block_size: BLOCK as i64,
            longest: c.block_size,
        };
        Ok(Self {
            model,
            vocab,
            sample,
            decoder: decoder(model, cache, &paged)?,
            paged,
            x: Tensor::zeros([b, c.n_embd], (model.kind(), device)),
            logits: floats(&[b.min(DECODER_ROWS as i64), vocab]),
            results,
            graphs: BTreeMap::new(),
            used: vec![false; rows],
            forgotten: false,
        })
    }

    /// Rows that are free.
    pub fn free(&self) -> usize {
        self.used.iter().filter(|used| !**used).count()
    }

    /// Ids at or beyond `vocab` are not chosen from now on. `false`, and nothing is done, where rows are in use that
    /// choose from others.
    pub fn limit_vocabulary(&mut self, vocab: i64) -> bool {
        if self.vocab == vocab {
            return true;
        }
        if self.used.contains(&true) {
            return false;
        }
        let rows = self.used.len() as i64;
        self.sample.seen = Tensor::zeros([rows, words(vocab)], (Kind::Int, self.model.device()));
        self.vocab = vocab;
        self.graphs.clear();
        true
    }

    /// Takes sequences in, and chooses the next token of each from its logits (E, V). Returns their rows, and the tokens.
    ///
    /// # Sync
    /// Waits for all work so far, since their state is copied to the card.
    ///
    /// # Errors
    /// More sequences than free rows; CUDA's own.
    pub fn begin(
        &mut self,
        newcomers: &[Newcomer],
        logits: &Tensor,
    ) -> Result<(Vec<usize>, Chosen)> {
        let free = (0..self.used.len()).filter(|&row| !self.used[row]); // the lowest: few rows are computed
        let rows: Vec<usize> = free.take(newcomers.len()).collect();
        if rows.len() < newcomers.len() {
            bail!("no free row on the card");
        }
        if std::mem::take(&mut self.forgotten) {
            let _ = self.sample.positions.fill_(-1);
        }
        rows.iter().for_each(|&row| self.used[row] = true);
        let (e, device) = (newcomers.len() as i64, self.model.device());
        let results = Tensor::zeros([3, e], (Kind::Int, device));
        let state = SampleState {
            next: results.get(0),
            log_prob: results.get(1).view_dtype(Kind::Float),
            not_finite: results.get(2),
            ..self.state_of(newcomers)
        };
        let x = Tensor::zeros([e, self.model.config.n_embd], (self.model.kind(), device));
        let embedding = &self.model.wte.weight;
        ffi::sample(&logits.contiguous(), &state, newcomers.len(), self.vocab, embedding, &x)?;

        let at: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let at = Tensor::from_slice(&at).to_device(device); // (E,)
        let put = |ours: &Tensor, theirs: &Tensor| {
            let _ = ours.shallow_clone().index_copy_(0, &at, theirs);
        };
        let (ours, theirs) = (&self.sample, &state);
        put(&ours.temperature, &theirs.temperature);
        put(&ours.top_k, &theirs.top_k);
        put(&ours.top_p, &theirs.top_p);
        put(&ours.repetition_penalty, &theirs.repetition_penalty);
        put(&ours.seen, &theirs.seen);
        put(&ours.key, &theirs.key);
        put(&ours.count, &theirs.count);
        put(&ours.positions, &theirs.positions);
        put(&ours.next, &theirs.next);
        put(&ours.not_finite, &theirs.not_finite);
        put(&self.x, &x);
        put(&self.paged.table, &self.tables_of(newcomers));
        Ok((rows, Chosen(ReadBack::start(&results)?)))
    }

    /// Their samplers, before the next draw.
    fn state_of(&self, newcomers: &[Newcomer]) -> SampleState {
        let (e, device) = (newcomers.len() as i64, self.model.device());
        let floats = |f: &dyn Fn(&Newcomer) -> f32| {
            let values: Vec<f32> = newcomers.iter().map(f).collect();
            Tensor::from_slice(&values).to_device(device) // (E,)
        };
        let ints = |f: &dyn Fn(&Newcomer) -> i32| {
            let values: Vec<i32> = newcomers.iter().map(f).collect();
            Tensor::from_slice(&values).to_device(device) // (E,)
        };
        let temperature = |s: &SamplingParams| if s.is_greedy() { 0.0 } else { s.temperature };
        let key = |n: &Newcomer| ChaCha8Rng::seed_from_u64(n.sampling.seed).get_seed();
        let keys: Vec<i32> = newcomers.iter().flat_map(|n| words_of(&key(n))).collect();
        let zeros = |n: i64| Tensor::zeros([e, n], (Kind::Int, device));
        SampleState {
            temperature: floats(&|n| temperature(n.sampling) as f32),
            top_k: ints(&|n| n.sampling.top_k.unwrap_or(0).min(i32::MAX as i64) as i32),
            top_p: floats(&|n| n.sampling.top_p as f32),
            repetition_penalty: floats(&|n| n.sampling.repetition_penalty as f32),
            seen: self.seen_of(newcomers),
            key: Tensor::from_slice(&keys).view([e, 8]).to_device(device),
            count: ints(&|n| n.drawn as i32),
            positions: ints(&|n| n.tokens.len() as i32 - 1), // the choice moves them on
            ids: zeros(RING),
            // Replaced by views of one tensor.
            next: zeros(0),
            log_prob: zeros(0),
            not_finite: zeros(0),
        }
    }

    /// (E, ceil(vocab/32)) bits of the ids that a repetition penalty wants to know.
    fn seen_of(&self, newcomers: &[Newcomer]) -> Tensor {
        let (e, device) = (newcomers.len(), self.model.device());
        let row = words(self.vocab);
        if newcomers.iter().all(|n| n.sampling.repetition_penalty == 1.0) {
            return Tensor::zeros([e as i64, row], (Kind::Int, device));
        }
        let mut bits = vec![0u32; e * row as usize];
        for (newcomer, bits) in newcomers.iter().zip(bits.chunks_mut(row as usize)) {
            for &id in newcomer.tokens.iter().filter(|&&id| (id as i64) < self.vocab) {
                bits[id as usize / 32] |= 1 << (id % 32);
            }
        }
        let bits: Vec<i32> = bits.into_iter().map(|word| word as i32).collect();
        Tensor::from_slice(&bits).view([e as i64, row]).to_device(device)
    }

    /// (E, blocks), filled up with 0.
    fn tables_of(&self, newcomers: &[Newcomer]) -> Tensor {
        let row = self.paged.table.size()[1] as usize;
        let mut all = vec![0i32; newcomers.len() * row];
        for (newcomer, all) in newcomers.iter().zip(all.chunks_mut(row)) {
            all.iter_mut().zip(newcomer.table).for_each(|(to, &block)| *to = block as i32);
        }
        let shape = [newcomers.len() as i64, row as i64];
        Tensor::from_slice(&all).view(shape).to_device(self.model.device())
    }

    /// Rows have more blocks.
    ///
    /// # Sync
    /// Waits for all work so far, where there are any.
    pub fn extend(&mut self, extensions: &[Extension]) {
        if extensions.is_empty() {
            return;
        }
        let columns = self.paged.table.size()[1];
        let places: Vec<i64> =
            extensions.iter().map(|e| e.row as i64 * columns + e.index as i64).collect();
        let blocks: Vec<i32> = extensions.iter().map(|e| e.block as i32).collect();
        let up = |x: Tensor| x.to_device(self.model.device());
        let (places, blocks) = (up(Tensor::from_slice(&places)), up(Tensor::from_slice(&blocks)));
        let _ = self.paged.table.view([-1]).index_copy_(0, &places, &blocks);
    }

    /// Rows make no more tokens; what is on its way still comes.
    ///
    /// # Sync
    /// Waits for all work so far, where there are any.
    pub fn pause(&mut self, rows: &[usize]) {
        if rows.is_empty() {
            return;
        }
        let at: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let at = Tensor::from_slice(&at).to_device(self.model.device());
        let _ = self.sample.positions.index_fill_(0, &at, -1);
    }

    /// All rows are free. Nothing is asked of the card, which may have failed.
    pub fn forget(&mut self) {
        self.used.fill(false);
        self.forgotten = true;
    }

    /// Rows are free for other sequences.
    ///
    /// # Sync
    /// As [`Card::pause`].
    pub fn release(&mut self, rows: &[usize]) {
        self.pause(rows);
        rows.iter().for_each(|&row| self.used[row] = false);
    }

    /// The next token of all rows that are not paused. Nothing waits.
    ///
    /// # Errors
    /// CUDA's own.
    pub fn step(&mut self, cache: &mut PagedCache) -> Result<Chosen> {
        let last = self.used.iter().rposition(|used| *used).context("no row is in use")?;
        let rows = (last + 1).next_power_of_two().min(self.used.len());
        if !self.graphs.contains_key(&rows) {
            let graph = self.capture(cache, rows)?;
            self.graphs.insert(rows, graph);
        }
        self.graphs[&rows].replay()?;
        Ok(Chosen(ReadBack::start(&self.results)?))
    }

    fn capture(&mut self, cache: &mut PagedCache, rows: usize) -> Result<Graph> {
        // Once before, with all rows paused, so that libraries have set themselves up.
        let mut kept = [self.sample.positions.shallow_clone(), self.x.shallow_clone()];
        let copies = [kept[0].copy(), kept[1].copy()];
        let _ = kept[0].fill_(-1);
        self.launch(cache, rows)?;
        kept.iter_mut().zip(&copies).for_each(|(ours, copy)| ours.copy_(copy));
        let other = self.graphs.values().next();
        Graph::capture(other, || self.launch(cache, rows))
    }

    /// The work of a step.
    fn launch(&self, cache: &mut PagedCache, rows: usize) -> Result<()> {
        let embedding = &self.model.wte.weight;
        if rows <= DECODER_ROWS {
            self.decoder.run(&self.x, &self.logits, rows)?;
            return ffi::sample(&self.logits, &self.sample, rows, self.vocab, embedding, &self.x);
        }
        let n = rows as i64;
        let ids = self.sample.next.narrow(0, 0, n).to_kind(Kind::Int64); // (B,)
        let state = self.rows_of_state(n);
        let x = self.model.hidden_step(&ids, cache, &state); // (B, C)
        let logits = self.model.head(&x); // (B, V)
        ffi::sample(&logits, &self.sample, rows, self.vocab, embedding, &self.x)
    }

    /// The first n rows; handles share storage.
    fn rows_of_state(&self, n: i64) -> DecodeState {
        let s = &self.paged;
        DecodeState {
            table: s.table.narrow(0, 0, n),
            positions: s.positions.narrow(0, 0, n),
            cos: s.cos.shallow_clone(),
            sin: s.sin.shallow_clone(),
            arrived: s.arrived.shallow_clone(),
            ..*s
        }
    }
}

fn decoder(model: &GPT, cache: &PagedCache, state: &DecodeState) -> Result<Decoder> {
    let c = &model.config;
    let joined: Vec<Option<Tensor>> = model.h.iter().map(|block| block.mlp.gate_up()).collect(); // (2F, C) each
    let mut layers = Vec::new();
    for (i, (block, gate_up)) in model.h.iter().zip(&joined).enumerate() {
        let Mlp::LLaMA(mlp) = &block.mlp else { continue };
        layers.push(DecodeLayer {
            norm_1: &block.norm_1.weight,
            norm_2: &block.norm_2.weight,
            qkv: weight_of(&block.attn.qkv),
            proj: weight_of(&block.attn.proj),
            gate_up: match (&mlp.gate_up_packed, gate_up) {
                (Some(packed), _) => DecodeWeight::Packed(packed),
                (None, Some(joined)) => DecodeWeight::Plain(joined),
                (None, None) => bail!("gate and up projections lie apart"),
            },
            mlp_proj: weight_of(&mlp.proj),
            memory: cache.memory(i),
        });
    }
    let head = model.lm_head.as_ref().map_or(DecodeWeight::Plain(&model.wte.weight), weight_of);
    Decoder::new(&DecoderParts {
        layers: &layers,
        norm: &model.ln_f.weight,
        head,
        state,
        heads: c.n_head,
        eps: c.norm_eps,
    })
}

fn weight_of(linear: &Linear) -> DecodeWeight<'_> {
    linear.packed.as_ref().map_or(DecodeWeight::Plain(&linear.weight), DecodeWeight::Packed)
}

/// 32-bit words with a bit for each of `ids` ids.
fn words(ids: i64) -> i64 {
    (ids + 31) / 32
}

fn words_of(key: &[u8; 32]) -> Vec<i32> {
    let word = |b: &[u8]| i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    key.chunks_exact(4).map(word).collect()
}
