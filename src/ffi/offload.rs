//! Page-locked memory, and copies between it and a card beside the card's work.

use super::{Handle, check, cuda_functions, device_index, handle};
use anyhow::Result;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use tch::{Device, Tensor};

cuda_functions! {
    fn tl_page_locked(bytes: i64, device: c_int, out: *mut Handle) -> c_int;
    fn tl_link_new(
        device: c_int,
        slots: c_int,
        n: c_int,
        host: *mut Handle,
        card: *mut Handle,
        link: *mut *mut c_void,
    ) -> c_int;
    fn tl_link_load(link: *mut c_void, slot: c_int, start: i64, blocks: i64) -> c_int;
    fn tl_link_store(link: *mut c_void, slot: c_int, start: i64, blocks: i64) -> c_int;
    fn tl_link_wait(link: *mut c_void) -> c_int;
    fn tl_link_free(link: *mut c_void);
}

/// So many bytes of page-locked memory as a CPU tensor `(bytes,) u8`, given back with its last view. The values are
/// whatever was there.
///
/// # Errors
/// The system has not so much memory that can be kept from being paged out.
pub fn page_locked(bytes: i64, device: Device) -> Result<Tensor> {
    let mut out: Handle = null_mut();
    // SAFETY: on success `out` is a new tensor of this side's.
    check(unsafe { tl_page_locked(bytes, device_index(device), &mut out) })?;
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Two streams, one a direction, between page-locked tensors and slots of staging memory on a card
/// (`csrc/torch_cuda/offload.cpp`). It keeps the tensors until its copies are done.
#[derive(Debug)]
pub struct HostLink(*mut c_void);

impl HostLink {
    /// `host[i]`, page-locked, of shape `(blocks, ..)`; `card[i]` of `(slots, blocks of a slot, ..)` and its dtype.
    pub fn new(device: Device, slots: usize, host: &[&Tensor], card: &[&Tensor]) -> Result<Self> {
        assert_eq!(host.len(), card.len(), "host and card tensors of a link");
        let handles = |list: &[&Tensor]| list.iter().map(|t| handle(t)).collect::<Vec<_>>();
        let (mut from, mut to) = (handles(host), handles(card));
        let mut link = null_mut();
        // SAFETY: both arrays have as many entries as said; C++ checks the tensors and keeps handles of its own.
        check(unsafe {
            tl_link_new(
                device_index(device),
                slots as c_int,
                host.len() as c_int,
                from.as_mut_ptr(),
                to.as_mut_ptr(),
                &mut link,
            )
        })?;
        Ok(Self(link))
    }

    /// Copies `blocks` blocks of every host tensor, from `start` on, into a slot, once its last store is done. The
    /// current stream waits for it, the CPU does not.
    pub fn load(&self, slot: usize, start: i64, blocks: i64) -> Result<()> {
        // SAFETY: the link is live; C++ checks the numbers and keeps the memory.
        check(unsafe { tl_link_load(self.0, slot as c_int, start, blocks) })
    }

    /// Copies them back, after all work that the current stream was given so far. The CPU does not wait.
    pub fn store(&self, slot: usize, start: i64, blocks: i64) -> Result<()> {
        // SAFETY: as in `load`.
        check(unsafe { tl_link_store(self.0, slot as c_int, start, blocks) })
    }

    /// Makes the CPU wait for all copies.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the link is live.
        check(unsafe { tl_link_wait(self.0) })
    }
}

impl Drop for HostLink {
    fn drop(&mut self) {
        // SAFETY: made by `tl_link_new`, freed once.
        unsafe { tl_link_free(self.0) }
    }
}
