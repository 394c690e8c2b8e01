#!/usr/bin/env python3
"""Writes tests/golden/packed/reader.json: the order in which lit-gpt and TinyLlama read packed files.

Needs numpy. `--check` compares with the committed file instead of writing it. The reader below follows the documented
behaviour of lit-gpt's `packed_dataset.py` and TinyLlama's `create_dataloader` (sorted files, shuffled by Python's
generator, cut among ranks, read in windows of 8 in numpy's permutations, sources drawn by Python's `choices`).

The set: source s has `files[s]` files of `chunk` tokens, named as published (`train_slim_<process>_<number>.bin`, the
processes' series mixed in a folder); token i of the f-th file in sorted order is `base[s] + f * chunk + i`.
"""

import json
import random
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parents[2] / "tests/golden/packed/reader.json"
HEADER = 24
WINDOW = 8
SET = {
    "seed": 3407,
    "block": 17,
    "chunk": 149,
    "processes": 3,
    "names": ["slim", "star"],
    "files": [75, 35],
    "base": [0, 20000],
    "weights": [0.693584, 0.306416],
}
SAMPLES, CLEAR, GROUP = 10_000, 50, 100


def write_set(folder):
    for name, files, base in zip(SET["names"], SET["files"], SET["base"]):
        paths = [
            folder / f"train_{name}_{i % SET['processes']}_{i // SET['processes']:010d}.bin" for i in range(files)
        ]
        for f, path in enumerate(sorted(paths)):
            tokens = np.arange(SET["chunk"], dtype=np.uint16) + np.uint16(base + f * SET["chunk"])
            header = b"LITPKDS" + struct.pack("<QBQ", 1, 8, SET["chunk"])
            path.write_bytes(header + tokens.tobytes())


def blocks_of_source(folder, name, rank, world):
    """Blocks of one source as one rank reads them, without end."""
    files = sorted(str(path) for path in folder.glob(f"train_{name}*"))
    random.seed(SET["seed"])
    random.shuffle(files)
    mine = files[rank : len(files) // world * world : world]
    rng = np.random.default_rng(SET["seed"] + rank)
    next_file = 0
    while True:
        if len(mine) - next_file < WINDOW:
            next_file = 0
        window = [np.memmap(path, dtype=np.uint16, mode="r", offset=HEADER) for path in mine[next_file :][:WINDOW]]
        next_file += WINDOW
        blocks = len(window[0]) // SET["block"]
        for i in rng.permutation(WINDOW * blocks):
            begin = i % blocks * SET["block"]
            yield window[i // blocks][begin : begin + SET["block"]].astype(np.int64)


def first_tokens(folder, rank, world):
    """First tokens of a rank's samples; the blocks must run on from them."""
    sources = [blocks_of_source(folder, name, rank, world) for name in SET["names"]]
    weights = [weight / sum(SET["weights"]) for weight in SET["weights"]]
    rng = random.Random(SET["seed"])
    firsts = []
    for _ in range(SAMPLES):
        (source,) = rng.choices(sources, weights=weights, k=1)
        block = next(source)
        assert (np.diff(block) == 1).all() and len(block) == SET["block"]
        firsts.append(int(block[0]))
    return firsts


def main():
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder))
        for world in (1, 4):
            for rank in range(world):
                firsts = first_tokens(Path(folder), rank, world)
                groups = [firsts[i : i + GROUP] for i in range(0, SAMPLES, GROUP)]
                crc32 = [zlib.crc32(struct.pack(f"<{GROUP}I", *group)) for group in groups]
                runs.append({"world": world, "rank": rank, "first": firsts[:CLEAR], "crc32": crc32})
    text = json.dumps({**SET, "group": GROUP, "runs": runs}) + "\n"
    if "--check" in sys.argv:
        assert OUT.read_text() == text, f"{OUT} differs"
        print("reader: same as committed", file=sys.stderr)
    else:
        OUT.write_text(text)


if __name__ == "__main__":
    main()
