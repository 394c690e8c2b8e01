//! Meta's releases: `params.json` and `consolidated.*.pth`, each file with a part of every matrix.
//!
//! Joined along the rows: `wq`, `wk`, `wv`, `w1`, `w3`, `output`. Along the columns: `wo`, `w2`. The embedding is cut by
//! columns in Llama 1 and 2 and by rows in Llama 3; norms are the same in each file.

use super::Opened;
use super::torch::TorchStore;
use crate::bail_hint;
use crate::checkpoint::hf_config;
use crate::checkpoint::names::Naming;
use crate::checkpoint::weights::{Store, Weights};
use crate::ffi::TensorView;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

const PARAMS: &str = "params.json";

/// Whether a folder is a release.
pub(super) fn is_one(dir: &Path) -> bool {
    dir.join(PARAMS).is_file() && !files(dir).is_empty()
}

/// `consolidated.00.pth`, `consolidated.01.pth`, ..
fn files(dir: &Path) -> Vec<PathBuf> {
    let numbered = |i: usize| dir.join(format!("consolidated.{i:02}.pth"));
    (0..).map(numbered).take_while(|path| path.is_file()).collect()
}

pub(super) fn open(dir: &Path) -> Result<Opened> {
    let path = dir.join(PARAMS);
    let told = || format!("in `{}`", path.display());
    let text = std::fs::read_to_string(&path).with_context(told)?;
    let params: Value = serde_json::from_str(&text).with_context(told)?;
    let stores = files(dir).into_iter().map(|file| TorchStore::of_state_dict(&file));
    let shards = Shards::of(stores.collect::<Result<_>>()?, &params).with_context(told)?;
    let json = config_json(&params, &shards).with_context(told)?;
    let config = hf_config::from_json(&json).with_context(told)?;
    let mut weights = Weights::default();
    weights.add(Box::new(shards), |name| (name != "rope.freqs").then(|| name.to_owned()))?;
    Ok(Opened::new("Meta", config, Naming::Meta, weights))
}

/// `config.json` of a release. What `params.json` does not say is known by release: the context length, and with
/// `use_scaled_rope` the factor, 8 but for Llama 3.2's 32, whose models have at most 3072 channels.
fn config_json(params: &Value, shards: &Shards) -> Result<Value> {
    let int = |key: &str| params.get(key).and_then(Value::as_i64).filter(|&n| n > 0);
    let need = |key: &str| int(key).with_context(|| format!("`{key}`: expected a number above 0"));
    let rows = |name: &str| {
        let shape = shards.shape(name).with_context(|| format!("no tensor `{name}`"))?;
        shape.first().copied().with_context(|| format!("`{name}` has no rows"))
    };
    let vocab = rows("tok_embeddings.weight")?;
    let base = params.get("rope_theta").and_then(Value::as_f64).unwrap_or(10_000.0);
    let eps = params.get("norm_eps").and_then(Value::as_f64).unwrap_or(1e-5);
    let scaled = params.get("use_scaled_rope").and_then(Value::as_bool).unwrap_or(false);
    let tied = shards.shape("output.weight").is_none();
    let factor = params.get("rope_scaling_factor").and_then(Value::as_f64);
    let factor = factor.unwrap_or(if need("dim")? <= 3072 { 32.0 } else { 8.0 });
    let length = int("max_seq_len").unwrap_or(match (vocab, scaled) {
        (100_000.., true) => 131_072,
        (100_000.., false) => 8192,
        _ if base > 500_000.0 => 16_384, // Code Llama
        _ if eps < 5e-6 => 2048,         // Llama 1
        _ => 4096,
    });
    let scaling = json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    Ok(json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": need("dim")?,
        "intermediate_size": rows("layers.0.feed_forward.w1.weight")?,
        "num_hidden_layers": need("n_layers")?,
        "num_attention_heads": need("n_heads")?,
        "num_key_value_heads": int("n_kv_heads").unwrap_or(need("n_heads")?),
        "vocab_size": vocab, "max_position_embeddings": length,
        "rms_norm_eps": eps, "rope_theta": base,
        "rope_scaling": if scaled { scaling } else { Value::Null },
        "tie_word_embeddings": tied,
    }))
}

/// The files of a release as one.
struct Shards {
    files: Vec<TorchStore>,
    /// Columns of the embedding.
    dim: i64,
}

/// How the files have a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Rows,
    Columns,
    Same,
}

impl Shards {
    fn of(files: Vec<TorchStore>, params: &Value) -> Result<Self> {
        let dim = params.get("dim").and_then(Value::as_i64).context("`dim`: expected a number")?;
        let all = Self { files, dim };
        for name in all.names() {
            let shapes: Vec<_> = all.files.iter().map(|file| file.shape(&name)).collect();
            if shapes.iter().any(|shape| shape != &shapes[0]) {
                bail_hint!(
                    "copy all `consolidated.*.pth` files of one release";
                    "`{name}` has the shapes {shapes:?} in the files"
                );
            }
        }
        let columns = all
            .files
            .first()
            .and_then(|file| file.shape("layers.0.attention.wo.weight")?.get(1).copied());
        if let Some(columns) = columns.filter(|&n| n > 0 && n * all.files.len() as i64 != dim) {
            bail_hint!(
                "copy all `consolidated.*.pth` files of the release into one folder";
                "expected {} `consolidated.*.pth` files, got {}", dim / columns, all.files.len()
            );
        }
        Ok(all)
    }

    fn cut(&self, name: &str) -> Cut {
        let leaf = name.strip_suffix(".weight").unwrap_or(name);
        let shape = self.files[0].shape(name).unwrap_or_default();
        let [_, columns] = shape[..] else { return Cut::Same };
        match leaf.rsplit('.').next().unwrap_or(leaf) {
            _ if self.files.len() == 1 => Cut::Same,
            "wo" | "w2" => Cut::Columns,
            "tok_embeddings" if columns < self.dim => Cut::Columns,
            _ => Cut::Rows,
        }
    }
}

impl Store for Shards {
    fn names(&self) -> Vec<String> {
        self.files.first().map(Store::names).unwrap_or_default()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let (mut shape, n) = (self.files.first()?.shape(name)?, self.files.len() as i64);
        match self.cut(name) {
            Cut::Rows => shape[0] *= n,
            Cut::Columns => shape[1] *= n,
            Cut::Same => {}
        }
        Some(shape)
    }

    fn kind(&self, name: &str) -> Result<Kind> {
        self.files.first().context("no files")?.kind(name)
    }

    fn rows(&self, name: &str, rows: Range<i64>) -> Result<TensorView<'_>> {
        let first = self.files.first().context("no files")?;
        match self.cut(name) {
            Cut::Same => first.rows(name, rows),
            Cut::Columns => {
                let parts = self.files.iter().map(|file| file.rows(name, rows.clone()));
                let parts = parts.collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&parts.iter().map(|part| &**part).collect::<Vec<_>>(), 1).into())
            }
            Cut::Rows => {
                let each = first.shape(name).and_then(|shape| shape.first().copied()).unwrap_or(0);
                let mut parts = Vec::new();
                for (file, start) in self.files.iter().zip((0..).step_by(each.max(1) as usize)) {
                    let (from, to) = (rows.start.max(start), rows.end.min(start + each));
                    if from < to {
                        parts.push(file.rows(name, from - start..to - start)?);
                    }
                }
                match parts.is_empty() {
                    true => bail!("`{name}` has no rows {rows:?}"),
                    false => {
                        Ok(Tensor::cat(&parts.iter().map(|part| &**part).collect::<Vec<_>>(), 0)
                            .into())
                    }
                }
            }
        }
    }
}
