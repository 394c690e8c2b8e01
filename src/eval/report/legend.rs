//! The words around the frames: legend above, notes below.

use super::frame::{dashes, line};
use super::picture::{CHANCE, LEFT, PUBLISHED, RIGHT};
use super::scene::{COLOURS, Line, Scene};
use super::{Report, Series, Source, tokens};
use crate::eval::published::Published;
use crate::picture::{self, DrawResult, INK, Root, px, text};
use anyhow::Result;
use plotters::prelude::*;
use plotters::style::FontStyle;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::collections::BTreeSet;

impl Scene<'_> {
    /// Below everything: what the picture does not say.
    pub fn notes(&self, report: &Report) -> String {
        let mut notes = vec!["Bars: one standard error.".to_owned()];
        if self.published().next().is_some() {
            notes.push("Published: EVAL.md of TinyLlama, zero-shot.".into());
        }
        let part = report.series.iter().filter(|s| s.source != Source::Evaluation(None));
        let part: Vec<String> = part.map(|series| series.label()).collect();
        if !part.is_empty() {
            notes.push(format!(
                "Of parts of the sets, so not comparable with whole ones: {}.",
                part.join("; ")
            ));
        }
        let at_zero = self.lines.iter().any(|l| l.points.first().is_some_and(|p| p.0 == 0.0));
        if at_zero && (self.axis.log || self.own_axis().log) {
            notes.push("0 tokens are at the left edge.".into());
        }
        let runs: BTreeSet<String> = report.series.iter().map(Series::coloured).collect();
        if runs.len() > COLOURS.len() {
            notes.push(format!("Colours repeat after {} runs.", COLOURS.len()));
        }
        match self.left_out {
            (0, 0) => {}
            (0, models) => {
                notes.push(format!("{models} more models of unknown tokens: in the table."))
            }
            (tasks, 0) => notes.push(format!("{tasks} more tasks: in the table.")),
            (tasks, models) => notes.push(format!(
                "{tasks} more tasks, {models} more models of unknown tokens: in the table."
            )),
        }
        notes.join(" ")
    }

    /// Marks and names, in lines that fit the width.
    pub fn legend(&self) -> Result<Vec<Vec<Entry<'_>>>> {
        let mut all = Vec::new();
        for run in &self.lines {
            let last = run.points.iter().rev().map(|p| p.1).chain(run.level);
            let last = last.filter_map(|row| self.basis.of(row)).next();
            let score = last.map_or_else(String::new, |(mean, _)| format!(": {mean:.2}"));
            all.push((Mark::Run(run), shortened(&run.label, 64) + &score));
        }
        let rows: Vec<(&Published, f64)> = self.published().collect();
        if let Some((row, score)) = rows.iter().rev().find(|(row, _)| row.tokens.is_some()) {
            let at = tokens(row.tokens);
            all.push((Mark::Published, format!("{}, published: {score:.2} at {at}", row.name)));
        }
        for (row, score) in rows.iter().filter(|(row, _)| row.tokens.is_none()) {
            all.push((Mark::Level(PUBLISHED), format!("{}, published: {score:.2}", row.name)));
        }
        match self.basis.chance() {
            Some(chance) => all.push((Mark::Level(CHANCE), format!("chance: {chance:.2}"))),
            None if self.panels.iter().any(|panel| self.chance(panel).is_some()) => {
                all.push((Mark::Level(CHANCE), "chance".into()));
            }
            None => {}
        }
        let mut lines: Vec<Vec<Entry>> = Vec::new();
        let mut x = RIGHT;
        for (mark, name) in all {
            let width = 54 + picture::width(&name, FontStyle::Normal, 20)?;
            if x + width > RIGHT || lines.is_empty() {
                lines.push(Vec::new());
                x = LEFT;
            }
            if let Some(line) = lines.last_mut() {
                line.push(Entry { x, mark, name });
            }
            x += width + 40;
        }
        Ok(lines)
    }
}

/// A name in the legend.
pub struct Entry<'a> {
    x: i32,
    mark: Mark<'a>,
    name: String,
}

pub enum Mark<'a> {
    Run(&'a Line<'a>),
    Published,
    Level(RGBColor),
}

pub fn draw_legend(root: &Root, lines: &[Vec<Entry>]) -> DrawResult {
    for (i, entries) in lines.iter().enumerate() {
        let y = px(96 + 34 * i as i32);
        for entry in entries {
            let (left, right) = (px(entry.x), px(entry.x + 42));
            match &entry.mark {
                Mark::Run(run) if run.level.is_some() => {
                    dashes(root, left, right, y, run.colour, 2)?;
                }
                Mark::Run(run) => {
                    let (colour, thickness) = run.stroke();
                    line(root, [(left, y), (right, y)], colour, thickness)?;
                    run.draw_point(root, ((left + right) / 2, y), 5)?;
                }
                Mark::Published => {
                    line(root, [(left, y), (right, y)], PUBLISHED, 2)?;
                    root.draw(&Circle::new(((left + right) / 2, y), px(5), PUBLISHED.filled()))?;
                }
                Mark::Level(colour) => dashes(root, left, right, y, *colour, 2)?,
            }
            let style = text(20, &INK).pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(entry.name.clone(), (px(entry.x + 54), y + px(2)), style))?;
        }
    }
    Ok(())
}

/// A text of at most so many characters, its middle left out.
fn shortened(name: &str, most: usize) -> String {
    let chars: Vec<char> = name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if chars.len() <= most {
        return chars.into_iter().collect();
    }
    let half = most.saturating_sub(3) / 2;
    let (head, tail) = (&chars[..half], &chars[chars.len() - half..]);
    head.iter().chain(&['.', '.', '.']).chain(tail).collect()
}

/// A bold text as wide as there is room.
pub fn fitted(name: &str, size: i32, room: i32) -> Result<String> {
    let width = |text: &str| picture::width(text, FontStyle::Bold, size);
    let whole = shortened(name, usize::MAX);
    let wide = width(&whole)?;
    if wide <= room {
        return Ok(whole);
    }
    let mut most = whole.chars().count() * room.max(0) as usize / wide as usize;
    while most > 8 && width(&shortened(name, most))? > room {
        most -= 1;
    }
    Ok(shortened(name, most.max(8)))
}

/// Lines as wide as the frames.
pub fn wrapped(all: &str, size: i32) -> Result<Vec<String>> {
    let (mut lines, mut line) = (Vec::new(), String::new());
    for word in all.split(' ').map(|word| shortened(word, 100)) {
        let longer = if line.is_empty() { word.clone() } else { format!("{line} {word}") };
        if picture::width(&longer, FontStyle::Normal, size)? <= RIGHT - LEFT {
            line = longer;
        } else {
            lines.push(std::mem::replace(&mut line, word));
        }
    }
    lines.push(line);
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_lose_their_middle() {
        assert_eq!(shortened("abcdefghij", 9), "abc...hij");
        assert_eq!(shortened("abc\ndef", 9), "abc def");
        assert!(fitted(&"w".repeat(300), 19, 200).unwrap().contains("..."));
        assert_eq!(fitted("piqa", 19, 200).unwrap(), "piqa");
        let lines = wrapped(&"word ".repeat(200), 18).unwrap();
        assert!(lines.len() > 3 && lines.len() < 20);
    }
}
