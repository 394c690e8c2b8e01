//! What the picture shows: lines over tokens, frames, axes.

use super::frame::{Axis, range};
use super::{Basis, Column, Report, Row, Source};
use crate::eval::published::{self, Published};
use crate::picture::{BLUE, ORANGE};
use plotters::style::RGBColor;

/// Frames of tasks in a row, and rows: more tasks are in the table only.
pub const GRID: (usize, usize) = (4, 5);
/// Level lines of models whose tokens are not known.
const LEVELS: usize = 4;

pub const COLOURS: [RGBColor; 8] = [
    BLUE,
    ORANGE,
    RGBColor(28, 132, 76),
    RGBColor(128, 62, 158),
    RGBColor(0, 136, 150),
    RGBColor(192, 36, 88),
    RGBColor(140, 92, 40),
    RGBColor(110, 122, 20),
];

/// What a frame shows.
pub enum Panel {
    Average,
    Task(Column),
}

/// A run's scores, or the level of a model whose tokens are not known.
pub struct Line<'a> {
    pub label: String,
    pub colour: RGBColor,
    pub in_training: bool,
    /// By tokens.
    pub points: Vec<(f64, &'a Row)>,
    pub level: Option<&'a Row>,
}

/// What is drawn.
pub struct Scene<'a> {
    pub basis: Basis,
    pub lines: Vec<Line<'a>>,
    /// Below the upper frame.
    pub panels: Vec<Panel>,
    /// Tasks without a frame, models without a level line.
    pub left_out: (usize, usize),
    /// Of the runs; with the published rows where they are near.
    pub axis: Axis,
    /// Of a frame of their own where they are not.
    pub apart: Option<Axis>,
}

impl<'a> Scene<'a> {
    pub fn of(report: &'a Report) -> Self {
        let basis = report.basis();
        let (lines, levels_left) = lines(report);
        let own: Vec<f64> = lines.iter().flat_map(|l| l.points.iter().map(|p| p.0)).collect();
        let rows = published::ROWS.iter().filter(|row| basis.published(row).is_some());
        let (axis, apart) = axes(&own, &rows.filter_map(|row| row.tokens).collect::<Vec<_>>());
        let mut scene =
            Self { basis, lines, panels: vec![], left_out: (0, levels_left), axis, apart };
        let columns = report.columns();
        let mut tasks: Vec<Column> = columns.into_iter().filter(|c| !c.perplexity).collect();
        tasks.retain(|task| scene.basis.columns != [task.clone()]);
        if scene.is_flat() {
            scene.panels.push(Panel::Average);
        }
        scene.panels.extend(tasks.into_iter().map(Panel::Task));
        scene.left_out.0 = scene.panels.len().saturating_sub(GRID.0 * GRID.1);
        scene.panels.truncate(GRID.0 * GRID.1);
        scene
    }

    /// A row's score and its error.
    pub fn value(&self, panel: &Panel, row: &Row) -> Option<(f64, Option<f64>)> {
        match panel {
            Panel::Average => self.basis.of(row),
            Panel::Task(task) => row.scores.get(task).map(|score| (score.mean, score.stderr)),
        }
    }

    pub fn chance(&self, panel: &Panel) -> Option<f64> {
        match panel {
            Panel::Average => self.basis.chance(),
            Panel::Task(task) => task.chance(),
        }
    }

    /// All that the runs have to show in a frame, ends of error bars included.
    pub fn own(&self, panel: &Panel) -> Vec<f64> {
        let rows = self.lines.iter().flat_map(|l| l.points.iter().map(|p| p.1).chain(l.level));
        let values = rows.filter_map(|row| self.value(panel, row));
        values
            .flat_map(|(mean, error)| [mean - error.unwrap_or(0.0), mean + error.unwrap_or(0.0)])
            .collect()
    }

    /// The published rows that the upper frame shows.
    pub fn published(&self) -> impl Iterator<Item = (&'static Published, f64)> {
        published::ROWS.iter().filter_map(|row| Some((row, self.basis.published(row)?)))
    }

    /// The range of the upper frame.
    pub fn main_range(&self) -> (f64, f64) {
        let own = self.own(&Panel::Average).into_iter().chain(self.basis.chance());
        range(own.chain(self.published().map(|(_, score)| score)))
    }

    /// Whether the published rows press the runs' own scores flat.
    pub fn is_flat(&self) -> bool {
        let own = range(self.own(&Panel::Average).into_iter());
        let main = self.main_range();
        let has = self.lines.iter().any(|line| line.points.len() > 1);
        has && self.published().next().is_some() && own.1 - own.0 < 0.3 * (main.1 - main.0)
    }

    /// The axis without the published rows, where a run has points.
    pub fn own_axis(&self) -> Axis {
        let counts = self.lines.iter().flat_map(|line| line.points.iter().map(|point| point.0));
        let counts: Vec<f64> = counts.collect();
        if counts.is_empty() { self.axis } else { Axis::over(&counts) }
    }
}

/// A line a series, in the colour of its run, then a level line for each model whose tokens are not
/// known; how many of these are too many.
fn lines(report: &Report) -> (Vec<Line<'_>>, usize) {
    let (mut names, mut lines): (Vec<String>, Vec<Line>) = (Vec::new(), Vec::new());
    let mut colour = |name: String| {
        let i = names.iter().position(|other| *other == name).unwrap_or_else(|| {
            names.push(name);
            names.len() - 1
        });
        COLOURS[i % COLOURS.len()]
    };
    for series in &report.series {
        let points = series.rows.iter().filter_map(|row| Some((row.tokens? as f64, row)));
        let points: Vec<(f64, &Row)> = points.collect();
        if !points.is_empty() {
            let in_training = matches!(series.source, Source::InTraining(_));
            let (label, colour) = (series.label(), colour(series.coloured()));
            lines.push(Line { label, colour, in_training, points, level: None });
        }
    }
    let unknown = || report.rows().filter(|(_, row)| row.tokens.is_none());
    for (series, row) in unknown().take(LEVELS) {
        let label = series.row_label(row);
        let colour = colour(format!("{label} {}", row.checkpoint));
        lines.push(Line { label, colour, in_training: false, points: vec![], level: Some(row) });
    }
    (lines, unknown().count().saturating_sub(LEVELS))
}

/// One axis for all; two where the published rows are so far from the runs that these could not be read.
fn axes(own: &[f64], published: &[f64]) -> (Axis, Option<Axis>) {
    if own.is_empty() || published.is_empty() {
        return (Axis::over(&[own, published].concat()), None);
    }
    let max = |counts: &[f64]| counts.iter().copied().fold(0.0, f64::max);
    let min = |counts: &[f64]| counts.iter().copied().fold(f64::INFINITY, f64::min);
    let mut both = Axis::over(&[own, published].concat());
    if !both.log && 3.0 * max(own) < max(published) {
        both = Axis::log_over(&[own, published].concat());
    }
    let far = 5.0 * max(own) < min(published);
    let narrow = own.len() > 3 && both.part(max(own)) - both.part(min(own)) < 0.25;
    if far || narrow { (Axis::over(own), Some(Axis::over(published))) } else { (both, None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_rows_that_are_far_away_have_a_frame_of_their_own() {
        let there = [105e9, 3e12];
        let (axis, apart) = axes(&[1e6, 2e6], &there);
        assert!(!axis.log && apart.is_some());
        let (axis, apart) = axes(&[50e9, 1e12], &there);
        assert!(!axis.log && apart.is_none());
        let (axis, apart) = axes(&[40e9], &there);
        assert!(axis.log && apart.is_none() && axis.high > 3e12);
        assert!(axes(&[], &there).1.is_none() && axes(&there, &[]).1.is_none());
        assert!(axes(&[25e9, 30e9, 40e9, 50e9], &there).1.is_some());
    }
}
