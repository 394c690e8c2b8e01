//! NF4: frozen weights of 4 bits a value for finetuning (QLoRA), in bitsandbytes' format.
//!
//! Values lie in memory order of the matrix in blocks of 64, the last one perhaps shorter:
//!
//! ```text
//! absmax[b] = max |w| over block b                        code[i] = nearest(w[i] * (1 / absmax[b]), TABLE)
//! w'[i]     = TABLE[code[i]] * absmax[b]
//! ```
//!
//! `TABLE` has 16 values, 0 and both ends among them, that a normally distributed weight uses about equally often. With
//! double quantisation the `absmax` are stored as bytes themselves, in blocks of 256:
//!
//! ```text
//! offset = mean(absmax)      d = absmax - offset      nested_absmax[c] = max |d| over block c
//! byte[b] = nearest(d[b] * (1 / nested_absmax[c]), MAP)    absmax'[b] = MAP[byte[b]] * nested_absmax[c] + offset
//! ```
//!
//! | bits a value | codes | scales                      | all   |
//! |--------------|-------|-----------------------------|-------|
//! | single       | 4     | 32 / 64                     | 4.5   |
//! | double       | 4     | 8 / 64 + 32 / (64 * 256)    | 4.127 |
//!
//! # Numerics
//! Each operation above is one rounding of fp32. A value just between two of a table gets the lower code. This is the
//! definition, which bitsandbytes' plain kernels follow; its others depart from it:
//! - in CUDA it divides approximately and breaks ties of `MAP` either way; a block of zeros gets code 0, which comes
//!   back as -0 (here 7: 0);
//! - on the CPU it divides a short last block by its absmax, and looks bytes up in a table that misses the nearest in 1
//!   of 1,000; AVX-512 dequantises with wrong scales where C is a multiple of 16 but not of 64;
//! - the last bits of its `MAP` depend on the processor ([`dynamic_map`]). So a weight has its own.
//!
//! Tests `nf4_codes_and_values_are_those_of_bitsandbytes`, `the_nf4_kernel_gives_the_references_bits`.
//!
//! # Source
//! arXiv 2305.14314 (QLoRA, section 3); `MAP`: arXiv 1511.04561; bitsandbytes 0.50.2 (`quantize_4bit`,
//! `dequantize_4bit`, `create_dynamic_map`, `csrc/kernels.cu`).

use crate::ffi::{Nf4Nested, Nf4Parts};
use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor, no_grad_guard};

/// Values that share an absmax.
pub const BLOCK: i64 = 64;
/// Values of absmax that share a nested one.
pub const NESTED_BLOCK: i64 = 256;

/// What the codes stand for: quantiles of the normal distribution, scaled to [-1, 1].
#[rustfmt::skip]
pub const TABLE: [f32; 16] = [
    -1.0, -0.696_192_8, -0.525_073_05, -0.394_917_5,
    -0.284_441_38, -0.184_773_43, -0.091_050_036, 0.0,
    0.079_580_3, 0.160_930_2, 0.246_112_3, 0.337_915_24,
    0.440_709_83, 0.562_617, 0.722_956_84, 1.0,
];

/// Smaller scales divide as this one, whose inverse is finite.
const SMALLEST_SCALE: f64 = 1e-38;

/// A weight (O, C) in NF4.
///
/// Handles on tensors of one device, as [`Tensor::shallow_clone`] makes them; nothing in it is ever written.
#[derive(Debug)]
pub struct Nf4Weight {
    /// (ceil(n / 2),) u8: values 2 i and 2 i + 1 in the high and the low half of byte i
    codes: Tensor,
    scales: Scales,
    /// (O, C)
    shape: (i64, i64),
}

#[derive(Debug)]
enum Scales {
    /// (ceil(n / 64),) fp32
    Single(Tensor),
    Double(Nested),
}

#[derive(Debug)]
struct Nested {
    /// (ceil(n / 64),) u8
    absmax: Tensor,
    /// (256,) fp32: what those bytes stand for
    map: Tensor,
    /// (ceil(n / 64 / 256),) fp32
    nested_absmax: Tensor,
    /// () fp32
    offset: Tensor,
}

impl Nf4Weight {
    /// Quantises a matrix (O, C) of fp32, bf16 or fp16, where it lies. `double`: its scales too. For a moment it takes
    /// some 20 bytes a value.
    ///
    /// # Errors
    /// Another shape or dtype; values that are not finite.
    ///
    /// # Sync
    /// Once, to know that all values are finite.
    pub fn quantize(weight: &Tensor, double: bool) -> Result<Self> {
        let _guard = no_grad_guard();
        ensure!(
            weight.dim() == 2 && weight.numel() > 0,
            "nf4: weight must be a matrix (O, C), got shape {:?}",
            weight.size()
        );
        ensure_float("weight", weight.kind())?;
        let shape = weight.size2()?;
        let flat = weight.detach().reshape([-1]).to_kind(Kind::Float); // (n,)
        let finite = flat.isfinite().all();
        ensure!(
            finite.int64_value(&[]) == 1,
            "nf4: weight {shape:?} has values that are not finite"
        );

        let table = Tensor::from_slice(&TABLE).to_device(weight.device());
        let (codes, absmax) = nearest_in_blocks(&flat, BLOCK, &table); // (blocks * 64,), (blocks,)
        let bytes = (flat.size()[0] + 1) / 2;
        let pairs = codes.narrow(0, 0, 2 * bytes).view([-1, 2]); // an odd last value: with the code of 0
        let codes = pairs.select(1, 0) * 16 + pairs.select(1, 1); // (bytes,)
        let scales = match double {
            false => Scales::Single(absmax),
            true => Scales::Double(Nested::quantize(&absmax)),
        };
        Ok(Self { codes, scales, shape })
    }

    /// The matrix (O, C) that it stands for, in fp32, bf16 or fp16: by plain operations of libtorch, on any device.
    /// [`crate::ops::nf4_dequantize`] is the fast one.
    ///
    /// # Errors
    /// Another dtype.
    pub fn dequantize(&self, kind: Kind) -> Result<Tensor> {
        let _guard = no_grad_guard();
        ensure_float("result", kind)?;
        let device = self.device();
        let (rows, columns) = self.shape;
        let absmax = match &self.scales {
            Scales::Single(absmax) => absmax.shallow_clone(),
            Scales::Double(nested) => nested.dequantize(),
        }; // (blocks,)
        let halves = [self.codes.bitwise_right_shift_tensor_scalar(4), self.codes.bitwise_and(15)];
        let codes = Tensor::stack(&halves, 1).view([-1]); // (n,) or (n + 1,)
        let values = look_up(&Tensor::from_slice(&TABLE).to_device(device), &codes);
        let values = in_blocks(&values, BLOCK) * absmax.unsqueeze(1); // (blocks, 64)
        Ok(values.view([-1]).narrow(0, 0, rows * columns).view([rows, columns]).to_kind(kind))
    }

    /// (O, C)
    pub fn shape(&self) -> (i64, i64) {
        self.shape
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        self.codes.device()
    }

    /// Whether the scales are quantised too.
    pub fn is_double(&self) -> bool {
        matches!(self.scales, Scales::Double(_))
    }

    /// Memory of codes and scales, in bytes.
    pub fn bytes(&self) -> usize {
        self.parts().iter().map(|(_, t)| t.numel() * t.kind().elt_size_in_bytes()).sum()
    }

    /// Another handle on the same memory.
    pub fn shallow_clone(&self) -> Self {
        self.map(Tensor::shallow_clone)
    }

    /// The same weight on another device; where it lies there already, a [`Self::shallow_clone`].
    pub fn to_device(&self, device: Device) -> Self {
        self.map(|t| t.to_device(device))
    }

    /// Its tensors by name, for saving: `codes` and `absmax`, and with double quantisation `nested_absmax`,
    /// `nested_quant_map`, `nested_offset`. Names other than `codes` are those of bitsandbytes' state.
    pub fn parts(&self) -> Vec<(&'static str, Tensor)> {
        let mut parts = vec![("codes", &self.codes)];
        match &self.scales {
            Scales::Single(absmax) => parts.push(("absmax", absmax)),
            Scales::Double(nested) => parts.extend([
                ("absmax", &nested.absmax),
                ("nested_absmax", &nested.nested_absmax),
                ("nested_quant_map", &nested.map),
                ("nested_offset", &nested.offset),
            ]),
        }
        parts.into_iter().map(|(name, t)| (name, t.shallow_clone())).collect()
    }

    /// The weight (O, C) of [`Self::parts`], which `part` gives by name. Double where `absmax` is of bytes.
    ///
    /// # Errors
    /// One that is missing, or of another shape, dtype or device than it should be.
    pub fn from_parts(shape: (i64, i64), part: impl Fn(&str) -> Option<Tensor>) -> Result<Self> {
        ensure!(shape.0 > 0 && shape.1 > 0, "nf4: a weight must be a matrix (O, C), got {shape:?}");
        let n = shape.0 * shape.1;
        let blocks = blocks_of(n, BLOCK);
        let device = part("codes").context("nf4: no tensor `codes`")?.device();
        let get = |name: &'static str, kind: Kind, size: &[i64]| -> Result<Tensor> {
            let t = part(name).with_context(|| format!("nf4: no tensor `{name}`"))?;
            let (got, expected) = ((t.kind(), t.size(), t.device()), (kind, size.to_vec(), device));
            ensure!(
                got == expected,
                "nf4: `{name}` of a weight {shape:?}: expected {expected:?}, got {got:?}"
            );
            Ok(t.contiguous())
        };
        let codes = get("codes", Kind::Uint8, &[(n + 1) / 2])?;
        let double = part("absmax").is_some_and(|t| t.kind() == Kind::Uint8);
        let scales = match double {
            false => Scales::Single(get("absmax", Kind::Float, &[blocks])?),
            true => Scales::Double(Nested {
                absmax: get("absmax", Kind::Uint8, &[blocks])?,
                map: get("nested_quant_map", Kind::Float, &[256])?,
                nested_absmax: get(
                    "nested_absmax",
                    Kind::Float,
                    &[blocks_of(blocks, NESTED_BLOCK)],
                )?,
                offset: get("nested_offset", Kind::Float, &[])?,
            }),
        };
        Ok(Self { codes, scales, shape })
    }

    /// For the kernels.
    pub(crate) fn raw(&self) -> Nf4Parts<'_> {
        let (absmax, nested) = match &self.scales {
            Scales::Single(absmax) => (absmax, None),
            Scales::Double(Nested { absmax, map, nested_absmax, offset }) => {
                (absmax, Some(Nf4Nested { map, absmax: nested_absmax, offset }))
            }
        };
        Nf4Parts { codes: &self.codes, absmax, nested, shape: self.shape }
    }

    fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        let scales = match &self.scales {
            Scales::Single(absmax) => Scales::Single(f(absmax)),
            Scales::Double(Nested { absmax, map, nested_absmax, offset }) => {
                Scales::Double(Nested {
                    absmax: f(absmax),
                    map: f(map),
                    nested_absmax: f(nested_absmax),
                    offset: f(offset),
                })
            }
        };
        Self { codes: f(&self.codes), scales, shape: self.shape }
    }
}

impl Nested {
    fn quantize(absmax: &Tensor) -> Self {
        let offset = absmax.mean(Kind::Float);
        let map = Tensor::from_slice(&dynamic_map()).to_device(absmax.device());
        let (bytes, nested_absmax) = nearest_in_blocks(&(absmax - &offset), NESTED_BLOCK, &map);
        let bytes = bytes.narrow(0, 0, absmax.size()[0]).contiguous(); // (blocks,)
        Self { absmax: bytes, map, nested_absmax, offset }
    }

    /// (blocks,) fp32
    fn dequantize(&self) -> Tensor {
        let values = in_blocks(&look_up(&self.map, &self.absmax), NESTED_BLOCK);
        let values = values * self.nested_absmax.unsqueeze(1); // a product and a sum: two roundings
        values.view([-1]).narrow(0, 0, self.absmax.size()[0]) + &self.offset
    }
}

/// The 256 values of 8-bit dynamic quantisation, in order: 0, 1, and of both signs for i = 0, .., 6 the middles of 2^i
/// equal parts of [0.1, 1], times 10^(i - 6).
///
/// bitsandbytes computes them by `torch.linspace`, which rounds `0.1 + j step` once where the processor has fused
/// products and sums (all of x86 since 2013), as here, and twice where not: then 42 values differ in their last bit or
/// two.
pub fn dynamic_map() -> [f32; 256] {
    let mut map = [0.0; 256];
    map[1] = 1.0;
    let mut n = 2;
    for i in 0..7 {
        let parts = 1 << i;
        let step = (1.0 - 0.1) / parts as f32;
        // From the nearer end, as linspace.
        let border = |j: i32| match j < (parts + 1) / 2 {
            true => step.mul_add(j as f32, 0.1),
            false => (-step).mul_add((parts - j) as f32, 1.0),
        };
        for j in 0..parts {
            let middle = (border(j) + border(j + 1)) / 2.0;
            let value = 10f64.powi(i - 6) as f32 * middle;
            (map[n], map[n + 1]) = (value, -value);
            n += 2;
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// Indices (blocks * block,) u8 of the nearest values in a sorted table, of two equally near ones the lower, and the
/// largest magnitude (blocks,) of each block of x (n,). Values behind the end are 0.
fn nearest_in_blocks(x: &Tensor, block: i64, table: &Tensor) -> (Tensor, Tensor) {
    let x = in_blocks(x, block); // (blocks, block)
    let absmax = x.abs().amax([1].as_slice(), true); // (blocks, 1)
    let scaled = &x * absmax.clamp_min(SMALLEST_SCALE).reciprocal();
    let n = table.size()[0];
    let borders = (table.narrow(0, 0, n - 1) + table.narrow(0, 1, n - 1)) / 2.0;
    let index = scaled.bucketize(&borders, true, false).to_kind(Kind::Uint8);
    (index.view([-1]), absmax.view([-1]))
}

/// table[index], in the shape of the index (n,).
fn look_up(table: &Tensor, index: &Tensor) -> Tensor {
    table.index_select(0, &index.to_kind(Kind::Int))
}

/// (n,) -> (blocks, block), zeros behind the end.
fn in_blocks(x: &Tensor, block: i64) -> Tensor {
    let n = x.size()[0];
    x.constant_pad_nd([0, blocks_of(n, block) * block - n]).view([-1, block])
}

fn blocks_of(n: i64, block: i64) -> i64 {
    (n + block - 1) / block
}

fn ensure_float(what: &str, kind: Kind) -> Result<()> {
    match kind {
        Kind::Float | Kind::BFloat16 | Kind::Half => Ok(()),
        other => bail!("nf4: {what} must be fp32, bf16 or fp16, got {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pivots of the decision tree in bitsandbytes' CUDA kernel (`dQuantizeNF4`), in order.
    #[rustfmt::skip]
    const PIVOTS: [f32; 15] = [
        -0.848_096_4, -0.610_632_9, -0.459_995_27, -0.339_679_43, -0.234_607_4,
        -0.137_911_73, -0.045_525_018, 0.039_790_15, 0.120_255_25, 0.203_521_25,
        0.292_013_77, 0.389_312_54, 0.501_663_45, 0.642_786_9, 0.861_478_45,
    ];

    fn codes_of(values: &[f32], table: &[f32]) -> Vec<i64> {
        let (x, table) = (Tensor::from_slice(values), Tensor::from_slice(table));
        let (codes, _) = nearest_in_blocks(&x, values.len() as i64, &table);
        Vec::try_from(codes.to_kind(Kind::Int64)).unwrap()
    }

    #[test]
    fn a_value_on_a_pivot_of_bitsandbytes_gets_the_lower_code_and_the_next_number_the_upper() {
        for (i, pivot) in PIVOTS.into_iter().enumerate() {
            let codes = codes_of(&[1.0, pivot, pivot.next_down(), pivot.next_up()], &TABLE);
            let i = i as i64;
            assert_eq!(codes, [15, i, i, i + 1], "{pivot}");
        }
    }

    #[test]
    fn the_values_of_the_tables_are_their_own_nearest() {
        let map = dynamic_map();
        assert_eq!(codes_of(&TABLE, &TABLE), (0..16).collect::<Vec<_>>());
        assert_eq!(codes_of(&map, &map), (0..256).collect::<Vec<_>>());
    }

    #[test]
    fn the_dynamic_map_has_seven_decades_of_both_signs() {
        let map = dynamic_map();
        assert!(map.is_sorted_by(|a, b| a < b));
        assert_eq!((map[127], map[255], map[0]), (0.0, 1.0, -0.992_968_74));
        assert!((map[128] - 5.5e-7).abs() < 1e-13); // 0.55, the middle of the whole, times 1e-6
        assert!((1..127).all(|i| map[127 - i] == -map[127 + i]));
    }

    #[test]
    fn a_matrix_of_zeros_comes_back_as_zeros_of_positive_sign() {
        for double in [false, true] {
            let zeros = Tensor::zeros([3, 50], (Kind::BFloat16, Device::Cpu));
            let back = Nf4Weight::quantize(&zeros, double).unwrap().dequantize(Kind::Float);
            assert_eq!(crate::ffi::tensor_bytes(&back.unwrap()), [0; 3 * 50 * 4]);
        }
    }
}
