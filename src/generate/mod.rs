//! Text from a trained model, and the probability of a given text.
//!
//! Read [`engine`] (the loop over tokens), then [`sampler`] (how a token is chosen), [`text`] (ids
//! to text, stop strings), [`score`].

pub mod engine;
pub mod load;
pub mod sampler;
pub mod score;
pub mod text;

pub use engine::{FinishReason, GenerateOptions, Generation, Token, generate};
pub use load::{Loaded, check_vocabulary};
pub use sampler::{Sampler, SamplingParams};
pub use score::{Score, score_tokens, score_windows};
pub use text::{TextGeneration, generate_text};
