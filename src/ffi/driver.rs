//! What the CUDA driver itself says, before and beside libtorch. The library is looked for at run
//! time, so that the same binary runs where there is none.

use cudarc::driver::result::{self, DriverError, ctx, device, primary_ctx};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

/// The driver library and the cards that it shows to this process.
pub struct Driver {
    /// Newest CUDA version that it runs: 13000 is 13.0.
    pub cuda: i32,
    /// The cards, in libtorch's order.
    pub cards: Vec<Card>,
    /// Why the driver shows no cards, as a CUDA error code's name; `None` where it merely has none.
    pub fault: Option<String>,
}

/// One card.
#[derive(Debug)]
pub struct Card {
    pub name: String,
    pub capability: (i32, i32),
    /// Bytes.
    pub total_memory: u64,
    /// Bytes that no process holds; `None` where the card lets this process make no context.
    pub free_memory: Option<u64>,
}

/// Whether the driver's library is there.
pub fn is_present() -> bool {
    // SAFETY: only looks for the shared library; cudarc's calls would panic without it.
    unsafe { sys::is_culib_present() }
}

/// The cards that the driver shows to this process.
pub fn card_count() -> usize {
    let count = || -> Result<i32, DriverError> {
        result::init()?;
        device::get_count()
    };
    if is_present() { count().map_or(0, |n| n.max(0) as usize) } else { 0 }
}

/// Asks the driver; `None` where there is no driver library. Makes and drops a context on each card,
/// which takes some tenths of a second.
pub fn query() -> Option<Driver> {
    if !is_present() {
        return None;
    }
    let mut cuda = 0;
    // SAFETY: the library is there and the pointer is to a live local; on failure it stays 0.
    unsafe { sys::cuDriverGetVersion(&mut cuda) };
    let (cards, fault) = match cards() {
        Ok(cards) => (cards, None),
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => (Vec::new(), None),
        Err(DriverError(code)) => (Vec::new(), Some(format!("{code:?}"))),
    };
    Some(Driver { cuda, cards, fault })
}

/// What tells a card from all others, on any node; `None` where there is no driver or no such card.
pub fn card_id(index: usize) -> Option<String> {
    if !is_present() {
        return None;
    }
    result::init().ok()?;
    let uuid = device::get_uuid(device::get(i32::try_from(index).ok()?).ok()?).ok()?;
    Some(uuid.bytes.iter().fold("GPU-".to_owned(), |id, byte| format!("{id}{:02x}", *byte as u8)))
}

fn cards() -> Result<Vec<Card>, DriverError> {
    result::init()?;
    (0..device::get_count()?).map(card).collect()
}

fn card(index: i32) -> Result<Card, DriverError> {
    let dev = device::get(index)?;
    // SAFETY: `dev` was returned by `device::get`.
    let attribute = |a| unsafe { device::get_attribute(dev, a) };
    Ok(Card {
        name: device::get_name(dev)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        total_memory: unsafe { device::total_mem(dev) }? as u64,
        free_memory: free_memory(dev).ok(),
    })
}

fn free_memory(dev: sys::CUdevice) -> Result<u64, DriverError> {
    // SAFETY: `dev` is a device, its primary context lives until it is released below, and no
    // context is current afterwards.
    unsafe {
        let context = primary_ctx::retain(dev)?;
        let free = ctx::set_current(context).and_then(|()| result::mem_get_info());
        ctx::set_current(std::ptr::null_mut())?;
        primary_ctx::release(dev)?;
        Ok(free?.0 as u64)
    }
}
