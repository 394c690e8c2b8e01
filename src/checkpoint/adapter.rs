//! LoRA adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Of a matrix `model.layers.0.self_attn.q_proj` the file has
//! `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` (r, in) and `.lora_B.weight` (out, r). A folder of
//! adapters is opened like any checkpoint: the base's weights with `(alpha / r) B A` added.

use super::disk::required_bytes;
use super::hf::write_json;
use super::names::{self, Layout};
use super::outline::outline;
use super::tensors::{self, Entry, TensorFile};
use crate::bail_hint;
use crate::config::LoraConfig;
use crate::error::WithHint;
use crate::model::lora::TARGETS;
use crate::model::{GPT, ModelConfig};
use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// The part of `adapter_config.json` that says what is computed.
#[derive(Debug, Deserialize)]
struct PeftConfig {
    peft_type: String,
    base_model_name_or_path: Option<String>,
    #[serde(default)]
    r: i64,
    #[serde(default)]
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    rank_pattern: BTreeMap<String, i64>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
}

/// Whether a folder holds adapters, whole.
pub(super) fn is_one(dir: &Path) -> bool {
    dir.join(CONFIG).is_file() && dir.join(WEIGHTS).is_file()
}

/// Opened adapters.
pub struct Adapter {
    /// Their folder.
    pub path: PathBuf,
    /// The checkpoint that they are of; as their configuration names it, before [`Adapter::chain`] finds it.
    pub base: PathBuf,
    rank: i64,
    scale: f64,
    file: TensorFile,
}

impl Adapter {
    /// The adapters in `path` and those that its base consists of, the innermost first; none where `path` is another
    /// checkpoint.
    ///
    /// # Errors
    /// As [`Adapter::open`]; a base that is not there; adapters that are their own base.
    pub fn chain(path: &Path) -> Result<Vec<Self>> {
        let (mut chain, mut dir) = (Vec::<Self>::new(), path.to_owned());
        while is_one(&dir) && !dir.join("config.json").is_file() {
            let mut adapter = Self::open(&dir)?;
            let base = find_base(&dir, &adapter.base)?;
            if is_same(&dir, &base) || chain.iter().any(|outer| is_same(&outer.path, &base)) {
                bail_hint!(
                    "set `base_model_name_or_path` in `adapter_config.json` to the model that they were trained with";
                    "the adapters in `{}` are their own base", dir.display()
                );
            }
            adapter.base.clone_from(&base);
            chain.push(adapter);
            dir = base;
        }
        chain.reverse();
        Ok(chain)
    }

    /// Opens a folder of adapters, wherever their base may be.
    ///
    /// # Errors
    /// No such files, damaged ones; another kind of adapters.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = PeftConfig::read(dir)?;
        if let Some(what) = config.unknown() {
            bail_hint!(
                "merge them with PEFT (`merge_and_unload()`) and save the whole model";
                "`{}` has adapters that are not known here: {what}", dir.display()
            );
        }
        let scale = config.lora_alpha
            / match config.use_rslora {
                true => (config.r as f64).sqrt(),
                false => config.r as f64,
            };
        let file = TensorFile::open(&dir.join(WEIGHTS)).hint("copy the file again")?;
        let base = config.base_model_name_or_path.unwrap_or_default().into();
        Ok(Self { path: dir.to_owned(), base, rank: config.r, scale, file })
    }

    /// Refuses adapters that are not of matrices of this model.
    ///
    /// # Errors
    /// Every one that is not, with shapes.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let mut known = BTreeMap::new();
        for (name, shape) in outline(config) {
            for part in names::parts(&name, config) {
                let on_disk = names::disk_shape(&shape, part.layout);
                if let (Some(module), [rows, columns]) =
                    (part.name.strip_suffix(".weight"), &on_disk[..])
                {
                    known.insert(module.to_owned(), (*rows, *columns));
                }
            }
        }
        let mut problems = Vec::new();
        for name in self.file.names() {
            let shape = self.file.shape(&name).unwrap_or_default();
            let module = name.strip_prefix(PREFIX).and_then(|n| {
                let (module, rest) = n.rsplit_once(".lora_")?;
                Some((module, rest))
            });
            let fits = |(rows, columns): (i64, i64), rest: &str| match (rest, &shape[..]) {
                ("A.weight", [r, c]) => (*r, *c) == (self.rank, columns),
                ("B.weight", [n, r]) => (*n, *r) == (rows, self.rank),
                _ => false,
            };
            let other = match name.strip_suffix("A.weight") {
                Some(start) => format!("{start}B.weight"),
                None => format!("{}A.weight", name.strip_suffix("B.weight").unwrap_or(&name)),
            };
            match module.and_then(|(module, rest)| Some((known.get(module)?, rest))) {
                None => problems.push(format!("`{name}`: the model has no such matrix")),
                Some((at, rest)) if !fits(*at, rest) => problems.push(format!(
                    "`{name}`: shape {shape:?} does not fit rank {} of a matrix of {} x {}",
                    self.rank, at.0, at.1
                )),
                Some(_) if self.file.shape(&other).is_none() => {
                    problems.push(format!("`{name}`: without `{other}`"));
                }
                Some(_) => {}
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        let n = problems.len();
        problems.truncate(5);
        bail_hint!(
            "adapters belong to the one model that they were trained with; `base_model_name_or_path` in their configuration names it";
            "{n} adapter tensor(s) of `{}` are not of the model in `{}`:\n  {}",
            self.path.display(), self.base.display(), problems.join("\n  ")
        )
    }

    /// Whether a parameter (lit-gpt name) has an adapter.
    pub fn changes(&self, name: &str, config: &ModelConfig) -> bool {
        let has = |part: &names::Part| self.pair(&part.name).is_some();
        names::parts(name, config).iter().any(has)
    }

    /// Adds `(alpha / r) B A` to a parameter (lit-gpt name) in place, summed in fp32 and rounded once.
    pub fn add_to(&self, name: &str, weight: &Tensor, config: &ModelConfig) -> Result<()> {
        for part in names::parts(name, config) {
            let Some([a, b]) = self.pair(&part.name) else { continue };
            let [a, b] = [self.tensor(&a)?, self.tensor(&b)?]; // (r, in), (rows, r)
            let delta = (b.matmul(&a) * self.scale).to_device(weight.device()); // (rows, in)
            let mut rows = match part.layout {
                Layout::Rows { start, len } => weight.narrow(0, start, len),
                _ => weight.shallow_clone(),
            };
            let sum = rows.to_kind(Kind::Float) + delta;
            rows.copy_(&sum);
        }
        Ok(())
    }

    /// Names of A and B of a matrix on disk.
    fn pair(&self, weight: &str) -> Option<[String; 2]> {
        let module = weight.strip_suffix(".weight")?;
        let pair = ["A", "B"].map(|which| format!("{PREFIX}{module}.lora_{which}.weight"));
        pair.iter().all(|name| self.file.shape(name).is_some()).then_some(pair)
    }

    /// In fp32.
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let rows = self.file.shape(name).and_then(|shape| shape.first().copied()).unwrap_or(0);
        Ok(self.file.rows(name, 0..rows)?.to_owned().to_kind(Kind::Float))
    }

    /// Takes the adapters over into those of a model.
    ///
    /// # Errors
    /// Other targets, or another rank.
    pub fn load_into(&self, model: &GPT) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let mut taken = 0;
        for (layer, lora) in model.lora() {
            for (i, part) in lora.parts.iter().enumerate() {
                let module = module_of(&layer, part.target, &model.config);
                let pair = self.pair(&format!("{module}.weight"));
                let [a, b] = pair.with_context(|| format!("no adapter of `{module}`"))?;
                let rows = lora.a.narrow(0, i as i64 * lora.rank, lora.rank);
                for (mut ours, name) in [(rows, a), (part.b.shallow_clone(), b)] {
                    let theirs = self.tensor(&name)?;
                    if theirs.size() != ours.size() {
                        bail_hint!(
                            "continue with the run's `finetune.lora`";
                            "`{name}`: expected shape {:?}, got {:?}", ours.size(), theirs.size()
                        );
                    }
                    ours.copy_(&theirs);
                    taken += 1;
                }
            }
        }
        if taken != self.file.names().len() {
            bail_hint!(
                "continue with the run's `finetune.lora.targets`";
                "`{}` has {} tensors, the configuration's targets {taken}",
                self.path.display(), self.file.names().len()
            );
        }
        Ok(())
    }
}

impl PeftConfig {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read `{}`", path.display()))
            .hint(
                "a folder of adapters holds `adapter_config.json` and `adapter_model.safetensors`",
            )?;
        serde_json::from_str(&text)
            .with_context(|| format!("`{}` is no configuration of adapters", path.display()))
    }

    /// What of it is not computed here.
    fn unknown(&self) -> Option<String> {
        let saved = self.modules_to_save.as_deref().unwrap_or_default();
        if self.peft_type != "LORA" {
            return Some(format!("`peft_type` {}", self.peft_type));
        }
        [
            (self.r < 1, "`r` below 1"),
            (self.use_dora, "`use_dora`"),
            (self.fan_in_fan_out, "`fan_in_fan_out`"),
            (self.bias.as_deref().is_some_and(|bias| bias != "none"), "`bias`"),
            (!saved.is_empty(), "`modules_to_save`"),
            (!self.rank_pattern.is_empty(), "`rank_pattern`"),
            (!self.alpha_pattern.is_empty(), "`alpha_pattern`"),
        ]
        .into_iter()
        .find_map(|(is, what)| is.then(|| what.to_owned()))
    }
}

fn is_same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn find_base(dir: &Path, name: &Path) -> Result<PathBuf> {
    if name.as_os_str().is_empty() {
        bail_hint!(
            "write the folder of the model there that the adapters were trained with";
            "`{}` names no `base_model_name_or_path`", dir.join(CONFIG).display()
        );
    }
    for path in [name.to_owned(), dir.join(name)] {
        if path.exists() {
            return super::resolve(&path);
        }
    }
    bail_hint!(
        "set `base_model_name_or_path` in `adapter_config.json` to where that model is";
        "the adapters in `{}` are of `{}`, which is no folder here", dir.display(), name.display()
    )
}

/// Hugging Face's name of the matrix that a target is in a layer (lit-gpt's name).
fn module_of(layer: &str, target: &str, config: &ModelConfig) -> String {
    let parts = names::parts(&format!("{layer}.weight"), config);
    let modules = parts.iter().filter_map(|part| part.name.strip_suffix(".weight"));
    let is = |module: &&str| module.rsplit('.').next() == Some(target);
    modules.into_iter().find(is).unwrap_or(target).to_owned()
}

/// Writes a model's adapters; `exact` are their fp32 values by lit-gpt name
/// ([`GPT::trained_parameters`]).
pub fn save(
    dir: &Path,
    model: &GPT,
    exact: &[(String, Tensor)],
    base: &Path,
    lora: &LoraConfig,
) -> Result<()> {
    let exact: BTreeMap<&str, &Tensor> = exact.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let get = |name: String| {
        exact.get(name.as_str()).copied().with_context(|| format!("no parameter `{name}`"))
    };
    let mut named = Vec::new();
    for (layer, adapters) in model.lora() {
        let a = get(format!("{layer}.lora_A"))?;
        for (i, part) in adapters.parts.iter().enumerate() {
            let module = module_of(&layer, part.target, &model.config);
            let rows = a.narrow(0, i as i64 * adapters.rank, adapters.rank);
            named.push((format!("{PREFIX}{module}.lora_A.weight"), rows));
            let b = get(format!("{layer}.lora_B.{}", part.target))?;
            named.push((format!("{PREFIX}{module}.lora_B.weight"), b.shallow_clone()));
        }
    }
    let entry = |(name, t): &(String, Tensor)| Entry {
        name: name.clone(),
        kind: Kind::Float,
        shape: t.size(),
    };
    let entries: Vec<Entry> = named.iter().map(entry).collect();
    tensors::write_lazily(&dir.join(WEIGHTS), &entries, |i| Ok(named[i].1.detach()))?;
    let base = base.canonicalize().unwrap_or_else(|_| base.to_owned());
    write_json(
        &dir.join(CONFIG),
        &json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.r,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": targets(&lora.targets)?,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "modules_to_save": null,
        }),
    )
}

/// Bytes that [`save`] writes.
pub fn bytes(exact: &[(String, Tensor)]) -> u64 {
    required_bytes(exact.iter().map(|(_, t)| t))
}

/// The names of `finetune.lora.targets` as Hugging Face's.
///
/// # Errors
/// A name that is none, with those most like it.
pub fn targets(names: &[String]) -> Result<Vec<&'static str>> {
    let mut found = Vec::new();
    for name in names {
        let of: &[&str] = match name.as_str() {
            "all" => &TARGETS,
            "qkv" | "attn.qkv" => &["q_proj", "k_proj", "v_proj"],
            "proj" | "attn.proj" => &["o_proj"],
            "fc_1" | "mlp.fc_1" => &["gate_proj"],
            "fc_2" | "mlp.fc_2" => &["up_proj"],
            "mlp.proj" => &["down_proj"],
            other => match TARGETS.iter().position(|target| target == &other) {
                Some(i) => &TARGETS[i..=i],
                None => return Err(no_target(other)),
            },
        };
        found.extend(of);
    }
    // In the order of the layers, each once.
    Ok(TARGETS.into_iter().filter(|target| found.contains(target)).collect())
}

fn no_target(name: &str) -> anyhow::Error {
    let known = TARGETS.iter().copied().chain(["qkv", "proj", "fc_1", "fc_2", "mlp.proj", "all"]);
    let mut near: Vec<&str> = known.collect();
    near.sort_by(|a, b| strsim::jaro(b, name).total_cmp(&strsim::jaro(a, name)));
    anyhow!("`{name}` is no matrix; near are `{}`", near[..3].join("`, `"))
}
