//! Training: the loop in [`pretrain`], one step in [`step`], the optimizer in [`optimizer`].

pub mod guard;
pub mod optimizer;
pub mod step;
