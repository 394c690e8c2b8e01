"""Compares two folders of golden files: integers and texts exactly, floats to 1e-5 of the largest.

    python scripts/golden/compare.py COMMITTED REMADE
"""

import json
import os
import sys

from safetensors.torch import load_file

TOLERANCE = 1e-5


def same(a, b, where):
    """Asserts that two JSON trees are alike."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()}"
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), f"{where}: {len(a)} != {len(b)}"
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, float):
        assert abs(a - b) <= TOLERANCE * max(1.0, abs(a)), f"{where}: {a} != {b}"
    else:
        assert a == b, f"{where}: {a} != {b}"


def main(committed, remade):
    count = 0
    for folder, _, files in sorted(os.walk(committed)):
        for file in sorted(files):
            path = os.path.join(folder, file)
            other = os.path.join(remade, os.path.relpath(path, committed))
            if file.endswith(".json"):
                same(json.load(open(path)), json.load(open(other)), file)
            elif file.endswith(".safetensors"):
                a, b = load_file(path), load_file(other)
                assert a.keys() == b.keys(), file
                for key in a:
                    error = (a[key].double() - b[key].double()).abs().max()
                    limit = TOLERANCE * max(1.0, a[key].double().abs().max())
                    assert error <= limit, f"{file} {key}: {error}"
            else:
                continue
            count += 1
    print(f"{count} files of {committed} remade: equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
