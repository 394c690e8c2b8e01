//! What each key means, from the doc comments of the structs.

use super::check::{self, Schema};
use super::{Method, RunConfig, finetune};
use crate::error::WithHint;
use crate::model::ModelConfig;
use anyhow::{Result, anyhow};
use serde_json::{Value, json};

/// One key of the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Dotted path.
    pub path: String,
    /// Meaning, unit.
    pub doc: String,
    /// What values it takes.
    pub kind: String,
    /// Default as YAML; empty where the key must be given.
    pub default: String,
    /// Default in a finetuning run where that is another, by method; else empty.
    pub finetune: String,
    /// Meaning of each choice, for an enum.
    pub choices: Vec<(String, String)>,
}

/// Every key, tables first, in the order of the structs.
pub fn keys() -> Vec<Key> {
    let schema = Schema::of::<RunConfig>();
    let all = RunConfig { finetune: Some(Default::default()), ..RunConfig::default() };
    let defaults = serde_json::to_value(all).unwrap_or(Value::Null);
    let mut out = Vec::new();
    collect("", schema.root(), &defaults, &schema, &mut out);
    let model = Schema::of::<ModelConfig>();
    collect("model_config", model.root(), &Value::Null, &model, &mut out);
    out
}

fn collect(path: &str, node: &Value, defaults: &Value, schema: &Schema, out: &mut Vec<Key>) {
    let properties = schema.non_null(node).get("properties").and_then(Value::as_object);
    for (name, child) in properties.into_iter().flatten() {
        let path = check::join(path, name);
        let target = schema.non_null(child);
        let doc = [child, target].iter().find_map(|n| n.get("description")?.as_str());
        // An entry of a list has its own; a model's keys have those of its preset.
        let of_entry = child.get("default").filter(|_| path.contains(".N."));
        let default = defaults.get(name).or(of_entry);
        let shown = match path.as_str() {
            "finetune" => Some(&Value::Null), // filled in above for the keys below it
            _ => default,
        };
        out.push(Key {
            doc: doc.unwrap_or("").replace('\n', " "),
            kind: check::expected(child, schema),
            finetune: default.map_or(String::new(), |default| in_finetuning(&path, default)),
            default: shown.map_or(String::new(), Value::to_string),
            choices: choice_docs(target),
            path: path.clone(),
        });
        let target = schema.container(target);
        let items = target.get("items").map(|items| schema.resolve(items));
        match items.filter(|items| items.get("properties").is_some()) {
            Some(items) => collect(&format!("{path}.N"), items, &Value::Null, schema, out),
            None => collect(&path, target, default.unwrap_or(&Value::Null), schema, out),
        }
    }
}

/// `2e-5 (full), 2e-4 (lora, qlora)`: a key's defaults in finetuning where they are not `default`, that of pretraining.
fn in_finetuning(path: &str, default: &Value) -> String {
    let pointer = format!("/{}", path.replace('.', "/"));
    let mut found: Vec<(Value, Vec<String>)> = Vec::new();
    for method in [Method::Full, Method::Lora, Method::Qlora, Method::Dpo] {
        let theirs = finetune::defaults(method, false, false);
        let value = theirs.pointer(&pointer).filter(|v| !v.is_object()).unwrap_or(default).clone();
        let name = json!(method).as_str().unwrap_or_default().to_owned();
        match found.iter_mut().find(|(known, _)| *known == value) {
            Some((_, methods)) => methods.push(name),
            None => found.push((value, vec![name])),
        }
    }
    match found.as_slice() {
        [(value, _)] if value == default => String::new(),
        [(value, _)] => value.to_string(),
        several => {
            let told =
                several.iter().map(|(value, methods)| format!("{value} ({})", methods.join(", ")));
            told.collect::<Vec<_>>().join(", ")
        }
    }
}

fn choice_docs(node: &Value) -> Vec<(String, String)> {
    let one = |v: &Value| {
        let doc = v.get("description").and_then(Value::as_str).unwrap_or("");
        Some((v.get("const")?.as_str()?.to_owned(), doc.replace('\n', " ")))
    };
    let variants = node.get("oneOf").and_then(Value::as_array);
    variants.into_iter().flatten().filter_map(one).collect()
}

/// The keys at and below `path`; a list position is a number or `N`.
///
/// # Errors
/// An unknown key, with the nearest one.
pub fn explain(path: &str) -> Result<Vec<Key>> {
    let all = keys();
    let any = |key| if str::parse::<usize>(key).is_ok() { "N" } else { key };
    let path = &path.split('.').map(any).collect::<Vec<_>>().join(".")[..];
    let below = |k: &&Key| k.path == path || k.path.starts_with(&format!("{path}."));
    let found: Vec<Key> = all.iter().filter(below).cloned().collect();
    if found.is_empty() {
        let leaf = all.iter().map(|k| k.path.as_str()).find(|p| p.rsplit('.').next() == Some(path));
        let near = leaf.or_else(|| check::nearest(path, all.iter().map(|k| k.path.as_str())));
        let near = near.map_or(String::new(), |n| format!("; did you mean `{n}`?"));
        return Err(anyhow!("no key is called `{path}`{near}"))
            .usage("`tinyllama config explain` lists all keys");
    }
    Ok(found)
}
