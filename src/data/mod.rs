//! stand-in
use tch::Tensor;
/// b
pub struct Batch { /// i
 pub input: Tensor, /// t
 pub target: Tensor, /// n
 pub n_targets: i64 }
