//! llama.cpp's files: one holds weights, architecture and tokenizer.

use super::Opened;
use crate::checkpoint::gguf::{GgufFile, Metadata, TensorInfo, Type, llama, quants, vocab};
use crate::checkpoint::hf_config::{self, GENERATION};
use crate::checkpoint::names::Naming;
use crate::checkpoint::weights::{Packed, Store, Weights};
use crate::error::WithHint;
use crate::ffi::TensorView;
use anyhow::{Context, Result};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use tch::{Kind, Tensor};

pub(super) fn open(path: &Path) -> Result<Opened> {
    let file = GgufFile::open(path).hint("copy or download the file again")?;
    let told = || format!("in `{}`", path.display());
    let factors = match file.tensor(llama::ROPE_FACTORS) {
        Ok(tensor) => Some(file.dequantize(tensor)?),
        Err(_) => None,
    };
    let json = llama::config_json(file.metadata(), file.tensors(), factors.as_deref())
        .with_context(told)
        .hint("only models of the architecture `llama` are read from GGUF")?;
    let config = hf_config::from_json(&json).with_context(told)?;
    let tokenizer = tokenizer(file.metadata()).with_context(told)?;
    let mut weights = Weights::default();
    weights.add(Box::new(GgufStore::of(file)), |name| {
        (name != llama::ROPE_FACTORS).then(|| name.to_owned())
    })?;
    Ok(Opened { tokenizer, ..Opened::new("GGUF", config, Naming::Gguf, weights) })
}

/// The tokenizer inside and the ids that end a text as files of Hugging Face's; none where the file has no vocabulary.
fn tokenizer(m: &Metadata) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let file = match m.find_str("tokenizer.ggml.model")? {
        None | Some("none") => return Ok(Vec::new()),
        Some("llama") => ("tokenizer.model", vocab::pieces::tokenizer_model(m)?),
        Some(_) => ("tokenizer.json", serde_json::to_vec(&vocab::bpe::tokenizer_json(m)?)?),
    };
    let special = vocab::Special::of(m)?;
    let generation = hf_config::with_ends(Map::new(), special.bos, &special.ends());
    let json = |value: Value| serde_json::to_vec_pretty(&value);
    Ok(vec![
        file,
        ("tokenizer_config.json", json(vocab::tokenizer_config(m)?)?),
        (GENERATION, json(generation)?),
    ])
}

/// Tensors of a file; what is quantised comes in fp32.
struct GgufStore {
    file: GgufFile,
    places: HashMap<String, usize>,
}

impl GgufStore {
    fn of(file: GgufFile) -> Self {
        let place = |(i, tensor): (usize, &TensorInfo)| (tensor.name.clone(), i);
        let places = file.tensors().iter().enumerate().map(place).collect();
        Self { file, places }
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let place = self.places.get(name).with_context(|| format!("no tensor `{name}`"))?;
        Ok(&self.file.tensors()[*place])
    }
}

/// libtorch's dtype of what is no block of several values.
fn plain(kind: Type) -> Option<Kind> {
    match kind {
        Type::F32 => Some(Kind::Float),
        Type::F16 => Some(Kind::Half),
        Type::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

impl Store for GgufStore {
    fn names(&self) -> Vec<String> {
        self.file.tensors().iter().map(|tensor| tensor.name.clone()).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        Some(self.info(name).ok()?.shape.iter().map(|&n| n as i64).collect())
    }

    fn kind(&self, name: &str) -> Result<Kind> {
        let kind = self.info(name)?.kind;
        if !quants::readable(kind) {
            anyhow::bail!("`{name}`: the type {kind} cannot be read here");
        }
        Ok(plain(kind).unwrap_or(Kind::Float))
    }

    fn stored_as(&self, name: &str) -> Result<String> {
        Ok(self.info(name)?.kind.to_string())
    }

    fn bytes(&self, name: &str) -> Result<u64> {
        Ok(self.info(name)?.bytes()?)
    }

    fn is_quantised(&self, name: &str) -> bool {
        let quantised =
            |info: &TensorInfo| plain(info.kind).is_none() && quants::readable(info.kind);
        self.info(name).is_ok_and(quantised)
    }

    fn blocks(&self, name: &str) -> Result<Option<Packed<'_>>> {
        let info = self.info(name)?;
        Ok(self.is_quantised(name).then(|| Packed::Gguf(info.kind, self.file.bytes(info))))
    }

    fn rows(&self, name: &str, rows: Range<i64>) -> Result<TensorView<'_>> {
        let info = self.info(name)?;
        let mut shape = self.shape(name).unwrap_or_default();
        // A vector is one row there, and each of its values one here.
        let (row, whole) = (info.row(), shape.len() < 2);
        if let Some(n) = shape.first_mut() {
            *n = rows.end - rows.start;
        }
        let (start, end) = (rows.start as u64, rows.end as u64);
        match plain(info.kind) {
            Some(kind) => {
                let values = if whole { start..end } else { start * row..end * row };
                let size = kind.elt_size_in_bytes();
                let bytes = self.file.bytes(info);
                let bytes = &bytes[values.start as usize * size..values.end as usize * size];
                Ok(TensorView::over(bytes, &shape, kind))
            }
            None if whole => {
                let all = Tensor::from_slice(&self.file.dequantize(info)?);
                Ok(all.narrow(0, rows.start, rows.end - rows.start).into())
            }
            None => {
                let inner: u64 = info.shape[1..info.shape.len() - 1].iter().product();
                let values = self.file.dequantize_rows(info, start * inner..end * inner)?;
                Ok(Tensor::from_slice(&values).view(&*shape).into())
            }
        }
    }
}
