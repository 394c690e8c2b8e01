//! Rotary positions: angles, and length extrapolation with Hugging Face's meaning of the keys.
//!
//! Pair i of the n rotated dimensions turns by `position * inv_freq[i]`, where without scaling
//! `inv_freq[i] = base^(-2i/n)`. The layout is rotate-half (NeoX, Hugging Face): dimension i pairs with
//! i + n/2, so the tables repeat their first half.
//!
//! # Source
//! RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); `modeling_rope_utils.py` of transformers.

use super::config::{ModelConfig, RopeScaling, RopeType};
use super::paged_cache::Batch;
use std::f64::consts::PI;
use tch::{Device, Kind, Tensor};

/// Frequencies in radians a position, and the factor on cos and sin (1 but for YaRN).
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// n/2 values
    pub inv_freq: Vec<f64>,
    /// Multiplies cos and sin, so attention scores by its square.
    pub attention_factor: f64,
}

/// Frequencies for a sequence of `seq_len` tokens (it matters to `dynamic` only).
pub fn frequencies(config: &ModelConfig, seq_len: i64) -> Frequencies {
    let (n, base) = (config.rope_n_elem(), config.rope_base);
    let plain = inv_freq(n, base);
    let Some(s) = &config.rope_scaling else {
        return Frequencies { inv_freq: plain, attention_factor: 1.0 };
    };
    let inv_freq = match s.rope_type {
        RopeType::Linear => plain.iter().map(|f| f / s.factor).collect(),
        RopeType::Dynamic => inv_freq(n, dynamic_base(base, n, s, config.block_size, seq_len)),
        RopeType::Llama3 => plain.iter().map(|&f| llama3(f, s, config.block_size)).collect(),
        RopeType::Yarn => return yarn(plain, n, base, s, config.block_size),
    };
    Frequencies { inv_freq, attention_factor: 1.0 }
}

/// `base^(-2i/n)` for i in 0..n/2.
fn inv_freq(n: i64, base: f64) -> Vec<f64> {
    (0..n / 2).map(|i| base.powf(-(2 * i) as f64 / n as f64)).collect()
}

/// NTK-aware base for a sequence beyond the trained length; the plain base up to it.
fn dynamic_base(base: f64, n: i64, s: &RopeScaling, block_size: i64, seq_len: i64) -> f64 {
    let trained = s.original_max_position_embeddings.unwrap_or(block_size);
    let ratio = s.factor * seq_len.max(trained) as f64 / trained as f64 - (s.factor - 1.0);
    base * ratio.powf(n as f64 / (n - 2) as f64)
}

/// Interpolates long wavelengths, keeps short ones, blends between.
fn llama3(f: f64, s: &RopeScaling, block_size: i64) -> f64 {
    let trained = s.original_max_position_embeddings.unwrap_or(block_size) as f64;
    let (low, high) = (s.low_freq_factor.unwrap_or(1.0), s.high_freq_factor.unwrap_or(4.0));
    let wavelength = 2.0 * PI / f;
    if wavelength < trained / high {
        return f;
    }
    if wavelength > trained / low {
        return f / s.factor;
    }
    let smooth = (trained / wavelength - low) / (high - low);
    (1.0 - smooth) * f / s.factor + smooth * f
}

fn yarn(plain: Vec<f64>, n: i64, base: f64, s: &RopeScaling, block_size: i64) -> Frequencies {
    let trained = s.original_max_position_embeddings.unwrap_or(block_size);
    // Dimension at which a frequency makes `rotations` turns over the trained length.
    let dimension = |rotations: f64| {
        n as f64 * (trained as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * base.ln())
    };
    let (mut low, mut high) =
        (dimension(s.beta_fast.unwrap_or(32.0)), dimension(s.beta_slow.unwrap_or(1.0)));
    if s.truncate.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min((n - 1) as f64));
    if low == high {
        high += 0.001;
    }
    let blend = |(i, f): (usize, f64)| {
        let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        f / s.factor * interpolated + f * (1.0 - interpolated)
    };
    let inv_freq = plain.into_iter().enumerate().map(blend).collect();
    Frequencies { inv_freq, attention_factor: yarn_attention_factor(s) }
}

fn yarn_attention_factor(s: &RopeScaling) -> f64 {
    let scale = |m: f64| if s.factor <= 1.0 { 1.0 } else { 0.1 * m * s.factor.ln() + 1.0 };
    match (s.attention_factor, s.mscale, s.mscale_all_dim) {
        (Some(factor), _, _) => factor,
        (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
        _ => scale(1.0),
    }
}

/// Tables of cos and sin, kept in fp32 (a bf16 table, as in the original, loses positions beyond 256).
#[derive(Debug)]
pub struct Rope {
    config: ModelConfig,
    /// (block_size, n)
    cos: Tensor,
    /// (block_size, n)
    sin: Tensor,
}

impl Rope {
    /// Tables for `block_size` positions.
    pub fn new(config: &ModelConfig, device: Device) -> Self {
        let (cos, sin) = tables(config, 0, config.block_size, device);
        Self { config: config.clone(), cos, sin }
    }

    /// cos and sin of all positions up to `block_size`.
    ///
    /// # Shapes
    /// (block_size, n) x2, fp32.
    pub fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// cos and sin of positions `past .. past + t`.
    ///
    /// # Shapes
    /// -> (T, n) x2, fp32.
    pub fn cos_sin(&self, past: i64, t: i64) -> (Tensor, Tensor) {
        if past + t <= self.config.block_size {
            return (self.cos.narrow(0, past, t), self.sin.narrow(0, past, t));
        }
        tables(&self.config, past, t, self.cos.device())
    }

    /// cos and sin of the positions of a batch's tokens.
    ///
    /// # Shapes
    /// -> (N, n) x2, fp32.
    pub fn of_batch(&self, batch: &Batch) -> (Tensor, Tensor) {
        if batch.longest() <= self.config.block_size {
            let rows = |table: &Tensor| table.index_select(0, &batch.positions); // (N, n)
            return (rows(&self.cos), rows(&self.sin));
        }
        let (cos, sin): (Vec<Tensor>, Vec<Tensor>) =
            batch.spans.iter().map(|span| self.cos_sin(span.past, span.tokens)).unzip();
        (Tensor::cat(&cos, 0), Tensor::cat(&sin, 0))
    }
}

/// Angles in fp32 (as in transformers), over `t` positions from `past`.
fn tables(config: &ModelConfig, past: i64, t: i64, device: Device) -> (Tensor, Tensor) {
    let f = frequencies(config, past + t);
    let inv_freq: Vec<f32> = f.inv_freq.iter().map(|&x| x as f32).collect();
    let inv_freq = Tensor::from_slice(&inv_freq).to_device(device); // (n/2,)
    let position = Tensor::arange_start(past, past + t, (Kind::Float, device)); // (T,)
    let angle = position.outer(&inv_freq); // (T, n/2)
    let angle = Tensor::cat(&[&angle, &angle], 1); // (T, n)
    (angle.cos() * f.attention_factor, angle.sin() * f.attention_factor)
}
