//! Quantised matrices on a CUDA card: a [`GPT`] whose layers keep them packed, as `csrc/decode` reads them.
//!
//! Up to 8 rows are multiplied with the codes themselves, more with the bf16 weights that they stand for, made anew for
//! each product. The embedding, of which a token reads one row, is bf16.

use super::llama::{QuantBlock, QuantLlama, Stack};
use super::matrix::{Format, QuantMatrix};
use crate::ffi::PackedWeight;
use crate::model::rope::Rope;
use crate::model::{GPT, Mlp};
use anyhow::{Result, bail};
use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Rows and columns of a block.
const ROWS: usize = 8;
const COLUMNS: usize = 128;

/// The network on a card, in bf16 but for its matrices.
///
/// # Errors
/// A device without kernels.
pub fn to_card(llama: QuantLlama, device: Device) -> Result<GPT> {
    if !device.is_cuda() || !cfg!(cuda_kernels) {
        bail!("packed weights need a CUDA card and a program that was built with its kernels");
    }
    let config = &llama.config;
    let mut model = GPT::empty(config, Device::Cpu); // its memory is never touched
    model.rope = Rope::new(config, device);
    model.wte.weight = embedding(&llama.wte).to_device(device);
    let vector = |x: &[f32]| Tensor::from_slice(x).to_device(device).to_kind(Kind::BFloat16);
    let none = || Tensor::empty([0], (Kind::BFloat16, device));
    for (block, from) in model.h.iter_mut().zip(&llama.h) {
        let QuantBlock { norm_1, qkv, proj, norm_2, gate_up, down } = from;
        block.norm_1.weight = vector(norm_1);
        block.norm_2.weight = vector(norm_2);
        block.attn.qkv.weight = none();
        block.attn.qkv.packed = Some(pack(qkv, device)?);
        block.attn.proj.weight = none();
        block.attn.proj.packed = Some(pack_one(proj, device)?);
        let Mlp::LLaMA(mlp) = &mut block.mlp else { bail!("only Llama's MLP can be packed") };
        (mlp.fc_1.weight, mlp.fc_2.weight, mlp.proj.weight) = (none(), none(), none());
        mlp.gate_up_packed = Some(pack(gate_up, device)?);
        mlp.proj.packed = Some(pack_one(down, device)?);
    }
    model.ln_f.weight = vector(&llama.ln_f);
    if let (Some(head), Some(from)) = (&mut model.lm_head, &llama.lm_head) {
        head.weight = none();
        head.packed = Some(pack_one(from, device)?);
    }
    Ok(model)
}

/// (V, C) of bf16.
fn embedding(matrix: &QuantMatrix) -> Tensor {
    let (n, k) = (matrix.rows(), matrix.columns());
    let mut values = vec![0.0; n * k];
    values.par_chunks_mut(k).enumerate().for_each(|(n, row)| matrix.dequantise_row(n, row));
    Tensor::from_slice(&values).view([n as i64, k as i64]).to_kind(Kind::BFloat16)
}

fn pack_one(matrix: &QuantMatrix, device: Device) -> Result<PackedWeight> {
    pack_rows(&[matrix], device)
}

fn pack(stack: &Stack, device: Device) -> Result<PackedWeight> {
    pack_rows(&stack.0.iter().collect::<Vec<_>>(), device)
}

/// Matrices one below the other as one weight: with the codes they have, where all have the same format in groups; else
/// rounded to 8 bits.
fn pack_rows(parts: &[&QuantMatrix], device: Device) -> Result<PackedWeight> {
    let format = parts[0].grouped_format();
    let alike = parts.iter().all(|part| part.grouped_format() == format);
    let Some(format) = format.filter(|_| alike) else {
        let rounded: Vec<QuantMatrix> = parts.iter().map(|p| to_int8(p)).collect::<Result<_>>()?;
        return pack_rows(&rounded.iter().collect::<Vec<_>>(), device);
    };
    let bytes = bytes_of(parts, format);
    Ok(PackedWeight {
        data: Tensor::from_slice(&bytes).to_device(device),
        bits: if matches!(format, Format::Int4 { .. }) { 4 } else { 8 },
        group: format.group() as i64,
        rows: parts.iter().map(|part| part.rows() as i64).sum(),
        columns: parts[0].columns() as i64,
    })
}

fn to_int8(matrix: &QuantMatrix) -> Result<QuantMatrix> {
    let (n, k) = (matrix.rows(), matrix.columns());
    let mut values = vec![0.0; n * k];
    values.par_chunks_mut(k).enumerate().for_each(|(n, row)| matrix.dequantise_row(n, row));
    QuantMatrix::pack(Format::Int8 { group: 32 }, &values, k)
}

/// Blocks of 8 rows and 128 columns, each its codes, then its scales: `csrc/decode/weights.cuh` says in what order.
fn bytes_of(parts: &[&QuantMatrix], format: Format) -> Vec<u8> {
    let rows: Vec<(&QuantMatrix, usize)> =
        parts.iter().flat_map(|part| (0..part.rows()).map(move |row| (*part, row))).collect();
    let (k, group) = (parts[0].columns(), format.group());
    let is_int4 = matches!(format, Format::Int4 { .. });
    let (codes, scale) = if is_int4 { (ROWS * COLUMNS / 2, 4) } else { (ROWS * COLUMNS, 2) };
    let block = codes + ROWS * (COLUMNS / group) * scale;
    let across = k.div_ceil(COLUMNS);
    let mut bytes = vec![0u8; rows.len().div_ceil(ROWS) * across * block];
    bytes.par_chunks_mut(across * block).zip(rows.par_chunks(ROWS)).for_each(|(bytes, rows)| {
        let (mut row_codes, mut scales) = (vec![0; k], vec![f16::ZERO; k / group]);
        let mut minimums = scales.clone();
        for (g, (matrix, row)) in rows.iter().enumerate() {
            matrix.grouped_row(*row, &mut row_codes, &mut scales, &mut minimums);
            for (column, &code) in row_codes.iter().enumerate() {
                let bytes = &mut bytes[column / COLUMNS * block..];
                match is_int4 {
                    true => {
                        let (at, shift) = code4(g, column % COLUMNS);
                        bytes[at] |= code << shift;
                    }
                    false => bytes[code8(g, column % COLUMNS)] = code,
                }
            }
            for (i, (s, m)) in scales.iter().zip(&minimums).enumerate() {
                let per_block = COLUMNS / group;
                let at = i / per_block * block + codes + (g * per_block + i % per_block) * scale;
                bytes[at..at + 2].copy_from_slice(&s.to_le_bytes());
                if is_int4 {
                    bytes[at + 2..at + 4].copy_from_slice(&m.to_le_bytes());
                }
            }
        }
    });
    bytes
}

/// Byte and shift of the 4-bit code of row g and a column of a block.
fn code4(g: usize, column: usize) -> (usize, u32) {
    let (j, t, e) = (column / 32, column % 32 / 8, column % 8);
    let nibble = e / 2 + e % 2 * 4; // 0 2 4 6 1 3 5 7
    (4 * (16 * g + 4 * t + j) + nibble / 2, nibble as u32 % 2 * 4)
}

/// Byte of the 8-bit code.
fn code8(g: usize, column: usize) -> usize {
    let (j, t, e) = (column / 32, column % 32 / 8, column % 8);
    let byte = e / 4 * 4 + [0, 2, 1, 3][e % 4]; // 0 2 1 3 4 6 5 7
    512 * (j / 2) + 64 * g + 16 * t + 8 * (j % 2) + byte
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_code_of_a_block_has_a_place_of_its_own() {
        let places = || (0..ROWS).flat_map(|g| (0..COLUMNS).map(move |column| (g, column)));
        let four: HashSet<_> = places().map(|(g, column)| code4(g, column)).collect();
        assert!(four.len() == 1024 && four.iter().all(|(byte, shift)| *byte < 512 && *shift < 8));
        let eight: HashSet<_> = places().map(|(g, column)| code8(g, column)).collect();
        assert!(eight.len() == 1024 && eight.iter().all(|byte| *byte < 1024));
    }
}
