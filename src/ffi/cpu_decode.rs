//! What stands between quantised products on the CPU (`csrc/cpu/decode.h`): attention over a paged cache, RMSNorm,
//! SwiGLU, RoPE.

use super::cpu::{Out, isa};
use rayon::prelude::*;
use std::ffi::c_void;
use std::ptr::null_mut;

unsafe extern "C" {
    fn tl_cpu_cache_store(
        isa: i32,
        cache: *const RawCache,
        slot: i64,
        k: *const f32,
        v: *const f32,
    );
    fn tl_cpu_paged_attention(
        isa: i32,
        cache: *const RawCache,
        table: *const u32,
        group: i64,
        past: i64,
        t: i64,
        heads: i64,
        scale: f32,
        q: *const f32,
        q_stride: i64,
        out: *mut f32,
        out_stride: i64,
        scratch: *mut f32,
    );
    fn tl_cpu_attention_scratch(heads: i64, head_size: i64) -> i64;
    fn tl_cpu_rms_norm(isa: i32, x: *const f32, weight: *const f32, eps: f32, n: i64, y: *mut f32);
    fn tl_cpu_swiglu(isa: i32, gate_up: *const f32, n: i64, y: *mut f32);
    fn tl_cpu_rope(
        isa: i32,
        x: *mut f32,
        heads: i64,
        head_size: i64,
        rotated: i64,
        cos: *const f32,
        sin: *const f32,
    );
}

#[repr(C)]
struct RawCache {
    k: *mut c_void,
    v: *mut c_void,
    k_scale: *mut f32,
    v_scale: *mut f32,
    kind: i32,
    block_size: i64,
    groups: i64,
    head_size: i64,
}

/// Largest head size of [`PagedMemory::attend`]; sizes are multiples of 8.
pub const LARGEST_HEAD: usize = 256;

/// Keys and values of one layer, (slots, G, D) each.
#[derive(Debug)]
pub enum KeysAndValues<'a> {
    /// fp32
    F32 { k: &'a mut [f32], v: &'a mut [f32] },
    /// Bits of bf16.
    Bf16 { k: &'a mut [u16], v: &'a mut [u16] },
    /// Bits of fp16.
    F16 { k: &'a mut [u16], v: &'a mut [u16] },
    /// `x = scale q`; scales (slots, G).
    Int8 { k: &'a mut [i8], v: &'a mut [i8], k_scale: &'a mut [f32], v_scale: &'a mut [f32] },
}

/// A layer's cache in blocks: position p of a sequence lies in slot `table[p / size] * size + p % size`.
pub struct PagedMemory<'a> {
    raw: RawCache,
    slots: usize,
    /// Keeps the memory borrowed.
    _memory: KeysAndValues<'a>,
}
// SAFETY: threads share it only to read, in `attend`; `store` needs it mutably.
unsafe impl Sync for PagedMemory<'_> {}

/// The new tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpan<'a> {
    /// Its blocks.
    pub table: &'a [u32],
    /// Tokens before the new ones.
    pub past: usize,
    /// New tokens, whose keys and values the cache has already.
    pub tokens: usize,
    /// Row of the first of them in q and the output.
    pub row: usize,
}

impl<'a> PagedMemory<'a> {
    /// # Panics
    /// Where sizes do not fit each other, or the head size the kernels.
    pub fn new(
        memory: KeysAndValues<'a>,
        block_size: usize,
        groups: usize,
        head_size: usize,
    ) -> Self {
        assert!(
            head_size.is_multiple_of(8) && (8..=LARGEST_HEAD).contains(&head_size),
            "a head size of {head_size}: expected a multiple of 8 up to {LARGEST_HEAD}"
        );
        assert!(block_size > 0 && groups > 0, "blocks of {block_size}, {groups} groups");
        let mut memory = memory;
        let no_scale = (null_mut(), null_mut(), None);
        let (kind, k, v, len, (k_scale, v_scale, scales)) = match &mut memory {
            KeysAndValues::F32 { k, v } => {
                (0, k.as_mut_ptr().cast(), v.as_mut_ptr().cast(), (k.len(), v.len()), no_scale)
            }
            KeysAndValues::Bf16 { k, v } => {
                (1, k.as_mut_ptr().cast(), v.as_mut_ptr().cast(), (k.len(), v.len()), no_scale)
            }
            KeysAndValues::F16 { k, v } => {
                (2, k.as_mut_ptr().cast(), v.as_mut_ptr().cast(), (k.len(), v.len()), no_scale)
            }
            KeysAndValues::Int8 { k, v, k_scale, v_scale } => {
                let sizes = Some((k_scale.len(), v_scale.len()));
                let scales = (k_scale.as_mut_ptr(), v_scale.as_mut_ptr(), sizes);
                (3, k.as_mut_ptr().cast(), v.as_mut_ptr().cast(), (k.len(), v.len()), scales)
            }
        };
        let slots = len.0 / (groups * head_size);
        assert_eq!(len.0, slots * groups * head_size, "keys of {groups} x {head_size} a slot");
        assert_eq!(len.0, len.1, "keys and values");
        if let Some(scales) = scales {
            assert_eq!(scales, (slots * groups, slots * groups), "scales of keys and of values");
        }
        let (block_size, groups) = (block_size as i64, groups as i64);
        let head_size = head_size as i64;
        let raw = RawCache { k, v, k_scale, v_scale, kind, block_size, groups, head_size };
        Self { raw, slots, _memory: memory }
    }

    /// Keeps the keys and values (G, D) of one token.
    ///
    /// # Panics
    /// Where there is no such slot, or sizes do not fit.
    pub fn store(&mut self, slot: usize, k: &[f32], v: &[f32]) {
        let width = (self.raw.groups * self.raw.head_size) as usize;
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        assert!(k.len() == width && v.len() == width, "keys and values of {width}");
        // SAFETY: the slot exists, k and v are as long as it.
        unsafe { tl_cpu_cache_store(isa(), &self.raw, slot as i64, k.as_ptr(), v.as_ptr()) }
    }

    /// `out = softmax(scale q K^T) V` of each new token over its sequence up to itself, on all threads of rayon. A
    /// token's bits do not depend on the others.
    ///
    /// # Shapes
    /// q (N, stride), of which the first H*D of a row are the queries; out (N, H*D).
    ///
    /// # Panics
    /// Where sizes do not fit, or a table names a block that the cache does not have.
    pub fn attend(
        &self,
        spans: &[AttentionSpan],
        q: &[f32],
        stride: usize,
        heads: usize,
        scale: f32,
        out: &mut [f32],
    ) {
        let (g, d) = (self.raw.groups as usize, self.raw.head_size as usize);
        let (per_group, width) = (heads / g, heads * d);
        assert!(heads > 0 && heads.is_multiple_of(g), "{heads} heads in {g} groups");
        assert!(width <= stride, "queries of {width} in rows of {stride}");
        let mut next = 0; // rows are disjoint and in order
        for span in spans {
            assert!(span.row >= next, "row {} comes twice", span.row);
            next = span.row + span.tokens;
            self.check_table(span);
        }
        assert!(next <= q.len() / stride && next <= out.len() / width, "{next} rows");

        let tasks: Vec<_> = spans.iter().flat_map(|span| tasks_of(span, g)).collect();
        let to = Out(out.as_mut_ptr());
        // SAFETY: plain arithmetic.
        let scratch = unsafe { tl_cpu_attention_scratch(per_group as i64, d as i64) } as usize;
        let run = |scratch: &mut Vec<f32>, &(span, group, first, tokens): &Task| {
            let row = span.row + first;
            let (q, at) = (&q[row * stride + group * per_group * d..], row * width);
            // SAFETY: rows and tables were checked; each task writes heads of its own.
            unsafe {
                let out = to.get().add(at + group * per_group * d);
                let (past, t, heads) =
                    ((span.past + first) as i64, tokens as i64, per_group as i64);
                let (q, stride, width) = (q.as_ptr(), stride as i64, width as i64);
                let (table, group) = (span.table.as_ptr(), group as i64);
                let scratch = scratch.as_mut_ptr();
                tl_cpu_paged_attention(
                    isa(),
                    &self.raw,
                    table,
                    group,
                    past,
                    t,
                    heads,
                    scale,
                    q,
                    stride,
                    out,
                    width,
                    scratch,
                );
            }
        };
        tasks.par_iter().for_each_init(|| vec![0.0; scratch], run);
    }

    fn check_table(&self, span: &AttentionSpan) {
        let size = self.raw.block_size as usize;
        let blocks = (span.past + span.tokens).div_ceil(size);
        assert!(blocks <= span.table.len(), "{blocks} blocks, a table of {}", span.table.len());
        let most = span.table[..blocks].iter().max().map_or(0, |&b| (b as usize + 1) * size);
        assert!(most <= self.slots, "slot {most} of {}", self.slots);
    }
}

/// A span, a group, and its tokens: the first and how many.
type Task<'a> = (AttentionSpan<'a>, usize, usize, usize);

fn tasks_of<'a>(span: &AttentionSpan<'a>, groups: usize) -> impl Iterator<Item = Task<'a>> {
    const TOKENS: usize = 32;
    let span = *span;
    let pieces = (0..span.tokens).step_by(TOKENS);
    pieces.flat_map(move |first| {
        let tokens = TOKENS.min(span.tokens - first);
        (0..groups).map(move |group| (span, group, first, tokens))
    })
}

/// `y = x / sqrt(mean(x^2) + eps) * weight` of one row.
///
/// # Panics
/// Where sizes differ or are no multiple of 8.
pub fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let n = x.len();
    assert!(n.is_multiple_of(8) && weight.len() == n && y.len() == n, "a row of {n}");
    // SAFETY: all have n values.
    unsafe { tl_cpu_rms_norm(isa(), x.as_ptr(), weight.as_ptr(), eps, n as i64, y.as_mut_ptr()) }
}

/// `gate sigmoid(gate) up` of one row `[gate | up]`, in the place of gate.
///
/// # Panics
/// Where the halves are no multiples of 8.
pub fn swiglu_row(gate_up: &mut [f32]) {
    let n = gate_up.len() / 2;
    assert!(n.is_multiple_of(8) && gate_up.len() == 2 * n, "a row of {}", gate_up.len());
    let row = gate_up.as_mut_ptr();
    // SAFETY: the row has 2 n values; y may be gate_up.
    unsafe { tl_cpu_swiglu(isa(), row, n as i64, row) }
}

/// Turns the heads of one token: pairs (i, i + n / 2) of the first n values of each by angle i.
///
/// # Shapes
/// x (heads, D); cos, sin (n / 2).
///
/// # Panics
/// Where sizes do not fit.
pub fn rope_row(x: &mut [f32], head_size: usize, cos: &[f32], sin: &[f32]) {
    assert!(cos.len() == sin.len() && 2 * cos.len() <= head_size, "{} angles", cos.len());
    assert!(x.len().is_multiple_of(head_size), "{} values in heads of {head_size}", x.len());
    // SAFETY: sizes were checked.
    unsafe {
        let (heads, rotated) = ((x.len() / head_size) as i64, 2 * cos.len() as i64);
        let (cos, sin) = (cos.as_ptr(), sin.as_ptr());
        tl_cpu_rope(isa(), x.as_mut_ptr(), heads, head_size as i64, rotated, cos, sin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    /// Values in (-1, 1) that no two seeds share.
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    const S: usize = 77;
    const SIZE: usize = 5;
    const SLOTS: usize = 85;

    /// A cache of S tokens in shuffled blocks; what lies in no token's slot is NaN or junk.
    struct Filled {
        floats: [Vec<f32>; 2],
        halves: [Vec<u16>; 2],
        bytes: [Vec<i8>; 2],
        scales: [Vec<f32>; 2],
        table: Vec<u32>,
    }

    impl Filled {
        fn new(kind: i32, g: usize, d: usize) -> Self {
            let two = |n| [vec![f32::NAN; n], vec![f32::NAN; n]];
            let n = SLOTS * g * d;
            let mut filled = Self {
                floats: two(n),
                halves: [vec![u16::MAX; n], vec![u16::MAX; n]],
                bytes: [vec![99; n], vec![99; n]],
                scales: two(SLOTS * g),
                table: (0..17).map(|i| i * 7 % 17).collect(),
            };
            let table = filled.table.clone();
            let mut memory = filled.memory(kind, g, d);
            for p in 0..S {
                let slot = table[p / SIZE] as usize * SIZE + p % SIZE;
                let (k, v) = (noise(g * d, p as u64 + 1), noise(g * d, p as u64 + 1000));
                memory.store(slot, &k, &v);
            }
            filled
        }

        fn memory(&mut self, kind: i32, g: usize, d: usize) -> PagedMemory<'_> {
            let [fk, fv] = &mut self.floats;
            let [hk, hv] = &mut self.halves;
            let [bk, bv] = &mut self.bytes;
            let [sk, sv] = &mut self.scales;
            let memory = match kind {
                0 => KeysAndValues::F32 { k: fk, v: fv },
                1 => KeysAndValues::Bf16 { k: hk, v: hv },
                2 => KeysAndValues::F16 { k: hk, v: hv },
                _ => KeysAndValues::Int8 { k: bk, v: bv, k_scale: sk, v_scale: sv },
            };
            PagedMemory::new(memory, SIZE, g, d)
        }

        /// Value i of group `group` at position p: of the keys (0), of the values (1).
        fn at(&self, kind: i32, which: usize, (g, d): (usize, usize), p: usize, i: usize) -> f64 {
            let slot = self.table[p / SIZE] as usize * SIZE + p % SIZE;
            let at = slot * g * d + i;
            f64::from(match kind {
                0 => self.floats[which][at],
                1 => bf16::from_bits(self.halves[which][at]).to_f32(),
                2 => f16::from_bits(self.halves[which][at]).to_f32(),
                _ => self.scales[which][slot * g + i / d] * f32::from(self.bytes[which][at]),
            })
        }
    }

    #[test]
    fn attention_is_that_of_the_kept_keys_and_values_and_no_chunk_changes_a_bit() {
        for (h, g, d) in [(8, 2, 64), (4, 4, 40), (3, 1, 8)] {
            let (width, stride) = (h * d, (h + 2 * g) * d);
            let q = noise(S * stride, 5);
            for kind in 0..4 {
                let mut filled = Filled::new(kind, g, d);
                let table = filled.table.clone();
                let memory = filled.memory(kind, g, d);
                let run = |chunk: usize| {
                    let mut out = vec![f32::NAN; S * width];
                    for past in (0..S).step_by(chunk) {
                        let tokens = chunk.min(S - past);
                        let span = AttentionSpan { table: &table, past, tokens, row: past };
                        memory.attend(&[span], &q, stride, h, 0.3, &mut out);
                    }
                    out
                };
                let out = run(S);
                for chunk in [1, 6, 50] {
                    assert!(run(chunk) == out, "kind {kind}, chunks of {chunk}");
                }
                for (row, out) in out.chunks(width).enumerate().step_by(4) {
                    for head in 0..h {
                        let q = &q[row * stride + head * d..][..d];
                        let value =
                            |which, p, i| filled.at(kind, which, (g, d), p, head / (h / g) * d + i);
                        let score = |p: usize| {
                            (0..d).map(|i| f64::from(q[i]) * value(0, p, i)).sum::<f64>() * 0.3
                        };
                        let weights: Vec<f64> = (0..=row).map(|p| score(p).exp()).collect();
                        let sum: f64 = weights.iter().sum();
                        for i in 0..d {
                            let values =
                                weights.iter().enumerate().map(|(p, w)| w * value(1, p, i));
                            let expected = values.sum::<f64>() / sum;
                            let got = f64::from(out[head * d + i]);
                            assert!((got - expected).abs() < 1e-5, "{kind}: {got}, {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn stored_halves_are_the_nearest() {
        let filled = [Filled::new(1, 1, 8), Filled::new(2, 1, 8)];
        for p in 0..S {
            for (i, &x) in noise(8, p as u64 + 1).iter().enumerate() {
                let got = |f: &Filled, kind| f.at(kind, 0, (1, 8), p, i) as f32;
                assert_eq!(got(&filled[0], 1), bf16::from_f32(x).to_f32());
                assert_eq!(got(&filled[1], 2), f16::from_f32(x).to_f32());
            }
        }
    }

    #[test]
    fn norm_swiglu_and_rope_follow_their_formulas() {
        let (x, weight) = (noise(64, 1), noise(64, 2));
        let mut y = vec![0.0; 64];
        rms_norm_row(&x, &weight, 1e-3, &mut y);
        let mean = x.iter().map(|x| f64::from(x * x)).sum::<f64>() / 64.0 + 1e-3;
        for i in 0..64 {
            let expected = f64::from(x[i]) / mean.sqrt() * f64::from(weight[i]);
            assert!((f64::from(y[i]) - expected).abs() < 1e-6);
        }

        let mut row: Vec<f32> = noise(128, 3).iter().map(|x| 40.0 * x).collect();
        (row[0], row[1]) = (-200.0, 200.0);
        let before = row.clone();
        swiglu_row(&mut row);
        for i in 0..64 {
            let g = f64::from(before[i]);
            let expected = g / (1.0 + (-g).exp()) * f64::from(before[64 + i]);
            let error = (f64::from(row[i]) - expected).abs();
            assert!(error <= 1e-6 * expected.abs() + 1e-30, "{g}: {} {expected}", row[i]);
        }

        let angles: Vec<f32> = (0..12).map(|i| 0.3 * i as f32).collect();
        let (cos, sin): (Vec<_>, Vec<_>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let mut x = noise(2 * 40, 4);
        let before = x.clone();
        rope_row(&mut x, 40, &cos, &sin);
        for (x, b) in x.chunks(40).zip(before.chunks(40)) {
            for i in 0..12 {
                assert!((x[i] - (b[i] * cos[i] - b[i + 12] * sin[i])).abs() < 1e-6);
                assert!((x[i + 12] - (b[i + 12] * cos[i] + b[i] * sin[i])).abs() < 1e-6);
            }
            assert_eq!(x[24..], b[24..]);
        }
    }

    #[test]
    fn the_plain_form_gives_the_same_bits() {
        let (x, weight) = (noise(64, 1), noise(64, 2));
        let (mut a, mut b) = (vec![0.0; 64], vec![1.0; 64]);
        rms_norm_row(&x, &weight, 1e-3, &mut a);
        // SAFETY: all have 64 values.
        unsafe { tl_cpu_rms_norm(0, x.as_ptr(), weight.as_ptr(), 1e-3, 64, b.as_mut_ptr()) };
        assert_eq!(a, b);

        let mut row = noise(128, 3);
        // SAFETY: 128 values in, 64 out.
        unsafe { tl_cpu_swiglu(0, row.as_ptr(), 64, b.as_mut_ptr()) };
        swiglu_row(&mut row);
        assert_eq!(row[..64], b);

        let mut filled = Filled::new(2, 1, 16);
        let table = filled.table.clone();
        let memory = filled.memory(2, 1, 16);
        let (mut a, mut b) = (vec![0.0; S * 32], vec![1.0; S * 32]);
        let span = AttentionSpan { table: &table, past: 0, tokens: S, row: 0 };
        let q = noise(S * 32, 8);
        memory.attend(&[span], &q, 32, 2, 0.25, &mut a);
        let (raw, table) = (&raw const memory.raw, table.as_ptr());
        // SAFETY: the same sizes as above, and scratch as long as asked for.
        unsafe {
            let mut scratch = vec![0.0; tl_cpu_attention_scratch(2, 16) as usize];
            let (q, b, scratch) = (q.as_ptr(), b.as_mut_ptr(), scratch.as_mut_ptr());
            tl_cpu_paged_attention(0, raw, table, 0, 0, S as i64, 2, 0.25, q, 32, b, 32, scratch);
        }
        assert_eq!(a, b);
    }
}
