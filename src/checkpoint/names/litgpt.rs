//! lit-gpt's own names, over the years.
//!
//! | ours         | litgpt since December 2024 | lit-gpt before            | TinyLlama           |
//! |--------------|----------------------------|---------------------------|---------------------|
//! | `attn.qkv`   | `attn.qkv`, `[Q; K; V]`    | `attn.attn`, group by group | `attn.attn`, so too |
//! | `mlp.fc_1`   | `mlp.fc_1`                 | `mlp.fc_1`                | `mlp.swiglu.w1`     |
//! | `mlp.fc_2`   | `mlp.fc_2`                 | `mlp.fc_2`                | `mlp.swiglu.w2`     |
//! | `mlp.proj`   | `mlp.proj`                 | `mlp.proj`                | `mlp.swiglu.w3`     |

use super::{Layout, Part};

/// Which of them a checkpoint has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LitGpt {
    /// `attn.attn`, packed group by group, instead of `attn.qkv`.
    pub interleaved: bool,
    /// `mlp.swiglu.w1` to `w3`, of TinyLlama.
    pub swiglu: bool,
}

impl LitGpt {
    /// By the names that are there.
    pub fn of<'a>(mut names: impl Iterator<Item = &'a str> + Clone) -> Self {
        let interleaved = names.clone().any(|name| name.contains(".attn.attn."));
        Self { interleaved, swiglu: names.any(|name| name.contains(".mlp.swiglu.")) }
    }

    /// For people.
    pub fn describe(self) -> &'static str {
        match (self.interleaved, self.swiglu) {
            (false, false) => "litgpt",
            (true, false) => "lit-gpt, QKV packed by group",
            (_, true) => "TinyLlama, QKV packed by group",
        }
    }
}

pub(super) fn parts(name: &str, variant: LitGpt) -> Vec<Part> {
    let swiglu = [
        ("mlp.fc_1", "mlp.swiglu.w1"),
        ("mlp.fc_2", "mlp.swiglu.w2"),
        ("mlp.proj", "mlp.swiglu.w3"),
    ];
    if variant.interleaved && name.contains(".attn.qkv.") {
        let name = name.replace(".attn.qkv.", ".attn.attn.");
        return vec![Part { name, layout: Layout::GroupInterleaved }];
    }
    let renamed = swiglu.iter().find(|(ours, _)| variant.swiglu && name.contains(ours));
    let name = renamed.map_or(name.to_owned(), |(ours, theirs)| name.replace(ours, theirs));
    vec![Part { name, layout: Layout::Same }]
}
