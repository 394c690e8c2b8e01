//! Values of tensors: from the bytes of every common type to f32, and back for those we write.
//!
//! [`simple`] has the types whose blocks are 32 values with one scale, [`k`] those of 256 values
//! with a scale a sub-block, [`k_search`] how the latter's scales are found. Bits equal those of the
//! Python package `gguf`, where it has the direction.

mod k;
mod k_search;
mod simple;

use super::{GgufError, Type};
use half::{bf16, f16};
use rayon::prelude::*;

/// Values of a task; a multiple of every block.
const TASK: usize = 1 << 15;

/// Whether [`dequantize`] knows the type.
pub fn readable(kind: Type) -> bool {
    dequantizer(kind).is_some()
}

/// Whether [`quantize`] knows the type.
pub fn writable(kind: Type) -> bool {
    quantizer(kind).is_some()
}

/// Values of whole blocks, in parallel where there are many.
///
/// # Errors
/// The type is not readable; `bytes` and `out` are not the same whole blocks.
pub fn dequantize(kind: Type, bytes: &[u8], out: &mut [f32]) -> Result<(), GgufError> {
    let run = dequantizer(kind).ok_or_else(|| unknown(kind, readable))?;
    check_sizes(kind, out.len(), bytes.len())?;
    let (block, block_bytes) = kind.block();
    let task = TASK / block as usize * block_bytes as usize;
    out.par_chunks_mut(TASK).zip(bytes.par_chunks(task)).for_each(|(out, bytes)| run(bytes, out));
    Ok(())
}

/// Bytes of whole blocks; rows must be whole blocks, so that none spans two.
///
/// # Errors
/// As [`dequantize`].
pub fn quantize(kind: Type, values: &[f32], out: &mut [u8]) -> Result<(), GgufError> {
    let run = quantizer(kind).ok_or_else(|| unknown(kind, writable))?;
    check_sizes(kind, values.len(), out.len())?;
    let (block, block_bytes) = kind.block();
    let task = TASK / block as usize * block_bytes as usize;
    out.par_chunks_mut(task).zip(values.par_chunks(TASK)).for_each(|(out, x)| run(x, out));
    Ok(())
}

/// [`quantize`] into new memory.
///
/// # Errors
/// As [`quantize`].
pub fn quantized(kind: Type, values: &[f32]) -> Result<Vec<u8>, GgufError> {
    let mut out = vec![0; kind.bytes(values.len() as u64).unwrap_or(0) as usize];
    quantize(kind, values, &mut out)?;
    Ok(out)
}

fn unknown(kind: Type, known: fn(Type) -> bool) -> GgufError {
    let known: Vec<_> = Type::ALL.iter().filter(|&&k| known(k)).map(Type::to_string).collect();
    GgufError::tensor("*", format!("one of the types {}", known.join(", ")), kind)
}

fn check_sizes(kind: Type, values: usize, bytes: usize) -> Result<(), GgufError> {
    if kind.bytes(values as u64) == Some(bytes as u64) {
        return Ok(());
    }
    let (block, block_bytes) = kind.block();
    let expected = format!("{kind} blocks of {block} values in {block_bytes} bytes");
    Err(GgufError::tensor("*", expected, format!("{values} values in {bytes} bytes")))
}

type Dequantizer = fn(&[u8], &mut [f32]);
type Quantizer = fn(&[f32], &mut [u8]);

/// Runs a function of one block over all of them.
macro_rules! by_blocks {
    (read $function:path) => {
        |bytes, out| {
            let (blocks, outs) = (bytes.as_chunks().0.iter(), out.as_chunks_mut().0.iter_mut());
            blocks.zip(outs).for_each(|(block, out)| $function(block, out));
        }
    };
    (write $function:path) => {
        |values, out| {
            let (blocks, outs) = (values.as_chunks().0.iter(), out.as_chunks_mut().0.iter_mut());
            blocks.zip(outs).for_each(|(block, out)| $function(block, out));
        }
    };
}

fn dequantizer(kind: Type) -> Option<Dequantizer> {
    Some(match kind {
        Type::F32 => by_blocks!(read simple::read_f32),
        Type::F16 => by_blocks!(read simple::read_f16),
        Type::BF16 => by_blocks!(read simple::read_bf16),
        Type::Q4_0 => by_blocks!(read simple::read_q4_0),
        Type::Q4_1 => by_blocks!(read simple::read_q4_1),
        Type::Q5_0 => by_blocks!(read simple::read_q5_0),
        Type::Q5_1 => by_blocks!(read simple::read_q5_1),
        Type::Q8_0 => by_blocks!(read simple::read_q8_0),
        Type::Q2_K => by_blocks!(read k::read_q2_k),
        Type::Q3_K => by_blocks!(read k::read_q3_k),
        Type::Q4_K => by_blocks!(read k::read_q4_k),
        Type::Q5_K => by_blocks!(read k::read_q5_k),
        Type::Q6_K => by_blocks!(read k::read_q6_k),
        _ => return None,
    })
}

fn quantizer(kind: Type) -> Option<Quantizer> {
    Some(match kind {
        Type::F32 => by_blocks!(write simple::write_f32),
        Type::F16 => by_blocks!(write simple::write_f16),
        Type::BF16 => by_blocks!(write simple::write_bf16),
        Type::Q4_0 => by_blocks!(write simple::write_q4_0),
        Type::Q4_1 => by_blocks!(write simple::write_q4_1),
        Type::Q5_0 => by_blocks!(write simple::write_q5_0),
        Type::Q5_1 => by_blocks!(write simple::write_q5_1),
        Type::Q8_0 => by_blocks!(write simple::write_q8_0),
        Type::Q4_K => by_blocks!(write k_search::write_q4_k),
        Type::Q6_K => by_blocks!(write k_search::write_q6_k),
        _ => return None,
    })
}

/// The half at a byte of a block.
fn half_at<const N: usize>(block: &[u8; N], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Puts the nearest half at a byte of a block; returns it.
fn put_half<const N: usize>(block: &mut [u8; N], at: usize, x: f32) -> f32 {
    let half = f16::from_f32(x);
    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half.to_f32()
}

/// The bf16 nearest to `x`, ties to even; NaNs stay NaNs.
fn to_bf16(x: f32) -> bf16 {
    bf16::from_f32(x)
}
