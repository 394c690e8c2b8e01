//! What the pictures of this crate share: a canvas, fonts, colours, the PNG file.
//!
//! Everything is drawn at twice the size and averaged down (`SCALE`), which smooths lines, circles
//! and letters alike: plotters' bitmap backend smooths only the thinnest lines. `train/plot.rs`
//! draws `loss.png` with it, `eval/report/picture.rs` scores over tokens.

use anyhow::{Context, Result, anyhow};
use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::fs;
use std::io::Write;
use std::path::Path;

/// Drawn pixels per pixel of the picture, in each direction.
const SCALE: usize = 2;

pub(crate) const FONT: &str = "sans-serif";
pub(crate) const INK: RGBColor = RGBColor(40, 40, 46);
pub(crate) const FAINT: RGBColor = RGBColor(112, 112, 122);
pub(crate) const GRID: RGBColor = RGBColor(228, 228, 233);
pub(crate) const BLUE: RGBColor = RGBColor(23, 92, 163);
pub(crate) const ORANGE: RGBColor = RGBColor(214, 84, 22);

pub(crate) type DrawResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;
pub(crate) type Root<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// Draws a picture of this width and height and writes it as a PNG, whole or not at all: beside its
/// place first, then renamed.
pub(crate) fn write(
    size: (usize, usize),
    out_png: &Path,
    draw: impl FnOnce(&Root) -> DrawResult,
) -> Result<()> {
    load_fonts()?;
    let mut pixels = vec![0; size.0 * size.1 * SCALE * SCALE * 3];
    draw_into(&mut pixels, size, draw)
        .map_err(|e| anyhow!("cannot draw {}: {e}", out_png.display()))?;
    write_png(&averaged(&pixels, size), size, out_png)
        .with_context(|| format!("cannot write {}", out_png.display()))
}

fn load_fonts() -> Result<()> {
    register_font(FONT, FontStyle::Normal, dejavu::sans::regular())
        .and_then(|()| register_font(FONT, FontStyle::Bold, dejavu::sans::bold()))
        .map_err(|_| anyhow!("cannot load the built-in font"))
}

/// Draws at `SCALE` times the size into RGB bytes.
fn draw_into(
    pixels: &mut [u8],
    size: (usize, usize),
    draw: impl FnOnce(&Root) -> DrawResult,
) -> DrawResult {
    let size = ((size.0 * SCALE) as u32, (size.1 * SCALE) as u32);
    let root = BitMapBackend::with_buffer(pixels, size).into_drawing_area();
    root.fill(&WHITE)?;
    draw(&root)?;
    root.present()?;
    Ok(())
}

/// Pixels of the picture -> drawn pixels.
pub(crate) fn px<T: From<u8> + std::ops::Mul<Output = T>>(n: T) -> T {
    n * T::from(SCALE as u8)
}

pub(crate) fn text(size: i32, colour: &'static RGBColor) -> TextStyle<'static> {
    TextStyle::from((FONT, px(size)).into_font()).color(colour)
}

pub(crate) fn bold(size: i32, colour: &'static RGBColor) -> TextStyle<'static> {
    (FONT, px(size), FontStyle::Bold).into_font().color(colour)
}

/// How wide a text of this weight and size will be, in pixels of the picture.
pub(crate) fn width(words: &str, weight: FontStyle, size: i32) -> Result<i32> {
    load_fonts()?; // before the style, which looks the font up
    let font = (FONT, px(size), weight).into_font();
    let (width, _) = font.box_size(words).map_err(|e| anyhow!("cannot measure `{words}`: {e}"))?;
    Ok((width as usize).div_ceil(SCALE) as i32)
}

/// A line, segment by segment: plotters' polylines grow long spikes where a line turns sharply.
pub(crate) fn segments<C: Copy>(
    points: &[(C, C)],
    colour: RGBColor,
    thickness: u32,
) -> impl Iterator<Item = PathElement<(C, C)>> {
    let style = colour.stroke_width(px(thickness));
    points.windows(2).map(move |pair| PathElement::new(pair, style))
}

/// `2.50` -> `2.5`, `10.0` -> `10`; `2.50M` -> `2.5M`.
pub(crate) fn trim_zeros(number: &str) -> String {
    let digits = number.trim_end_matches(char::is_alphabetic);
    let unit = &number[digits.len()..];
    match digits.contains('.') {
        true => format!("{}{unit}", digits.trim_end_matches('0').trim_end_matches('.')),
        false => number.into(),
    }
}

/// Averages squares of `SCALE * SCALE` drawn pixels.
fn averaged(pixels: &[u8], (width, height): (usize, usize)) -> Vec<u8> {
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
fn write_png(rgb: &[u8], (width, height): (usize, usize), path: &Path) -> std::io::Result<()> {
    let mut header = Vec::new();
    header.extend((width as u32).to_be_bytes());
    header.extend((height as u32).to_be_bytes());
    header.extend([8, 2, 0, 0, 0]); // bits a channel, RGB, deflate, filters by row, not interlaced
    let mut rows = ZlibEncoder::new(Vec::new(), Compression::default());
    for row in rgb.chunks(width * 3) {
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
