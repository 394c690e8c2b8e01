//! Our folders of quantised matrices: what `convert --to hf --quantize int4` writes.
//!
//! In the place of a matrix `NAME.weight` (N, K) there are, in groups of 32, 64 or 128 neighbours of a row,
//!
//! | tensor          | 4 bits                                                           | 8 bits       |
//! |-----------------|------------------------------------------------------------------|--------------|
//! | `NAME.codes`    | U8 (N, K/2), value 2 j in the low half of byte j, 2 j + 1 in the high one | I8 (N, K) |
//! | `NAME.scales`   | F16 (N, K/group)                                                 | the same     |
//! | `NAME.minimums` | F16 (N, K/group)                                                 |              |
//!
//! `x = scale code + minimum`, in fp32. Bits and group of each matrix are those of the shapes; all else is Hugging Face's.
//! The files have names of their own ([`SINGLE`]), since transformers would take `model.safetensors` for a model
//! whose matrices are missing, and make random ones.

use super::tensors::Entry;
use super::weights::{Packed, Store, Weights};
use crate::bail_hint;
use crate::error::WithHint;
use crate::ffi::{self, TensorView};
use crate::model::ModelConfig;
use crate::quant::{Format, Groups, QuantMatrix, Scheme, obstacle};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use tch::{Kind, Tensor};

/// The weights, where they are in one file.
pub const SINGLE: &str = "quantized.safetensors";
/// Which shard has which tensor.
pub const INDEX: &str = "quantized.safetensors.index.json";
/// `quant_method` of `config.json`.
const METHOD: &str = "tinyllama";
/// Number of the layout above.
const VERSION: u64 = 1;
/// Ends of names.
const ENDS: [&str; 3] = [".codes", ".scales", ".minimums"];

/// `quantization_config` of a folder. For people: readers go by shapes.
pub fn config_json(scheme: Scheme) -> Value {
    let (bits, group) = match scheme {
        Scheme::Int4 { group } => (4, group),
        Scheme::Int8 { group } => (8, group),
        Scheme::Stored => return Value::Null,
    };
    json!({"quant_method": METHOD, "version": VERSION, "bits": bits, "group_size": group})
}

/// Whether a `config.json` is of such a folder.
///
/// # Errors
/// It is of weights that another program quantised.
pub fn is_one(config: &Value) -> Result<bool> {
    let Some(found) = config.get("quantization_config").filter(|q| !q.is_null()) else {
        return Ok(false);
    };
    let method = found.get("quant_method").and_then(Value::as_str).unwrap_or("none");
    if method != METHOD {
        bail_hint!(
            "take the weights that are not quantised, or a GGUF file of the model";
            "`quantization_config.quant_method`: expected `{METHOD}` (of `convert --quantize`), got `{method}`, which \
             is not supported"
        );
    }
    match found.get("version").and_then(Value::as_u64) {
        Some(VERSION) => Ok(true),
        other => bail_hint!(
            "write the folder again with this program: `convert SRC DST --to hf --quantize int4`";
            "`quantization_config.version`: expected {VERSION}, got {}",
            other.map_or("none".into(), |n| n.to_string())
        ),
    }
}

/// Whether a model can be written so, before anything is.
///
/// # Errors
/// An architecture that has no quantised form; rows that the groups do not divide, with all their names.
pub fn check(config: &ModelConfig, entries: &[Entry], scheme: Scheme) -> Result<()> {
    if let Some(problem) = obstacle(config) {
        return Err(anyhow!("this model cannot be quantised: {problem}"))
            .usage("leave `--quantize` out, or take `--to gguf`");
    }
    let problem = |entry: &Entry| {
        let format = format_of(entry, config, Some(scheme))?;
        let (k, group) = (entry.shape[1], format.group());
        let odd = k % group as i64 != 0;
        odd.then(|| format!("`{}`: rows of {k} values, expected a multiple of {group}", entry.name))
    };
    let problems: Vec<String> = entries.iter().filter_map(problem).collect();
    match problems.is_empty() {
        true => Ok(()),
        false => Err(anyhow!(
            "groups do not divide {} matrices:\n  {}",
            problems.len(),
            problems.join("\n  ")
        ))
        .usage("take smaller groups: `--quantize int4:32`"),
    }
}

/// How a parameter is written; `None`: as it is.
pub fn format_of(entry: &Entry, config: &ModelConfig, scheme: Option<Scheme>) -> Option<Format> {
    scheme.filter(|_| entry.shape.len() == 2).map(|scheme| scheme.format(&entry.name, config))
}

/// The tensors of a matrix `NAME.weight` of n rows of k values.
pub fn entries(name: &str, format: Format, n: i64, k: i64) -> Vec<Entry> {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let entry = |end: &str, kind, columns| Entry {
        name: format!("{name}{end}"),
        kind,
        shape: vec![n, columns],
    };
    let halves = k / format.group() as i64;
    match format {
        Format::Int8 { .. } => {
            vec![entry(ENDS[1], Kind::Half, halves), entry(ENDS[0], Kind::Int8, k)]
        }
        _ => vec![
            entry(ENDS[1], Kind::Half, halves),
            entry(ENDS[2], Kind::Half, halves),
            entry(ENDS[0], Kind::Uint8, k / 2),
        ],
    }
}

/// What [`entries`] names, of a whole parameter (N, K).
pub fn tensors(matrix: &QuantMatrix) -> Result<Vec<Tensor>> {
    let groups = matrix.groups().context("a matrix without groups")?;
    let bytes =
        [&groups.scales, &groups.minimums, &groups.codes].into_iter().filter(|b| !b.is_empty());
    let all = entries("", groups.format, groups.rows() as i64, groups.columns as i64);
    Ok(all
        .iter()
        .zip(bytes)
        .map(|(entry, bytes)| ffi::tensor_from_bytes(bytes, &entry.shape, entry.kind))
        .collect())
}

/// A folder's tensors with the matrices whole.
///
/// # Errors
/// Tensors of matrices that are missing, or of another shape or dtype, all at once.
pub fn whole(inner: Weights, dir: &Path) -> Result<Weights> {
    let (mut matrices, mut problems) = (BTreeMap::new(), Vec::new());
    let names: Vec<String> = inner.names().map(str::to_owned).collect();
    for name in &names {
        let Some((stem, end)) = split(name) else { continue };
        if end == ENDS[0] {
            match Matrix::of(&inner, stem) {
                Ok(matrix) => _ = matrices.insert(format!("{stem}.weight"), matrix),
                Err(problem) => problems.push(format!("{problem:#}")),
            }
        } else if !inner.has(&format!("{stem}{}", ENDS[0])) {
            problems.push(format!("`{stem}{}`: missing, `{name}` is there", ENDS[0]));
        }
    }
    if !problems.is_empty() {
        bail_hint!(
            "copy the folder again, or write it again by `convert --to hf --quantize`";
            "quantised matrices of `{}` are damaged:\n  {}", dir.display(), problems.join("\n  ")
        );
    }
    let mut out = Weights::default();
    out.add(Box::new(QuantisedStore { inner, matrices }), |name| Some(name.to_owned()))?;
    Ok(out)
}

/// `NAME` and the end of one of a matrix's tensors.
fn split(name: &str) -> Option<(&str, &'static str)> {
    ENDS.into_iter().find_map(|end| Some((name.strip_suffix(end)?, end)))
}

/// Where the tensors of a matrix are, and how it is stored.
struct Matrix {
    /// `NAME`.
    stem: String,
    format: Format,
    rows: usize,
    columns: usize,
}

impl Matrix {
    /// From the headers of its tensors.
    fn of(inner: &Weights, stem: &str) -> Result<Self> {
        let named = |end: &str| format!("{stem}{end}");
        let [codes, scales, minimums] = ENDS.map(named);
        let shape = |name: &str| inner.shape(name).unwrap_or_default();
        let is_int4 = match inner.kind(&codes)? {
            Kind::Uint8 => true,
            Kind::Int8 => false,
            _ => bail!(
                "`{codes}`: expected dtype U8 (4 bits) or I8, got {}",
                inner.stored_as(&codes)?
            ),
        };
        let &[n, width] = shape(&codes).as_slice() else {
            bail!("`{codes}`: expected a matrix, got shape {:?}", shape(&codes));
        };
        let k = if is_int4 { 2 * width } else { width };
        if !inner.has(&scales) {
            bail!("`{scales}`: missing, `{codes}` is there");
        }
        let got = shape(&scales);
        let group = [32, 64, 128].into_iter().find(|group| k % group == 0 && got == [n, k / group]);
        let Some(group) = group else {
            bail!("`{scales}`: expected shape [{n}, {k} / 32, 64 or 128], got {got:?}");
        };
        if is_int4 != inner.has(&minimums) {
            let expected = if is_int4 { "missing" } else { "not expected beside codes of 8 bits" };
            bail!("`{minimums}`: {expected}, `{codes}` is there");
        }
        for name in [&scales, &minimums].into_iter().take(1 + usize::from(is_int4)) {
            if shape(name) != got {
                bail!("`{name}`: expected shape {got:?}, got {:?}", shape(name));
            }
            if inner.kind(name)? != Kind::Half {
                bail!("`{name}`: expected dtype F16, got {}", inner.stored_as(name)?);
            }
        }
        let group = group as usize;
        let format = if is_int4 { Format::Int4 { group } } else { Format::Int8 { group } };
        Ok(Self { stem: stem.to_owned(), format, rows: n as usize, columns: k as usize })
    }
}

/// A folder's tensors with the matrices under their own names.
struct QuantisedStore {
    inner: Weights,
    matrices: BTreeMap<String, Matrix>,
}

impl QuantisedStore {
    /// A tensor's bytes, read rather than mapped: pages of a map count as memory of the process.
    fn bytes_of(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.inner.bytes(name)? as usize];
        if !self.inner.read(name, &mut bytes)? {
            let tensor = self.inner.tensor(name)?;
            bytes.copy_from_slice(ffi::bytes_of(&tensor).context("a tensor on the CPU")?);
        }
        Ok(bytes)
    }

    /// The ends of the tensors that a matrix has.
    fn ends(matrix: &Matrix) -> impl Iterator<Item = String> {
        let all = entries(&matrix.stem, matrix.format, 0, 0);
        all.into_iter().map(|entry| entry.name)
    }
}

impl Store for QuantisedStore {
    fn names(&self) -> Vec<String> {
        let plain = self.inner.names().filter(|name| split(name).is_none()).map(str::to_owned);
        plain.chain(self.matrices.keys().cloned()).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        match self.matrices.get(name) {
            Some(matrix) => Some(vec![matrix.rows as i64, matrix.columns as i64]),
            None => self.inner.shape(name),
        }
    }

    fn kind(&self, name: &str) -> Result<Kind> {
        self.matrices.get(name).map_or_else(|| self.inner.kind(name), |_| Ok(Kind::Float))
    }

    fn stored_as(&self, name: &str) -> Result<String> {
        match self.matrices.get(name) {
            Some(matrix) => Ok(matrix.format.to_string()),
            None => self.inner.stored_as(name),
        }
    }

    fn bytes(&self, name: &str) -> Result<u64> {
        match self.matrices.get(name) {
            Some(matrix) => Self::ends(matrix).map(|name| self.inner.bytes(&name)).sum(),
            None => self.inner.bytes(name),
        }
    }

    fn rows(&self, name: &str, rows: Range<i64>) -> Result<TensorView<'_>> {
        let Some(matrix) = self.matrices.get(name) else { return self.inner.rows(name, rows) };
        let part = |end: &str| {
            let name = format!("{}{end}", matrix.stem);
            self.inner.has(&name).then(|| self.inner.rows(&name, rows.clone())).transpose()
        };
        let [codes, scales, minimums] = [part(ENDS[0])?, part(ENDS[1])?, part(ENDS[2])?];
        fn bytes<'a>(part: &'a Option<TensorView>) -> Result<&'a [u8]> {
            let bytes = part.as_ref().map_or(Some(&[][..]), |part| ffi::bytes_of(part));
            bytes.context("a tensor on the CPU")
        }
        let groups = Groups {
            format: matrix.format,
            columns: matrix.columns,
            codes: bytes(&codes)?.into(),
            scales: bytes(&scales)?.into(),
            minimums: bytes(&minimums)?.into(),
        };
        let shape = [rows.end - rows.start, matrix.columns as i64];
        let mut out = Tensor::empty(shape, (Kind::Float, tch::Device::Cpu));
        groups.dequantise(ffi::floats_of_mut(&mut out).context("a tensor on the CPU")?);
        Ok(out.into())
    }

    fn is_quantised(&self, name: &str) -> bool {
        self.matrices.contains_key(name)
    }

    fn blocks(&self, name: &str) -> Result<Option<Packed<'_>>> {
        let Some(matrix) = self.matrices.get(name) else { return Ok(None) };
        let part = |end: &str| {
            let name = format!("{}{end}", matrix.stem);
            if self.inner.has(&name) { self.bytes_of(&name) } else { Ok(Vec::new()) }
        };
        Ok(Some(Packed::Grouped(Groups {
            format: matrix.format,
            columns: matrix.columns,
            codes: part(ENDS[0])?.into(),
            scales: part(ENDS[1])?.into(),
            minimums: part(ENDS[2])?.into(),
        })))
    }

    fn read(&self, name: &str, out: &mut [u8]) -> Result<bool> {
        if self.matrices.contains_key(name) { Ok(false) } else { self.inner.read(name, out) }
    }
}
