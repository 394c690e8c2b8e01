//! Weights of 4 to 8 bits, on the CPU and on a CUDA card.
//!
//! Read [`llama`] (the forward pass), then [`matrix`] (how weights lie in memory and are multiplied), [`load`],
//! [`Groups`] (rows outside of panels). All that is for inference; [`nf4`] is a frozen weight that training runs through.

mod attention;
mod card;
mod groups;
pub mod llama;
mod load;
pub mod matrix;
mod memory;
pub mod nf4;
mod panel;
mod round;

pub use card::to_card;
pub use groups::Groups;
pub use llama::{QuantLlama, obstacle};
pub use load::{Scheme, load, quantise, round_matrix};
pub use matrix::{Format, QuantMatrix};

/// `stored`, `int4`, `int8`, or one of the latter with a group size, as in `int4:64`.
///
/// # Errors
/// Anything else, in words for a command line.
pub fn parse_scheme(text: &str) -> Result<Scheme, String> {
    let (name, group) =
        text.split_once(':').map_or((text, None), |(name, group)| (name, Some(group)));
    let group = match group {
        None => None,
        Some("32") => Some(32),
        Some("64") => Some(64),
        Some("128") => Some(128),
        Some(other) => return Err(format!("a group has 32, 64 or 128 values, got `{other}`")),
    };
    match (name, group) {
        ("stored", None) => Ok(Scheme::Stored),
        ("int4", group) => Ok(Scheme::Int4 { group: group.unwrap_or(64) }),
        ("int8", group) => Ok(Scheme::Int8 { group: group.unwrap_or(32) }),
        _ => Err("expected `int4`, `int8` or `stored`".into()),
    }
}
