//! Low-rank adapters beside matrices that stay as they are.

use super::config::{MlpClass, ModelConfig};
use super::gpt::GPT;
use super::linear::Linear;
use super::mlp::Mlp;
use super::rope::Rope;
use crate::quant::nf4::Nf4Weight;
use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

/// Hugging Face's names of a Llama's matrices.
pub const TARGETS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Adapters of one [`Linear`]: `y += (alpha / r) B A dropout(x)` for some of its rows.
///
/// Those of one layer (q, k and v, which are one matrix here) share the input that is dropped out, and their A lie in
/// one matrix, so that x is read once.
///
/// # Source
/// arXiv 2106.09685; `peft.LoraConfig`.
#[derive(Debug)]
pub struct Lora {
    /// (n r, in): of each adapter r rows.
    pub a: Tensor,
    /// The adapters.
    pub parts: Vec<LoraPart>,
    /// r
    pub rank: i64,
    /// alpha / r
    pub scale: f64,
    /// Part of x that is zeroed in training.
    pub dropout: f64,
}

/// One adapter.
#[derive(Debug)]
pub struct LoraPart {
    /// Hugging Face's name of the matrix.
    pub target: &'static str,
    /// Its first row in the layer's weight.
    pub start: i64,
    /// (rows, r)
    pub b: Tensor,
}

impl Lora {
    /// Adapters of matrices of a layer with `inputs` columns: name, first row, rows. A is uniform in
    /// +-1/sqrt(in) (`kaiming_uniform_(a=sqrt(5))`) by libtorch's generator, B is zero.
    fn new(
        inputs: i64,
        matrices: &[(&'static str, i64, i64)],
        rank: i64,
        alpha: f64,
        dropout: f64,
        device: Device,
    ) -> Self {
        let options = (Kind::Float, device);
        let bound = 1.0 / (inputs as f64).sqrt();
        let part = |&(target, start, rows): &(&'static str, i64, i64)| LoraPart {
            target,
            start,
            b: Tensor::zeros([rows, rank], options),
        };
        let a =
            Tensor::empty([matrices.len() as i64 * rank, inputs], options).uniform_(-bound, bound);
        let parts = matrices.iter().map(part).collect();
        Self { a, parts, rank, scale: alpha / rank as f64, dropout }
    }

    /// Another handle on the same parameters.
    pub fn shallow_clone(&self) -> Self {
        let part = |p: &LoraPart| LoraPart { b: p.b.shallow_clone(), ..*p };
        let parts = self.parts.iter().map(part).collect();
        Self { a: self.a.shallow_clone(), parts, ..*self }
    }

    /// Adds what the adapters make of x to y, in place.
    ///
    /// # Shapes
    /// x (.., in); y (.., out), perhaps a view.
    pub fn add_to(&self, y: &Tensor, x: &Tensor, train: bool) {
        let x = match train && self.dropout > 0.0 {
            true => &x.dropout(self.dropout, true),
            false => x,
        };
        let h = x.linear(&self.a, None::<Tensor>); // (.., n r)
        for (i, LoraPart { start, b, .. }) in self.parts.iter().enumerate() {
            let h = h.narrow(-1, i as i64 * self.rank, self.rank); // (.., r)
            let delta = h.linear(b, None::<Tensor>) * self.scale; // (.., rows)
            let _ = y.narrow(-1, *start, b.size()[0]).g_add_(&delta);
        }
    }

    /// `(alpha / r) B A` of an adapter, in fp32.
    ///
    /// # Shapes
    /// (rows, in).
    pub fn delta(&self, part: usize) -> Tensor {
        let a = self.a.narrow(0, part as i64 * self.rank, self.rank).to_kind(Kind::Float); // (r, in)
        self.parts[part].b.to_kind(Kind::Float).matmul(&a) * self.scale
    }
}

/// The layers of block `i` that may have adapters: lit-gpt's name, the layer, its matrices (name, first row, rows).
type Layer<'a> = (String, &'a mut Linear, Vec<(&'static str, i64, i64)>);

fn layers(model: &mut GPT) -> impl Iterator<Item = Layer<'_>> {
    let ModelConfig { n_head, n_query_groups, head_size, .. } = model.config;
    let (q, k) = (n_head * head_size, n_query_groups * head_size);
    model.h.iter_mut().enumerate().flat_map(move |(i, block)| {
        let name = |layer: &str| format!("transformer.h.{i}.{layer}");
        let qkv = vec![("q_proj", 0, q), ("k_proj", q, k), ("v_proj", q + k, k)];
        let whole = |target, layer: &Linear| vec![(target, 0, layer.rows())];
        let mut found = vec![(name("attn.qkv"), &mut block.attn.qkv, qkv)];
        let o = whole("o_proj", &block.attn.proj);
        found.push((name("attn.proj"), &mut block.attn.proj, o));
        if let Mlp::LLaMA(mlp) = &mut block.mlp {
            let [gate, up, down] = [
                whole("gate_proj", &mlp.fc_1),
                whole("up_proj", &mlp.fc_2),
                whole("down_proj", &mlp.proj),
            ];
            found.push((name("mlp.fc_1"), &mut mlp.fc_1, gate));
            found.push((name("mlp.fc_2"), &mut mlp.fc_2, up));
            found.push((name("mlp.proj"), &mut mlp.proj, down));
        }
        found
    })
}

impl GPT {
    /// Gives the matrices with these of [`TARGETS`]' names adapters, which are trained instead of the weights. A Llama's.
    pub fn add_lora(&mut self, targets: &[&str], rank: i64, alpha: f64, dropout: f64) {
        let device = self.device();
        for (_, linear, mut matrices) in layers(self) {
            matrices.retain(|(target, ..)| targets.contains(target));
            if !matrices.is_empty() {
                let inputs = linear.weight.size()[1];
                linear.lora =
                    Some(Box::new(Lora::new(inputs, &matrices, rank, alpha, dropout, device)));
            }
        }
    }

    /// Moves a Llama to a device, its blocks' matrices in NF4 and all else in `kind`: one matrix at a time, so that the
    /// device needs no room for the model in `kind`. `double`: their scales are quantised too.
    ///
    /// # Errors
    /// Values that are not finite.
    pub fn quantise_base(&mut self, device: Device, kind: Kind, double: bool) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (name, linear, _) in layers(self) {
            let weight = linear.weight.to_device(device); // (out, in)
            linear.nf4 = Some(Box::new(Nf4Weight::quantize(&weight, double).context(name)?));
            linear.weight = Tensor::empty([0, weight.size()[1]], (kind, device));
        }
        for (_, mut parameter) in self.named_parameters() {
            parameter.set_data(&parameter.to_device(device).to_kind(kind));
        }
        self.rope = Rope::new(&self.config, device);
        Ok(())
    }

    /// Layers with adapters under their lit-gpt names.
    pub fn lora(&self) -> Vec<(String, &Lora)> {
        let mut found = Vec::new();
        for (i, block) in self.h.iter().enumerate() {
            let mut all = vec![("attn.qkv", &block.attn.qkv), ("attn.proj", &block.attn.proj)];
            if let Mlp::LLaMA(mlp) = &block.mlp {
                all.extend([
                    ("mlp.fc_1", &mlp.fc_1),
                    ("mlp.fc_2", &mlp.fc_2),
                    ("mlp.proj", &mlp.proj),
                ]);
            }
            for (layer, linear) in all {
                let name = format!("transformer.h.{i}.{layer}");
                found.extend(linear.lora.as_deref().map(|lora| (name, lora)));
            }
        }
        found
    }

    /// The parameters that are trained: the adapters', or where there are none, all.
    pub fn trained_parameters(&self) -> Vec<(String, Tensor)> {
        let adapters = self.adapters();
        if adapters.is_empty() { self.named_parameters() } else { adapters }
    }

    /// Every parameter of the adapters, in a fixed order; the handles share storage with the model.
    pub fn adapters(&self) -> Vec<(String, Tensor)> {
        let mut out = Vec::new();
        for (layer, lora) in self.lora() {
            out.push((format!("{layer}.lora_A"), lora.a.shallow_clone()));
            for part in &lora.parts {
                out.push((format!("{layer}.lora_B.{}", part.target), part.b.shallow_clone()));
            }
        }
        out
    }

    /// Whether an adapter can be given to every target of a model of this kind.
    pub fn takes_lora(config: &ModelConfig) -> bool {
        config.mlp_class == MlpClass::LLaMAMLP
    }
}
