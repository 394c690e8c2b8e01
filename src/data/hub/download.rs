//! Files into the cache: several at a time, each whole file once, checked against what the Hub lists.

use super::cache::Cache;
use super::client::{Client, Failure, with_hint};
use super::listing::HubFile;
use super::part::Part;
use super::{Fetched, HubSource};
use crate::bail_hint;
use crate::checkpoint::disk::free_bytes;
use crate::data::documents::Selection;
use crate::train::progress;
use anyhow::{Context, Result, anyhow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};
use ureq::BodyReader;

/// Files at a time.
const AT_ONCE: usize = 4;
/// How often a line is written where stderr is no terminal.
const EVERY: Duration = Duration::from_secs(30);
const GOES_ON: &str = "start again: it goes on where it stopped";

impl Client {
    /// As [`super::fetch`].
    pub fn fetch(
        &self,
        source: &HubSource,
        commit: Option<&str>,
        selection: &Selection,
        split: &str,
    ) -> Result<Fetched> {
        let cache = Cache::new(&self.cache, &self.repository);
        let commit = match commit {
            Some(begun) => begun.to_owned(),
            None => {
                let commit = self.commit(&source.revision)?;
                cache.note(&source.revision, &commit)?;
                commit
            }
        };
        let files = self.files(source, &commit, selection, split)?;
        self.download(&cache, &commit, &files)?;
        let paths = files.iter().map(|file| cache.link(file, &commit));
        let mut paths = paths.collect::<Result<Vec<PathBuf>>>()?;
        paths.sort();
        Ok(Fetched { commit, files: paths })
    }

    /// Brings what is not there yet.
    fn download(&self, cache: &Cache, commit: &str, files: &[HubFile]) -> Result<()> {
        let missing = files.iter().filter(|file| !cache.has(file, commit));
        let missing: BTreeMap<&str, &HubFile> =
            missing.map(|file| (file.etag.as_str(), file)).collect();
        let missing: Vec<&HubFile> = missing.into_values().collect();
        let from = format!("`{}`, commit {commit}", self.repository);
        if missing.is_empty() {
            eprintln!("{:<12}{} files of {from}: all are there", "downloaded", files.len());
            return Ok(());
        }
        let (total, needed) = room(cache, &missing)?;
        eprintln!(
            "{:<12}{} of {} files of {from}, {}, into {}",
            "downloads",
            missing.len(),
            files.len(),
            progress::bytes(total),
            cache.root.display(),
        );
        let style =
            ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} eta {eta} | {msg}");
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
            .with_style(style.unwrap_or(ProgressStyle::default_bar()));
        bar.set_position(total - needed);
        bar.reset_eta();
        let run = Run { client: self, cache, commit, bar, stop: AtomicBool::new(false) };
        run.all(&missing)
    }
}

/// Bytes of these files, and how many of them are not there.
///
/// # Errors
/// The disk has no room for them.
fn room(cache: &Cache, missing: &[&HubFile]) -> Result<(u64, u64)> {
    let total = missing.iter().map(|file| file.bytes).sum();
    let begun = |file: &&HubFile| match cache.part(file).metadata() {
        Ok(part) if file.is_sha256 && part.len() <= file.bytes => part.len(),
        _ => 0,
    };
    let needed = total - missing.iter().map(begun).sum::<u64>();
    match free_bytes(&cache.root) {
        Some(free) if free < needed => bail_hint!(
            "free space, set `HF_HOME` to a larger disk, or prepare a `--pattern` at a time into folders of their own";
            "{} files take {} more, `{}` has {} free",
            missing.len(), progress::bytes(needed), cache.root.display(), progress::bytes(free)
        ),
        _ => Ok((total, needed)),
    }
}

/// Downloads while they run.
struct Run<'a> {
    client: &'a Client,
    cache: &'a Cache,
    commit: &'a str,
    bar: ProgressBar,
    /// One failed: the others end too.
    stop: AtomicBool,
}

impl Run<'_> {
    /// All files, some at a time.
    fn all(&self, files: &[&HubFile]) -> Result<()> {
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let worker = || -> Result<()> {
            while let Some(file) = files.get(next.fetch_add(1, Relaxed)) {
                if self.stop.load(Relaxed) {
                    break;
                }
                self.one(file).inspect_err(|_| self.stop.store(true, Relaxed)).with_context(
                    || format!("cannot download `{}` of `{}`", file.path, self.client.repository),
                )?;
                done.fetch_add(1, Relaxed);
            }
            Ok(())
        };
        let result = thread::scope(|scope| {
            let workers: Vec<_> =
                (0..AT_ONCE.min(files.len())).map(|_| scope.spawn(worker)).collect();
            self.watch(
                || workers.iter().all(|w| w.is_finished()),
                || format!("{} of {} files", done.load(Relaxed), files.len()),
            );
            let results = workers.into_iter().map(|w| {
                w.join().unwrap_or_else(|_| Err(anyhow!("a download stopped unexpectedly")))
            });
            results.collect::<Vec<_>>().into_iter().collect::<Result<()>>()
        });
        self.bar.finish_and_clear();
        result
    }

    /// Shows how far all is, until it is over.
    fn watch(&self, over: impl Fn() -> bool, files: impl Fn() -> String) {
        let (began, first) = (Instant::now(), self.bar.position());
        let mut said = began;
        while !over() {
            sleep(Duration::from_millis(50));
            let bytes = self.bar.position().saturating_sub(first);
            let rate = bytes as f64 / began.elapsed().as_secs_f64() / 1e6;
            let line = format!("{}, {rate:.1} MB/s", files());
            if !io::stderr().is_terminal() && said.elapsed() > EVERY {
                let all = self.bar.length().unwrap_or(0).max(1);
                let percent = 100.0 * self.bar.position() as f64 / all as f64;
                eprintln!("{:<12}{percent:.0} % | {line}", "downloads");
                said = Instant::now();
            }
            self.bar.set_message(line);
        }
    }

    /// One file's bytes into the cache.
    fn one(&self, file: &HubFile) -> Result<()> {
        let _lock = self.cache.lock(file)?;
        if self.cache.has(file, self.commit) {
            self.bar.inc(file.bytes); // another process brought it
            return Ok(());
        }
        let path = self.cache.part(file);
        let mut part = Part::open(&path, file)?;
        loop {
            let resumed = part.bytes > 0;
            let stopped = || self.stop.load(Relaxed);
            let attempts =
                self.client.retrying(self.client.tries, stopped, || self.go_on(&mut part));
            if stopped() {
                return Ok(()); // another file's error is the one to tell
            }
            attempts.map_err(|failure| failure.error)?;
            match part.problem() {
                None => break,
                // What was there may have been no part of this file.
                Some(_) if resumed => part.clear(&self.bar)?,
                Some(problem) => {
                    fs::remove_file(&path)
                        .with_context(|| format!("cannot remove `{}`", path.display()))?;
                    bail_hint!(
                        "start again, which downloads it anew; if that gives the same, \
                         `HF_ENDPOINT` or a proxy serves other bytes than the Hub lists";
                        "{problem}: it was not used"
                    );
                }
            }
        }
        part.finish(&self.cache.blob(file))
    }

    /// Appends what a request brings.
    fn go_on(&self, part: &mut Part) -> Result<(), Failure> {
        if part.bytes == part.of.bytes || self.stop.load(Relaxed) {
            return Ok(());
        }
        let mut body = self.open(part)?;
        let first = part.bytes;
        let cut = |error: anyhow::Error, part: &Part| {
            let (bytes, all) = (part.bytes, part.of.bytes);
            let error = error.context(format!("the connection ended after {bytes} of {all} bytes"));
            let advanced = bytes > first;
            Failure { advanced, ..Failure::passing(with_hint(error, GOES_ON)) }
        };
        let mut buffer = vec![0; 1 << 17];
        while !self.stop.load(Relaxed) && part.bytes <= part.of.bytes {
            match body.read(&mut buffer) {
                Ok(0) if part.bytes < part.of.bytes => {
                    return Err(cut(anyhow!("it was closed"), part));
                }
                Ok(0) => break,
                Ok(n) => part.add(&buffer[..n], &self.bar)?,
                Err(error) => return Err(cut(error.into(), part)),
            }
        }
        Ok(())
    }

    /// The bytes that a part lacks; where the server has no parts, all of them, and the part is empty.
    fn open(&self, part: &mut Part) -> Result<BodyReader<'static>, Failure> {
        let url = self.client.url("", "resolve", self.commit, &part.of.path);
        let answer = self.client.request(&url, part.bytes)?;
        let range = answer.headers().get("content-range").and_then(|value| value.to_str().ok());
        let goes_on = answer.status() == 206
            && range.is_some_and(|r| r.starts_with(&format!("bytes {}-", part.bytes)));
        if part.bytes > 0 && !goes_on {
            part.clear(&self.bar)?;
        }
        if !goes_on && answer.status() != 200 {
            return Err(Failure::passing(anyhow!(
                "`{url}` gave another part than it was asked for"
            )));
        }
        let expected = part.of.bytes - part.bytes;
        match answer.body().content_length() {
            Some(length) if length != expected => {
                let what = anyhow!("`{url}`: expected {expected} bytes, got {length}");
                let hint = "check `HF_ENDPOINT`, and for a proxy: the file is not the one that the Hub lists";
                Err(with_hint(what, hint).into())
            }
            _ => Ok(answer.into_body().into_reader()),
        }
    }
}
