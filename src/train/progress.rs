//! Numbers for human eyes at fixed widths, and the progress bar under the log lines.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};

/// Where log lines go: stderr, above a progress bar where stderr is a terminal.
pub struct Progress {
    /// `None` where stderr is a file or a pipe.
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Progress {
    /// A bar that is full at `length` (`None`: a spinner). `quiet` shows neither bar nor lines.
    pub fn new(length: Option<u64>, quiet: bool) -> Progress {
        let show = !quiet && std::io::stderr().is_terminal();
        Progress { bar: show.then(|| bar(length)), quiet }
    }

    /// Prints a line above the bar. A closed stderr is no reason to stop.
    pub fn line(&self, text: &str) {
        match &self.bar {
            _ if self.quiet => {}
            Some(bar) => bar.suspend(|| write_line(text)),
            None => write_line(text),
        }
    }

    /// Moves the bar to `position` and puts `message` behind it.
    pub fn set(&self, position: u64, message: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(message);
            bar.set_position(position);
        }
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// An error leaves the loop without [`Progress::clear`]; its message must not land on the bar.
impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

fn bar(length: Option<u64>) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::stderr());
    let template = match length {
        Some(_) => "{bar:40} {percent:>3}% | {elapsed} | {msg}",
        None => "{spinner} {elapsed} | {msg}",
    };
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    bar.with_style(style)
}

/// `eprintln!` panics where stderr is closed; this does not.
fn write_line(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// What a column shows where there is no value.
pub const NO_VALUE: &str = "-";

/// A count at three significant digits: `853`, `26.9k`, `1.26B`, `1.50T`; at most five characters
/// below a thousand trillions.
pub fn count(value: f64) -> String {
    if !value.is_finite() {
        return NO_VALUE.into();
    }
    if value.abs() < 999.5 {
        return if value.fract() == 0.0 { format!("{value:.0}") } else { three_digits(value) };
    }
    let (mut value, mut unit) = (value, "");
    for next in ["k", "M", "B", "T"] {
        // 999,500 is 1.00M, not 1000k.
        if value.abs() < 999.5 {
            break;
        }
        value /= 1e3;
        unit = next;
    }
    format!("{}{unit}", three_digits(value))
}

/// `3.14`, `31.4`, `314`, rounded before the decimals are chosen: 9.999 is `10.0`.
fn three_digits(value: f64) -> String {
    let decimals = match value.abs() {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

/// As many decimals as fit into `width` characters, at most `width - 2`; `nan` and `inf` as they
/// are; an exponent where nothing else fits.
pub fn fit(value: f64, width: usize) -> String {
    if !value.is_finite() {
        return format!("{value:>width$}").to_lowercase();
    }
    let text = (0..=width.saturating_sub(2))
        .rev()
        .map(|decimals| format!("{value:.decimals$}"))
        .find(|text| text.len() <= width)
        .unwrap_or_else(|| format!("{value:.0e}"));
    format!("{text:>width$}")
}

/// A span at two units: `9d 03h`, `3h 07m`, `4m 09s`, `12s`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return NO_VALUE.into();
    }
    let s = seconds.round() as u64;
    let (minutes, hours, days) = (s / 60, s / 3600, s / 86400);
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{minutes}m {:02}s", s % 60),
        3600..86400 => format!("{hours}h {:02}m", minutes % 60),
        _ => format!("{days}d {:02}h", hours % 24),
    }
}

/// A short span in six characters: `9.1 ms`, `312 ms`, `1.25 s`.
pub fn milliseconds(ms: f64) -> String {
    match ms {
        _ if !ms.is_finite() => format!("{NO_VALUE:>6}"),
        _ if ms < 999.5 => format!("{} ms", fit(ms, 3)),
        _ => format!("{} s", fit(ms / 1e3, 4)),
    }
}

/// Bytes in binary units at three significant digits: `512 B`, `4.07 MiB`, `31.2 GiB`.
pub fn bytes(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 999.5 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{} {unit}", three_digits(value)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_keep_three_digits_and_five_characters() {
        let cases = [
            (0.0, "0"),
            (7.0, "7"),
            (0.5, "0.50"),
            (853.0, "853"),
            (999.0, "999"),
            (999.7, "1.00k"),
            (26_900.0, "26.9k"),
            (999_499.0, "999k"),
            (999_500.0, "1.00M"),
            (2_097_152.0, "2.10M"),
            (1_258_291_200.0, "1.26B"),
            (99_960_000_000.0, "100B"),
            (1.5e12, "1.50T"),
            (3e12, "3.00T"),
            (f64::NAN, "-"),
        ];
        for (value, text) in cases {
            assert_eq!(count(value), text);
        }
    }

    #[test]
    fn a_fitted_number_has_the_width_of_its_column() {
        let cases = [
            (3.24159, 6, "3.2416"),
            (10.8268, 6, "10.827"),
            (9.99999, 6, "10.000"),
            (0.82, 4, "0.82"),
            (12.3456, 4, "12.3"),
            (123.4, 4, " 123"),
            (99999.0, 4, " 1e5"),
            (-0.5, 6, "-0.500"),
            (f64::NAN, 6, "   nan"),
            (f64::INFINITY, 6, "   inf"),
        ];
        for (value, width, text) in cases {
            assert_eq!(fit(value, width), text);
        }
    }

    #[test]
    fn spans_and_sizes_read_well() {
        let spans = [
            (0.4, "0s"),
            (59.6, "1m 00s"),
            (249.0, "4m 09s"),
            (11_220.0, "3h 07m"),
            (9.0 * 86400.0 + 3.4 * 3600.0, "9d 03h"),
            (f64::NAN, "-"),
        ];
        for (seconds, text) in spans {
            assert_eq!(duration(seconds), text);
        }
        let short = [
            (9.1415, "9.1 ms"),
            (12.4, " 12 ms"),
            (312.2, "312 ms"),
            (999.9, "1.00 s"),
            (125e3, " 125 s"),
            (f64::NAN, "     -"),
        ];
        for (ms, text) in short {
            assert_eq!(milliseconds(ms), text);
        }
        for (n, text) in [(512, "512 B"), (1000, "0.98 KiB"), (33_500_000_000, "31.2 GiB")] {
            assert_eq!(bytes(n), text);
        }
    }
}
