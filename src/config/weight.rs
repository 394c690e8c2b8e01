//! Weights of data sources: a number, or points between which the weight changes linearly.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Share of a source, before all are normalised to sum 1.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(untagged)]
pub enum Weight {
    /// The same throughout.
    Constant(f64),
    /// Straight lines between points, the first point's weight before and the last one's after them.
    Schedule(Vec<WeightPoint>),
}

/// A weight at a time of the run.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct WeightPoint {
    /// Tokens trained on over all ranks, e.g. `1.5T`.
    pub tokens: u64,
    /// Weight at that time, 0 or more.
    pub weight: f64,
}

impl Default for Weight {
    fn default() -> Self {
        Self::Constant(1.0)
    }
}

impl From<f64> for Weight {
    fn from(weight: f64) -> Self {
        Self::Constant(weight)
    }
}

impl Weight {
    /// The number that it is throughout, if it is one.
    pub fn constant(&self) -> Option<f64> {
        match self {
            Self::Constant(weight) => Some(*weight),
            Self::Schedule(_) => None,
        }
    }

    /// Its value after `tokens` tokens of training.
    pub fn at(&self, tokens: u64) -> f64 {
        let points = match self {
            Self::Constant(weight) => return *weight,
            Self::Schedule(points) => points,
        };
        let after = points.partition_point(|p| p.tokens <= tokens);
        match (after.checked_sub(1).map(|before| points[before]), points.get(after)) {
            (None, None) => 0.0,
            (None, Some(first)) => first.weight,
            (Some(last), None) => last.weight,
            (Some(a), Some(b)) => {
                let done = (tokens - a.tokens) as f64 / (b.tokens - a.tokens) as f64;
                a.weight + done * (b.weight - a.weight)
            }
        }
    }

    /// What is wrong with it alone: the rest of a key path after `weight`, and the sentence.
    pub fn problems(&self) -> Vec<String> {
        let is_weight = |w: f64| w >= 0.0 && w.is_finite();
        let points = match self {
            Self::Constant(w) if is_weight(*w) && *w > 0.0 => return vec![],
            Self::Constant(w) => return vec![format!("`: must be above 0, got {w}")],
            Self::Schedule(points) => points,
        };
        let mut problems = Vec::new();
        for (i, point) in points.iter().enumerate() {
            if !is_weight(point.weight) {
                problems.push(format!(".{i}.weight`: must be at least 0, got {}", point.weight));
            }
            if i > 0 && point.tokens <= points[i - 1].tokens {
                problems.push(format!(
                    ".{i}.tokens`: must be above the point before, {}, got {}",
                    points[i - 1].tokens,
                    point.tokens
                ));
            }
        }
        if problems.is_empty() && points.iter().all(|p| p.weight == 0.0) {
            problems.push("`: needs a point with a weight above 0".into());
        }
        problems
    }

    /// What is wrong with weights together: values that are none, or a time at which all are 0. Straight lines that are
    /// above 0 together at every point are so between the points.
    pub fn problem_together(weights: &[Self]) -> Option<String> {
        let points = |w: &Self| match w {
            Self::Constant(_) => vec![],
            Self::Schedule(points) => points.iter().map(|p| p.tokens).collect(),
        };
        let times = std::iter::once(0).chain(weights.iter().flat_map(points));
        for time in times {
            let at = || weights.iter().map(|w| w.at(time));
            let total: f64 = at().sum();
            if !(at().all(|w| w >= 0.0) && total > 0.0 && total.is_finite()) {
                let shown: Vec<String> = at().map(|w| w.to_string()).collect();
                return Some(format!(
                    "weights must be 0 or more and one above 0 at any time; after {time} tokens they are {}",
                    shown.join(", ")
                ));
            }
        }
        None
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant(weight) => write!(f, "{weight}"),
            Self::Schedule(points) => {
                for (i, p) in points.iter().enumerate() {
                    let comma = if i > 0 { ", " } else { "" };
                    let tokens = crate::train::progress::count(p.tokens as f64);
                    write!(f, "{comma}{} at {tokens} tokens", p.weight)?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(list: &[(u64, f64)]) -> Weight {
        Weight::Schedule(
            list.iter().map(|&(tokens, weight)| WeightPoint { tokens, weight }).collect(),
        )
    }

    #[test]
    fn a_schedule_is_straight_between_its_points_and_level_outside() {
        let weight = points(&[(100, 1.0), (200, 0.5), (400, 0.0)]);
        let got = [0, 100, 150, 200, 300, 400, u64::MAX].map(|tokens| weight.at(tokens));
        assert_eq!(got, [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]);
        assert_eq!(Weight::Constant(2.0).at(7), 2.0);
        assert_eq!(points(&[(5, 0.3)]).at(0), 0.3);
        assert_eq!(weight.to_string(), "1 at 100 tokens, 0.5 at 200 tokens, 0 at 400 tokens");
    }

    #[test]
    fn weights_that_leave_no_source_at_some_time_are_told() {
        let (falls, rises) = (points(&[(0, 1.0), (10, 0.0)]), points(&[(10, 0.0), (20, 1.0)]));
        assert!(falls.problems().is_empty() && rises.problems().is_empty());
        let gap = Weight::problem_together(&[falls.clone(), rises]).unwrap();
        assert!(gap.ends_with("after 10 tokens they are 0, 0"), "{gap}");
        assert_eq!(Weight::problem_together(&[falls, Weight::Constant(0.1)]), None);
        assert_eq!(points(&[(0, 0.0)]).problems(), ["`: needs a point with a weight above 0"]);
        let twice = points(&[(5, 1.0), (5, -1.0)]).problems();
        assert_eq!(twice.len(), 2, "{twice:?}");
    }
}
