//! How far a preparation is: a bar on a terminal, elsewhere a line every 30 seconds.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_secs(30);

/// Counters and the bar.
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
    said: Instant,
    documents: u64,
    tokens: u64,
    bytes: u64,
}

impl Progress {
    /// For sources of so many bytes, as they lie on disk.
    pub fn new(source_bytes: u64) -> Self {
        let style = "{bar:30} {bytes}/{total_bytes} eta {eta} | {msg}";
        let target = ProgressDrawTarget::stderr();
        let bar = ProgressBar::with_draw_target(Some(source_bytes), target).with_style(
            ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar()),
        );
        let now = Instant::now();
        Self { bar, started: now, said: now, documents: 0, tokens: 0, bytes: 0 }
    }

    /// The bar, for the readers of the sources to advance.
    pub fn bar(&self) -> ProgressBar {
        self.bar.clone()
    }

    /// Source files of so many bytes are through already.
    pub fn go_on(&self, source_bytes: u64) {
        self.bar.set_position(source_bytes);
        self.bar.reset_eta();
    }

    /// Counts documents, their bytes of text and their tokens.
    pub fn add(&mut self, documents: u64, text_bytes: u64, tokens: u64) {
        self.documents += documents;
        self.bytes += text_bytes;
        self.tokens += tokens;
        let seconds = self.started.elapsed().as_secs_f64().max(1e-3);
        let rate = |n: u64, unit: f64| n as f64 / seconds / unit;
        let line = format!(
            "{} documents ({:.0}/s), {:.1}M tokens ({:.2}M/s), {:.1} MB/s of text",
            self.documents,
            rate(self.documents, 1.0),
            self.tokens as f64 / 1e6,
            rate(self.tokens, 1e6),
            rate(self.bytes, 1e6),
        );
        if std::io::stderr().is_terminal() {
            self.bar.set_message(line);
        } else if self.said.elapsed() > EVERY {
            let done =
                100.0 * self.bar.position() as f64 / self.bar.length().unwrap_or(0).max(1) as f64;
            eprintln!("preparing   {done:.0} % | {line}");
            self.said = Instant::now();
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
