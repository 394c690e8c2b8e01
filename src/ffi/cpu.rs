//! Quantised products on the CPU (`csrc/cpu/quant_matmul.h`).

use rayon::prelude::*;
use std::sync::OnceLock;

unsafe extern "C" {
    fn tl_cpu_isa() -> i32;
    fn tl_panel_bytes(format: i32, k: i64, group: i32) -> i64;
    fn tl_quantise_activations(
        isa: i32,
        x: *const f32,
        rows: i64,
        k: i64,
        stride: i64,
        out: *mut ActivationBlock,
    );
    fn tl_quant_matmul(
        isa: i32,
        w: *const RawMatrix,
        x: *const ActivationBlock,
        rows: i64,
        n0: i64,
        n1: i64,
        y: *mut f32,
        stride: i64,
    );
}

/// Rows of a panel, and values of an activation block.
const PANEL: usize = 8;
const BLOCK: usize = 32;

/// `tl_activation_block`, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ActivationBlock {
    q: [i8; BLOCK],
    d: f32,
    s: f32,
    offset: [i16; 4],
}

#[repr(C)]
struct RawMatrix {
    panels: *const u8,
    n: i64,
    k: i64,
    format: i32,
    group: i32,
}

/// A quantised matrix (N, K) in panels of 8 rows.
#[derive(Debug)]
pub struct QuantPanels<'a> {
    pub panels: &'a [u8],
    pub rows: usize,
    pub columns: usize,
    /// A `tl_quant_format`.
    pub format: i32,
    pub group: i32,
}

/// The best instruction set that is known for this processor.
pub(super) fn isa() -> i32 {
    static ISA: OnceLock<i32> = OnceLock::new();
    // SAFETY: asks the processor, no more.
    *ISA.get_or_init(|| unsafe { tl_cpu_isa() })
}

/// Name of the instruction set in use.
pub fn cpu_isa() -> &'static str {
    match isa() {
        0 => "portable",
        1 => "AVX2",
        _ => "AVX-512 VNNI",
    }
}

/// Rounds rows of `columns` values, `stride` apart, to 8 bits.
///
/// # Panics
/// Where `columns` is no multiple of 32, or `out` has another size.
pub fn quantise_activations(x: &[f32], columns: usize, stride: usize, out: &mut [ActivationBlock]) {
    let rows = x.len() / stride;
    assert!(columns.is_multiple_of(BLOCK) && columns <= stride, "{columns} of {stride} values");
    assert_eq!(out.len(), rows * columns / BLOCK, "blocks of activations");
    let one = |(x, out): (&[f32], &mut [ActivationBlock])| {
        // SAFETY: x has `columns` values, `out` a block for each 32 of them.
        unsafe {
            let (k, stride) = (columns as i64, stride as i64);
            tl_quantise_activations(isa(), x.as_ptr(), 1, k, stride, out.as_mut_ptr());
        }
    };
    let blocks = out.chunks_mut(columns / BLOCK);
    if rows < 4 {
        return x.chunks(stride).zip(blocks).for_each(one);
    }
    x.par_chunks(stride).zip(out.par_chunks_mut(columns / BLOCK)).for_each(one);
}

/// Address of a result, for threads that write different parts of it.
#[derive(Clone, Copy)]
pub(super) struct Out(pub(super) *mut f32);
// SAFETY: `quant_matmul` gives each thread columns of its own, attention heads of its own.
unsafe impl Send for Out {}
unsafe impl Sync for Out {}

impl Out {
    pub(super) fn get(self) -> *mut f32 {
        self.0
    }
}

/// `y[m * stride + n]` = row m of x times row n of w, on all threads of rayon.
///
/// # Panics
/// Where sizes do not fit.
pub fn quant_matmul(
    w: &QuantPanels,
    x: &[ActivationBlock],
    rows: usize,
    y: &mut [f32],
    stride: usize,
) {
    let panels = w.rows.div_ceil(PANEL);
    // SAFETY: plain arithmetic.
    let bytes = unsafe { tl_panel_bytes(w.format, w.columns as i64, w.group) } as usize;
    assert!(bytes > 0 && w.panels.len() == panels * bytes, "panels of {bytes} bytes");
    assert_eq!(x.len(), rows * w.columns / BLOCK, "blocks of activations");
    if rows == 0 || w.rows == 0 {
        return;
    }
    assert!(w.rows <= stride || rows == 1, "rows of y overlap");
    assert!(y.len() >= (rows - 1) * stride + w.rows, "y is too short");
    let raw = RawMatrix {
        panels: w.panels.as_ptr(),
        n: w.rows as i64,
        k: w.columns as i64,
        format: w.format,
        group: w.group,
    };
    // A few pieces a thread: whoever is done first takes the next.
    let pieces = (rayon::current_num_threads() * 4).min(panels);
    let out = Out(y.as_mut_ptr());
    let raw = &RawShared(raw);
    (0..pieces).into_par_iter().for_each(|i| {
        let first = panels * i / pieces * PANEL;
        let last = (panels * (i + 1) / pieces * PANEL).min(w.rows);
        // SAFETY: sizes were checked; columns first..last are written by this piece alone.
        unsafe {
            let (n0, n1, stride) = (first as i64, last as i64, stride as i64);
            tl_quant_matmul(isa(), raw.get(), x.as_ptr(), rows as i64, n0, n1, out.get(), stride);
        }
    });
}

struct RawShared(RawMatrix);
// SAFETY: only read; the slice that it points into outlives the call.
unsafe impl Sync for RawShared {}

impl RawShared {
    fn get(&self) -> *const RawMatrix {
        &self.0
    }
}
