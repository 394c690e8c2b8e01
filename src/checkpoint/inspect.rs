//! What a checkpoint holds: its format, architecture and tensors, and where two differ.

use super::source::{Source, StoredTensor};
use crate::model::ModelConfig;
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tch::{Kind, Tensor};

/// What [`inspect`] found.
#[derive(Clone, Debug, Serialize)]
pub struct CheckpointReport {
    /// The folder or file.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
    /// Its architecture.
    pub config: ModelConfig,
    /// Parameters, counted once where they are tied.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Number of tensors of each dtype.
    pub dtypes: BTreeMap<String, u64>,
    /// Every tensor, by name.
    pub tensors: Vec<TensorReport>,
    /// Why its tensors do not fit its architecture; none where they do.
    pub problem: Option<String>,
}

/// One tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// As it is stored.
    #[serde(flatten)]
    pub stored: StoredTensor,
    /// Of its values, where they were asked for.
    pub statistics: Option<Statistics>,
}

/// Statistics of a tensor's finite values, in fp32.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Statistics {
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub std: f64,
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
    /// Values that are NaN or infinite.
    pub not_finite: u64,
}

impl Statistics {
    /// Of all values of a tensor; `None`: it has no finite value.
    pub fn of(tensor: &Tensor) -> Option<Self> {
        let values = tensor.to_kind(Kind::Float).view([-1]); // (N,)
        let finite = values.isfinite();
        let n = finite.sum(Kind::Int64).int64_value(&[]);
        let not_finite = (values.numel() as i64 - n) as u64;
        if n == 0 {
            return None;
        }
        let values = if not_finite > 0 { values.masked_select(&finite) } else { values };
        let number = |x: Tensor| x.double_value(&[]);
        Some(Self {
            mean: number(values.mean(Kind::Double)),
            std: number(values.std(false)),
            min: number(values.min()),
            max: number(values.max()),
            not_finite,
        })
    }
}

/// Looks into a checkpoint; with `statistics` at every value.
///
/// # Errors
/// A file that went away or is damaged.
pub fn inspect(source: &Source, statistics: bool) -> Result<CheckpointReport> {
    let stored = source.stored()?;
    let mut dtypes = BTreeMap::new();
    for tensor in &stored {
        *dtypes.entry(tensor.dtype.clone()).or_default() += 1;
    }
    let bytes = stored.iter().map(|t| t.bytes).sum();
    let report = |stored: StoredTensor| {
        let statistics = match statistics {
            true => Statistics::of(&source.tensor(&stored.name)?),
            false => None,
        };
        Ok(TensorReport { stored, statistics })
    };
    Ok(CheckpointReport {
        path: source.path.clone(),
        format: source.format().to_owned(),
        config: source.config.clone(),
        parameters: source.config.n_params(),
        bytes,
        dtypes,
        tensors: stored.into_iter().map(report).collect::<Result<_>>()?,
        problem: source.check().err().map(|e| format!("{e:#}")),
    })
}

/// How one parameter differs between two checkpoints, by its lit-gpt name.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Change {
    /// Only the first has it.
    OnlyFirst,
    /// Only the second has it.
    OnlySecond,
    /// Shapes of both.
    Shape(Vec<i64>, Vec<i64>),
    /// Largest absolute difference, and `||a - b|| / ||a||`.
    Values(f64, f64),
}

impl Change {
    /// Every parameter of two checkpoints that is not the same, whatever their formats.
    ///
    /// # Errors
    /// Tensors that do not fit their architecture; a damaged file.
    pub fn between(first: &Source, second: &Source) -> Result<Vec<(String, Self)>> {
        let (a, b) = (first.parameters(Some(Kind::Float))?, second.parameters(Some(Kind::Float))?);
        let mut out = Vec::new();
        let place = |name: &str| b.entries.iter().position(|entry| entry.name == name);
        for (i, entry) in a.entries.iter().enumerate() {
            let change = match place(&entry.name) {
                None => Some(Self::OnlyFirst),
                Some(j) if b.entries[j].shape != entry.shape => {
                    Some(Self::Shape(entry.shape.clone(), b.entries[j].shape.clone()))
                }
                Some(j) => Self::of_values(&a.get(i)?, &b.get(j)?),
            };
            out.extend(change.map(|change| (entry.name.clone(), change)));
        }
        let known = |name: &str| a.entries.iter().any(|entry| entry.name == name);
        let only = b.entries.iter().filter(|entry| !known(&entry.name));
        out.extend(only.map(|entry| (entry.name.clone(), Self::OnlySecond)));
        Ok(out)
    }

    fn of_values(a: &Tensor, b: &Tensor) -> Option<Self> {
        if a.equal(b) {
            return None;
        }
        let difference = a - b;
        let number = |x: Tensor| x.double_value(&[]);
        let relative = number(difference.norm()) / number(a.norm()).max(f64::MIN_POSITIVE);
        Some(Self::Values(number(difference.abs().max()), relative))
    }
}
