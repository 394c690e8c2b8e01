//! Text from a trained model, and the probability of a given text.
//!
//! Read [`plain`] (the loop over tokens), [`sampler`] (how a token is chosen), [`engine`] (many sequences at a time, on
//! the cache's [`blocks`]), then [`text`] (ids to text, stop strings), [`service`] (an engine on a thread of its own),
//! [`speculative`], [`score`].

pub mod blocks;
pub mod card;
pub mod engine;
pub mod load;
pub mod network;
pub mod plain;
pub mod request;
pub mod sampler;
pub mod score;
pub mod service;
pub mod speculative;
pub mod text;

pub use engine::{Engine, EngineOptions, Event, Request, generate};
pub use load::{Loaded, check_vocabulary};
pub use network::{Network, NetworkRef};
pub use plain::generate_plain;
pub use request::{FinishReason, GenerateOptions, Generation, Token};
pub use sampler::{Sampler, SamplingParams};
pub use score::{Score, score_tokens, score_windows};
pub use text::{TextGeneration, generate_text};
