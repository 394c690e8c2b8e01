//! Stub.

/// Kept between texts.
#[derive(Default)]
pub(super) struct State {}

pub(super) struct Fast {}

impl Fast {
    pub(super) fn encode(&self, _: &str, _: bool, _: &mut State, _: &mut Vec<u32>) -> bool {
        false
    }
    pub(super) fn safe_cut(&self, _: &str) -> Option<usize> {
        None
    }
}
