//! Published models and their numbers, as in their `config.json` files and litgpt's `config.py`.

use super::config::{MlpClass, ModelConfig, NormClass, RopeScaling, RopeType};

/// Every preset.
pub fn all() -> Vec<ModelConfig> {
    let mut presets = tiny_llama();
    presets.extend(llama());
    presets.extend(smollm2());
    presets.extend(pythia());
    presets
}

/// A Llama: RMSNorm, full rotary, SwiGLU, no biases.
#[allow(clippy::too_many_arguments)]
fn llama_model(
    name: &str,
    block_size: i64,
    vocab_size: i64,
    n_layer: i64,
    n_head: i64,
    n_query_groups: i64,
    n_embd: i64,
    intermediate_size: i64,
) -> ModelConfig {
    ModelConfig {
        name: name.into(),
        block_size,
        vocab_size,
        padded_vocab_size: vocab_size,
        n_layer,
        n_head,
        n_embd,
        n_query_groups,
        head_size: n_embd / n_head,
        intermediate_size,
        rotary_percentage: 1.0,
        rope_base: 10_000.0,
        rope_scaling: None,
        bias: false,
        attn_bias: false,
        parallel_residual: false,
        norm_class: NormClass::RMSNorm,
        norm_eps: 1e-5,
        mlp_class: MlpClass::LLaMAMLP,
        tie_embeddings: false,
    }
}

#[rustfmt::skip]
fn tiny_llama() -> Vec<ModelConfig> {
    //                                               T     vocab   L   H   G  C     F
    let code = llama_model("code-tiny-llama-1b",     8192, 32_000, 22, 32, 4, 2048, 5632);
    vec![
        llama_model("tiny-llama-1.1b",               2048, 32_000, 22, 32, 4, 2048, 5632),
        llama_model("tiny-llama-120m",               2048, 32_000, 12, 12, 1, 768,  2048),
        // 8k context on a 2k base: condense ratio 4.
        ModelConfig { rope_scaling: Some(RopeScaling::new(RopeType::Linear, 4.0)), ..code },
        llama_model("micro-llama-300m",              2048, 32_000, 12, 16, 4, 1024, 5632),
    ]
}

#[rustfmt::skip]
fn llama() -> Vec<ModelConfig> {
    //                                               T     vocab   L   H   G   C     F
    let open_llama = llama_model("open_llama_3b",    2048, 32_000, 26, 32, 32, 3200, 8640);
    vec![
        llama_model("Llama-2-7b",                    4096, 32_000, 32, 32, 32, 4096, 11_008),
        llama_model("Llama-2-13b",                   4096, 32_000, 40, 40, 40, 5120, 13_824),
        llama_model("Llama-2-70b",                   4096, 32_000, 80, 64, 8,  8192, 28_672),
        ModelConfig { norm_eps: 1e-6, ..open_llama },
    ]
}

#[rustfmt::skip]
fn smollm2() -> Vec<ModelConfig> {
    let tied = |rope_base, c| ModelConfig { rope_base, tie_embeddings: true, ..c };
    vec![
        //                                                       T     vocab   L   H   G   C     F
        tied(100_000.0, llama_model("SmolLM2-135M",              8192, 49_152, 30, 9,  3,  576,  1536)),
        tied(100_000.0, llama_model("SmolLM2-360M",              8192, 49_152, 32, 15, 5,  960,  2560)),
        tied(130_000.0, llama_model("SmolLM2-1.7B",              8192, 49_152, 24, 32, 32, 2048, 8192)),
    ]
}

/// The Pythia suite: GPT-NeoX with parallel residual, a quarter of each head rotated, biases everywhere.
fn pythia() -> Vec<ModelConfig> {
    // name, L, H, C, V, T
    let table = [
        ("pythia-14m", 6, 4, 128, 50_304, 512),
        ("pythia-31m", 6, 8, 256, 50_304, 1024),
        ("pythia-70m", 6, 8, 512, 50_304, 2048),
        ("pythia-160m", 12, 12, 768, 50_304, 2048),
        ("pythia-410m", 24, 16, 1024, 50_304, 2048),
        ("pythia-1b", 16, 8, 2048, 50_304, 2048),
        ("pythia-1.4b", 24, 16, 2048, 50_304, 2048),
        ("pythia-2.8b", 32, 32, 2560, 50_304, 2048),
        ("pythia-6.9b", 32, 32, 4096, 50_432, 2048),
        ("pythia-12b", 36, 40, 5120, 50_688, 2048),
    ];
    let model = |(name, n_layer, n_head, n_embd, padded_vocab_size, block_size)| ModelConfig {
        padded_vocab_size,
        rotary_percentage: 0.25,
        bias: true,
        attn_bias: true,
        parallel_residual: true,
        norm_class: NormClass::LayerNorm,
        mlp_class: MlpClass::GptNeoxMLP,
        ..llama_model(name, block_size, 50_254, n_layer, n_head, n_head, n_embd, 4 * n_embd)
    };
    table.map(model).into()
}
