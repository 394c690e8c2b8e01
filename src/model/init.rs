//! Initial weights, by the exact formulas of TinyLlama (2023-11-09 and later).
//!
//! - embedding and every matrix: N(0, sqrt(2 / (5 C)))
//! - `attn.proj` and the Llama MLP's `proj`, which write into the residual stream: N(0, 1 / (sqrt(C) L))
//! - biases 0, norm weights 1
//!
//! For `tiny-llama-1.1b`: 0.013975 and 0.0010044. The test that holds it: `init` in the suite.

use super::config::{MlpClass, ModelConfig};
use super::gpt::GPT;
use tch::Tensor;

/// Standard deviation of embedding and ordinary matrices.
pub fn std_plain(config: &ModelConfig) -> f64 {
    (2.0 / 5.0 / config.n_embd as f64).sqrt()
}

/// Standard deviation of the matrices that write into the residual stream.
pub fn std_residual(config: &ModelConfig) -> f64 {
    1.0 / (config.n_embd as f64).sqrt() / config.n_layer as f64
}

/// Standard deviation of a parameter by its name; `None` for norms and biases, which are constants.
pub fn std_of(name: &str, config: &ModelConfig) -> Option<f64> {
    let scaled_mlp = config.mlp_class == MlpClass::LLaMAMLP && name.ends_with("mlp.proj.weight");
    if name.ends_with(".bias") || name.contains("norm_") || name.contains("ln_f") {
        None
    } else if name.ends_with("attn.proj.weight") || scaled_mlp {
        Some(std_residual(config))
    } else {
        Some(std_plain(config))
    }
}

/// Fills a model in place, in the order of its parameters, from libtorch's generator of its device.
pub fn init_weights(model: &GPT) {
    for (name, parameter) in model.named_parameters() {
        init_parameter(&name, &parameter, &model.config);
    }
}

/// Fills one parameter, told by its name, as [`init_weights`] does.
pub fn init_parameter(name: &str, parameter: &Tensor, config: &ModelConfig) {
    let mut parameter = parameter.shallow_clone();
    let _ = tch::no_grad(|| match std_of(name, config) {
        Some(std) => parameter.normal_(0.0, std),
        None => parameter.fill_(if name.ends_with(".bias") { 0.0 } else { 1.0 }),
    });
}
