//! The learning rate of each optimizer step.
//!
//! Steps count from 1, so the first step already learns (lit-gpt's first micro-step has rate 0).
//! Warmup and length are in optimizer steps: the rate depends neither on the accumulation nor on
//! the world size.

use crate::config::{LrSchedule, TrainConfig};
use std::f64::consts::PI;

/// Learning rate of optimizer step `step` (from 1).
///
/// With W = `lr_warmup_steps`, D = `total_steps`, and `lr` = `peak_lr`:
/// - s < W: `lr * s / W`, whatever the schedule;
/// - `cosine`: `min_lr + 0.5 * (1 + cos(pi * (s - W) / (D - W))) * (lr - min_lr)`, and `min_lr` for
///   s > D;
/// - `constant`: `lr`;
/// - `wsd`: `lr` up to step `D * (1 - decay_fraction)`, then a straight line to `min_lr` at D.
///
/// Without `total_steps` (a run that only `max_time` or a signal ends) `cosine` and `wsd` have no
/// end to decay to and stay at `peak_lr`; the configuration refuses such a run. A run shorter than
/// its warmup stays in the warmup.
///
/// # Source
/// lit-gpt's `get_lr` at s, as TinyLlama published it: 4e-4 at s = 2000, 4e-5 at s = 1,430,512.
pub fn lr_at(step: u64, total_steps: Option<u64>, config: &TrainConfig, peak_lr: f64) -> f64 {
    let (s, warmup) = (step as f64, config.lr_warmup_steps as f64);
    if s < warmup {
        return peak_lr * s / warmup;
    }
    let Some(total) = total_steps else { return peak_lr };
    let total = total as f64;
    // A peak below `min_lr` must not rise at the end.
    let min_lr = config.min_lr.min(peak_lr);
    match config.lr_schedule {
        LrSchedule::Constant => peak_lr,
        _ if s > total => min_lr,
        LrSchedule::Cosine => {
            let done = progress(s, warmup, total);
            min_lr + 0.5 * (1.0 + (PI * done).cos()) * (peak_lr - min_lr)
        }
        LrSchedule::Wsd => {
            // The decay starts after the warmup even where their shares overlap.
            let start = (total * (1.0 - config.decay_fraction)).max(warmup);
            let done = progress(s.max(start), start, total);
            peak_lr + done * (min_lr - peak_lr)
        }
    }
}

/// Share of `[start, end]` that lies behind `s`; nothing where the interval is empty.
fn progress(s: f64, start: f64, end: f64) -> f64 {
    if end > start { ((s - start) / (end - start)).clamp(0.0, 1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(serde::Deserialize)]
    struct Golden {
        schedule: LrSchedule,
        lr: f64,
        min_lr: f64,
        warmup: u64,
        total: u64,
        decay_fraction: f64,
        /// `[step, learning rate]`
        values: Vec<(u64, f64)>,
    }

    fn config(schedule: LrSchedule, warmup: u64, min_lr: f64, decay_fraction: f64) -> TrainConfig {
        TrainConfig {
            lr_schedule: schedule,
            lr_warmup_steps: warmup,
            min_lr,
            decay_fraction,
            ..Default::default()
        }
    }

    #[test]
    fn rates_equal_the_published_formula_at_golden_steps() {
        let text = include_str!("../../tests/golden/metrics/schedule.json");
        let cases: Vec<Golden> = serde_json::from_str(text).unwrap();
        assert!(cases.len() >= 5);
        for case in cases {
            let config = config(case.schedule, case.warmup, case.min_lr, case.decay_fraction);
            for (step, want) in case.values {
                let got = lr_at(step, Some(case.total), &config, case.lr);
                assert!((got - want).abs() <= 1e-12 * case.lr, "{step}: {got} != {want}");
            }
        }
    }

    #[test]
    fn the_published_run_peaks_at_2000_and_ends_at_4e_5() {
        let config = config(LrSchedule::Cosine, 2000, 4e-5, 0.1);
        let lr = |step| lr_at(step, Some(1_430_512), &config, 4e-4);
        assert_eq!((lr(1), lr(1000), lr(2000)), (4e-4 / 2000.0, 2e-4, 4e-4));
        assert!((lr(716_256) - 2.2e-4).abs() < 1e-16);
        assert!((lr(1_430_512) - 4e-5).abs() < 1e-18);
        assert_eq!(lr(1_430_513), 4e-5);
    }

    #[test]
    fn a_run_without_a_length_stays_at_its_peak() {
        for schedule in [LrSchedule::Cosine, LrSchedule::Wsd, LrSchedule::Constant] {
            assert_eq!(lr_at(10_000, None, &config(schedule, 10, 1e-5, 0.1), 3e-4), 3e-4);
        }
    }

    fn schedules() -> impl Strategy<Value = LrSchedule> {
        prop_oneof![Just(LrSchedule::Cosine), Just(LrSchedule::Constant), Just(LrSchedule::Wsd)]
    }

    proptest! {
        #[test]
        fn a_rate_is_never_above_its_peak_nor_below_zero_and_never_jumps(
            schedule in schedules(),
            warmup in 0u64..300,
            length in 50u64..2000,
            min_share in 0.0f64..=1.5,
            decay in 0.1f64..=1.0,
            peak in 1e-6f64..1e-1,
        ) {
            let total = warmup + length;
            let config = config(schedule, warmup, peak * min_share, decay);
            // No step moves the rate further than the steepest of: warmup, cosine, linear decay.
            let decay_steps = (total as f64 * decay).min(length as f64);
            let steepest = peak * (1.0 / warmup.max(1) as f64).max(PI / 2.0 / decay_steps);
            let mut before = lr_at(warmup.max(1), Some(total), &config, peak);
            prop_assert!((before - peak).abs() <= steepest);
            for step in 1..=total + 50 {
                let lr = lr_at(step, Some(total), &config, peak);
                prop_assert!((0.0..=peak * (1.0 + 1e-12)).contains(&lr), "step {step}: {lr}");
                if step > 1 {
                    prop_assert!((lr - before).abs() <= steepest * 1.0001, "jump at {step}");
                }
                before = lr;
            }
        }
    }
}
