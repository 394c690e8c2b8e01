//! A frame of a picture: two axes, their ticks, and what is drawn inside.

use super::tokens;
use crate::picture::{DrawResult, FAINT, GRID, INK, Root, px, segments, text, trim_zeros};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Tokens from left to right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Axis {
    pub low: f64,
    pub high: f64,
    pub log: bool,
}

impl Axis {
    /// For these counts: from zero, or logarithmic where they span more than two decades.
    pub fn over(counts: &[f64]) -> Axis {
        let (low, high) = ends(counts);
        match high > 100.0 * low {
            true => Axis::log_over(counts),
            false => Axis { low: 0.0, high: 1.05 * high.max(1.0), log: false },
        }
    }

    /// Logarithmic; of counts that are not all zero.
    pub fn log_over(counts: &[f64]) -> Axis {
        let (low, high) = ends(counts);
        Axis { low: low / 1.5, high: high * 1.5, log: true }
    }

    /// 0 at the left, 1 at the right; what lies outside (0 tokens on a logarithmic axis) at the edge.
    pub fn part(&self, count: f64) -> f64 {
        let part = match self.log {
            true => (count.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (count - self.low) / (self.high - self.low),
        };
        part.clamp(0.0, 1.0)
    }

    /// At most `most` ticks: steps of 1, 2 or 5; on a logarithmic axis 1, 2 and 5 of each decade, or
    /// some decades.
    pub fn ticks(&self, most: usize) -> Vec<f64> {
        if !self.log {
            return steps(self.low, self.high, most);
        }
        let decades = (self.low.log10().floor() as i32)..=(self.high.log10().ceil() as i32);
        let within = |count: &f64| (self.low..=self.high).contains(count);
        let fine = decades.clone().flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d)));
        let fine: Vec<f64> = fine.filter(within).collect();
        if fine.len() <= most {
            return fine;
        }
        let whole: Vec<f64> = decades.map(|d| 10f64.powi(d)).filter(within).collect();
        let stride = whole.len().div_ceil(most.max(1)).max(1);
        whole.into_iter().step_by(stride).collect()
    }
}

/// The least and the largest count above zero.
fn ends(counts: &[f64]) -> (f64, f64) {
    let positive = counts.iter().copied().filter(|n| *n > 0.0);
    (positive.clone().fold(f64::INFINITY, f64::min), positive.fold(0.0, f64::max))
}

/// Multiples of 1, 2 or 5 times a power of ten within a range, at most `most`.
pub fn steps(low: f64, high: f64, most: usize) -> Vec<f64> {
    let least = (high - low) / most.max(1) as f64;
    let decade = 10f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * decade).into_iter().find(|s| *s >= least);
    let Some(step) = step.filter(|step| step.is_finite() && *step > 0.0) else { return Vec::new() };
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A range for these values with room at both ends; at least two units high.
pub fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .filter(|x| x.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    if low > high {
        return (0.0, 100.0);
    }
    let (middle, half) = ((low + high) / 2.0, ((high - low) / 2.0).max(1.0));
    (middle - 1.12 * half, middle + 1.12 * half)
}

/// Where it is, in drawn pixels, and what its edges mean.
#[derive(Clone, Copy)]
pub struct Frame {
    pub left: i32,
    pub right: i32,
    pub top: i32,
    pub bottom: i32,
    pub axis: Axis,
    /// Per cent at the bottom and at the top.
    pub range: (f64, f64),
}

impl Frame {
    pub fn x(&self, count: f64) -> i32 {
        self.left + (self.axis.part(count) * f64::from(self.right - self.left)).round() as i32
    }

    /// Cut at the edges.
    pub fn y(&self, value: f64) -> i32 {
        let part = (value - self.range.0) / (self.range.1 - self.range.0);
        let height = f64::from(self.bottom - self.top);
        self.bottom - (part.clamp(0.0, 1.0) * height).round() as i32
    }

    pub fn has(&self, value: f64) -> bool {
        (self.range.0..=self.range.1).contains(&value)
    }

    /// Grid, ticks and their labels, `size` high; values at the left only where `values` says so.
    pub fn draw(&self, root: &Root, size: i32, values: bool) -> DrawResult {
        let (width, height) = (self.right - self.left, self.bottom - self.top);
        let most = (height / px(size * 2 - 6)).clamp(2, 9) as usize;
        let ticks = steps(self.range.0, self.range.1, most);
        let decimals = usize::from(ticks.windows(2).any(|t| t[1] - t[0] < 0.95));
        for value in ticks {
            let y = self.y(value);
            line(root, [(self.left, y), (self.right, y)], GRID, 1)?;
            if values {
                let style = text(size, &INK).pos(Pos::new(HPos::Right, VPos::Center));
                let label = trim_zeros(&format!("{value:.decimals$}"));
                root.draw(&Text::new(label, (self.left - px(10), y + px(2)), style))?;
            }
        }
        let style = text(size, &INK).pos(Pos::new(HPos::Center, VPos::Top));
        for count in self.axis.ticks((width / px(size * 4)).clamp(2, 11) as usize) {
            let x = self.x(count);
            line(root, [(x, self.top), (x, self.bottom)], GRID, 1)?;
            line(root, [(x, self.bottom), (x, self.bottom + px(6))], FAINT, 1)?;
            let at = (x, self.bottom + px(10));
            root.draw(&Text::new(tokens(Some(count)), at, style.clone()))?;
        }
        line(root, [(self.left, self.bottom), (self.right, self.bottom)], FAINT, 1)?;
        line(root, [(self.left, self.top), (self.left, self.bottom)], FAINT, 1)
    }

    /// A broken line from edge to edge.
    pub fn level(&self, root: &Root, value: f64, colour: RGBColor, thickness: u32) -> DrawResult {
        if self.has(value) {
            dashes(root, self.left, self.right, self.y(value), colour, thickness)?;
        }
        Ok(())
    }
}

/// A broken level line.
pub fn dashes(
    root: &Root,
    left: i32,
    right: i32,
    y: i32,
    colour: RGBColor,
    thickness: u32,
) -> DrawResult {
    let mut x = left;
    while x < right {
        line(root, [(x, y), ((x + px(9)).min(right), y)], colour, thickness)?;
        x += px(15);
    }
    Ok(())
}

/// A line from here to there.
pub fn line(root: &Root, ends: [(i32, i32); 2], colour: RGBColor, thickness: u32) -> DrawResult {
    for segment in segments(&ends, colour, thickness) {
        root.draw(&segment)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_is_logarithmic_where_it_spans_more_than_two_decades() {
        let axis = Axis::over(&[1e9, 12e9]);
        assert_eq!((axis.log, axis.low, axis.part(0.0)), (false, 0.0, 0.0));
        assert_eq!(axis.ticks(7), [0.0, 2e9, 4e9, 6e9, 8e9, 10e9, 12e9]);
        let axis = Axis::over(&[0.0, 1e6, 3e12]);
        assert!(axis.log && axis.part(0.0) == 0.0 && axis.part(1e30) == 1.0);
        assert_eq!(axis.ticks(4), [1e6, 1e8, 1e10, 1e12]);
        assert_eq!(Axis::over(&[]).ticks(2), [0.0, 1.0]);
        assert!(Axis::over(&[5.0]).part(5.0) > 0.9);
    }

    #[test]
    fn a_range_has_room_and_is_never_empty() {
        assert_eq!(range([f64::NAN].into_iter()), (0.0, 100.0));
        let (low, high) = range([30.0].into_iter());
        assert!(low < 29.0 && high > 31.0);
        assert_eq!(steps(28.0, 32.0, 4), [28.0, 29.0, 30.0, 31.0, 32.0]);
        assert!(steps(1.0, 1.0, 4).is_empty());
    }
}
