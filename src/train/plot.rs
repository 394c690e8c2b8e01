//! `loss.png`: the loss curve of a run, drawn from `metrics.jsonl` on the canvas of `picture.rs`.

use super::progress::count;
use crate::picture::{self, BLUE, DrawResult, FAINT, GRID, INK, ORANGE, Root};
use crate::picture::{bold, px, segments, text, trim_zeros};
use anyhow::{Context, Result};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// Size of the picture in pixels.
const SIZE: (usize, usize) = (1600, 1000);

const RAW: RGBColor = RGBColor(168, 203, 233);
const SMOOTH: RGBColor = BLUE;
const VALIDATION: RGBColor = ORANGE;

/// Draws training loss (each logged step, and smoothed) and validation loss over tokens as a PNG.
///
/// Lines that do not parse (a torn last one) are skipped. A run without points gives an empty
/// frame. Spikes and the first steps of a long run may leave the frame at the top: the scale is
/// chosen for the bulk of the run, and a note says how high the curve went. Steps whose loss is not
/// finite leave a gap, which a note counts. Takes 0.03 s, and 0.15 s at 100,000 lines.
///
/// # Errors
/// Where the metrics cannot be read or the picture cannot be written. The picture appears whole or
/// not at all: it is written beside its place and renamed.
pub fn loss_curve(metrics_jsonl: &Path, out_png: &Path) -> Result<()> {
    let curve = Curve::read(metrics_jsonl)
        .with_context(|| format!("cannot read {}", metrics_jsonl.display()))?;
    let title = metrics_jsonl
        .parent()
        .and_then(Path::file_name)
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();

    picture::write(SIZE, out_png, |root| draw(root, &curve, &title))
}

/// What is drawn: (tokens, loss) in the order of the file.
#[derive(Default)]
struct Curve {
    /// Logged steps; NaN where the loss was not finite.
    train: Vec<(f64, f64)>,
    val: Vec<(f64, f64)>,
    last_step: u64,
}

/// The fields of either kind of line that a curve needs.
#[derive(Deserialize)]
struct Line {
    step: u64,
    tokens: f64,
    loss: Option<f64>,
    val_loss: Option<f64>,
    /// Present in steps only.
    lr: Option<f64>,
}

impl Curve {
    fn read(path: &Path) -> std::io::Result<Curve> {
        let mut curve = Curve::default();
        for line in BufReader::new(File::open(path)?).split(b'\n') {
            let Ok(line) = serde_json::from_slice::<Line>(&line?) else { continue };
            curve.last_step = curve.last_step.max(line.step);
            match (line.loss, line.val_loss) {
                (_, Some(loss)) => curve.val.push((line.tokens, loss)),
                (Some(loss), None) => curve.train.push((line.tokens, loss)),
                (None, None) if line.lr.is_some() => curve.train.push((line.tokens, f64::NAN)),
                (None, None) => {}
            }
        }
        Ok(curve)
    }

    fn last_tokens(&self) -> f64 {
        self.train.iter().chain(&self.val).map(|p| p.0).fold(0.0, f64::max)
    }

    /// The finite losses of both series, ascending.
    fn sorted_losses(&self) -> Vec<f64> {
        let both = self.train.iter().chain(&self.val);
        let mut losses: Vec<f64> = both.map(|p| p.1).filter(|l| l.is_finite()).collect();
        losses.sort_by(f64::total_cmp);
        losses
    }

    /// Bottom and top of the frame: everything, unless the highest points lie far above the 98th
    /// percentile, so that one spike or the first steps of a long run do not flatten the rest.
    fn loss_range(&self) -> (f64, f64) {
        let losses = self.sorted_losses();
        let (Some(&low), Some(&high)) = (losses.first(), losses.last()) else { return (0.0, 1.0) };
        let bulk = losses[(losses.len() - 1) * 98 / 100];
        let spread = if losses.len() < 20 { high - low } else { bulk - low };
        let reach = if losses.len() < 1000 { 4.0 } else { 1.5 };
        let high = if spread > 0.0 { high.min(low + reach * spread) } else { high };
        let margin = if high > low { 0.04 * (high - low) } else { 0.05 * high.abs().max(1.0) };
        (low - margin, high + margin)
    }
}

/// Centred mean of the finite losses over about 0.7 * sqrt(n) neighbours. The window narrows
/// towards the first point, so the curve starts where the run starts, and is one-sided at the last,
/// so the last value is a mean, not one noisy step.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|p| p.1.is_finite()).collect();
    let half = half_window(finite.len());
    let mut sums = vec![0.0]; // sums[i]: of the first i losses
    for (_, loss) in &finite {
        sums.push(sums[sums.len() - 1] + loss);
    }
    let mean = |i: usize| {
        let from = i - half.min(i);
        let to = (i + half.min(i) + 1).min(finite.len());
        (sums[to] - sums[from]) / (to - from) as f64
    };
    finite.iter().enumerate().map(|(i, p)| (p.0, mean(i))).collect()
}

/// Neighbours on each side that a mean takes in; none below 9 points.
fn half_window(points: usize) -> usize {
    ((points as f64).sqrt() / 3.0) as usize
}

/// At most `2 * columns` points that draw like all of them: the lowest and the highest of each
/// group.
fn thinned(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    if points.len() <= 2 * columns {
        return points.to_vec();
    }
    let mut kept = Vec::with_capacity(2 * columns + 2);
    for group in points.chunks(points.len().div_ceil(columns)) {
        let by_loss = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        if let (Some(&low), Some(&high)) =
            (group.iter().min_by(by_loss), group.iter().max_by(by_loss))
        {
            kept.extend(if low.0 <= high.0 { [low, high] } else { [high, low] });
        }
    }
    kept
}

/// The pieces of a curve that lie below `top`, cut where it crosses: a spike leaves the frame
/// instead of running along its edge. Points that are not finite cut too.
fn pieces_below(points: &[(f64, f64)], top: f64) -> Vec<Vec<(f64, f64)>> {
    let (mut pieces, mut piece) = (Vec::new(), Vec::new());
    let mut before = (f64::NAN, f64::NAN);
    for &(x, y) in points {
        let (x0, y0) = before;
        if y0.is_finite() && y.is_finite() && (y0 > top) != (y > top) {
            piece.push((x0 + (x - x0) * (top - y0) / (y - y0), top)); // the crossing
        }
        if y <= top {
            piece.push((x, y));
        } else {
            pieces.push(std::mem::take(&mut piece));
        }
        before = (x, y);
    }
    pieces.push(piece);
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

type Chart<'a> = ChartContext<'a, BitMapBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn draw(root: &Root, curve: &Curve, title: &str) -> DrawResult {
    let (low, high) = curve.loss_range();
    let mut chart = ChartBuilder::on(root)
        .margin_top(px(118))
        .margin_right(px(44))
        .margin_bottom(px(20))
        .margin_left(px(22))
        .set_label_area_size(LabelAreaPosition::Bottom, px(76))
        .set_label_area_size(LabelAreaPosition::Left, px(90))
        .build_cartesian_2d(0.0..1.02 * curve.last_tokens().max(1.0), low..high)?;
    chart
        .configure_mesh()
        .x_labels(9)
        .y_labels(9)
        .y_label_offset(px(3)) // the backend sets letters a little high
        .max_light_lines(0)
        .bold_line_style(GRID.stroke_width(px(1)))
        .axis_style(FAINT.stroke_width(px(1)))
        .set_all_tick_mark_size(px(7))
        .label_style(text(21, &INK))
        .axis_desc_style(text(23, &INK))
        .x_label_formatter(&|v| tick(*v))
        .y_label_formatter(&|v| trim_zeros(&format!("{v:.3}")))
        .x_desc("tokens")
        .y_desc("loss (nats per token)")
        .draw()?;

    let smooth = smoothed(&curve.train);
    let val: Vec<_> = curve.val.iter().copied().filter(|p| p.1.is_finite()).collect();
    let few = half_window(smooth.len()) == 0; // nothing was smoothed
    draw_training(&mut chart, curve, &smooth, few, high)?;
    draw_validation(&mut chart, &val, high)?;
    draw_header(root, curve, title)?;
    draw_legend(root, few, smooth.last(), val.last())?;
    draw_notes(root, curve, high)
}

/// Each logged step thin and pale, the smoothed curve over it; a few steps as dots.
fn draw_training(
    chart: &mut Chart,
    curve: &Curve,
    smooth: &[(f64, f64)],
    few: bool,
    top: f64,
) -> DrawResult {
    if !few {
        for piece in pieces_below(&curve.train, top) {
            chart.draw_series(segments(&thinned(&piece, SIZE.0), RAW, 1))?;
        }
    }
    let stride = smooth.len().div_ceil(SIZE.0).max(1);
    let strided: Vec<_> = smooth.iter().step_by(stride).chain(smooth.last()).copied().collect();
    for piece in pieces_below(&strided, top) {
        chart.draw_series(segments(&piece, SMOOTH, 3))?;
    }
    for point in smooth.iter().filter(|_| few) {
        chart.draw_series([Circle::new(*point, px(5), SMOOTH.filled())])?;
    }
    Ok(())
}

/// A line with a dot at each validation; of many the line says it all.
fn draw_validation(chart: &mut Chart, val: &[(f64, f64)], top: f64) -> DrawResult {
    for piece in pieces_below(val, top) {
        chart.draw_series(segments(&piece, VALIDATION, 2))?;
    }
    for point in val.iter().filter(|p| val.len() <= 60 && p.1 <= top) {
        chart.draw_series([Circle::new(*point, px(7), WHITE.filled())])?;
        chart.draw_series([Circle::new(*point, px(5), VALIDATION.filled())])?;
    }
    Ok(())
}

/// The run's name at the left, its length at the right.
fn draw_header(root: &Root, curve: &Curve, title: &str) -> DrawResult {
    root.draw(&Text::new(title.to_owned(), (px(112), px(28)), bold(30, &INK)))?;
    let length = match curve.last_step {
        0 => "no steps logged yet".into(),
        1 => format!("1 step, {} tokens", count(curve.last_tokens())),
        n => format!("{} steps, {} tokens", grouped(n), count(curve.last_tokens())),
    };
    let style = text(22, &FAINT).pos(Pos::new(HPos::Right, VPos::Top));
    root.draw(&Text::new(length, (right_edge(), px(34)), style))?;
    Ok(())
}

/// Names, colours and last values, in one row above the frame, where no curve gets in the way.
fn draw_legend(
    root: &Root,
    few: bool,
    train: Option<&(f64, f64)>,
    val: Option<&(f64, f64)>,
) -> DrawResult {
    let mut entries: Vec<(RGBColor, i32, String)> = Vec::new();
    match train {
        Some((_, loss)) if few => entries.push((SMOOTH, px(4), format!("training: {loss:.3}"))),
        Some((_, loss)) => {
            entries.push((RAW, px(2), "training, each logged step".into()));
            entries.push((SMOOTH, px(4), format!("training, smoothed: {loss:.3}")));
        }
        None => {}
    }
    if let Some((_, loss)) = val {
        entries.push((VALIDATION, px(3), format!("validation: {loss:.3}")));
    }
    let (mut x, y) = (px(112), px(90));
    for (colour, thickness, name) in entries {
        let line = [(x, y - thickness / 2), (x + px(44), y + thickness / 2)];
        root.draw(&Rectangle::new(line, colour.filled()))?;
        if colour == VALIDATION {
            root.draw(&Circle::new((x + px(22), y), px(6), colour.filled()))?;
        }
        let style = text(22, &INK).pos(Pos::new(HPos::Left, VPos::Center));
        let width = root.estimate_text_size(&name, &style)?.0 as i32;
        root.draw(&Text::new(name, (x + px(56), y + px(2)), style))?;
        x += px(56) + width + px(48);
    }
    Ok(())
}

/// What the frame cannot show: how high a spike went, steps without a finite loss. At the bottom
/// right.
fn draw_notes(root: &Root, curve: &Curve, top_of_frame: f64) -> DrawResult {
    let mut notes = Vec::new();
    let by_loss = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let finite = curve.train.iter().filter(|p| p.1.is_finite());
    if let Some((tokens, loss)) = finite.max_by(by_loss).filter(|p| p.1 > top_of_frame) {
        notes.push(format!("above the frame: up to {} at {}", count(*loss), count(*tokens)));
    }
    match curve.train.iter().filter(|p| !p.1.is_finite()).count() {
        0 => {}
        1 => notes.push("1 logged step without a finite loss".into()),
        n => notes.push(format!("{} logged steps without a finite loss", grouped(n as u64))),
    }
    let style = text(19, &FAINT).pos(Pos::new(HPos::Right, VPos::Bottom));
    root.draw(&Text::new(notes.join("; "), (right_edge(), px(SIZE.1 as i32 - 22)), style))?;
    Ok(())
}

/// Where right-aligned text ends: the right edge of the frame.
fn right_edge() -> i32 {
    px(SIZE.0 as i32 - 44)
}

/// `715256` -> `715,256`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

/// A tick on the token axis: `0`, `2.5M`, `10M`, `1B`.
fn tick(tokens: f64) -> String {
    trim_zeros(&count(tokens))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smoothed_curve_starts_at_the_first_point_and_ends_at_a_mean() {
        let points: Vec<_> =
            (0..100).map(|i| (i as f64, if i == 99 { 14.0 } else { 10.0 })).collect();
        let smooth = smoothed(&points);
        assert_eq!(smooth.len(), 100);
        assert_eq!((smooth[0].1, smooth[50].1), (10.0, 10.0));
        assert_eq!(smooth[99].1, 11.0); // the last and three before it
        assert_eq!(smoothed(&[(1.0, 5.0)]), [(1.0, 5.0)]);
        assert_eq!(smoothed(&[(1.0, f64::NAN), (2.0, 3.0)]), [(2.0, 3.0)]);
    }

    #[test]
    fn thinning_keeps_every_groups_extremes() {
        let mut points: Vec<_> = (0..10_000).map(|i| (i as f64, 3.0)).collect();
        points[5000].1 = 90.0;
        points[5001].1 = 0.5;
        let thin = thinned(&points, 100);
        assert_eq!(thin.len(), 200);
        assert!(thin.contains(&(5000.0, 90.0)) && thin.contains(&(5001.0, 0.5)));
        assert!(thin.windows(2).all(|w| w[0].0 <= w[1].0));
    }

    #[test]
    fn one_spike_does_not_flatten_the_rest() {
        let train: Vec<_> = (0..1000).map(|i| (i as f64, 3.0 + 0.001 * (i % 100) as f64)).collect();
        let mut curve = Curve { train, ..Default::default() };
        let calm = curve.loss_range();
        curve.train[500].1 = 1e6;
        assert!(curve.loss_range().1 < calm.1 + 0.1);
        assert_eq!(Curve::default().loss_range(), (0.0, 1.0));
    }

    #[test]
    fn a_spike_leaves_the_frame_where_the_line_crosses_its_edge() {
        let points = [(0.0, 2.0), (1.0, 4.0), (2.0, 8.0), (3.0, 0.0), (4.0, f64::NAN), (5.0, 1.0)];
        let want =
            vec![vec![(0.0, 2.0), (0.5, 3.0)], vec![(2.625, 3.0), (3.0, 0.0)], vec![(5.0, 1.0)]];
        assert_eq!(pieces_below(&points, 3.0), want);
    }

    #[test]
    fn ticks_are_short() {
        let ticks = [0.0, 250_000.0, 2.5e6, 1e7, 1e9, 1.5e12].map(tick);
        assert_eq!(ticks, ["0", "250k", "2.5M", "10M", "1B", "1.5T"]);
        assert_eq!([7, 1000, 715_256].map(grouped), ["7", "1,000", "715,256"]);
    }
}
