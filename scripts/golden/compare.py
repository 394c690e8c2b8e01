"""Compares two folders of golden files: integers, texts and bytes exactly, floats to 1e-5 of the largest.

    python scripts/golden/compare.py COMMITTED REMADE

What lies under a key `bf16...` is compared to 2e-3: bf16 products round differently from CPU to CPU.
"""

import json
import os
import sys

import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-3


def same(a, b, where, tolerance=TOLERANCE):
    """Asserts that two JSON trees are alike."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()}"
        for key in a:
            within = BF16_TOLERANCE if key.startswith("bf16") else tolerance
            same(a[key], b[key], f"{where}.{key}", within)
    elif isinstance(a, list):
        assert len(a) == len(b), f"{where}: {len(a)} != {len(b)}"
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]", tolerance)
    elif isinstance(a, float):
        assert abs(a - b) <= tolerance * max(1.0, abs(a)), f"{where}: {a} != {b}"
    else:
        assert a == b, f"{where}: {a} != {b}"


def same_tensors(path, other, file):
    """Asserts that two safetensors files hold alike tensors."""
    a, b = load_file(path), load_file(other)
    assert a.keys() == b.keys(), f"{file}: {a.keys() ^ b.keys()}"
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), f"{file} {key}"
        if not a[key].is_floating_point():
            assert torch.equal(a[key], b[key]), f"{file} {key}: integers differ"
            continue
        error = (a[key].double() - b[key].double()).abs().max()
        limit = TOLERANCE * max(1.0, a[key].double().abs().max())
        assert error <= limit, f"{file} {key}: {error}"


def files_of(folder):
    """Every file below a folder, by its path in it."""
    return sorted(os.path.relpath(os.path.join(at, file), folder)
                  for at, _, files in os.walk(folder) for file in files)


def main(committed, remade):
    names, others = files_of(committed), files_of(remade)
    assert names == others, f"{committed}: not on both sides: {set(names) ^ set(others)}"
    for name in names:
        path, other = os.path.join(committed, name), os.path.join(remade, name)
        if name.endswith(".json"):
            same(json.load(open(path)), json.load(open(other)), name)
        elif name.endswith(".safetensors"):
            same_tensors(path, other, name)
        else:
            assert open(path, "rb").read() == open(other, "rb").read(), f"{name}: bytes differ"
    print(f"{len(names)} files of {committed} remade: equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
