#!/usr/bin/env python3
"""Writes tests/golden/packed/packed.json: LITPKDS files and the blocks read from them.

Standard library only. `--check` compares with the committed file instead of writing it. The format is
lit-gpt's `packed_dataset.py`; `original` follows its builder (a short last chunk is filled with the
separator) and its reader (blocks cut within a file), `ours` what this project writes.
"""

import json
import random
import struct
import sys
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "tests/golden/packed/packed.json"
DTYPES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def packed(tokens, code):
    header = b"LITPKDS" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<Q", len(tokens))
    return (header + struct.pack(f"<{len(tokens)}{DTYPES[code]}", *tokens)).hex()


def auto(vocab_size):
    return 8 if vocab_size < 65500 else 4


def chunks(documents, size):
    stream = [token for document in documents for token in document]
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def ours(documents, chunk, vocab_size):
    files = [packed(c, auto(vocab_size)) for c in chunks(documents, chunk)]
    return {"documents": documents, "chunk": chunk, "vocab_size": vocab_size, "files": files}


def original(documents, chunk, vocab_size, separator, block):
    full = [c + [separator] * (chunk - len(c)) for c in chunks(documents, chunk)]
    blocks = [c[i : i + block] for c in full for i in range(0, chunk // block * block, block)]
    return {"files": [packed(c, auto(vocab_size)) for c in full], "block": block, "blocks": blocks}


def main():
    rng = random.Random(3407)

    def corpus(n, top):
        return [[rng.randrange(top) for _ in range(rng.randrange(1, 30))] for _ in range(n)]

    golden = {
        "ours": [
            ours([[5, 6, 7], [8, 2]], 8, 32000),
            ours([[5, 6, 7], [8, 2, 1, 1, 1]], 8, 32000),
            ours(corpus(12, 65499), 16, 65499),
            ours(corpus(12, 70000), 16, 65500 + 4500),
        ],
        "original": [
            original([[5, 6, 7, 8, 2]], 8, 32000, 1, 4),
            original(corpus(40, 32000), 8 * 9, 32000, 1, 9),
        ],
        "dtypes": [
            {"file": packed(tokens, code), "tokens": tokens}
            for code, tokens in [
                (1, [0, 255, 7]),
                (2, [0, 127]),
                (3, [32767, 1]),
                (4, [2**31 - 1, 3]),
                (5, [2**40, 5, 6]),
                (8, [65535, 9]),
            ]
        ],
    }
    text = json.dumps(golden) + "\n"
    if "--check" in sys.argv:
        assert OUT.read_text() == text, f"{OUT} differs"
        print("packed: same as committed", file=sys.stderr)
    else:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(text)


if __name__ == "__main__":
    main()
