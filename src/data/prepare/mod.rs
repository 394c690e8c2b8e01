//! A corpus to packed files: read, tokenize on every core, write in order.
//!
//! Whole documents are kept, each ended by the tokenizer's end-of-text id (unless told otherwise), back to
//! back. Output is byte-identical whatever the number of threads, and however often it was interrupted: it is
//! written to a temporary folder, whose journal says after each source file how far all is, and renamed when
//! complete. Nothing that is half written is ever read.
//!
//! Which documents go to validation, and which are used at all where `percentage` is below 1, is decided by a
//! checksum of the text: copies of a document stay together, and a document stays where it is when the corpus
//! grows. The original's `percentage` took the first files instead.
//!
//! A source may be a dataset on the Hub ([`super::hub`]): its files are downloaded first, then read as any others.
//!
//! Read first: [`prepare`]; then `pipeline` (who works on what), `encode` (rows to ids), `output` and `journal`.

mod encode;
mod from_hub;
mod journal;
mod manifest;
mod output;
mod pipeline;
mod progress;
mod raw;

pub use manifest::{Counts, Manifest, SourceRecord};
pub use raw::with_raw_prepared;

use super::documents::{self, Schema, Selection, Skipped};
use super::packed::explain;
use super::writer::{Position, TokenFormat};
use crate::bail_hint;
use crate::config::{OnError, PrepareConfig, counted};
use crate::error::WithHint;
use crate::tokenizer::Tokenizer;
use anyhow::{Result, anyhow};
use encode::{Encoded, Work};
use journal::{Entry, Journal};
use output::Output;
use pipeline::Event;
use progress::Progress;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bounds `chunk_tokens` at 1 GiB a file.
const MAX_CHUNK_TOKENS: u64 = 1 << 28;
/// How often the journal goes to the disk itself: what a power cut may cost.
const SYNC_EVERY: Duration = Duration::from_secs(5);

/// Runs those preparations of a configuration whose output is not there yet.
pub fn prepare_missing(list: &[PrepareConfig], tokenizer: Option<&Tokenizer>) -> Result<()> {
    for options in list {
        let tokenizer = tokenizer
            .ok_or_else(|| anyhow!("preparing `{}` needs a tokenizer", options.source))
            .usage("set `tokenizer_dir`")?;
        prepare(options, tokenizer, None)?;
    }
    Ok(())
}

/// Prepares a corpus, or finds it prepared already by the same options. With `workers` threads; `None`: one a
/// core.
///
/// # Errors
/// No files, an unreadable file, no usable document; a folder that holds something else.
pub fn prepare(
    options: &PrepareConfig,
    tokenizer: &Tokenizer,
    workers: Option<usize>,
) -> Result<Manifest> {
    let schema = Schema::from_name(&options.kind)?;
    let format = check(options, tokenizer)?;
    let selection = Selection {
        schema,
        field: options.text_field.clone(),
        subsets: options.subsets.clone(),
        exclude_subsets: options.exclude_subsets.clone(),
    };
    let (files, commit) = match from_hub::Found::of(options, &selection, tokenizer)? {
        from_hub::Found::Nothing => {
            (documents::files(&options.source, &selection, &options.split)?, None)
        }
        from_hub::Found::Files(fetched) => (fetched.files, Some(fetched.commit)),
        from_hub::Found::Prepared(done) => {
            output::tidy(&options.out);
            announce("already prepared", &done);
            return Ok(*done);
        }
    };
    let manifest = Manifest { commit, ..Manifest::begin(options, &files, tokenizer)? };
    if let Some(done) = manifest.find_prepared()? {
        output::tidy(&options.out);
        announce("already prepared", &done);
        return Ok(done);
    }
    let work = Work { options, selection: &selection, tokenizer, format };
    let workers =
        workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));

    let (mut preparation, from) = Preparation::begin(manifest, format)?;
    let bar = preparation.progress.bar();
    pipeline::run(&files, from, &work, workers, &bar, |file, event| match event {
        Event::Piece(encoded) => preparation.add(&files[file], encoded),
        Event::End { sum, damage } => {
            if let Some(damage) = damage {
                preparation.damaged(&files[file], damage)?;
            }
            preparation.end_source(&files[file], sum)
        }
    })?;
    let manifest = preparation.finish()?;
    announce("prepared", &manifest);
    Ok(manifest)
}

/// A preparation while it runs.
struct Preparation {
    manifest: Manifest,
    train: Output,
    validation: Option<Output>,
    journal: Journal,
    progress: Progress,
    /// Documents and tokens when the source that is being read began.
    before: (u64, u64),
    synced: Instant,
}

impl Preparation {
    /// Takes the output folders, as they were after the last of these source files that is through; how many
    /// those are.
    ///
    /// # Errors
    /// The folders hold something else, or what another preparation began.
    fn begin(mut manifest: Manifest, format: TokenFormat) -> Result<(Self, usize)> {
        let options = &manifest.options;
        let mut train = Output::begin(&options.out, &options.split, &manifest, format, false)?;
        let begun = train.temporary.join(output::BEGUN);
        let mut done = Journal::read(&train.temporary);
        match Manifest::read_file(&begun)? {
            Some(found) if !done.is_empty() => {
                manifest.must_continue(found, &done, &train.temporary)?;
            }
            _ => manifest.write(&begun)?,
        }
        let mut validation = match &options.validation_out {
            Some(out) => {
                let take_back = !done.is_empty();
                Some(Output::begin(out, "validation", &manifest, format, take_back)?)
            }
            None => None,
        };
        while !go_to(&mut train, validation.as_mut(), done.last())? {
            done.pop(); // a power cut: the disk did not get all of it
        }
        let journal = Journal::go_on(&train.temporary, &done)?;
        let progress = Progress::new(manifest.sources.values().map(|s| s.sum.bytes).sum());
        let (n_files, n_done) = (manifest.sources.len(), done.len());
        if let Some(last) = done.last() {
            let (documents, tokens) = last.counts.totals();
            eprintln!(
                "{:<12}after {n_done} of {n_files} source files: {documents} documents, {tokens} tokens are there",
                "continues"
            );
            progress.go_on(done.iter().map(|entry| entry.record.sum.bytes).sum());
            manifest.counts = last.counts.clone();
        }
        for entry in done {
            train.files.extend(entry.outputs);
            if let Some(validation) = &mut validation {
                validation.files.extend(entry.validation_outputs);
            }
            manifest.sources.insert(entry.source, entry.record);
        }
        let (before, synced) = (manifest.counts.totals(), Instant::now());
        Ok((Self { manifest, train, validation, journal, progress, before, synced }, n_done))
    }

    /// Writes the documents of a piece and counts what it left out.
    fn add(&mut self, path: &Path, piece: Encoded) -> Result<()> {
        for skipped in &piece.skipped {
            if skipped.damaged && self.manifest.options.on_error == OnError::Stop {
                return Err(anyhow!("`{}`, {skipped}", path.display()))
                    .hint("correct it, or leave such rows out with `--on-error skip-rows`");
            }
            self.manifest.counts.skip(skipped, path);
        }
        let before = self.manifest.counts.totals();
        explain(self.train.writer.add_bytes(&piece.train.bytes))?;
        if let Some(validation) = &mut self.validation {
            explain(validation.writer.add_bytes(&piece.validation.bytes))?;
            self.manifest.counts.validation_tokens = validation.writer.tokens;
        }
        let counts = &mut self.manifest.counts;
        counts.documents += piece.train.documents;
        counts.validation_documents += piece.validation.documents;
        counts.tokens = self.train.writer.tokens;
        let now = self.manifest.counts.totals();
        self.progress.add(now.0 - before.0, piece.text_bytes, now.1 - before.1);
        Ok(())
    }

    /// The rest of a source is damaged.
    fn damaged(&mut self, path: &Path, damage: anyhow::Error) -> Result<()> {
        if self.manifest.options.on_error != OnError::Skip {
            return Err(damage);
        }
        let mut detail: Vec<String> = damage.chain().map(ToString::to_string).collect();
        detail.dedup();
        let skipped = Skipped {
            why: "damaged file, the rest of it".into(),
            row: 0,
            detail: detail.join(": "),
            damaged: true,
        };
        self.manifest.counts.skip(&skipped, path);
        Ok(())
    }

    /// Notes in the journal that a source is through.
    fn end_source(&mut self, path: &Path, sum: documents::SourceSum) -> Result<()> {
        let source = path.display().to_string();
        let expected = self.manifest.sources.get(&source).map(|record| &record.sum);
        if expected.is_some_and(|was| (was.bytes, was.modified) != (sum.bytes, sum.modified)) {
            bail_hint!(
                "prepare again when nothing writes to the corpus";
                "`{source}` changed while it was read"
            );
        }
        let (documents, tokens) = self.manifest.counts.totals();
        let record = SourceRecord {
            sum,
            documents: documents - self.before.0,
            tokens: tokens - self.before.1,
        };
        self.before = (documents, tokens);
        self.manifest.sources.insert(source.clone(), record.clone());
        let sync = self.synced.elapsed() > SYNC_EVERY;
        let train = explain(self.train.writer.position(sync))?;
        let outputs = self.train.writer.take_files();
        self.train.files.extend(outputs.clone());
        let (validation, validation_outputs) = match &mut self.validation {
            None => Default::default(),
            Some(validation) => {
                let position = explain(validation.writer.position(sync))?;
                let outputs = validation.writer.take_files();
                validation.files.extend(outputs.clone());
                (position, outputs)
            }
        };
        let counts = self.manifest.counts.clone();
        let entry =
            Entry { source, record, counts, train, validation, outputs, validation_outputs };
        self.journal.append(&entry, sync)?;
        if sync {
            self.synced = Instant::now();
        }
        Ok(())
    }

    /// Puts both folders in their places.
    fn finish(mut self) -> Result<Manifest> {
        self.progress.finish();
        if let Err(error) = check_counts(&self.manifest) {
            self.train.discard();
            self.validation.into_iter().for_each(Output::discard);
            return Err(error);
        }
        self.train.finish()?;
        if let Some(validation) = &mut self.validation {
            validation.finish()?;
            self.manifest.validation_outputs = validation.files.clone();
        }
        self.manifest.outputs = self.train.files.clone();
        // The training folder comes last: its manifest says that everything is there.
        if let Some(validation) = self.validation {
            validation.commit(&self.manifest)?;
        }
        self.train.commit(&self.manifest)?;
        Ok(self.manifest)
    }
}

/// Takes both folders back to where they were after an entry of the journal, or to their beginning; `false` where
/// they do not hold what they held then.
fn go_to(train: &mut Output, validation: Option<&mut Output>, to: Option<&Entry>) -> Result<bool> {
    let none = (Position::default(), 0);
    if let Some(validation) = validation {
        let (at, tokens) = to.map_or(none, |e| (e.validation, e.counts.validation_tokens));
        if !explain(validation.writer.go_to(at, tokens))? {
            return Ok(false);
        }
    }
    let (at, tokens) = to.map_or(none, |e| (e.train, e.counts.tokens));
    explain(train.writer.go_to(at, tokens))
}

/// How ids are written; options that cannot work, all at once, before anything is read.
fn check(o: &PrepareConfig, tokenizer: &Tokenizer) -> Result<TokenFormat> {
    let mut problems = Vec::new();
    let mut require = |holds: bool, problem: String| {
        if !holds {
            problems.push(problem);
        }
    };
    require(
        (1..=MAX_CHUNK_TOKENS).contains(&o.chunk_tokens),
        format!("`chunk_tokens`: must be 1 to {MAX_CHUNK_TOKENS}, got {}", o.chunk_tokens),
    );
    require(
        o.percentage > 0.0 && o.percentage <= 1.0,
        format!("`percentage`: must be above 0 and at most 1.0 (all), got {}", o.percentage),
    );
    require(
        (0.0..1.0).contains(&o.validation_fraction),
        format!("`validation_fraction`: must be in [0, 1), got {}", o.validation_fraction),
    );
    require(
        (o.validation_fraction > 0.0) == o.validation_out.is_some(),
        "`validation_fraction` and `validation_out` go together".into(),
    );
    for out in std::iter::once(&o.out).chain(&o.validation_out) {
        require(out.file_name().is_some(), format!("`{}`: must name a folder", out.display()));
    }
    require(
        o.validation_out.as_ref() != Some(&o.out),
        "`validation_out`: must not be `out`".into(),
    );
    require(
        !o.split.is_empty() && !o.split.contains('/'),
        format!("`split`: must be a name such as `train`, got `{}`", o.split),
    );
    require(
        !o.eos || tokenizer.eos_id().is_some(),
        "`eos`: the tokenizer has no end-of-text token; say `eos: false` (`--no-eos`)".into(),
    );
    require(
        !o.bos || tokenizer.bos_id().is_some(),
        "`bos`: the tokenizer has no beginning-of-text token".into(),
    );
    let format = TokenFormat::new(tokenizer.vocab_size(), o.dtype);
    require(
        format.is_some(),
        format!(
            "`dtype`: expected a vocabulary of at most {} ids for `uint16`, got a tokenizer of {}, larger than the \
             dtype; say `auto` or `int32`",
            TokenFormat::NARROW_IDS,
            tokenizer.vocab_size()
        ),
    );
    if let (Some(format), []) = (format, &problems[..]) {
        return Ok(format);
    }
    Err(anyhow!("cannot prepare `{}`:\n  {}", o.source, problems.join("\n  ")))
        .usage("`tinyllama prepare --help` explains each option")
}

/// Refuses an empty result, saying why it is empty.
fn check_counts(m: &Manifest) -> Result<()> {
    if m.counts.documents == 0 {
        let reasons = m.counts.skipped.iter().map(|(why, n)| {
            let first = m.counts.first_skipped.get(why).map_or("", |place| place);
            format!("\n  {} skipped: {why} (first: {first})", counted(*n, "row"))
        });
        let reasons = reasons.collect::<String>();
        return Err(anyhow!("no document in `{}`{reasons}", m.options.source))
            .hint("check the kind of the corpus and `--text-field`");
    }
    if m.options.validation_out.is_some() && m.counts.validation_documents == 0 {
        bail_hint!(
            "raise `validation_fraction`, or prepare a validation set of its own";
            "none of {} documents went to validation with `validation_fraction` {}",
            m.counts.documents, m.options.validation_fraction
        );
    }
    Ok(())
}

fn announce(what: &str, m: &Manifest) {
    let validation = match m.counts.validation_documents {
        0 => String::new(),
        n => format!(
            "; validation {}, {}",
            counted(n, "document"),
            counted(m.counts.validation_tokens, "token")
        ),
    };
    eprintln!(
        "{what:<12}{}{}: {}, {}{validation}",
        if what.len() < 12 { "" } else { " " },
        m.options.out.display(),
        counted(m.counts.documents, "document"),
        counted(m.counts.tokens, "token"),
    );
    for (why, &count) in &m.counts.skipped {
        let first = m.counts.first_skipped.get(why).map_or("", |place| place);
        eprintln!("            {} skipped: {why} (first: {first})", counted(count, "row"));
    }
}
