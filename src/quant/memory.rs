//! Memory of weights, in large pages where the system gives them.
//!
//! A token reads every weight once, and 600 MB in pages of 4 KiB are 150,000 of them, each to be looked up: with pages of
//! 2 MiB one thread read a sixth to a third faster (`docs/LOG.md`).

use anyhow::{Context, Result};
use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};

/// Bytes of a large page on x86-64 and on ARM with pages of 4 KiB.
const LARGE: usize = 2 << 20;

/// Bytes that begin at a multiple of 64, of 2 MiB where they are that many.
#[derive(Debug)]
pub struct Memory {
    map: MmapMut,
    first: usize,
    len: usize,
}

impl Memory {
    /// `len` zeros.
    ///
    /// # Errors
    /// The system does not have so much.
    pub fn zeros(len: usize) -> Result<Self> {
        // Room to begin at a large page. What is never touched costs addresses, no memory.
        let spare = if len < LARGE { 0 } else { LARGE };
        let map = MmapMut::map_anon((len + spare).max(1))
            .with_context(|| format!("cannot get {len} bytes of memory for weights"))?;
        let start = map.as_ptr() as usize;
        let first = if spare == 0 { 0 } else { start.next_multiple_of(LARGE) - start };
        // A hint: nothing happens where it cannot be followed. Whole large pages only, since a part costs all of one.
        #[cfg(target_os = "linux")]
        if spare > 0 {
            let _ = map.advise_range(memmap2::Advice::HugePage, first, len / LARGE * LARGE);
        }
        Ok(Self { map, first, len })
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.first..self.first + self.len]
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.first..self.first + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_aligned_and_as_long_as_asked() {
        for len in [0, 1, 1000, LARGE - 1, LARGE, 3 * LARGE + 5] {
            let mut memory = Memory::zeros(len).unwrap();
            assert_eq!(memory.len(), len);
            assert!(memory.iter().all(|&byte| byte == 0));
            let align = if len < LARGE { 64 } else { LARGE };
            assert!((memory.as_ptr() as usize).is_multiple_of(align), "{len}");
            memory.fill(7);
            assert!(memory.iter().all(|&byte| byte == 7));
        }
    }
}
