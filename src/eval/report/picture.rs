//! The report as a picture: the average over tokens with the published scores, below it each task.
//!
//! What is drawn is found in `scene.rs`, and the words around it in `legend.rs`.

use super::frame::{Frame, line, range};
use super::legend::{draw_legend, fitted, wrapped};
use super::scene::{GRID, Line, Panel, Scene};
use super::{Report, tokens};
use crate::eval::published;
use crate::picture::{self, DrawResult, FAINT, INK, Root, bold, px, segments, text};
use anyhow::Result;
use plotters::prelude::*;
use plotters::style::FontStyle;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

const WIDTH: i32 = 1600;
pub(super) const LEFT: i32 = 96;
pub(super) const RIGHT: i32 = WIDTH - 44;
/// Height of the upper frame, and of those of tasks.
const HEIGHTS: (i32, i32) = (430, 150);
/// Between frames of a row, with the labels of the right one.
const GAP: i32 = 74;
/// From the bottom of a row of frames to the top of the next: ticks, titles.
const PITCH: i32 = 92;
/// Width of the published frame, where it is apart.
const APART: i32 = 330;
/// More points than this are drawn without error bars.
const MANY: usize = 40;

pub(super) const PUBLISHED: RGBColor = RGBColor(136, 136, 146);
pub(super) const CHANCE: RGBColor = RGBColor(178, 178, 186);

/// Draws a report as a PNG, whole or not at all.
///
/// # Errors
/// Where it cannot be written.
pub fn draw(report: &Report, out_png: &Path) -> Result<()> {
    let scene = Scene::of(report);
    let legend = scene.legend()?;
    let notes = wrapped(&scene.notes(report), 18)?;
    let top = 96 + 34 * legend.len() as i32 + 44;
    let rows = scene.panels.len().div_ceil(GRID.0) as i32;
    let below = top + HEIGHTS.0 + PITCH + 34 + rows * (HEIGHTS.1 + PITCH);
    let height = below + 26 * notes.len() as i32 + 12;
    picture::write((WIDTH as usize, height as usize), out_png, |root| {
        root.draw(&Text::new("Scores over tokens", (px(LEFT), px(28)), bold(30, &INK)))?;
        draw_legend(root, &legend)?;
        scene.draw_main(root, top)?;
        for (i, panel) in scene.panels.iter().enumerate() {
            let (row, column) = ((i / GRID.0) as i32, (i % GRID.0) as i32);
            let top = top + HEIGHTS.0 + PITCH + 34 + row * (HEIGHTS.1 + PITCH);
            scene.draw_panel(root, panel, column, top)?;
        }
        for (i, note) in notes.iter().enumerate() {
            let at = (px(LEFT), px(below - 14 + 26 * i as i32));
            root.draw(&Text::new(note.clone(), at, text(18, &FAINT)))?;
        }
        Ok(())
    })
}

impl Scene<'_> {
    /// The average over tokens, the published rows in it or beside it.
    fn draw_main(&self, root: &Root, top: i32) -> DrawResult {
        let right = if self.apart.is_some() { RIGHT - APART - 24 } else { RIGHT };
        let frame = Frame {
            left: px(LEFT),
            right: px(right),
            top: px(top),
            bottom: px(top + HEIGHTS.0),
            axis: self.axis,
            range: self.main_range(),
        };
        let title = format!("{}, %", self.basis.name());
        root.draw(&Text::new(
            fitted(&title, 23, right - LEFT)?,
            (px(LEFT), px(top - 36)),
            bold(23, &INK),
        ))?;
        frame.draw(root, 20, true)?;
        let tokens = text(21, &FAINT).pos(Pos::new(HPos::Center, VPos::Top));
        root.draw(&Text::new(
            "tokens",
            (px((LEFT + right) / 2), px(top + HEIGHTS.0 + 38)),
            tokens,
        ))?;
        self.draw_levels(root, &frame, &Panel::Average)?;
        match self.apart {
            None => self.draw_published(root, &frame)?,
            Some(axis) => {
                let other = Frame { left: px(RIGHT - APART), right: px(RIGHT), axis, ..frame };
                root.draw(&Text::new("published", (other.left, px(top - 36)), bold(23, &INK)))?;
                other.draw(root, 20, false)?;
                self.draw_levels(root, &other, &Panel::Average)?;
                self.draw_published(root, &other)?;
            }
        }
        self.draw_lines(root, &frame, &Panel::Average, 5)
    }

    /// A task, or the average of the runs alone.
    fn draw_panel(&self, root: &Root, panel: &Panel, column: i32, top: i32) -> DrawResult {
        let width = (RIGHT - LEFT - GAP * (GRID.0 as i32 - 1)) / GRID.0 as i32;
        let left = LEFT + column * (width + GAP);
        let last = published::ROWS.iter().rev().find(|row| row.tasks.is_some());
        let (title, best) = match panel {
            Panel::Average => (format!("{}, runs alone", self.basis.name()), None),
            Panel::Task(task) => (task.to_string(), last.and_then(|row| task.published(row))),
        };
        let own = self.own(panel);
        let frame = Frame {
            left: px(left),
            right: px(left + width),
            top: px(top),
            bottom: px(top + HEIGHTS.1),
            axis: self.own_axis(),
            // The average is shown again to be read closely; of a task it is good to see where chance is.
            range: range(own.into_iter().chain(match panel {
                Panel::Average => None,
                Panel::Task(task) => task.chance(),
            })),
        };
        let mut room = width;
        if let (Some(score), Some(row)) = (best, last) {
            let label = format!("{}: {score:.2}", tokens(row.tokens));
            room -= picture::width(&label, FontStyle::Normal, 17)? + 12;
            let style = text(17, &PUBLISHED).pos(Pos::new(HPos::Right, VPos::Top));
            root.draw(&Text::new(label, (frame.right, px(top - 28)), style))?;
        }
        root.draw(&Text::new(fitted(&title, 19, room)?, (px(left), px(top - 30)), bold(19, &INK)))?;
        frame.draw(root, 16, true)?;
        if let Some(score) = best {
            frame.level(root, score, PUBLISHED, 2)?;
        }
        self.draw_levels(root, &frame, panel)?;
        self.draw_lines(root, &frame, panel, 4)
    }

    /// Chance, and models whose tokens are not known.
    fn draw_levels(&self, root: &Root, frame: &Frame, panel: &Panel) -> DrawResult {
        if let Some(chance) = self.chance(panel) {
            frame.level(root, chance, CHANCE, 2)?;
        }
        for line in &self.lines {
            if let Some((score, _)) = line.level.and_then(|row| self.value(panel, row)) {
                frame.level(root, score, line.colour, 2)?;
            }
        }
        Ok(())
    }

    fn draw_published(&self, root: &Root, frame: &Frame) -> DrawResult {
        let mut points = Vec::new();
        for (row, score) in self.published() {
            match row.tokens {
                Some(n) => points.push((frame.x(n), frame.y(score))),
                None => frame.level(root, score, PUBLISHED, 2)?,
            }
        }
        for segment in segments(&points, PUBLISHED, 2) {
            root.draw(&segment)?;
        }
        for point in points {
            root.draw(&Circle::new(point, px(5), PUBLISHED.filled()))?;
        }
        Ok(())
    }

    /// Each run: error bars below, then the line, then the points.
    fn draw_lines(&self, root: &Root, frame: &Frame, panel: &Panel, size: i32) -> DrawResult {
        for run in &self.lines {
            let points =
                run.points.iter().filter_map(|(n, row)| Some((*n, self.value(panel, row)?)));
            let points: Vec<(f64, (f64, Option<f64>))> = points.collect();
            let at: Vec<(i32, i32)> =
                points.iter().map(|(n, (mean, _))| (frame.x(*n), frame.y(*mean))).collect();
            for ((_, (mean, error)), (x, _)) in points.iter().zip(&at) {
                let Some(error) = error.filter(|_| points.len() <= MANY) else { continue };
                let ends = [(*x, frame.y(mean - error)), (*x, frame.y(mean + error))];
                line(root, ends, pale(run.colour), 2)?;
                for (x, y) in ends {
                    line(root, [(x - px(4), y), (x + px(4), y)], pale(run.colour), 2)?;
                }
            }
            // On a logarithmic axis nothing leads from 0 tokens to the next point.
            let from = usize::from(frame.axis.log && points.first().is_some_and(|p| p.0 == 0.0));
            let (colour, thickness) = run.stroke();
            for segment in segments(&at[from..], colour, thickness) {
                root.draw(&segment)?;
            }
            // Where points would touch, the line says it all.
            let room = (frame.right - frame.left) / px(3 * size);
            for point in at.iter().filter(|_| points.len() <= room as usize) {
                run.draw_point(root, *point, size)?;
            }
        }
        Ok(())
    }
}

impl Line<'_> {
    /// Colour and thickness of the line.
    pub(super) fn stroke(&self) -> (RGBColor, u32) {
        if self.in_training { (pale(self.colour), 2) } else { (self.colour, 3) }
    }

    /// A disc; a ring for scores of training.
    pub(super) fn draw_point(&self, root: &Root, at: (i32, i32), size: i32) -> DrawResult {
        if self.in_training {
            root.draw(&Circle::new(at, px(size), self.colour.filled()))?;
            root.draw(&Circle::new(at, px(size - 2), WHITE.filled()))?;
            return Ok(());
        }
        root.draw(&Circle::new(at, px(size + 2), WHITE.filled()))?;
        root.draw(&Circle::new(at, px(size), self.colour.filled()))?;
        Ok(())
    }
}

/// Half way to white.
fn pale(colour: RGBColor) -> RGBColor {
    let half = |c: u8| 128 + c / 2;
    RGBColor(half(colour.0), half(colour.1), half(colour.2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::report::{Column, Form, Row, Score, Series, Source};

    #[test]
    fn every_kind_of_report_has_a_picture() {
        let row = |step: Option<u64>, tasks: &[&str]| {
            let of = |(i, task): (usize, &&str)| {
                let score = |mean| Score {
                    metric: "acc".into(),
                    mean,
                    stderr: (i != 1).then_some(1.5),
                    samples: None,
                    file: None,
                };
                (Column::new(task, 0, task.contains("text")), score(30.0 + i as f64))
            };
            let scores = tasks.iter().enumerate().map(of).collect();
            Row { checkpoint: "m".into(), step, tokens: step.map(|n| n * 4096), scores }
        };
        let (dir, seven) = (tempfile::tempdir().unwrap(), published::TASKS);
        let many: Vec<String> = (0..30).map(|i| format!("task_{i}_{}", "x".repeat(60))).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for (i, rows) in [
            vec![row(Some(1), &seven)],
            vec![row(Some(0), &seven)],
            vec![row(None, &seven), row(None, &["piqa"])],
            (0..200).map(|n| row(Some(n * n * 1000), &seven)).collect(),
            (1..5).map(|n| row(Some(n), &["piqa"])).collect(),
            (1..5).map(|n| row(Some(n * 1_000_000_000), &many)).collect(),
            vec![row(Some(1), &["wikitext"])],
        ]
        .into_iter()
        .enumerate()
        {
            let series = [Source::Evaluation(None), Source::InTraining(Some(9))].map(|source| {
                let (run, form) = ("mine".to_owned(), Form::default());
                Series { run, source, form, rows: rows.clone() }
            });
            let report = Report { series: series.to_vec(), ..Default::default() };
            let png = dir.path().join("report.png");
            draw(&report, &png).unwrap();
            let bytes = std::fs::read(&png).unwrap();
            assert_eq!(
                (&bytes[1..4], &bytes[16..20]),
                (&b"PNG"[..], &1600u32.to_be_bytes()[..]),
                "{i}"
            );
        }
    }
}
