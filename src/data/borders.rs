//! Where documents begin in packed rows, for `data.document_mask`.

use super::packed::PackedSet;
use crate::error::WithHint;
use crate::ops::Documents;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow};
use tch::Tensor;

/// How many tokens of a set are looked at for a border.
const LOOKED_AT: u64 = 1 << 20;

/// The ids that documents begin or end with. A document begins at the former, and after the latter; a row's first token
/// begins one, whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Borders {
    first: Option<i64>,
    last: Option<i64>,
}

impl Borders {
    /// Those of a tokenizer. Where both are one id (`<|endoftext|>` of GPT-NeoX), it ends documents, as
    /// `tinyllama prepare` writes it.
    ///
    /// # Errors
    /// It has neither.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let last = tokenizer.eos_id().map(i64::from);
        let first = tokenizer.bos_id().map(i64::from).filter(|&id| Some(id) != last);
        if (first, last) == (None, None) {
            return Err(anyhow!(
                "`data.document_mask`: expected a tokenizer with an end-of-text or beginning-of-text token, `tokenizer_dir` \
                 has one with neither"
            ))
            .usage("name the token in tokenizer_config.json (`eos_token`), or leave `data.document_mask` out");
        }
        Ok(Self { first, last })
    }

    /// Whether a document begins at `token`, which stands behind `before`.
    fn begins(self, before: i64, token: i64) -> bool {
        self.last == Some(before) || self.first == Some(token)
    }

    /// Where documents lie in rows of `t` tokens, one row behind the other in `tokens`.
    ///
    /// # Shapes
    /// tokens (B T) -> start, end (B, T) of i32 on the CPU.
    pub fn documents(self, tokens: &[i64], t: usize) -> Documents {
        let (mut start, mut end) = (vec![0_i32; tokens.len()], vec![0_i32; tokens.len()]);
        for (i, row) in tokens.chunks(t).enumerate() {
            let mut from = 0;
            for to in 1..=row.len() {
                if to == row.len() || self.begins(row[to - 1], row[to]) {
                    start[i * t + from..i * t + to].fill(from as i32);
                    end[i * t + from..i * t + to].fill(to as i32);
                    from = to;
                }
            }
        }
        let table = |values: &[i32]| Tensor::from_slice(values).view([-1, t as i64]); // (B, T)
        Documents::new(table(&start), table(&end))
    }

    /// Whether a border is among the first million tokens of a set.
    ///
    /// # Errors
    /// A file that went away or was cut; an id outside the vocabulary.
    pub fn are_in(self, set: &PackedSet, vocab_size: usize) -> Result<bool> {
        let n = set.len().min(LOOKED_AT);
        let tokens = set.read(0, n, vocab_size).context("cannot look for borders of documents")?;
        Ok(tokens.windows(2).any(|pair| self.begins(pair[0], pair[1])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths of the documents in each row.
    fn lengths(borders: Borders, tokens: &[i64], t: usize) -> Vec<Vec<i32>> {
        let documents = borders.documents(tokens, t);
        let (start, end): (Vec<i32>, Vec<i32>) = (
            Vec::try_from(documents.start.reshape([-1])).unwrap(),
            Vec::try_from(documents.end.reshape([-1])).unwrap(),
        );
        let begins = |i: usize| start[i] as usize == i % t;
        let row = |row: usize| {
            (row * t..(row + 1) * t).filter(|&i| begins(i)).map(|i| end[i] - start[i]).collect()
        };
        (0..tokens.len() / t).map(row).collect()
    }

    #[test]
    fn documents_begin_behind_an_end_and_at_a_beginning_and_at_each_row() {
        let both = Borders { first: Some(1), last: Some(2) };
        // The second row goes on with the first row's last document.
        let tokens = [1, 5, 2, 1, 5, 6, 7, 8, 2, 2, 1, 9];
        assert_eq!(lengths(both, &tokens, 6), [vec![3, 3], vec![3, 1, 2]]);
        let ends = Borders { first: None, last: Some(2) };
        assert_eq!(lengths(ends, &[5, 6, 2, 7, 8, 2], 6), [[3, 3]]);
        assert_eq!(lengths(ends, &[5, 6, 2, 7, 8, 2], 3), [[3], [3]]);
        let begins = Borders { first: Some(1), last: None };
        assert_eq!(lengths(begins, &[5, 1, 1, 7, 8, 9], 6), [[1, 1, 4]]);
        assert_eq!(lengths(begins, &[5, 6, 7], 3), [[3]]);
    }

    #[test]
    fn each_position_knows_its_own_document() {
        let borders = Borders { first: Some(1), last: Some(2) };
        let documents = borders.documents(&[7, 2, 7, 7, 1, 7], 6);
        let values = |x: &Tensor| Vec::<i32>::try_from(x.reshape([-1])).unwrap();
        assert_eq!(values(&documents.start), [0, 0, 2, 2, 4, 4]);
        assert_eq!(values(&documents.end), [2, 2, 4, 4, 6, 6]);
    }
}
