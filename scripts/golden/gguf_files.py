"""Golden values of GGUF files, by the Python package `gguf`.

Writes into tests/golden/gguf/ (or OUT_DIR):
  types.gguf     version 3: one tensor of each type that can be read, metadata of every type
  types.v2.gguf  the same bytes with version 2 in the header
  quants.gguf    version 3, alignment 64: `input` (F32) and what the package quantises it to
  expected.json  {"tensors": {file: {tensor: {"type", "shape", "sha256"}}}}: SHA-256 of the values as
                 little-endian f32 by `gguf.quants.dequantize`

    python3 -m venv venv && venv/bin/pip install gguf==0.19.0
    venv/bin/python scripts/golden/gguf_files.py [OUT_DIR]
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

READ = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1,
        Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]
WRITTEN = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]
# Where the halves of a block lie: random bytes could make them infinite.
HALVES = {Type.Q8_0: [0], Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2],
          Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}


def random_blocks(rng, kind, rows, row):
    """Random bytes of whole blocks, with finite scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind == Type.F32:
        return rng.standard_normal((rows, row), dtype=np.float32)
    if kind == Type.F16:
        return rng.standard_normal((rows, row)).astype(np.float16)
    data = rng.integers(0, 256, (rows * row // block, size), dtype=np.uint8)
    for at in HALVES.get(kind, []):
        halves = rng.standard_normal(len(data)).astype(np.float16)
        data[:, at:at + 2] = halves.view(np.uint8).reshape(-1, 2)
    if kind == Type.BF16:
        data[:, 1] &= 0xBF  # no NaN
    return data.reshape(rows, -1)


def expected(kind, data, shape):
    values = dequantize(data, kind).astype("<f4")
    return {"type": kind.name, "shape": shape, "sha256": hashlib.sha256(values.tobytes()).hexdigest()}


def every_value(writer):
    writer.add_uint8("a.u8", 255)
    writer.add_int8("a.i8", -128)
    writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -32768)
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -2**31)
    writer.add_float32("a.f32", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "gr\u00fc\u00df dich \U0001f600")
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_int64("a.i64", -2**63)
    writer.add_float64("a.f64", 0.1)
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    writer.add_array("a.bools", [True, False])
    writer.add_array("a.strings", ["", "a", "\u2581the"])
    writer.add_array("a.nested", [[1, 2], [3]])


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types(path, rng):
    writer, out = gguf.GGUFWriter(path, "llama"), {}
    every_value(writer)
    for kind in READ:
        rows, row = (2, 256) if gguf.GGML_QUANT_SIZES[kind][0] == 256 else (3, 64)
        data = random_blocks(rng, kind, rows, row)
        name = f"{kind.name.lower()}.weight"
        raw = None if data.dtype in (np.float32, np.float16) else kind
        writer.add_tensor(name, data, raw_dtype=raw)
        out[name] = expected(kind, data, [rows, row])
    cube = rng.standard_normal((2, 3, 5), dtype=np.float32)
    writer.add_tensor("cube", cube)
    out["cube"] = expected(Type.F32, cube, [2, 3, 5])
    close(writer)
    return out


def quants(path, rng):
    """Gaussian rows, and those where rounding is delicate."""
    writer, out = gguf.GGUFWriter(path, "llama"), {}
    writer.add_custom_alignment(64)
    x = rng.standard_normal((12, 64), dtype=np.float32) * 0.05
    x[1] = 0
    x[2] = 1.25
    x[3] = -x[4]
    x[5] = np.round(rng.standard_normal(64) * 8) / 16  # ties
    x[6] *= 1e-6
    x[7] *= 1e4
    x[8, ::2] = 0
    x[9] = np.arange(64, dtype=np.float32) - 32
    x[10] = abs(x[10])
    x[11, 0], x[11, 1] = 3.0, -3.0  # equal magnitudes: the first one's sign counts
    writer.add_tensor("input", x)
    out["input"] = expected(Type.F32, x, list(x.shape))
    for kind in WRITTEN:
        data = quantize(x, kind)
        name = f"{kind.name.lower()}.weight"
        raw = None if kind == Type.F16 else kind
        writer.add_tensor(name, data, raw_dtype=raw)
        out[name] = expected(kind, data, list(x.shape))
    close(writer)
    return out


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/gguf")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20_260)
    tensors = {"types.gguf": types(out / "types.gguf", rng), "quants.gguf": quants(out / "quants.gguf", rng)}
    raw = (out / "types.gguf").read_bytes()
    (out / "types.v2.gguf").write_bytes(raw[:4] + struct.pack("<I", 2) + raw[8:])
    tensors["types.v2.gguf"] = tensors["types.gguf"]
    (out / "expected.json").write_text(json.dumps({"tensors": tensors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
