//! Saved optimizer state, read by name: whole tensors, or the parts of them that ranks wrote.

use super::tensors::TensorFile;
use anyhow::{Result, anyhow, bail};
use std::collections::BTreeMap;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// Tensors by name. A part `NAME@START` holds the values of `NAME` from START on; parts of a tensor may lie in several
/// files, cut in another way than they are asked for.
#[derive(Default)]
pub struct Moments {
    tensors: BTreeMap<String, Vec<Piece>>,
}

struct Piece {
    start: i64,
    shape: Vec<i64>,
    kind: Kind,
    source: Source,
}

enum Source {
    /// A file, and the name there.
    File(Rc<TensorFile>, String),
    Here(Tensor),
}

impl Piece {
    fn len(&self) -> i64 {
        self.shape.iter().product()
    }

    /// On the CPU, but for one that was given.
    fn read(&self) -> Result<Tensor> {
        match &self.source {
            Source::File(file, name) => file.tensor(name),
            Source::Here(tensor) => Ok(tensor.shallow_clone()),
        }
    }
}

/// `NAME@START` -> NAME and START, 0 where the name has none.
fn split(name: &str) -> (&str, i64) {
    let parsed = name.rsplit_once('@').and_then(|(name, at)| Some((name, at.parse().ok()?)));
    parsed.unwrap_or((name, 0))
}

impl Moments {
    /// Tensors in memory.
    pub fn of(tensors: &[(String, Tensor)]) -> Self {
        let mut all = Self::default();
        for (name, tensor) in tensors {
            all.add(name, tensor.size(), tensor.kind(), Source::Here(tensor.shallow_clone()));
        }
        all
    }

    /// Tensors of files, read when they are asked for.
    pub(super) fn of_files(files: Vec<TensorFile>) -> Result<Self> {
        let mut all = Self::default();
        for file in files.into_iter().map(Rc::new) {
            for name in file.names() {
                let (shape, kind) = (file.shape(&name).unwrap_or_default(), file.kind(&name)?);
                all.add(&name, shape, kind, Source::File(Rc::clone(&file), name.clone()));
            }
        }
        Ok(all)
    }

    fn add(&mut self, name: &str, shape: Vec<i64>, kind: Kind, source: Source) {
        let (name, start) = split(name);
        let pieces = self.tensors.entry(name.to_owned()).or_default();
        pieces.push(Piece { start, shape, kind, source });
        pieces.sort_by_key(|piece| piece.start);
    }

    /// Names without the starts of parts, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor or a part of this name, without start.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Dtype of the first tensor whose name begins so.
    pub fn kind_of(&self, prefix: &str) -> Option<Kind> {
        let (_, pieces) = self.tensors.iter().find(|(name, _)| name.starts_with(prefix))?;
        pieces.first().map(|piece| piece.kind)
    }

    /// A tensor, or with a name `NAME@START` so many values of one, put together from what was saved.
    ///
    /// # Errors
    /// None of that name; another dtype or shape; parts that do not cover what is asked for; a damaged file.
    pub fn get(&self, name: &str, kind: Kind, shape: &[i64]) -> Result<Tensor> {
        let (base, start) = split(name);
        let Some(pieces) = self.tensors.get(base) else { bail!("optimizer state lacks `{base}`") };
        let unlike = |piece: &Piece| {
            anyhow!(
                "optimizer state `{base}`: expected {kind:?} {shape:?}, got {:?} {:?}",
                piece.kind,
                piece.shape
            )
        };
        if let Some(piece) = pieces.iter().find(|piece| piece.kind != kind) {
            return Err(unlike(piece));
        }
        if let ([piece], true) = (&pieces[..], base == name) {
            // One that was saved flat, as a rank's part, may be all of the tensor.
            let flat = piece.shape.len() == 1 && piece.len() == shape.iter().product::<i64>();
            return match piece.start == 0 && (piece.shape == shape || flat) {
                true => Ok(piece.read()?.view(shape)),
                false => Err(unlike(piece)),
            };
        }
        self.put_together(name, pieces, start, kind, shape)
    }

    fn put_together(
        &self,
        name: &str,
        pieces: &[Piece],
        start: i64,
        kind: Kind,
        shape: &[i64],
    ) -> Result<Tensor> {
        let end = start + shape.iter().product::<i64>();
        let out = Tensor::empty([end - start], (kind, Device::Cpu));
        let mut at = start;
        for piece in pieces {
            let (first, last) = (piece.start.max(start), (piece.start + piece.len()).min(end));
            if first >= last {
                continue;
            }
            if first != at {
                break;
            }
            let from = piece.read()?.view([-1]).narrow(0, first - piece.start, last - first);
            out.narrow(0, first - start, last - first).copy_(&from);
            at = last;
        }
        if at != end {
            bail!("optimizer state `{name}`: expected values up to {end}, got them up to {at}");
        }
        Ok(out.view(shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &str, from: i64, to: i64) -> (String, Tensor) {
        (name.to_owned(), Tensor::arange_start(from, to, (Kind::Float, Device::Cpu)))
    }

    #[test]
    fn a_tensor_comes_together_from_parts_cut_anywhere() {
        let saved = Moments::of(&[part("m.a@4", 4, 10), part("m.a", 0, 4), part("m.a@10", 10, 12)]);
        let whole = Tensor::arange(12, (Kind::Float, Device::Cpu));
        assert!(saved.get("m.a", Kind::Float, &[3, 4]).unwrap().equal(&whole.view([3, 4])));
        for (start, len) in [(0, 12), (0, 3), (2, 4), (4, 6), (5, 7), (11, 1)] {
            let got = saved.get(&format!("m.a@{start}"), Kind::Float, &[len]).unwrap();
            assert!(got.equal(&whole.narrow(0, start, len)), "{start}, {len}");
        }
        // And a whole one is cut.
        let saved = Moments::of(&[("m.a".into(), whole.view([3, 4]))]);
        let got = saved.get("m.a@5", Kind::Float, &[3]).unwrap();
        assert!(got.equal(&whole.narrow(0, 5, 3)));
    }

    #[test]
    fn what_is_missing_or_of_another_kind_is_told_by_name() {
        let saved = Moments::of(&[part("m.a", 0, 4), part("m.a@6", 6, 8), part("m.b", 0, 4)]);
        let told =
            |name: &str, kind, shape: &[i64]| saved.get(name, kind, shape).unwrap_err().to_string();
        assert!(told("m.c@4", Kind::Float, &[2]).contains("lacks `m.c`"));
        assert!(
            told("m.a", Kind::Float, &[8]).contains("expected values up to 8, got them up to 4")
        );
        assert!(told("m.b", Kind::Float, &[5]).contains("expected Float [5], got Float [4]"));
        assert!(told("m.b@2", Kind::Float, &[3]).contains("up to 5, got them up to 4"));
        assert!(told("m.b", Kind::Half, &[4]).contains("expected Half [4], got Float [4]"));
    }
}
