#!/usr/bin/env python3
"""Writes tests/golden/nf4/nf4.safetensors with the real bitsandbytes 0.50.2, on the CPU.

Of each case NAME, quantised to NF4 in blocks of 64:

NAME.shape, NAME.kind         (2,) int64; (1,) int64: 0 fp32, 1 bf16
NAME.weight                   of `borders` only; the others' values come from `hashed` below, as in the test
NAME.codes, NAME.absmax       (ceil(n / 2),) u8, (ceil(n / 64),) fp32
NAME.single.crc32             (3,) int64: CRC-32 of the values that come back in fp32, bf16 and fp16
NAME.double.absmax, .nested_absmax, .nested_offset, .crc32       the same with compress_statistics=True
nested_quant_map              (256,) fp32

Everything is made by bitsandbytes' plain kernels, those that it has for devices without their own. Of the CPU's, the
one that quantises the scales looks bytes up in a table that is not fine enough for the nearest in one of 1,000, and the
one that dequantises takes wrong scales with AVX-512 where a row is a multiple of 16 values but not of 64; where neither
is so, this script asserts that both agree.

In a virtual environment that sees torch 2.11.0:
    pip install --no-deps bitsandbytes==0.50.2 packaging numpy==2.3.4 safetensors==0.7.0
    python scripts/golden/nf4.py [OUT]
"""

import os
import sys
import zlib
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiled, a product and a sum may be rounded once

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import save_file

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/nf4/nf4.safetensors")
PLAIN = torch._C.DispatchKey.CompositeExplicitAutograd
KINDS = [torch.float32, torch.bfloat16, torch.float16]


def mixed(x):
    """uint32 -> uint32."""
    x = x * np.uint32(0x9E3779B1)
    x ^= x >> np.uint32(15)
    x = x * np.uint32(0x85EBCA77)
    return x ^ x >> np.uint32(13)


def hashed(seed, rows, columns):
    """s^3 a of hashes: s in [-1, 1) of the value's index, a in [0.01, 0.02) of its block's; each step fp32."""
    i = np.arange(rows * columns, dtype=np.uint32)
    s = (mixed(i + np.uint32(seed << 20)).view(np.int32) >> 8).astype(np.float32) / np.float32(1 << 23)
    a = (mixed(i // 64 + np.uint32(seed << 24)) >> np.uint32(24)).astype(np.float32) / np.float32(256)
    a = (np.float32(1) + a) * np.float32(0.01)
    return torch.from_numpy(s * s * s * a).view(rows, columns)


def borders():
    """One block, absmax 1: the middles between neighbours of the table, and the numbers next to them."""
    table = bnb.get_4bit_type("nf4", device="cpu").numpy()
    middle = (table[1:] + table[:-1]) / np.float32(2)
    row = [middle, np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2)), table, [0, 1, -1]]
    return torch.from_numpy(np.concatenate(row).astype(np.float32)).view(4, 16)


def with_zeros(weight):
    weight[1] = 0
    return weight


CASES = {
    "whole": hashed(1, 8, 128),
    "bf16": hashed(2, 8, 64).bfloat16(),
    "short": hashed(3, 5, 30),  # a last block of 22
    "odd": hashed(4, 3, 43),  # a last block of 1, half a byte left
    "zeros": with_zeros(hashed(5, 4, 64)),
    "borders": borders(),
    "nested": hashed(6, 514, 32),  # 257 blocks: two of the second level
}


def plain(name, *arguments):
    return getattr(torch.ops.bitsandbytes, name).default._op_dk(PLAIN, *arguments)


def crcs(codes, state, shape):
    absmax = state.absmax
    if state.nested:
        second = state.state2
        absmax = plain("dequantize_blockwise", absmax, second.absmax, second.code, 256, torch.float32) + state.offset
    out = []
    for kind in KINDS:
        state.dtype = kind
        values = plain("dequantize_4bit", codes, absmax, 64, "nf4", list(shape), kind)
        assert shape[1] % 64 or torch.equal(values, bnb.dequantize_4bit(codes, state))
        out.append(zlib.crc32(values.contiguous().view(torch.uint8).numpy().tobytes()))
    return torch.tensor(out)


def main():
    assert bitsandbytes.__version__ == "0.50.2", bitsandbytes.__version__
    torch.set_num_threads(1)
    out = {"nested_quant_map": bnb.create_dynamic_map(signed=True)}
    for name, weight in CASES.items():
        codes, single = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        again, double = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
        assert torch.equal(codes, again)
        cpu = double.absmax
        double.absmax, nested = plain("quantize_blockwise", single.absmax - double.offset, double.state2.code, 256)
        if double.state2.absmax.min() > 0:  # of zeros the CPU's bytes are 0
            assert (double.absmax.int() - cpu.int()).abs().max() <= 1
        assert torch.equal(nested, double.state2.absmax.clamp(min=1e-38))  # of zeros the plain kernel says 1e-38
        assert torch.equal(double.state2.code, out["nested_quant_map"])
        case = {
            "shape": torch.tensor(weight.shape),
            "kind": torch.tensor([KINDS.index(weight.dtype)]),
            "codes": codes.view(-1),
            "absmax": single.absmax,
            "double.absmax": double.absmax,
            "double.nested_absmax": double.state2.absmax,
            "double.nested_offset": double.offset,
            "single.crc32": crcs(codes, single, weight.shape),
            "double.crc32": crcs(codes, double, weight.shape),
        }
        if name == "borders":
            case["weight"] = weight
        out |= {f"{name}.{key}": value.contiguous().clone() for key, value in case.items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, OUT)
    print(f"wrote {OUT}: {len(CASES)} cases, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
