//! Number formats in which AdamW keeps weights and moments in fewer bytes, as plain ATen operations.
//!
//! `csrc/adamw.cu` computes the same, bit for bit where both start from the same fp32 values: each operation here
//! is one rounding of IEEE fp32, or one of integers.
//!
//! | format                     | bytes a parameter | what is lost                                     |
//! |----------------------------|-------------------|--------------------------------------------------|
//! | `master: fp32`             | 4 + 2 (bf16 copy) | nothing                                          |
//! | `master: split`            | 2 + 2             | nothing: [`join`] gives the fp32 value back      |
//! | `master: bf16`             | 2                 | 16 bits a step, unbiased ([`stochastic_bf16`])   |
//! | `state: fp32`              | 8                 | nothing                                          |
//! | `state: bf16`              | 4                 | 16 bits a step, unbiased                         |
//! | `state: int8`              | 2 + 8 / 256       | all but 8 bits and a scale a block, unbiased     |
//!
//! # Why stochastic rounding
//! A step changes `v = b2 v + (1 - b2) g^2` by a share of `1 - b2`: 5 % at 0.95, 0.1 % at 0.999. bf16 values lie
//! 0.4 to 0.8 % apart, the codes of [`quantize_unsigned`] 1.6 % and more. Rounded to the nearest, `v` would stay
//! where it is for ever once a gradient becomes small. Rounded up with a probability equal to the distance from
//! below, it moves as it should on average. The same holds for `m` where b1 is near 1, and for a bf16 weight,
//! whose step of about lr is below half its spacing as soon as it is larger than 256 lr.

use tch::{Device, Kind, Tensor};

/// Elements that share one scale in `state: int8`.
pub const BLOCK: i64 = 256;

/// Blocks whose largest magnitude is not above this are kept as zeros: 1 / scale must be finite.
const SMALLEST_SCALE: f64 = 1e-28;

// ---- rounding to bf16 ------------------------------------------------------------------------------------

/// fp32 -> bf16, to the nearest; a value halfway between two goes to the one of larger magnitude.
///
/// Half-way cases (one value in 131,072) decide whether [`split`] can be exact: to an even neighbour, as IEEE
/// has it, 65,537 fp32 values round to each bf16 value with an even last bit, and 16 more bits cannot tell them
/// apart. Away from zero they are 65,536 everywhere. Both rules have the same error bound. NaN stays NaN.
pub fn nearest_bf16(x: &Tensor) -> Tensor {
    let bits = bits_of(x);
    let rounded = (&bits + 0x8000).bitwise_right_shift_tensor_scalar(16);
    // inf and nan: cut, with a bit set that keeps nan from becoming inf.
    let cut = bits.bitwise_right_shift_tensor_scalar(16);
    let cut = cut.bitwise_or_tensor(&(x.isnan().to_kind(Kind::Int) * 0x40));
    to_bf16(&rounded.where_self(&is_finite(&bits), &cut))
}

/// fp32 -> bf16, up in magnitude with a probability of (distance from below) / (distance of the neighbours), so
/// that the expected result is x. `noise`: uniform in [0, 65536), of the shape of x ([`Noise`]).
pub fn stochastic_bf16(x: &Tensor, noise: &Tensor) -> Tensor {
    let bits = bits_of(x);
    let rounded = (&bits + noise).bitwise_right_shift_tensor_scalar(16);
    to_bf16(&bits_of_bf16(&nearest_bf16(x)).where_self(&is_finite(&bits).logical_not(), &rounded))
}

/// fp32 -> (bf16 value to the nearest, the 16 bits that it lacks as int16).
///
/// With bits(x) the 32 bits of x: `weight = (bits(x) + 0x8000) >> 16` and `low = bits(x) & 0xffff`. Magnitudes
/// are ordered as their bits are, so that this also carries into the exponent as rounding does.
pub fn split(x: &Tensor) -> (Tensor, Tensor) {
    (nearest_bf16(x), bits_of(x).to_kind(Kind::Int16))
}

/// What [`split`] cut, bit for bit: `bits(x) = (weight << 16) + low`. Where `low` is negative as int16, that is
/// at least 0x8000, the weight had been rounded up, and adding it takes that back.
pub fn join(weight: &Tensor, low: &Tensor) -> Tensor {
    let high = bits_of_bf16(weight) * 0x10000;
    (high + low).view_dtype(Kind::Float)
}

fn bits_of(x: &Tensor) -> Tensor {
    x.detach().contiguous().view_dtype(Kind::Int)
}

fn bits_of_bf16(x: &Tensor) -> Tensor {
    x.detach().view_dtype(Kind::Int16).to_kind(Kind::Int)
}

fn to_bf16(high: &Tensor) -> Tensor {
    high.to_kind(Kind::Int16).view_dtype(Kind::BFloat16)
}

fn is_finite(bits: &Tensor) -> Tensor {
    bits.bitwise_and(0x7f80_0000).ne(0x7f80_0000)
}

// ---- 8 bits a moment -------------------------------------------------------------------------------------

/// Signed fp32 -> int8 codes of the same shape and one fp32 scale for each [`BLOCK`] elements, `(ceil(n / 256),)`.
///
/// `s = max |x|` over the block; code q stands for `sign(q) s (q / 127)^2`. Spacing the codes by their square
/// keeps two significant digits down to 1/1000 of the block's largest value; the smallest is 1/16,129 of it.
/// Between two codes one is drawn, so that the expected value is x. `noise` as in [`stochastic_bf16`].
///
/// # Source
/// Block-wise 8-bit moments: arXiv 2110.02861, there with a table of 256 values and rounding to the nearest.
pub fn quantize_signed(x: &Tensor, noise: &Tensor) -> (Tensor, Tensor) {
    let (blocks, u) = (in_blocks(x), uniform(noise)); // (blocks, 256)
    let scale = blocks.abs().amax([1].as_slice(), true); // (blocks, 1)
    let y = blocks.abs() * inverse(&scale, 16_129.0);
    let q = y.sqrt().floor().clamp_max(126.0);
    let up = (u * (&q * 2.0 + 1.0)).lt_tensor(&(y - &q * &q));
    let code = (q + up) * blocks.sign();
    (out_of_blocks(&code.to_kind(Kind::Int8), x), scale.view([-1]))
}

/// fp32 >= 0 -> uint8 codes and scales, as [`quantize_signed`]: code q stands for `s (q / 255)^4`.
///
/// The fourth power, since AdamW divides by the root: of `sqrt(v)`, codes are spaced by their square as those of
/// the first moment are. Above 0 no value becomes 0, which would make a huge step of `m / (sqrt(0) + eps)`:
/// below the smallest code, `s / 4.2e9`, values round up to it, and steps come out smaller.
pub fn quantize_unsigned(x: &Tensor, noise: &Tensor) -> (Tensor, Tensor) {
    let (blocks, u) = (in_blocks(x), uniform(noise)); // (blocks, 256)
    let scale = blocks.amax([1].as_slice(), true); // (blocks, 1)
    let z = (blocks * inverse(&scale, 4_228_250_625.0)).sqrt(); // q^2 of a value between codes
    let q = z.sqrt().floor().clamp_max(254.0);
    let q2 = &q * &q;
    // (z^2 - q^4) / ((q + 1)^4 - q^4), by factors: fp32 has too few digits for the fourth powers.
    let above = (&z - &q2) * (&z + &q2);
    let up = (u * ((&q * 2.0 + 1.0) * (q2 * 2.0 + (&q * 2.0 + 1.0)))).lt_tensor(&above);
    let code = (q + up).maximum(&z.gt(0.0).to_kind(Kind::Float));
    (out_of_blocks(&code.to_kind(Kind::Uint8), x), scale.view([-1]))
}

/// fp32 values of the codes of [`quantize_signed`].
pub fn dequantize_signed(code: &Tensor, scale: &Tensor) -> Tensor {
    let q = in_blocks(&code.to_kind(Kind::Float)); // (blocks, 256)
    out_of_blocks(&(&q * q.abs() * (scale * (1.0 / 16_129.0)).unsqueeze(1)), code)
}

/// fp32 values of the codes of [`quantize_unsigned`].
pub fn dequantize_unsigned(code: &Tensor, scale: &Tensor) -> Tensor {
    let q2 = in_blocks(&code.to_kind(Kind::Float)).square(); // (blocks, 256)
    out_of_blocks(&(q2.square() * (scale * (1.0 / 4_228_250_625.0)).unsqueeze(1)), code)
}

/// Scales that a tensor of n elements has.
pub fn n_blocks(n: i64) -> i64 {
    (n + BLOCK - 1) / BLOCK
}

/// Any shape -> (blocks, 256), zeros behind the end.
fn in_blocks(x: &Tensor) -> Tensor {
    let n = x.numel() as i64;
    x.reshape([-1]).constant_pad_nd([0, n_blocks(n) * BLOCK - n]).view([-1, BLOCK])
}

/// (blocks, 256) -> the shape of `like`.
fn out_of_blocks(x: &Tensor, like: &Tensor) -> Tensor {
    x.reshape([-1]).narrow(0, 0, like.numel() as i64).reshape(like.size())
}

/// top / scale, or 0 where the scale is too small for it.
fn inverse(scale: &Tensor, top: f64) -> Tensor {
    let quotient = scale.full_like(top) / scale;
    quotient.where_self(&scale.gt(SMALLEST_SCALE), &scale.zeros_like())
}

/// 16 random bits -> (blocks, 256) in (0, 1).
fn uniform(noise: &Tensor) -> Tensor {
    (in_blocks(noise).to_kind(Kind::Float) + 0.5) * (1.0 / 65_536.0)
}

// ---- random bits -----------------------------------------------------------------------------------------

/// Uniform in [0, 65536) as int32, for each element of a tensor and each of the values kept of it.
///
/// A hash of (key, index of the element): nothing is stored, and a resumed run draws what it would have drawn.
/// With `mix` the finaliser of MurmurHash3 and the key's halves k0, k1:
/// `a = mix(i ^ k0)`, `b = mix(a + k1)`; weight `a >> 16`, exp_avg `b >> 16`, exp_avg_sq `b & 0xffff`. That i and k0
/// meet in an exclusive or is what [`super::offload::slice_key`] rests on.
#[derive(Debug)]
pub struct Noise {
    /// For the weight.
    pub weight: Tensor,
    /// For the first moment.
    pub exp_avg: Tensor,
    /// For the second moment.
    pub exp_avg_sq: Tensor,
}

impl Noise {
    /// Draws for a tensor of this shape, under a key of [`noise_key`].
    pub fn new(key: u64, shape: &[i64], device: Device) -> Self {
        let n = shape.iter().product::<i64>();
        let (k0, k1) = ((key & LOW) as i64, (key >> 32) as i64);
        let i = Tensor::arange(n, (Kind::Int64, device)).bitwise_and(LOW as i64);
        let a = mix(&i.bitwise_xor(k0));
        let b = mix(&(&a + k1).bitwise_and(LOW as i64));
        let int = |x: Tensor| x.to_kind(Kind::Int).view(shape);
        Self {
            weight: int(a.bitwise_right_shift_tensor_scalar(16)),
            exp_avg: int(b.bitwise_right_shift_tensor_scalar(16)),
            exp_avg_sq: int(b.bitwise_and(0xffff)),
        }
    }

    /// One half everywhere: with it, rounding goes to the nearest.
    pub fn half(shape: &[i64], device: Device) -> Self {
        let half = || Tensor::full(shape, 0x8000, (Kind::Int, device));
        Self { weight: half(), exp_avg: half(), exp_avg_sq: half() }
    }
}

const LOW: u64 = 0xffff_ffff;

/// The finaliser of MurmurHash3 on values below 2^32, held in int64.
fn mix(x: &Tensor) -> Tensor {
    let fold = |x: Tensor, by: i64| x.bitwise_xor_tensor(&x.bitwise_right_shift_tensor_scalar(by));
    // The product wraps in 64 bits; its low 32 are right.
    let times = |x: Tensor, factor: i64| (x * factor).bitwise_and(LOW as i64);
    let x = fold(x.shallow_clone(), 16);
    let x = fold(times(x, 0x85eb_ca6b), 13);
    fold(times(x, 0xc2b2_ae35), 16)
}

/// The key of a tensor's random bits in one step: SplitMix64's finaliser over seed, step and the tensor's place.
pub fn noise_key(seed: u64, step: i64, tensor: usize) -> u64 {
    let mut x = seed;
    for part in [step as u64, tensor as u64] {
        x = x.wrapping_add(part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
    }
    x
}
