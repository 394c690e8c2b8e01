//! Integration tests, one crate: one file a part.

mod generate;
