//! Names of GGUF, as [`crate::checkpoint::gguf::llama`] lists them; queries and keys are rotated in pairs there.

use super::{Layout, Part};
use crate::checkpoint::gguf::llama;
use crate::model::ModelConfig;

/// A parameter that GGUF has no name for keeps Hugging Face's.
pub(super) fn parts(name: &str, config: &ModelConfig) -> Vec<Part> {
    let renamed = |Part { name, layout }| {
        let name = llama::gguf_name(&name).unwrap_or(name);
        match layout {
            Layout::Rows { start, len } if llama::is_interleaved(&name) => {
                Part { name, layout: Layout::RotaryPairs { start, len } }
            }
            layout => Part { name, layout },
        }
    };
    super::parts(name, config).into_iter().map(renamed).collect()
}
