//! All integration tests, one crate: a test binary links libtorch, which is worth doing once.

mod gpu;


