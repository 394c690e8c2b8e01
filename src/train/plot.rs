//! `loss.png`: the loss curve of a run, drawn from `metrics.jsonl`.
//!
//! Everything is drawn at twice the size and averaged down (`SCALE`), which smooths lines, circles and
//! letters alike: plotters' bitmap backend smooths only the thinnest lines.

use super::progress::count;
use anyhow::{Context, Result, anyhow};
use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use serde::Deserialize;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

/// Size of the picture in pixels.
const SIZE: (usize, usize) = (1600, 1000);
/// Drawn pixels per pixel of the picture, in each direction.
const SCALE: usize = 2;

const FONT: &str = "sans-serif";
const RAW: RGBColor = RGBColor(168, 203, 233);
const SMOOTH: RGBColor = RGBColor(23, 92, 163);
const VALIDATION: RGBColor = RGBColor(214, 84, 22);
const INK: RGBColor = RGBColor(40, 40, 46);
const FAINT: RGBColor = RGBColor(112, 112, 122);
const GRID: RGBColor = RGBColor(228, 228, 233);

/// Draws training loss (each logged step, and smoothed) and validation loss over tokens as a PNG.
///
/// Lines that do not parse (a torn last one) are skipped. A run without points gives an empty frame.
/// Spikes and the first steps of a long run may leave the frame at the top: the scale is chosen for
/// the bulk of the run, and a note says how high the curve went. Steps whose loss is not finite leave
/// a gap, which a note counts. About 0.2 s, most of it for the pixels.
///
/// # Errors
/// Where the metrics cannot be read or the picture cannot be written. The picture appears whole or not
/// at all: it is written beside its place and renamed.
pub fn loss_curve(metrics_jsonl: &Path, out_png: &Path) -> Result<()> {
    let curve = Curve::read(metrics_jsonl)
        .with_context(|| format!("cannot read {}", metrics_jsonl.display()))?;
    let title = metrics_jsonl
        .parent()
        .and_then(Path::file_name)
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();

    register_font(FONT, FontStyle::Normal, dejavu::sans::regular())
        .and_then(|()| register_font(FONT, FontStyle::Bold, dejavu::sans::bold()))
        .map_err(|_| anyhow!("cannot load the built-in font"))?;
    let mut pixels = vec![0; SIZE.0 * SIZE.1 * SCALE * SCALE * 3];
    draw(&curve, &title, &mut pixels).map_err(|e| anyhow!("cannot draw the loss curve: {e}"))?;
    write_png(&averaged(&pixels), out_png)
        .with_context(|| format!("cannot write {}", out_png.display()))
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

    /// Bottom and top of the frame: everything, but at most half a range above the 98th percentile, so
    /// that one spike does not flatten the rest.
    fn loss_range(&self) -> (f64, f64) {
        let losses = self.sorted_losses();
        let (Some(&low), Some(&high)) = (losses.first(), losses.last()) else { return (0.0, 1.0) };
        let bulk = losses[(losses.len() - 1) * 98 / 100];
        let spread = if losses.len() < 20 { high - low } else { bulk - low };
        let high = if spread > 0.0 { high.min(low + 1.5 * spread) } else { high };
        let margin = if high > low { 0.04 * (high - low) } else { 0.05 * high.abs().max(1.0) };
        (low - margin, high + margin)
    }
}

/// Centred mean of the finite losses over about 0.7 * sqrt(n) neighbours. The window narrows towards
/// the first point, so the curve starts where the run starts, and is one-sided at the last, so the last
/// value is a mean, not one noisy step.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|p| p.1.is_finite()).collect();
    let half = ((finite.len() as f64).sqrt() / 3.0) as usize;
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

/// At most `2 * columns` points that draw like all of them: the lowest and the highest of each group.
fn thinned(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    if points.len() <= 2 * columns {
        return points.to_vec();
    }
    let mut kept = Vec::with_capacity(2 * columns + 2);
    for group in points.chunks(points.len().div_ceil(columns)) {
        let by_loss = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        if let (Some(&low), Some(&high)) = (group.iter().min_by(by_loss), group.iter().max_by(by_loss)) {
            kept.extend(if low.0 <= high.0 { [low, high] } else { [high, low] });
        }
    }
    kept
}

type DrawResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Draws at `SCALE` times the size into RGB bytes.
fn draw(curve: &Curve, title: &str, pixels: &mut [u8]) -> DrawResult {
    let size = ((SIZE.0 * SCALE) as u32, (SIZE.1 * SCALE) as u32);
    let root = BitMapBackend::with_buffer(pixels, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (low, high) = curve.loss_range();
    let last = curve.last_tokens().max(1.0);

    draw_title(&root, curve, title)?;
    let mut chart = ChartBuilder::on(&root)
        .margin_top(px(76))
        .margin_right(px(44))
        .margin_bottom(px(18))
        .margin_left(px(22))
        .x_label_area_size(px(72))
        .y_label_area_size(px(88))
        .build_cartesian_2d(0.0..1.02 * last, low..high)?;
    chart
        .configure_mesh()
        .x_labels(9)
        .y_labels(9)
        .max_light_lines(0)
        .bold_line_style(GRID.stroke_width(px(1)))
        .axis_style(FAINT.stroke_width(px(1)))
        .label_style(text(21, &INK))
        .axis_desc_style(text(24, &INK))
        .x_label_formatter(&|v| tick(*v))
        .y_label_formatter(&|v| trim_zeros(&format!("{v:.3}")))
        .x_desc("tokens")
        .y_desc("loss (nats per token)")
        .draw()?;

    // Clamped, or spikes would be drawn over the title.
    let clamp = |points: Vec<(f64, f64)>| points.into_iter().map(move |(x, y)| (x, y.min(high)));
    let train = smoothed(&curve.train);
    for segment in curve.train.split(|p| !p.1.is_finite()) {
        let points = clamp(thinned(segment, SIZE.0));
        chart.draw_series(LineSeries::new(points, RAW.stroke_width(px(1))))?;
    }
    let points = clamp(thinned(&train, SIZE.0));
    chart.draw_series(LineSeries::new(points, SMOOTH.stroke_width(px(3))))?;
    if let [only] = train[..] {
        chart.draw_series([Circle::new(only, px(6), SMOOTH.filled())])?;
    }
    let val: Vec<_> = curve.val.iter().copied().filter(|p| p.1.is_finite()).collect();
    chart.draw_series(LineSeries::new(clamp(val.clone()), VALIDATION.stroke_width(px(2))))?;
    // Many validations: the line says it all.
    if val.len() <= 60 {
        for point in clamp(val.clone()) {
            chart.draw_series([Circle::new(point, px(7), WHITE.filled())])?;
            chart.draw_series([Circle::new(point, px(5), VALIDATION.filled())])?;
        }
    }
    draw_legend(&root, &train, &val)?;
    draw_notes(&root, curve, high)?;
    root.present()?;
    Ok(())
}

type Root<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;

/// The run's name, its length beside it.
fn draw_title(root: &Root, curve: &Curve, title: &str) -> DrawResult {
    let at = (px(112), px(30));
    let bold = (FONT, px(30), FontStyle::Bold).into_font().color(&INK);
    root.draw(&Text::new(title.to_owned(), at, bold))?;
    let length = match curve.last_step {
        0 => "no steps logged yet".into(),
        1 => format!("1 step, {} tokens", count(curve.last_tokens())),
        n => format!("{n} steps, {} tokens", count(curve.last_tokens())),
    };
    let style = text(22, &FAINT).pos(Pos::new(HPos::Right, VPos::Top));
    root.draw(&Text::new(length, (width() - px(46), px(36)), style))?;
    Ok(())
}

/// Names, colours and last values, at the top right, where a falling curve leaves room.
fn draw_legend(root: &Root, train: &[(f64, f64)], val: &[(f64, f64)]) -> DrawResult {
    let mut rows: Vec<(RGBColor, i32, &str, Option<f64>)> = Vec::new();
    if let Some((_, loss)) = train.last() {
        rows.push((RAW, px(2), "training, each logged step", None));
        rows.push((SMOOTH, px(4), "training, smoothed", Some(*loss)));
    }
    if let Some((_, loss)) = val.last() {
        rows.push((VALIDATION, px(4), "validation", Some(*loss)));
    }
    if rows.is_empty() {
        return Ok(());
    }
    let (row, left, right, top) = (px(36), width() - px(520), width() - px(64), px(96));
    let bottom = top + row * rows.len() as i32 + px(16);
    let frame = [(left, top), (right, bottom)];
    root.draw(&Rectangle::new(frame, WHITE.filled()))?;
    root.draw(&Rectangle::new(frame, GRID.stroke_width(px(1))))?;
    for (i, (colour, thickness, name, value)) in rows.into_iter().enumerate() {
        let y = top + px(8) + row * i as i32 + row / 2;
        let line = [(left + px(18), y - thickness / 2), (left + px(62), y + thickness / 2)];
        root.draw(&Rectangle::new(line, colour.filled()))?;
        if colour == VALIDATION {
            root.draw(&Circle::new((left + px(40), y), px(6), colour.filled()))?;
        }
        let style = text(22, &INK).pos(Pos::new(HPos::Left, VPos::Center));
        root.draw(&Text::new(name, (left + px(78), y), style))?;
        if let Some(value) = value {
            let style = text(22, &INK).pos(Pos::new(HPos::Right, VPos::Center));
            root.draw(&Text::new(format!("{value:.3}"), (right - px(18), y), style))?;
        }
    }
    Ok(())
}

/// What the frame cannot show: how high a spike went, steps without a finite loss.
fn draw_notes(root: &Root, curve: &Curve, top_of_frame: f64) -> DrawResult {
    let mut notes = Vec::new();
    let by_loss = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let finite = curve.train.iter().filter(|p| p.1.is_finite());
    if let Some((tokens, loss)) = finite.max_by(by_loss).filter(|p| p.1 > top_of_frame) {
        notes.push(format!("highest: {} at {} tokens, above the frame", trim_zeros(&format!("{loss:.2}")), count(*tokens)));
    }
    let lost = curve.train.iter().filter(|p| !p.1.is_finite()).count();
    if lost > 0 {
        notes.push(format!("not finite in {lost} logged steps"));
    }
    for (i, note) in notes.into_iter().enumerate() {
        let style = text(20, &FAINT).pos(Pos::new(HPos::Right, VPos::Top));
        let y = px(96 + 3 * 36 + 16 + 14 + 30 * i as i32);
        root.draw(&Text::new(note, (width() - px(64), y), style))?;
    }
    Ok(())
}

/// Pixels of the picture -> drawn pixels.
fn px<T: From<u8> + std::ops::Mul<Output = T>>(n: T) -> T {
    n * T::from(SCALE as u8)
}

/// Drawn width.
fn width() -> i32 {
    (SIZE.0 * SCALE) as i32
}

fn text(size: i32, colour: &'static RGBColor) -> TextStyle<'static> {
    TextStyle::from((FONT, px(size)).into_font()).color(colour)
}

/// A tick on the token axis: `0`, `2.5M`, `10M`, `1B`.
fn tick(tokens: f64) -> String {
    let text = count(tokens);
    let digits = text.trim_end_matches(char::is_alphabetic);
    let unit = &text[digits.len()..];
    format!("{}{unit}", trim_zeros(digits))
}

/// `2.50` -> `2.5`, `10.0` -> `10`.
fn trim_zeros(number: &str) -> String {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.').into() } else { number.into() }
}

/// Averages squares of `SCALE * SCALE` drawn pixels.
fn averaged(pixels: &[u8]) -> Vec<u8> {
    let (width, height) = SIZE;
    let stride = width * SCALE * 3;
    let mut out = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let mut sum = 0;
                for dy in 0..SCALE {
                    let start = (y * SCALE + dy) * stride + x * SCALE * 3 + channel;
                    sum += (0..SCALE).map(|dx| u32::from(pixels[start + 3 * dx])).sum::<u32>();
                }
                out.push((sum / (SCALE * SCALE) as u32) as u8);
            }
        }
    }
    out
}

/// Writes RGB bytes as a PNG, beside its place first.
fn write_png(rgb: &[u8], path: &Path) -> std::io::Result<()> {
    let mut header = Vec::new();
    header.extend((SIZE.0 as u32).to_be_bytes());
    header.extend((SIZE.1 as u32).to_be_bytes());
    header.extend([8, 2, 0, 0, 0]); // bits a channel, RGB, deflate, filters by row, not interlaced
    let mut rows = ZlibEncoder::new(Vec::new(), Compression::default());
    for row in rgb.chunks(SIZE.0 * 3) {
        rows.write_all(&[0])?; // unfiltered
        rows.write_all(row)?;
    }
    let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
    put_chunk(&mut out, b"IHDR", &header);
    put_chunk(&mut out, b"IDAT", &rows.finish()?);
    put_chunk(&mut out, b"IEND", &[]);
    let temporary = path.with_extension("png.tmp");
    fs::write(&temporary, out)?;
    fs::rename(temporary, path)
}

/// Length, name, data, CRC-32 of name and data.
fn put_chunk(out: &mut Vec<u8>, name: &[u8; 4], data: &[u8]) {
    let mut crc = Crc::new();
    crc.update(name);
    crc.update(data);
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(name);
    out.extend(data);
    out.extend(crc.sum().to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smoothed_curve_starts_at_the_first_point_and_ends_at_a_mean() {
        let points: Vec<_> = (0..100).map(|i| (i as f64, if i == 99 { 14.0 } else { 10.0 })).collect();
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
    fn ticks_are_short() {
        let ticks = [0.0, 250_000.0, 2.5e6, 1e7, 1e9, 1.5e12].map(tick);
        assert_eq!(ticks, ["0", "250k", "2.5M", "10M", "1B", "1.5T"]);
    }
}
