//! Names of Meta's releases.
//!
//! | ours                | theirs                                                    |
//! |---------------------|-----------------------------------------------------------|
//! | `transformer.wte`   | `tok_embeddings`                                          |
//! | `norm_1`, `norm_2`  | `layers.{i}.attention_norm`, `ffn_norm`                   |
//! | `attn.qkv`          | `layers.{i}.attention.wq`, `wk` (rotary pairs), `wv`      |
//! | `attn.proj`         | `layers.{i}.attention.wo`                                 |
//! | `mlp.fc_1`, `fc_2`, `proj` | `layers.{i}.feed_forward.w1`, `w3`, `w2`           |
//! | `transformer.ln_f`, `lm_head` | `norm`, `output`                                |

use super::{Layout, Part};
use crate::model::ModelConfig;

pub(super) fn parts(name: &str, config: &ModelConfig) -> Vec<Part> {
    let (module, kind) = name.rsplit_once('.').unwrap_or((name, "weight"));
    let one = |module: &str| vec![Part { name: format!("{module}.{kind}"), layout: Layout::Same }];
    match module {
        "transformer.wte" => return one("tok_embeddings"),
        "transformer.ln_f" => return one("norm"),
        "lm_head" => return one("output"),
        _ => {}
    }
    let rest = module.strip_prefix("transformer.h.").and_then(|rest| rest.split_once('.'));
    let Some((layer, leaf)) = rest else { return one(module) };
    let in_layer = |leaf: &str| one(&format!("layers.{layer}.{leaf}"));
    match leaf {
        "norm_1" => in_layer("attention_norm"),
        "norm_2" => in_layer("ffn_norm"),
        "attn.proj" => in_layer("attention.wo"),
        "mlp.fc_1" => in_layer("feed_forward.w1"),
        "mlp.fc_2" => in_layer("feed_forward.w3"),
        "mlp.proj" => in_layer("feed_forward.w2"),
        "attn.qkv" => {
            let (q, kv) =
                (config.n_head * config.head_size, config.n_query_groups * config.head_size);
            let part = |letter, layout| Part {
                name: format!("layers.{layer}.attention.w{letter}.{kind}"),
                layout,
            };
            vec![
                part("q", Layout::RotaryPairs { start: 0, len: q }),
                part("k", Layout::RotaryPairs { start: q, len: kv }),
                part("v", Layout::Rows { start: q + kv, len: kv }),
            ]
        }
        other => in_layer(other),
    }
}
