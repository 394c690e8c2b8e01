//! The model cut into units: the embedding, each block, the final norm with the head. Sharded training keeps the
//! weights of a unit together and brings them when a pass enters it.

use super::gpt::GPT;
use crate::ffi;
use std::fmt;
use std::sync::Arc;
use tch::Tensor;

/// Which way a pass goes through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Unit 0, 1, .., L + 1.
    Forward,
    /// Unit L + 1, .., 1, 0.
    Backward,
}

/// Called before a pass enters a unit, the backward pass in the thread that runs it. On entering unit u backward, the
/// gradients of unit u + 1 are complete: autograd runs the latest node that is ready first, and the accumulation of a
/// parameter's gradient before any other. A node that two units share would break that.
#[derive(Clone)]
pub struct AtUnit(pub Arc<dyn Fn(Pass, usize) + Send + Sync>);

impl fmt::Debug for AtUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AtUnit")
    }
}

impl GPT {
    /// The trained parameters by unit, under their names: 0 the embedding, 1 to L the blocks, L + 1 the final norm with its
    /// head. A head that is tied to the embedding has its weight there. Adapters are few: they are one unit.
    pub fn units(&self) -> Vec<Vec<(String, Tensor)>> {
        let adapters = self.adapters();
        if !adapters.is_empty() {
            return vec![adapters];
        }
        let last = self.h.len() + 1;
        let mut units: Vec<_> = (0..=last).map(|_| Vec::new()).collect();
        for (name, parameter) in self.named_parameters() {
            let block = name.strip_prefix("transformer.h.").and_then(|rest| rest.split('.').next());
            let unit = match block.and_then(|i| i.parse::<usize>().ok()) {
                Some(i) => i + 1,
                None if name.starts_with("transformer.wte") => 0,
                None => last,
            };
            units[unit].push((name, parameter));
        }
        units
    }

    /// Before the forward pass enters a unit.
    pub(super) fn enter(&self, unit: usize) {
        if let Some(AtUnit(call)) = &self.at_unit {
            call(Pass::Forward, unit);
        }
    }

    /// `x` is the last that a unit makes: where its gradient is known, the backward pass enters the unit.
    pub(super) fn leave(&self, unit: usize, x: &Tensor) {
        let Some(AtUnit(call)) = &self.at_unit else { return };
        if !x.requires_grad() {
            return;
        }
        let call = call.clone();
        let entered = ffi::on_gradient(
            x,
            Box::new(move || {
                call(Pass::Backward, unit);
                Ok(())
            }),
        );
        entered.unwrap_or_else(|e| panic!("{e:#}"));
    }
}
