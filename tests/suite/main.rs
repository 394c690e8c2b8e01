//! All integration tests in one crate: one link instead of one a file.

mod metrics;
