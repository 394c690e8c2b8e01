//! What is wrong with a well-typed configuration, and the arithmetic that follows from a right one.

mod data;
mod finetune;

use super::check::{self, Schema};
use super::{
    ActivationCheckpointing, AttentionBackend, ConfigError, LrSchedule, MasterFormat, Precision,
    Resume, RunConfig, StateFormat, Strategy,
};
use crate::checkpoint::hf_config;
use crate::eval;
use crate::model::ModelConfig;
use serde_json::{Map, Value};
use std::fmt;

impl RunConfig {
    /// The preset with `model_config` applied.
    ///
    /// # Errors
    /// Every problem of name and fields.
    pub fn model(&self) -> Result<ModelConfig, ConfigError> {
        model_config(&self.model_name, &self.model_config, self.train.tie_embeddings)
            .map_err(|problems| ConfigError { problems })
    }

    /// The model's name, and whether it is still the preset's model.
    pub fn model_told(&self, model: &ModelConfig) -> String {
        // A finetuned model's keys are those of its checkpoint.
        match self.model_config.is_empty() || self.finetune.is_some() {
            true => model.name.clone(),
            false => format!("{}, changed by `model_config`,", model.name),
        }
    }

    /// Tokens of a training sequence: `max_seq_length`, or the model's `block_size`.
    pub fn sequence_length(&self, model: &ModelConfig) -> i64 {
        self.train.max_seq_length.map_or(model.block_size, |t| t as i64)
    }
}

/// The preset `name` with `overrides`, or every problem of both.
pub fn model_config(
    name: &str,
    overrides: &Map<String, Value>,
    tie: Option<bool>,
) -> Result<ModelConfig, Vec<String>> {
    let preset = ModelConfig::preset(name);
    let mut overrides = Value::Object(overrides.clone());
    // Hugging Face's older spelling of `rope_type`, which the struct reads too.
    if let Some(Value::Object(scaling)) = overrides.get_mut("rope_scaling")
        && !scaling.contains_key("rope_type")
        && let Some(rope_type) = scaling.remove("type")
    {
        scaling.insert("rope_type".into(), rope_type);
    }
    let mut problems = Vec::new();
    check::check(&mut overrides, &Schema::of::<Overrides>(), &mut problems);
    let prefixed =
        |p: String| p.replacen('`', "`model_config.", 1).replace("mean `", "mean `model_config.");
    let mut problems: Vec<String> = problems.into_iter().map(prefixed).collect();
    if preset.is_none() {
        problems.insert(0, no_preset(name));
    }
    let (Some(preset), true) = (preset, problems.is_empty()) else { return Err(problems) };
    let model = merge(preset, &overrides, tie).map_err(|e| vec![e])?;
    let mut problems = model.validate();
    if overrides.get("head_size").is_none() && model.n_head > 0 && model.n_embd % model.n_head != 0
    {
        let (c, h) = (model.n_embd, model.n_head);
        problems.insert(0, format!("`n_embd`: {c} is not divisible by `n_head` = {h}; change one"));
    }
    // A model that no checkpoint can hold would be refused at its first save, hours later.
    problems.extend(hf_config::unsupported(&model));
    if problems.is_empty() {
        return Ok(model);
    }
    Err(problems.into_iter().map(prefixed).collect())
}

fn no_preset(name: &str) -> String {
    let names = ModelConfig::preset_names();
    let near = check::nearest(name, names.iter().map(String::as_str));
    let near = near.map_or(String::new(), |n| format!("; did you mean `{n}`?"));
    format!(
        "`model_name`: no preset is called `{name}`{near} (`tinyllama config models` lists them)"
    )
}

/// The schema of `model_config`: the fields of [`ModelConfig`], none required.
struct Overrides;

impl schemars::JsonSchema for Overrides {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Overrides".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let mut schema = <ModelConfig as schemars::JsonSchema>::json_schema(generator);
        schema.remove("required");
        schema
    }
}

fn merge(preset: ModelConfig, overrides: &Value, tie: Option<bool>) -> Result<ModelConfig, String> {
    let text = |e: serde_json::Error| format!("`model_config`: {e}");
    let mut tree = serde_json::to_value(&preset).map_err(text)?;
    let (Some(fields), Some(given)) = (tree.as_object_mut(), overrides.as_object()) else {
        return Ok(preset);
    };
    let has = |key: &str| given.contains_key(key);
    for (key, value) in given {
        fields.insert(key.clone(), value.clone());
    }
    // Sizes that follow from others, unless they are given.
    let width = |fields: &Map<String, Value>, key| fields[key].as_i64().unwrap_or(0);
    if (has("n_embd") || has("n_head")) && !has("head_size") {
        let head_size = width(fields, "n_embd") / width(fields, "n_head").max(1);
        fields.insert("head_size".into(), head_size.into());
    }
    if has("n_head") && !has("n_query_groups") {
        fields.insert("n_query_groups".into(), width(fields, "n_head").into());
    }
    if has("vocab_size") && !has("padded_vocab_size") {
        fields.insert("padded_vocab_size".into(), width(fields, "vocab_size").into());
    }
    if has("padded_vocab_size") && !has("vocab_size") {
        fields.insert("vocab_size".into(), width(fields, "padded_vocab_size").into());
    }
    if let Some(tie) = tie {
        fields.insert("tie_embeddings".into(), tie.into());
    }
    serde_json::from_value(tree).map_err(text)
}

/// Everything that cannot work, with key paths; empty where all is well.
pub fn problems(config: &RunConfig) -> Vec<String> {
    let mut problems = Vec::new();
    let model = model_config(&config.model_name, &config.model_config, config.train.tie_embeddings);
    if let Some(of_run) = &config.finetune {
        finetune::check(config, of_run, model.as_ref().ok(), &mut problems);
    }
    match model {
        Ok(model) => {
            check_sequence(config, &model, &mut problems);
            check_recomputation(config, &model, &mut problems);
            check_fp8(config, &model, &mut problems);
        }
        Err(found) => problems.extend(found),
    }
    check_ranks(config, &mut problems);
    check_batch(config, &mut problems);
    check_length(config, &mut problems);
    check_optimizer(config, &mut problems);
    check_optimizer_formats(config, &mut problems);
    check_offload(config, &mut problems);
    data::check(config, &mut problems);
    if !config.eval.tasks.is_empty()
        && let Err(error) = eval::task::find(&config.eval.tasks)
    {
        problems.push(format!("`eval.tasks`: {error:#}"));
    }
    if let Some(gib) = config.memory_limit.filter(|gib| !(*gib > 0.0 && gib.is_finite())) {
        problems.push(format!("`memory_limit`: must be above 0 GiB, or null, got {gib}"));
    }
    if config.deterministic && config.attention == AttentionBackend::Cudnn {
        problems.push("`attention`: cuDNN's is not deterministic; use `auto` or `flash`".into());
    }
    if config.finetune.is_none() // which takes the model, and adapters their base, from there
        && config.initial_checkpoint_dir.is_some()
        && matches!(&config.resume, Resume::Text(path) if path != "auto")
    {
        problems.push(
            "`resume`: a path and `initial_checkpoint_dir` contradict each other; keep one".into(),
        );
    }
    problems
}

fn check_sequence(config: &RunConfig, model: &ModelConfig, problems: &mut Vec<String>) {
    let (t, most) = (config.sequence_length(model), model.max_length());
    if t < 1 || t > most {
        problems.push(format!(
            "`train.max_seq_length`: must be between 1 and the model's `block_size` = {most}, got {t}"
        ));
    }
}

/// What `fp8-mixed` needs of a run; card and model are looked at when it starts.
fn check_fp8(config: &RunConfig, model: &ModelConfig, problems: &mut Vec<String>) {
    if config.precision != Precision::Fp8Mixed {
        return;
    }
    if config.ranks() > 1 && config.distributed.strategy != Strategy::Ddp {
        problems.push(
            "`distributed.strategy`: `precision: fp8-mixed` needs whole weights on each rank, so it must be `ddp`"
                .into(),
        );
    }
    if !config.fused {
        problems
            .push("`fused`: `precision: fp8-mixed` has no plain path, so it must be true".into());
    }
    let t = config.sequence_length(model);
    if t % 16 != 0 {
        problems.push(format!(
            "`train.max_seq_length`: `precision: fp8-mixed` needs a multiple of 16, got {t}"
        ));
    }
}

fn check_recomputation(config: &RunConfig, model: &ModelConfig, problems: &mut Vec<String>) {
    let Some(blocks) = config.train.checkpoint_blocks else { return };
    if config.train.activation_checkpointing != ActivationCheckpointing::Block {
        problems.push(format!(
            "`train.checkpoint_blocks`: {blocks} blocks need `train.activation_checkpointing` to be `block`, \
             got `none`"
        ));
    }
    let n_layer = model.n_layer;
    if blocks < 1 || blocks > n_layer as u64 {
        problems.push(format!(
            "`train.checkpoint_blocks`: must be between 1 and the model's `n_layer` = {n_layer}, got {blocks}"
        ));
    }
}

fn check_batch(config: &RunConfig, problems: &mut Vec<String>) {
    let t = &config.train;
    for (key, value) in [
        ("global_batch_size", t.global_batch_size),
        ("micro_batch_size", t.micro_batch_size),
        ("log_interval", t.log_interval),
    ] {
        if value == 0 {
            problems.push(format!("`train.{key}`: must be at least 1, got 0"));
        }
    }
    if t.micro_batch_size > 0
        && t.global_batch_size > 0
        && config.ranks() > 0
        && let Err(e) = plan(config, config.ranks())
    {
        problems.extend(e.problems);
    }
    for (key, value) in [
        ("train.save_interval", t.save_interval),
        ("train.keep_last", t.keep_last),
        ("eval.interval", config.eval.interval),
        ("eval.max_iters", config.eval.max_iters),
        ("eval.limit", config.eval.limit),
    ] {
        if value == Some(0) {
            problems.push(format!("`{key}`: must be at least 1, or null, got 0"));
        }
    }
}

/// With a wrong model, whose problems are told anyway, a sequence counts as one token.
fn plan(config: &RunConfig, world: u64) -> Result<BatchPlan, ConfigError> {
    let sequence = config.model().map_or(1, |model| config.sequence_length(&model).max(1));
    BatchPlan::new(config, sequence, world)
}

/// Processes of the run, and how long they wait for each other.
fn check_ranks(config: &RunConfig, problems: &mut Vec<String>) {
    for (key, value) in [("devices", config.devices), ("num_nodes", config.num_nodes)] {
        if !(1..=1 << 20).contains(&value) {
            problems.push(format!("`{key}`: must be between 1 and 2^20, got {value}"));
        }
    }
    let device = &config.device.0;
    if let Err(error) = crate::device::check(device) {
        problems.push(format!("`device`: {error}"));
    }
    if config.devices > 1 && device.starts_with("cuda:") {
        problems.push(format!(
            "`device`: `{device}` is one card, but `devices` asks for {}; use `cuda`, and CUDA_VISIBLE_DEVICES to \
             choose among the node's cards",
            config.devices
        ));
    }
    let d = &config.distributed;
    for (key, seconds) in [
        ("timeout", d.timeout),
        ("heartbeat_timeout", d.heartbeat_timeout),
        ("rendezvous_timeout", d.rendezvous_timeout),
    ] {
        if !(0.5..=1e6).contains(&seconds) {
            problems.push(format!(
                "`distributed.{key}`: must be between 0.5 and 1,000,000 seconds, got {seconds}"
            ));
        }
    }
}

fn check_length(config: &RunConfig, problems: &mut Vec<String>) {
    let t = &config.train;
    let known = t.max_tokens.is_some() || t.max_steps.is_some() || config.data.epochs.is_some();
    if !known && t.max_time.is_none() {
        problems.push(
            "`train`: nothing stops the run; set `train.max_steps`, `train.max_tokens`, \
             `train.max_time` or `data.epochs`"
                .into(),
        );
    }
    if t.lr_schedule != LrSchedule::Constant && !known && t.max_time.is_some() {
        problems.push(
            "`train.lr_schedule`: `cosine` and `wsd` need a known length; set `train.max_steps`, \
             `train.max_tokens` or `data.epochs` beside `train.max_time`, or use `constant`"
                .into(),
        );
    }
    for (key, value) in [("max_steps", t.max_steps), ("max_tokens", t.max_tokens)] {
        if value == Some(0) {
            problems.push(format!("`train.{key}`: must be at least 1, got 0"));
        }
    }
    let plan = plan(config, 1).ok(); // a run's length does not depend on its ranks
    if let Some(steps) = plan.and_then(|p| p.total_steps).or(t.max_steps)
        && steps > 0
        && t.lr_warmup_steps > steps
    {
        let source = match t.max_steps {
            Some(n) if n == steps => "`train.max_steps`",
            _ => "whole steps in `train.max_tokens`",
        };
        problems.push(format!(
            "`train.lr_warmup_steps`: {} is longer than the run of {steps} ({source})",
            t.lr_warmup_steps
        ));
    }
    if !(t.decay_fraction > 0.0 && t.decay_fraction <= 1.0) {
        problems.push(format!(
            "`train.decay_fraction`: must be above 0 and at most 1, got {}",
            t.decay_fraction
        ));
    }
    if t.max_time.is_some_and(|s| s <= 0.0) {
        problems.push("`train.max_time`: must be above 0 seconds".into());
    }
}

fn check_optimizer(config: &RunConfig, problems: &mut Vec<String>) {
    let (o, t) = (&config.optimizer, &config.train);
    let mut positive = |key: &str, value: f64| {
        if value <= 0.0 {
            problems.push(format!("`{key}`: must be above 0, got {value}"));
        }
    };
    positive("optimizer.lr", o.lr);
    positive("optimizer.eps", o.eps);
    if let Some(norm) = t.max_norm {
        positive("train.max_norm", norm);
    }
    for (i, beta) in o.betas.iter().enumerate() {
        if !(0.0..1.0).contains(beta) {
            problems.push(format!("`optimizer.betas.{i}`: must be in [0, 1), got {beta}"));
        }
    }
    if o.weight_decay < 0.0 {
        problems
            .push(format!("`optimizer.weight_decay`: must be at least 0, got {}", o.weight_decay));
    }
    if !(0.0..1.0).contains(&t.label_smoothing) {
        let got = t.label_smoothing;
        problems.push(format!("`train.label_smoothing`: must be in [0, 1), got {got}"));
    }
    if t.z_loss < 0.0 {
        problems.push(format!("`train.z_loss`: must be at least 0, got {}", t.z_loss));
    }
    if t.min_lr < 0.0 {
        problems.push(format!("`train.min_lr`: must be at least 0, got {}", t.min_lr));
    }
    if t.lr_schedule != LrSchedule::Constant && t.min_lr > o.lr {
        problems.push(format!("`train.min_lr`: {} is above `optimizer.lr` = {}", t.min_lr, o.lr));
    }
}

/// Only a mixed precision has a second copy of the weights to save, and fp32 moments to shrink.
fn check_optimizer_formats(config: &RunConfig, problems: &mut Vec<String>) {
    let (precision, o) = (config.precision, &config.optimizer);
    let keeps = match precision {
        Precision::Fp32True => "one fp32 copy of the weights and fp32 moments",
        Precision::Bf16True => "bf16 weights and moments already",
        _ => return,
    };
    let mut refuse = |key: &str, got: String| {
        problems.push(format!(
            "`optimizer.{key}`: `{got}` needs `precision: bf16-mixed` or `fp8-mixed`; `{precision}` keeps {keeps} and \
             takes `fp32` only"
        ));
    };
    if o.state != StateFormat::Fp32 {
        refuse("state", o.state.to_string());
    }
    if o.master != MasterFormat::Fp32 {
        refuse("master", o.master.to_string());
    }
}

/// What `cpu_offload` needs of a run; whether `device: auto` finds a GPU is seen when it starts.
fn check_offload(config: &RunConfig, problems: &mut Vec<String>) {
    let wrong = [
        (!config.precision.is_mixed(), format!("`precision: {}`", config.precision)),
        (!config.fused, "`fused: false`".into()),
        (config.device.0 == "cpu", "`device: cpu`".into()),
    ];
    let wrong: Vec<String> =
        wrong.into_iter().filter(|(is_wrong, _)| *is_wrong).map(|(_, got)| got).collect();
    if config.optimizer.cpu_offload && !wrong.is_empty() {
        problems.push(format!(
            "`optimizer.cpu_offload`: needs a GPU, `precision: bf16-mixed` or `fp8-mixed`, and `fused: true`; got {}",
            wrong.join(", ")
        ));
    }
}

/// The arithmetic of a step, from the actual world size.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchPlan {
    /// Ranks.
    pub world: u64,
    /// Sequences of a micro-batch on one rank.
    pub micro: u64,
    /// Micro-batches of a step on one rank.
    pub accumulation: u64,
    /// Sequences of a step over all ranks.
    pub global: u64,
    /// Of preferences, a sequence of batch sizes is a pair of them.
    pub pairs: bool,
    /// Tokens of a step over all ranks.
    pub tokens_per_step: u64,
    /// Length of the run, where `max_steps` or `max_tokens` gives one.
    pub total_steps: Option<u64>,
    /// Steps and tokens before it went on here.
    done: (u64, u64),
}

impl BatchPlan {
    /// `accumulation = global / (world x micro)`. With `max_tokens` the run has the whole steps that fit,
    /// at least one; with `max_steps` too, the smaller of both.
    ///
    /// # Errors
    /// Not divisible: names the nearest valid values. Absurd sizes: says which.
    pub fn new(config: &RunConfig, sequence: i64, world: u64) -> Result<Self, ConfigError> {
        let (global, micro) = (config.train.global_batch_size, config.train.micro_batch_size);
        let unit = world.saturating_mul(micro);
        if global == 0 || unit == 0 || !global.is_multiple_of(unit) {
            return Err(ConfigError { problems: vec![not_divisible(global, micro, world)] });
        }
        let pairs = config.dpo().is_some();
        let tokens_per_step = sequence as u128 * u128::from(global) * (1 + u128::from(pairs));
        // 2^48 tokens are a hundred times the published run: a slip of the pen, and it must not wrap.
        if tokens_per_step > 1 << 48 {
            let problem = format!(
                "`train.global_batch_size`: {global} sequences of {sequence} tokens are \
                 {tokens_per_step} tokens a step; at most 2^48 are possible"
            );
            return Err(ConfigError { problems: vec![problem] });
        }
        let tokens_per_step = tokens_per_step as u64;
        let by_tokens = config.train.max_tokens.map(|n| (n / tokens_per_step).max(1));
        let total_steps = [by_tokens, config.train.max_steps].into_iter().flatten().min();
        let accumulation = global / unit;
        let done = (0, 0);
        Ok(Self { world, micro, accumulation, global, pairs, tokens_per_step, total_steps, done })
    }

    /// Plans the length anew of a run that goes on after `step` steps and `tokens` tokens; `consumed`: the sequences that
    /// it read of its data. They may have come in batches of another size.
    pub fn go_on_from(&mut self, config: &RunConfig, step: u64, tokens: u64, consumed: u64) {
        // Short rows have fewer tokens than are planned for; data that began anew, or a checkpoint of another program, say
        // less than was seen.
        let read = consumed.saturating_mul(self.tokens_per_step / self.global);
        let done = match tokens.max(read) {
            0 => step.saturating_mul(self.tokens_per_step),
            done => done,
        };
        self.done = (step, done);
        let left = |max_tokens: u64| max_tokens.saturating_sub(done) / self.tokens_per_step;
        let by_tokens = config.train.max_tokens.map(|n| (step + left(n)).max(1));
        self.total_steps = [by_tokens, config.train.max_steps].into_iter().flatten().min();
    }

    /// Bounds a run that has done `step` steps by the global samples that its data still give, in whole steps. Whether that
    /// makes it shorter.
    pub fn limit_samples(&mut self, step: u64, left: u64) -> bool {
        let steps = step + left / self.global;
        let shorter = self.total_steps.is_none_or(|total| steps < total);
        if shorter {
            self.total_steps = Some(steps);
        }
        shorter
    }

    /// Tokens of the whole run, where its length is known.
    pub fn total_tokens(&self) -> Option<u64> {
        let (step, tokens) = self.done;
        let ahead = |steps: u64| steps.saturating_sub(step).saturating_mul(self.tokens_per_step);
        self.total_steps.map(|steps| tokens.saturating_add(ahead(steps)))
    }
}

fn not_divisible(global: u64, micro: u64, world: u64) -> String {
    if world == 0 {
        return "a run needs at least 1 rank, got 0".into();
    }
    let unit = world.saturating_mul(micro).max(1);
    let below = global / unit * unit;
    let above = global.div_ceil(unit).max(1).saturating_mul(unit);
    let nearest = if below == 0 { above.to_string() } else { format!("{below} or {above}") };
    // A micro-batch that divides is no larger than the share of a rank; 2^16 tries are plenty.
    let most = micro.min(global / world);
    let fits =
        (1..=most).rev().take(1 << 16).find(|m| global.is_multiple_of(world.saturating_mul(*m)));
    let other = fits.map_or(String::new(), |m| format!(", or `train.micro_batch_size` to {m}"));
    format!(
        "`train.global_batch_size`: {global} is not divisible by {world} rank(s) x \
         `train.micro_batch_size` {micro} = {unit}; set it to {nearest}{other}"
    )
}

impl fmt::Display for BatchPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks = if self.world == 1 { "rank" } else { "ranks" };
        write!(
            f,
            "{} {}/step = {} {ranks} x {} micro x {} accumulation = {} tokens/step",
            self.global,
            if self.pairs { "pairs" } else { "seq" },
            self.world,
            self.micro,
            self.accumulation,
            with_commas(self.tokens_per_step)
        )
    }
}

/// (1, `file`) -> `1 file`; (2097152, `token`) -> `2,097,152 tokens`.
pub fn counted(n: u64, one: &str) -> String {
    format!("{} {one}{}", with_commas(n), if n == 1 { "" } else { "s" })
}

/// 2097152 -> `2,097,152`.
pub fn with_commas(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}
