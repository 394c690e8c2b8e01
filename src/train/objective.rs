//! What a step makes smaller: the cross-entropy of the next tokens, or the loss of preferences.

use crate::data::Batch;
use crate::model::GPT;
use crate::ops::LossScalars;
use std::cell::RefCell;
use tch::{Kind, Tensor};

/// A loss over batches.
#[derive(Debug, Default)]
pub enum Objective {
    /// [`GPT::loss`].
    #[default]
    NextToken,
    /// Preferences between two answers.
    Dpo(Box<Dpo>),
}

/// Direct preference optimisation: of the chosen (c) and the rejected (r) answer of a pair
///
/// `-log sigmoid(m)`, `m = beta ((log p(c) - log p(r)) - (log q(c) - log q(r)))`
///
/// with the model p and the reference q. m is the margin between both answers' rewards.
///
/// # Source
/// arXiv 2305.18290, equation 7.
#[derive(Debug)]
pub struct Dpo {
    /// beta
    pub beta: f64,
    /// q; `None`: the model without its adapters.
    pub reference: Option<GPT>,
    /// Sums of margins and of pairs whose margin is above 0 since [`Dpo::take`], `(2,) fp32`, and how many pairs.
    sums: RefCell<Option<(Tensor, i64)>>,
}

impl Objective {
    /// The summed loss of a batch times `scalars.scale`, `() fp32`; of pairs, a pair's rows behind each other, chosen
    /// first.
    pub fn loss(&self, model: &GPT, batch: &Batch, scalars: LossScalars) -> Tensor {
        match self {
            Self::NextToken => {
                model.loss(&batch.input, &batch.target, batch.documents.as_ref(), scalars)
            }
            Self::Dpo(dpo) => {
                let margins = dpo.margins(model, batch); // (B,)
                dpo.note(&margins.detach());
                -margins.log_sigmoid().sum(Kind::Float) * scalars.scale
            }
        }
    }

    /// Mean margin and part of the pairs whose chosen answer is preferred, `(2,) fp32`, since the last call; of
    /// preferences only.
    pub fn take(&self) -> Option<Tensor> {
        match self {
            Self::NextToken => None,
            Self::Dpo(dpo) => dpo.sums.take().map(|(sums, pairs)| sums / pairs as f64),
        }
    }
}

impl Dpo {
    /// See [`Dpo`].
    pub fn new(beta: f64, reference: Option<GPT>) -> Self {
        Self { beta, reference, sums: RefCell::new(None) }
    }

    /// m of each pair, with a graph of the model's part.
    ///
    /// # Shapes
    /// batch (2B, T) -> (B,) fp32.
    pub fn margins(&self, model: &GPT, batch: &Batch) -> Tensor {
        // log p(c) - log p(r)
        let lead = |model: &GPT| {
            let sums = model.log_probabilities(&batch.input, &batch.target).view([-1, 2]); // (B, 2)
            sums.select(1, 0) - sums.select(1, 1)
        };
        let reference = tch::no_grad(|| match &self.reference {
            Some(reference) => lead(reference),
            None => {
                let was_training = model.training.replace(false);
                model.without_adapters.set(true);
                let lead = lead(model);
                model.without_adapters.set(false);
                model.training.set(was_training);
                lead
            }
        });
        (lead(model) - reference) * self.beta
    }

    fn note(&self, margins: &Tensor) {
        let right = margins.gt(0.0).sum(Kind::Float);
        let sums = Tensor::stack(&[margins.sum(Kind::Float), right], 0); // (2,)
        let pairs = margins.numel() as i64;
        self.sums.replace_with(|before| match before.take() {
            Some((all, n)) => Some((all + sums, n + pairs)),
            None => Some((sums, pairs)),
        });
    }
}
