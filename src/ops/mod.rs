//! Differentiable operations of the model, each with its plain ATen reference.

mod attention;
mod loss;
mod norm;
mod rope;
mod swiglu;

pub use attention::{attention, attention_reference};
pub use loss::cross_entropy_sum;
pub use norm::{layer_norm, rms_norm, rms_norm_reference};
pub use rope::rope;
pub use swiglu::swiglu;
