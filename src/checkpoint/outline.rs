//! Names and shapes of a model's parameters, without the model.

use crate::model::{MlpClass, ModelConfig, NormClass};

/// Every parameter under its lit-gpt name with its shape, in the order of [`crate::model::GPT::named_parameters`].
pub fn outline(config: &ModelConfig) -> Vec<(String, Vec<i64>)> {
    let mut out = Vec::new();
    let mut matrix = |name: String, rows: i64, columns: i64, bias: bool| {
        out.push((format!("{name}.weight"), vec![rows, columns]));
        if bias {
            out.push((format!("{name}.bias"), vec![rows]));
        }
    };
    let (c, f, v) = (config.n_embd, config.intermediate_size, config.padded_vocab_size);
    let (width, bias) = (config.n_head * config.head_size, config.bias);
    matrix("transformer.wte".into(), v, c, false);
    for layer in 0..config.n_layer {
        let name = |leaf: &str| format!("transformer.h.{layer}.{leaf}");
        matrix(name("norm_1"), c, 0, config.norm_class == NormClass::LayerNorm);
        matrix(name("attn.qkv"), config.qkv_rows(), c, config.attn_bias);
        matrix(name("attn.proj"), c, width, bias);
        matrix(name("norm_2"), c, 0, config.norm_class == NormClass::LayerNorm);
        match config.mlp_class {
            MlpClass::LLaMAMLP => {
                matrix(name("mlp.fc_1"), f, c, bias);
                matrix(name("mlp.fc_2"), f, c, bias);
            }
            MlpClass::GptNeoxMLP => matrix(name("mlp.fc"), f, c, bias),
        }
        matrix(name("mlp.proj"), c, f, bias);
    }
    matrix("transformer.ln_f".into(), c, 0, config.norm_class == NormClass::LayerNorm);
    if !config.tie_embeddings {
        matrix("lm_head".into(), v, c, false);
    }
    // A norm's weight is a vector.
    out.iter_mut().for_each(|(_, shape)| shape.retain(|&n| n > 0));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::GPT;
    use tch::Device;

    #[test]
    fn the_outline_is_that_of_the_model() {
        let mut small = vec![];
        for name in ["tiny-llama-120m", "pythia-14m"] {
            let preset = ModelConfig::preset(name).unwrap();
            let config = ModelConfig {
                n_layer: 2,
                padded_vocab_size: 64,
                vocab_size: 60,
                intermediate_size: 96,
                ..preset
            };
            small.push(ModelConfig { tie_embeddings: !config.tie_embeddings, ..config.clone() });
            let both = config.mlp_class == MlpClass::LLaMAMLP;
            small.push(ModelConfig { bias: both || config.bias, attn_bias: true, ..config });
        }
        for config in small {
            let of = |model: GPT| -> Vec<_> {
                model.named_parameters().into_iter().map(|(name, p)| (name, p.size())).collect()
            };
            let outlined = outline(&config);
            assert_eq!(outlined, of(GPT::empty(&config, Device::Cpu)), "{}", config.name);
            assert_eq!(outlined, of(GPT::outline(&config, Device::Cpu)), "{}", config.name);
        }
    }
}
