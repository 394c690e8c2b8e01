//! A column of a Parquet file, a row group after the other.

use super::source::Source;
use super::text::no_column;
use super::{PIECE, Piece, Row, Selection, Skipped};
use crate::error::WithHint;
use anyhow::{Context, Result, anyhow};
use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};
use std::fs::File;

/// Rows decoded at a time.
const ROWS: usize = 16;

/// The texts of a column. Only its pages are read and decoded.
pub(super) struct Column {
    source: Source,
    file: SerializedFileReader<File>,
    column: usize,
    name: String,
    /// Definition level of a text; a null's is lower. 0: no row may be null.
    defined: i16,
    group: usize,
    reader: Option<ColumnReaderImpl<ByteArrayType>>,
    rows: u64,
}

impl Column {
    pub(super) fn open(source: &Source, selection: &Selection) -> Result<Self> {
        let file = SerializedFileReader::new(source.file()?)
            .with_context(|| format!("{} as Parquet", source.cannot("read")))
            .hint("a file cut short has no footer: copy it again, or leave it out")?;
        let schema = file.metadata().file_metadata().schema_descr_ptr();
        let fields = selection.fields();
        let is =
            |name: &str| schema.columns().iter().position(|column| column.path().parts() == [name]);
        let Some((column, name)) = fields.iter().find_map(|name| Some((is(name)?, *name))) else {
            let there = schema.root_schema().get_fields().iter();
            let there: Vec<&str> = there.map(|field| field.name()).collect();
            return no_column(source, &fields, &there.join("`, `"));
        };
        let descriptor = schema.column(column);
        if descriptor.physical_type() != Type::BYTE_ARRAY {
            let (path, kind) = (source.path().display(), descriptor.physical_type());
            return Err(anyhow!("`{path}`: column `{name}` is {kind}, expected text"))
                .usage("name a column of strings with `--text-field`");
        }
        Ok(Self {
            source: source.clone(),
            column,
            name: name.into(),
            defined: descriptor.max_def_level(),
            file,
            group: 0,
            reader: None,
            rows: 0,
        })
    }

    fn read(&mut self) -> Result<Option<Piece>> {
        let (mut rows, mut bytes) = (Vec::new(), 0);
        while bytes < PIECE {
            let Some(reader) = &mut self.reader else {
                if self.group == self.file.num_row_groups() {
                    break;
                }
                let group = self.file.get_row_group(self.group)?;
                match group.get_column_reader(self.column)? {
                    ColumnReader::ByteArrayColumnReader(reader) => self.reader = Some(reader),
                    _ => return Err(anyhow!("the column changes its type")),
                }
                self.group += 1;
                let groups = self.file.num_row_groups() as u64;
                let size = self.source.path().metadata().map_or(0, |m| m.len());
                let (done, before) = (self.group as u64, self.group as u64 - 1);
                self.source.advance(size * done / groups - size * before / groups);
                continue;
            };
            let (mut values, mut levels) = (Vec::<ByteArray>::new(), Vec::<i16>::new());
            let wants_levels = (self.defined > 0).then_some(&mut levels);
            let (read, _, _) = reader.read_records(ROWS, wants_levels, None, &mut values)?;
            if read == 0 {
                self.reader = None;
                continue;
            }
            let mut values = values.into_iter();
            for i in 0..read {
                self.rows += 1;
                let is_null = levels.get(i).is_some_and(|level| *level < self.defined);
                let value = if is_null { None } else { values.next() };
                bytes += value.as_ref().map_or(0, ByteArray::len);
                rows.push(self.row(value));
            }
        }
        Ok(if rows.is_empty() { None } else { Some(Piece::Rows(rows)) })
    }

    fn row(&self, value: Option<ByteArray>) -> Row {
        match value.map(|value| String::from_utf8(value.data().to_vec())) {
            Some(Ok(text)) => Row::Text(text),
            Some(Err(e)) => {
                let at = format!("at byte {}", e.utf8_error().valid_up_to());
                Skipped::damaged("not UTF-8", self.rows, at)
            }
            None => {
                Skipped::damaged(format!("no text under `{}`", self.name), self.rows, "it is null")
            }
        }
    }
}

impl Iterator for Column {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let before = self.rows;
        let piece = self.read().transpose();
        if matches!(piece, Some(Err(_))) {
            self.group = self.file.num_row_groups();
            self.reader = None;
        }
        piece.map(|piece| {
            piece
                .with_context(|| format!("{} after row {before}", self.source.cannot("read")))
                .hint("copy the file again, or leave it out")
        })
    }
}
