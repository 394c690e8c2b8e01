//! Files to tokens on every core, in the order of the files.
//!
//! A worker takes the reader of the earliest file that has one free, reads a piece, hands the reader back and
//! encodes the piece; where no reader is free it opens the next file. So one large file keeps every core busy as
//! well as many small ones. The caller gets the pieces in order, whatever the number of workers. What is read and
//! not yet given out is bounded: the file that is given out may always be read on, the others wait.

use super::encode::{Encoded, Work};
use crate::data::documents::{Piece, Reader, Source, SourceSum};
use anyhow::{Result, anyhow};
use indicatif::ProgressBar;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What comes out of a file: its pieces, then its end.
pub(super) enum Event {
    /// The next documents.
    Piece(Encoded),
    /// All was read, or what is left of it is damaged.
    End { sum: SourceSum, damage: Option<anyhow::Error> },
}

/// Bytes that may be read and not given out: 64 MiB, and 16 MiB a worker. In ids, they take at most four times
/// as much.
fn limit(workers: usize) -> usize {
    (64 + 16 * workers) << 20
}

/// Reads and encodes `files[from..]` with so many threads; calls `take` with the index of a file and what comes
/// out of it, in order.
///
/// # Errors
/// The first error of `take`, or of a file that cannot be read at all.
pub(super) fn run(
    files: &[PathBuf],
    from: usize,
    work: &Work<'_>,
    workers: usize,
    bar: &ProgressBar,
    mut take: impl FnMut(usize, Event) -> Result<()>,
) -> Result<()> {
    let pool = Pool {
        files,
        work,
        bar,
        limit: limit(workers),
        most_open: 4 * workers,
        board: Mutex::new(Board { next: from, head: from, ..Board::default() }),
        changed: Condvar::new(),
    };
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| pool.work());
        }
        let _stop = StopOnDrop(&pool);
        (from..files.len()).try_for_each(|file| {
            loop {
                let event = pool.next_of(file)?;
                let at_end = matches!(event, Event::End { .. });
                take(file, event)?;
                if at_end {
                    return Ok(());
                }
            }
        })
    })
}

struct Pool<'a> {
    files: &'a [PathBuf],
    work: &'a Work<'a>,
    bar: &'a ProgressBar,
    limit: usize,
    most_open: usize,
    board: Mutex<Board<'a>>,
    changed: Condvar,
}

/// Who does what.
#[derive(Default)]
struct Board<'a> {
    /// The next file to open.
    next: usize,
    /// The file that is given out.
    head: usize,
    open: BTreeMap<usize, OpenFile<'a>>,
    /// Bytes read and not given out.
    outstanding: usize,
    stopped: bool,
}

#[derive(Default)]
struct OpenFile<'a> {
    /// `None` while a worker has it, and at the end.
    reader: Option<Reader<'a>>,
    /// Pieces read, and given out.
    read: usize,
    given: usize,
    /// Encoded pieces by number, with their sizes as read.
    encoded: BTreeMap<usize, (usize, Result<Encoded>)>,
    end: Option<Result<Event>>,
}

impl<'a> Board<'a> {
    /// The file to read from next, with its reader unless it is to be opened.
    fn pick(&mut self, pool: &Pool<'a>) -> Option<(usize, Option<Reader<'a>>)> {
        let (outstanding, head) = (self.outstanding, self.head);
        let may = |file| outstanding < if file == head { 2 * pool.limit } else { pool.limit };
        let free = self.open.iter_mut().find(|(file, open)| may(**file) && open.reader.is_some());
        if let Some((file, open)) = free {
            return Some((*file, open.reader.take()));
        }
        let (next, n_open) = (self.next, self.open.len());
        if next == pool.files.len() || n_open >= pool.most_open || !may(next) {
            return None;
        }
        self.next += 1;
        self.open.insert(next, OpenFile::default());
        Some((next, None))
    }
}

impl<'a> Pool<'a> {
    fn board(&self) -> MutexGuard<'_, Board<'a>> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'b>(&'b self, board: MutexGuard<'b, Board<'a>>) -> MutexGuard<'b, Board<'a>> {
        self.changed.wait(board).unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker's life.
    fn work(&self) {
        let _stop = StopOnPanic(self);
        let mut encoder = self.work.tokenizer.encoder();
        let mut ids = Vec::new();
        while let Some((file, reader)) = self.job() {
            let Some((number, piece)) = self.read(file, reader) else { continue };
            let size = size_of_piece(&piece);
            let encoded = self.work.encode(piece, &mut encoder, &mut ids);
            if let Some(open) = self.board().open.get_mut(&file) {
                open.encoded.insert(number, (size, encoded));
            }
            self.changed.notify_all();
        }
    }

    /// What to do next; `None` when there is nothing more.
    fn job(&self) -> Option<(usize, Option<Reader<'a>>)> {
        let mut board = self.board();
        loop {
            if board.stopped || (board.next == self.files.len() && board.open.is_empty()) {
                return None;
            }
            match board.pick(self) {
                Some(job) => return Some(job),
                None => board = self.wait(board),
            }
        }
    }

    /// Reads a piece of a file; its number. `None` where the file ends.
    fn read(&self, file: usize, reader: Option<Reader<'a>>) -> Option<(usize, Piece)> {
        let source = Source::with_bar(&self.files[file], self.bar.clone());
        let Work { selection, tokenizer, .. } = *self.work;
        let reader = match reader {
            Some(reader) => Ok(reader),
            None => Reader::open(source.clone(), selection, Some(tokenizer)),
        };
        let end = match reader {
            Err(damage) => source.finish().map(|sum| (sum, Some(damage))),
            Ok(mut reader) => match reader.next() {
                Some(Ok(piece)) => return Some((self.hand_back(file, reader, &piece), piece)),
                Some(Err(damage)) => reader.finish().map(|sum| (sum, Some(damage))),
                None => reader.finish().map(|sum| (sum, None)),
            },
        };
        if let Some(open) = self.board().open.get_mut(&file) {
            open.end = Some(end.map(|(sum, damage)| Event::End { sum, damage }));
        }
        self.changed.notify_all();
        None
    }

    fn hand_back(&self, file: usize, reader: Reader<'a>, piece: &Piece) -> usize {
        let mut board = self.board();
        board.outstanding += size_of_piece(piece);
        let number = board.open.get_mut(&file).map_or(0, |open| {
            open.reader = Some(reader);
            open.read += 1;
            open.read - 1
        });
        drop(board);
        self.changed.notify_all();
        number
    }

    /// What comes out of a file next.
    fn next_of(&self, file: usize) -> Result<Event> {
        let mut board = self.board();
        board.head = file;
        self.changed.notify_all();
        loop {
            if board.stopped {
                return Err(anyhow!("a worker ended"));
            }
            if let Some(open) = board.open.get_mut(&file) {
                if let Some((size, encoded)) = open.encoded.remove(&open.given) {
                    open.given += 1;
                    board.outstanding -= size;
                    self.changed.notify_all();
                    return encoded.map(Event::Piece);
                }
                if open.given == open.read
                    && let Some(end) = open.end.take()
                {
                    board.open.remove(&file);
                    self.changed.notify_all();
                    return end;
                }
            }
            board = self.wait(board);
        }
    }

    fn stop(&self) {
        self.board().stopped = true;
        self.changed.notify_all();
    }
}

fn size_of_piece(piece: &Piece) -> usize {
    match piece {
        Piece::Lines { bytes, .. } => bytes.len(),
        Piece::Part { text, .. } => text.len(),
        Piece::Rows(rows) => rows.iter().map(crate::data::documents::Row::len).sum(),
    }
}

/// Ends the workers when the caller is through or fails.
struct StopOnDrop<'b, 'a>(&'b Pool<'a>);

impl Drop for StopOnDrop<'_, '_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// A worker that panics must not leave the caller waiting.
struct StopOnPanic<'b, 'a>(&'b Pool<'a>);

impl Drop for StopOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}
