//! Parameters and tokenizer -> one GGUF file.

use crate::checkpoint::gguf::llama::{self, Llama3Rope};
use crate::checkpoint::gguf::mix::{Mix, Model};
use crate::checkpoint::gguf::vocab::{Special, bpe, pieces};
use crate::checkpoint::gguf::{GgufWriter, Metadata, TensorInfo, Type, quants};
use crate::checkpoint::hf_config::{self, Extras};
use crate::checkpoint::names::{self, Layout, Naming, disk_shape};
use crate::checkpoint::source::Parameters;
use crate::error::WithHint;
use crate::model::ModelConfig;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat_template::find_template;
use anyhow::{Context, Result, anyhow};
use sentencepiece_model::SentencePieceModel;
use serde_json::Value;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Values that are quantised at a time.
const CHUNK: i64 = 1 << 22;

/// The scheme that keeps a dtype.
pub(in crate::checkpoint) fn mix_of(kind: Kind) -> Mix {
    Mix::All(match kind {
        Kind::Half => Type::F16,
        Kind::BFloat16 => Type::BF16,
        _ => Type::F32,
    })
}

/// A file before it is written.
pub(in crate::checkpoint) struct Plan {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    /// For each tensor the parameter and the layout of its rows; none: the rotary factors.
    sources: Vec<Option<(usize, Layout)>>,
    factors: Option<Vec<f32>>,
}

impl Plan {
    /// `folder` holds the tokenizer, if there is one.
    ///
    /// # Errors
    /// No Llama, or a RoPE that llama.cpp does not have; a tokenizer that GGUF cannot say.
    pub fn of(
        config: &ModelConfig,
        parameters: &Parameters,
        mix: Mix,
        folder: Option<&Path>,
    ) -> Result<Self> {
        const HINT: &str = "only Llama models are written as GGUF; `--to hf` takes every model";
        let tokenizer = folder.map(Tokenizer::load).transpose()?;
        let ids = |id: fn(&Tokenizer) -> Option<u32>| tokenizer.as_ref().and_then(id);
        let (bos, eos) = (ids(Tokenizer::bos_id), ids(Tokenizer::eos_id));
        let json = hf_config::to_json(config, &Extras { dtype: "float32", bos, eos });
        let mut metadata = llama::metadata(&json, &config.name).hint(HINT)?;
        metadata.set("general.file_type", mix.file_type());
        metadata.set("general.quantization_version", 2u32);
        metadata.extend(match (folder, &tokenizer) {
            (Some(folder), Some(tokenizer)) => {
                vocabulary(folder, tokenizer, config.padded_vocab_size as usize)
                    .hint("the weights can be written without it: take the tokenizer's files out of the folder")?
            }
            _ => {
                let mut none = Metadata::default();
                none.set("tokenizer.ggml.model", "none");
                none
            }
        });
        let model = Model {
            layers: config.n_layer as u64,
            group: (config.n_head / config.n_query_groups) as u64,
            tied: config.tie_embeddings,
        };
        let (mut tensors, mut sources) = (Vec::new(), Vec::new());
        for (i, entry) in parameters.entries.iter().enumerate() {
            for part in Naming::Gguf.parts(&entry.name, config) {
                let shape = disk_shape(&entry.shape, part.layout);
                let shape: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
                let kind = mix.kind(&part.name, &shape, &model);
                tensors.push(TensorInfo::new(part.name, kind, &shape));
                sources.push(Some((i, part.layout)));
            }
        }
        let rope = Llama3Rope::of_config(&json);
        let factors = rope.map(|rope| rope.factors(config.rope_base, config.head_size as u64));
        if let Some(factors) = &factors {
            let shape = [factors.len() as u64];
            tensors.push(TensorInfo::new(llama::ROPE_FACTORS, Type::F32, &shape));
            sources.push(None);
        }
        Ok(Self { metadata, tensors, sources, factors })
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> Result<u64> {
        self.tensors.iter().try_fold(0, |sum, tensor| Ok(sum + tensor.bytes()?))
    }

    /// Writes the file, one parameter in memory at a time.
    pub fn write(&self, path: &Path, config: &ModelConfig, parameters: &Parameters) -> Result<()> {
        let mut writer = GgufWriter::create(path, &self.metadata, &self.tensors)?;
        let mut held: Option<(usize, Tensor)> = None;
        for (info, source) in self.tensors.iter().zip(&self.sources) {
            let Some((i, layout)) = *source else {
                let factors = self.factors.iter().flatten().flat_map(|x| x.to_le_bytes());
                writer.write(&factors.collect::<Vec<u8>>())?;
                continue;
            };
            let ours = match held.take() {
                Some((j, ours)) if j == i => ours,
                _ => parameters.get(i)?,
            };
            write_tensor(&mut writer, &names::to_disk(&ours, layout, config), info)?;
            held = Some((i, ours));
        }
        writer.finish()
    }
}

/// Quantises and writes some rows at a time.
fn write_tensor(writer: &mut GgufWriter, theirs: &Tensor, info: &TensorInfo) -> Result<()> {
    let rows = theirs.size().first().copied().unwrap_or(1);
    // A vector is one row.
    let step = match info.shape.len() {
        0 | 1 => rows,
        _ => (CHUNK / info.row() as i64).max(1),
    };
    let mut start = 0;
    while start < rows {
        let n = step.min(rows - start);
        let part = theirs.narrow(0, start, n).to_device(Device::Cpu).to_kind(Kind::Float);
        let values = Vec::<f32>::try_from(part.contiguous().view([-1]))?;
        writer.write(&quants::quantized(info.kind, &values)?)?;
        start += n;
    }
    Ok(())
}

/// `tokenizer.*` of a tokenizer's folder.
fn vocabulary(folder: &Path, tokenizer: &Tokenizer, rows: usize) -> Result<Metadata> {
    let json = read_json(&folder.join("tokenizer.json"))?;
    let model = folder.join("tokenizer.model");
    let model = match model.is_file() {
        true => Some(
            SentencePieceModel::from_slice(&std::fs::read(&model)?)
                .map_err(|e| anyhow!("{e}"))
                .with_context(|| format!("cannot read `{}`", model.display()))?,
        ),
        false => None,
    };
    let special = special(folder, tokenizer)?;
    match (json, model) {
        // Its scores are exact; but only `tokenizer.json` has what was added later.
        (_, Some(model)) if model.pieces().len() >= tokenizer.vocab_size() => {
            of_model(&model, rows, &special)
        }
        (Some(json), _) if json["model"]["byte_fallback"] == true => {
            pieces::check_normalizer(&json)?;
            let (list, exact) = pieces::of_tokenizer_json(&json, rows)?;
            if !exact {
                eprintln!(
                    "tokenizer   its merges are not SentencePiece's: llama.cpp may cut some texts elsewhere"
                );
            }
            Ok(pieces::metadata(&list, pieces::puts_space(&json), rows, &special)?)
        }
        (Some(json), _) => Ok(bpe::metadata(&json, rows, &special)?),
        (None, _) => Err(anyhow!("`{}` has no tokenizer that GGUF can hold", folder.display())),
    }
}

/// Pieces and normaliser of a `tokenizer.model`.
fn of_model(model: &SentencePieceModel, rows: usize, special: &Special) -> Result<Metadata> {
    let spec = model.normalizer().cloned().unwrap_or_default();
    let rules = spec.precompiled_charsmap().len();
    if rules > 0 {
        return Err(anyhow!(
            "`tokenizer.model` has the character rules `{}`: expected none, since GGUF has no place for them, got \
             {rules} bytes",
            spec.name()
        ));
    }
    let piece = |p: &sentencepiece_model::SentencePiece| pieces::Piece {
        text: p.piece().to_owned(),
        score: p.score(),
        kind: p.r#type() as i32,
    };
    let list: Vec<_> = model.pieces().iter().map(piece).collect();
    let mut m = pieces::metadata(&list, spec.add_dummy_prefix(), rows, special)?;
    if spec.remove_extra_whitespaces() {
        m.set("tokenizer.ggml.remove_extra_whitespaces", true);
        eprintln!("tokenizer   it takes extra spaces out, as the file says; llama.cpp keeps them");
    }
    Ok(m)
}

/// Ids with a meaning, and the template of chats.
fn special(folder: &Path, tokenizer: &Tokenizer) -> Result<Special> {
    let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let id = |key: &str| {
        let token = config[key].as_str().or(config[key]["content"].as_str())?;
        tokenizer.id_of(token)
    };
    // What ends a text beside eos: a turn, or a message.
    let mut turns = hf_config::end_ids(folder)?;
    turns.retain(|id| Some(*id) != tokenizer.eos_id() && tokenizer.token(*id).is_some());
    let (messages, turns): (Vec<u32>, Vec<u32>) =
        turns.into_iter().partition(|id| tokenizer.token(*id).as_deref() == Some("<|eom_id|>"));
    let (eot, more) = (turns.first().copied(), turns.get(1).copied());
    let eom = messages.first().copied().or(more);
    if let Some(left) = turns.iter().find(|id| Some(**id) != eot && Some(**id) != eom) {
        eprintln!("tokenizer   GGUF has a place for three ids that end a text: {left} is left out");
    }
    Ok(Special {
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_id(),
        eot,
        eom,
        unk: id("unk_token").or_else(|| tokenizer.id_of("<unk>")),
        pad: id("pad_token"),
        add_bos: tokenizer.use_bos(),
        add_eos: config["add_eos_token"].as_bool().unwrap_or(false),
        chat_template: find_template(folder)?.map(|(text, _)| text),
    })
}

/// A JSON file, if it is there.
fn read_json(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let told = || format!("cannot read `{}`", path.display());
    let text = std::fs::read_to_string(path).with_context(told)?;
    serde_json::from_str(&text).map(Some).with_context(told)
}
