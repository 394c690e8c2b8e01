//! YAML text and `--set` overrides -> [`RunConfig`]. The only file that calls the YAML crate.
//!
//! `serde_yaml` is archived; `serde-saphyr` is the living successor and prints a code frame.

use super::check::{self, Schema};
use super::finetune::{self, Method};
use super::{ConfigError, RunConfig, validate};
use crate::checkpoint;
use crate::error::WithHint;
use crate::model::ModelConfig;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use serde_json::Value;
use std::path::Path;

/// Reads a run's YAML, applies overrides (`train.max_steps=10`, `data.train.0.weight=0.5`), checks keys,
/// types and values.
///
/// # Errors
/// One [`ConfigError`] with every problem; a missing file; a YAML syntax error with its code frame.
pub fn load(path: &Path, sets: &[String]) -> Result<RunConfig> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration `{}`", path.display()))
        .usage("the repository's runs lie in `configs/`")?;
    parse(&text, sets).with_context(|| format!("in `{}`", path.display()))
}

/// [`load`] on a text.
pub fn parse(text: &str, sets: &[String]) -> Result<RunConfig> {
    let (mut tree, schema, mut problems) = tree(text, sets)?;
    check::check(&mut tree, &schema, &mut problems);
    if !tree["finetune"].is_null() {
        problems.push(
            "`finetune`: this is for `tinyllama finetune CONFIG`; leave it out to pretrain".into(),
        );
    }
    finish(tree, problems)
}

/// [`load`] or, where the YAML says what is to be finetuned, [`load_finetune`].
///
/// # Errors
/// Theirs.
pub fn load_either(path: &Path, sets: &[String]) -> Result<RunConfig> {
    let text = std::fs::read_to_string(path).unwrap_or_default(); // they say what is wrong with it
    let finetunes =
        yaml(&text).is_ok_and(|tree| tree.get("finetune").is_some_and(|f| !f.is_null()));
    if finetunes { load_finetune(path, sets) } else { load(path, sets) }
}

/// [`load`] of a finetuning run: the model is that of `initial_checkpoint_dir`, as is the tokenizer unless
/// `tokenizer_dir` names another, and learning rate, batch and schedule have defaults of their own.
///
/// # Errors
/// As [`load`]; no checkpoint there; a model in the YAML that is another one.
pub fn load_finetune(path: &Path, sets: &[String]) -> Result<RunConfig> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration `{}`", path.display()))
        .usage("the repository's runs lie in `configs/finetune/`")?;
    parse_finetune(&text, sets).with_context(|| format!("in `{}`", path.display()))
}

/// [`load_finetune`] on a text.
pub fn parse_finetune(text: &str, sets: &[String]) -> Result<RunConfig> {
    let (mut tree, schema, mut problems) = tree(text, sets)?;
    check::check(&mut tree, &schema, &mut problems);
    if tree["finetune"].is_null() {
        problems.push("`finetune`: needs at least `{data: {train: FILE}}`".into());
    }
    let method = tree["finetune"].get("method").cloned().unwrap_or_default();
    let method: Method = serde_json::from_value(method).unwrap_or_default();
    let ends = ["max_steps", "max_tokens", "max_time"];
    let ends = ends.iter().any(|key| !tree["train"].get(key).is_none_or(Value::is_null));
    let saves = tree["train"].get("save_interval").is_some();
    fill(&mut tree, finetune::defaults(method, ends, saves));
    let Some(dir) = tree["initial_checkpoint_dir"].as_str().map(str::to_owned) else {
        problems
            .push("`initial_checkpoint_dir`: needs the checkpoint that is to be finetuned".into());
        return Err(ConfigError { problems }.into());
    };
    let folder = checkpoint::resolve(dir.as_ref())?;
    let mut model = checkpoint::load_config(&folder)?;
    if let Some(tie) =
        tree["train"]["tie_embeddings"].as_bool().filter(|tie| *tie != model.tie_embeddings)
    {
        problems.push(format!(
            "`train.tie_embeddings`: the checkpoint's are {}; leave it out",
            if tie { "apart" } else { "one matrix" }
        ));
        model.tie_embeddings = tie;
    }
    let given = ["model_name", "model_config"].iter().any(|key| tree.get(key).is_some());
    if given && problems.is_empty() {
        let config: RunConfig = serde_json::from_value(tree.clone()).context("configuration")?;
        // A saved configuration may have rows for the tokens that the run added.
        let theirs = config.model().ok().map(|theirs| ModelConfig {
            vocab_size: model.vocab_size,
            padded_vocab_size: model.padded_vocab_size,
            ..theirs
        });
        if theirs.as_ref() != Some(&model) {
            problems.push(format!(
                "`model_name`, `model_config`: the model is that of `{dir}`, another one than they name; leave them out"
            ));
        }
    }
    // The checkpoint itself: of a run's folder the newest, which later may be another.
    tree["initial_checkpoint_dir"] = folder.to_string_lossy().into_owned().into();
    tree["model_name"] = RunConfig::default().model_name.into();
    tree["model_config"] =
        serde_json::to_value(&model).context("the checkpoint's configuration")?;
    if tree["tokenizer_dir"].is_null() {
        // Of a file: what lies beside it.
        let parent = folder.parent().filter(|dir| *dir != Path::new("")).unwrap_or(Path::new("."));
        let beside = Some(if folder.is_file() { parent } else { folder.as_path() });
        let beside = beside.filter(|dir| dir.is_dir() && Tokenizer::is_in(dir));
        if beside.is_none() && folder.is_file() {
            problems.push(format!(
                "`tokenizer_dir`: `{dir}` is a file without a tokenizer beside it; name one, or make a folder with both \
                 by `tinyllama convert {dir} FOLDER --to hf`"
            ));
        }
        let place = beside.unwrap_or(&folder);
        tree["tokenizer_dir"] = place.to_string_lossy().into_owned().into();
    }
    finish(tree, problems)
}

/// Sets the keys of `defaults` that `tree` does not have.
fn fill(tree: &mut Value, defaults: Value) {
    let (Some(tree), Value::Object(defaults)) = (tree.as_object_mut(), defaults) else { return };
    for (key, default) in defaults {
        match tree.get_mut(&key) {
            None => {
                tree.insert(key, default);
            }
            Some(value) => fill(value, default),
        }
    }
}

/// A YAML text with overrides.
fn tree(text: &str, sets: &[String]) -> Result<(Value, Schema, Vec<String>)> {
    let mut tree = yaml(text)?;
    if tree.is_null() {
        tree = Value::Object(Default::default());
    }
    let schema = Schema::of::<RunConfig>();
    let mut problems = Vec::new();
    for set in sets {
        apply(&mut tree, set, &schema, &mut problems);
    }
    Ok((tree, schema, problems))
}

/// The configuration of a tree whose keys and types were checked.
fn finish(tree: Value, mut problems: Vec<String>) -> Result<RunConfig> {
    if problems.is_empty() {
        let config: RunConfig = serde_json::from_value(tree).context("configuration")?;
        problems = validate::problems(&config);
        if problems.is_empty() {
            return Ok(config);
        }
    } else {
        problems.extend(model_problems(&tree));
    }
    Err(ConfigError { problems }.into())
}

/// Problems of the model in a tree that has others: they are worth telling in the same go.
fn model_problems(tree: &Value) -> Vec<String> {
    let default = RunConfig::default();
    let name = tree.get("model_name").map_or(Some(default.model_name.as_str()), Value::as_str);
    let overrides = tree.get("model_config").map_or(Some(&default.model_config), Value::as_object);
    let (Some(name), Some(overrides)) = (name, overrides) else { return Vec::new() };
    validate::model_config(name, overrides, None).err().unwrap_or_default()
}

/// A YAML text as a tree.
fn yaml(text: &str) -> Result<Value> {
    serde_saphyr::from_str(text)
        .map_err(|e| anyhow!("the YAML cannot be read:\n{e}"))
        .usage("see `configs/tinyllama.yaml` for every key")
}

/// Writes `a.b.c=value` into the tree; list positions are numbers.
fn apply(tree: &mut Value, set: &str, schema: &Schema, problems: &mut Vec<String>) {
    let Some((path, value)) = set.split_once('=') else {
        problems.push(format!("`--set {set}`: expected KEY=VALUE"));
        return;
    };
    let value = match yaml(value) {
        Ok(value) => value,
        Err(e) => return problems.push(format!("`--set {set}`: {e}")),
    };
    let keys: Vec<&str> = path.split('.').collect();
    if let Err(problem) = check::known_path(schema, &keys) {
        return problems.push(format!("`--set {set}`: {problem}"));
    }
    let defaults = serde_json::to_value(RunConfig::default()).unwrap_or(Value::Null);
    let mut default = Some(&defaults);
    let mut at = tree;
    for (i, key) in keys.iter().enumerate() {
        // A position in a list that the YAML leaves out is one in the default's list.
        let list = default.filter(|d| d.is_array());
        if let (true, Some(list), Ok(_)) = (at.is_null(), list, key.parse::<usize>()) {
            *at = list.clone();
        }
        default = default.and_then(|d| d.get(key));
        at = match (at, key.parse::<usize>()) {
            (Value::Array(items), Ok(index)) => match items.len() {
                n if index < n => &mut items[index],
                n => {
                    return problems
                        .push(format!("`--set {set}`: `{key}`, but the list has {n} item(s)"));
                }
            },
            (at, _) => {
                if !at.is_object() {
                    *at = Value::Object(Default::default());
                }
                match at.as_object_mut() {
                    Some(map) => map.entry(*key).or_insert(Value::Null),
                    None => return,
                }
            }
        };
        if i + 1 == keys.len() {
            *at = value;
            return;
        }
    }
}

/// Writes the fully resolved configuration; [`load`] reads it back to an equal one.
pub fn save_resolved(config: &RunConfig, path: &Path) -> Result<()> {
    let text = to_yaml(config)?;
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}

/// The fully resolved configuration as YAML.
pub fn to_yaml(config: &RunConfig) -> Result<String> {
    serde_saphyr::to_string(config)
        .map_err(|e| anyhow!("cannot write the configuration as YAML: {e}"))
}

/// Key paths whose values differ, as `key: old -> new`.
pub fn diff(old: &RunConfig, new: &RunConfig) -> Vec<String> {
    let tree = |c: &RunConfig| serde_json::to_value(c).unwrap_or(Value::Null);
    let mut out = Vec::new();
    diff_at("", &tree(old), &tree(new), &mut out);
    out
}

fn diff_at(path: &str, old: &Value, new: &Value, out: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.dedup();
            keys.sort();
            keys.dedup();
            for key in keys {
                let null = Value::Null;
                let (x, y) = (a.get(key).unwrap_or(&null), b.get(key).unwrap_or(&null));
                diff_at(&check::join(path, key), x, y, out);
            }
        }
        (a, b) if a != b => out.push(format!("{path}: {a} -> {b}")),
        _ => {}
    }
}
