//! Which tensor of a Llama gets which type, as llama.cpp chooses them.

use super::Type;

/// A scheme for a whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Every matrix of one type: F32, F16, BF16, Q8_0, Q6_K; Q4_0 with a Q6_K head.
    All(Type),
    /// 4-bit K-quants, with 6 bits for the head, and for values and down-projections of half of the
    /// layers.
    Q4KM,
}

/// What the choice depends on beside the tensor.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Number of layers.
    pub layers: u64,
    /// Query heads a key head.
    pub group: u64,
    /// Whether the head is the embedding.
    pub tied: bool,
}

impl Mix {
    /// All schemes.
    pub const NAMES: [&str; 7] = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K_M", "Q4_0"];

    /// The scheme of a name: one of [`Mix::NAMES`].
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "Q4_K_M" => Some(Mix::Q4KM),
            _ => Type::from_name(name)
                .filter(|kind| Self::NAMES.contains(&&*kind.to_string()))
                .map(Mix::All),
        }
    }

    /// `general.file_type`.
    pub fn file_type(self) -> u32 {
        match self {
            Mix::All(Type::F32) => 0,
            Mix::All(Type::F16) => 1,
            Mix::All(Type::Q4_0) => 2,
            Mix::All(Type::Q8_0) => 7,
            Mix::All(Type::Q6_K) => 18,
            Mix::All(Type::BF16) => 32,
            Mix::Q4KM => 15,
            Mix::All(_) => 1024, // "guessed"
        }
    }

    /// Type of the tensor with this GGUF name and shape.
    pub fn kind(self, name: &str, shape: &[u64], model: &Model) -> Type {
        let matrix =
            shape.len() >= 2 && name.ends_with("weight") && !name.ends_with("_norm.weight");
        let row = shape.last().copied().unwrap_or(1);
        match self {
            _ if !matrix => Type::F32,
            Mix::All(kind @ (Type::F32 | Type::F16 | Type::BF16)) => kind,
            Mix::All(kind) => fallback(of_head(name, kind, row, model).unwrap_or(kind), row),
            Mix::Q4KM => {
                let head = of_head(name, Type::Q4_K, row, model);
                fallback(head.unwrap_or_else(|| in_layer(name, model)), row)
            }
        }
    }
}

/// The head, and an embedding that is the head too: 6 bits, or 8 where the row is no multiple of the
/// scheme's block.
fn of_head(name: &str, kind: Type, row: u64, model: &Model) -> Option<Type> {
    let head = name == "output.weight" || (model.tied && name == "token_embd.weight");
    head.then(|| match kind {
        Type::Q8_0 => Type::Q8_0,
        _ if !row.is_multiple_of(kind.block().0) => Type::Q8_0,
        _ => Type::Q6_K,
    })
}

/// Q4_K_M's choice for what is not the head.
fn in_layer(name: &str, model: &Model) -> Type {
    let parts = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, leaf)) = parts else { return Type::Q4_K };
    let more = layer.parse().is_ok_and(|layer| more_bits(layer, model.layers));
    // 80 layers with 8 query heads a key head: Llama 2 and 3 of 70B, whose small `attn_v` is worth it.
    let large = model.layers == 80 && model.group > 1;
    match leaf {
        "attn_v.weight" | "ffn_down.weight" if more => Type::Q6_K,
        "attn_v.weight" if large => Type::Q5_K,
        _ => Type::Q4_K,
    }
}

/// The first and last eighth of the layers, and every third between.
fn more_bits(layer: u64, layers: u64) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// A type whose block divides the row: for K-quants one of 32 values a block, else halves.
fn fallback(kind: Type, row: u64) -> Type {
    let fits = |kind: Type| row.is_multiple_of(kind.block().0);
    let other = match kind {
        _ if fits(kind) => return kind,
        Type::Q4_K => Type::Q5_0,
        Type::Q5_K => Type::Q5_1,
        Type::Q6_K => Type::Q8_0,
        other => other,
    };
    if fits(other) { other } else { Type::F16 }
}
