//! Large pages for tensors on the CPU.

use tch::{Device, Tensor};

/// Asks the system for huge pages (2 MiB on x86-64) for a contiguous CPU tensor that nobody has written yet. Memory then
/// comes 512 small pages at a time, each of which costs more to get than to fill. A hint: nothing happens where it
/// cannot be followed, and on other systems than Linux.
pub fn want_huge_pages(tensor: &Tensor) {
    const HUGE: usize = 2 << 20;
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() {
        return;
    }
    let start = tensor.data_ptr() as usize;
    let end = start + tensor.numel() * tensor.kind().elt_size_in_bytes();
    let (first, last) = (start.next_multiple_of(HUGE), end / HUGE * HUGE);
    #[cfg(target_os = "linux")]
    if first < last {
        use rustix::mm::{Advice, madvise};
        let skipped = first - start;
        // SAFETY: the pages lie wholly within the tensor's memory, and the advice changes no byte of them.
        let _ = unsafe {
            let address = tensor.data_ptr().cast::<u8>().add(skipped).cast();
            madvise(address, last - first, Advice::LinuxHugepage)
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (first, last);
}
