"""Compares the ids of a prepared folder with those of Python's `tokenizers`, document by document.

    .venv-golden/bin/python scripts/golden/tokens.py FOLDER TOKENIZER_JSON SOURCE...

Sources are .jsonl files (key `text`) or plain texts, a file a document, in sorted order as `prepare` takes them. Rows
without a text and files that are no UTF-8 are left out, as there. Documents stand back to back, each ended by `</s>` (or
`<|endoftext|>`) once; a file's header says its length.
"""

import json
import pathlib
import struct
import sys

import numpy as np
from tokenizers import Tokenizer


def packed(folder):
    """The ids of all files of a folder, in order: (N,)."""
    parts = []
    for path in sorted(pathlib.Path(folder).glob("*.bin")):
        data = path.read_bytes()
        assert data[:7] == b"LITPKDS", path
        version, dtype, tokens = struct.unpack("<QBQ", data[7:24])
        assert version == 1, path
        ids = np.frombuffer(data[24:], {8: np.uint16, 4: np.int32}[dtype])
        assert len(ids) == tokens, path
        parts.append(ids.astype(np.int64))
    return np.concatenate(parts)


def documents(path):
    if path.suffix == ".jsonl":
        for line in path.read_bytes().split(b"\n"):
            try:
                text = json.loads(line.decode())["text"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(text, str) and text:
                yield text
    else:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            return
        if text:
            yield text


def main(folder, tokenizer, *sources):
    tokenizer = Tokenizer.from_file(tokenizer)
    eos = tokenizer.token_to_id("</s>")
    if eos is None:
        eos = tokenizer.token_to_id("<|endoftext|>")
    got, at, count = packed(folder), 0, 0
    for source in sorted(map(pathlib.Path, sources)):
        for text in documents(source):
            want = np.array(tokenizer.encode(text, add_special_tokens=False).ids + [eos])
            if len(want) > 1 and want[-2] == eos:
                want = want[:-1]
            if not np.array_equal(got[at : at + len(want)], want):
                sys.exit(f"{source}: document {count} differs, it begins {text[:40]!r}")
            at += len(want)
            count += 1
    if at != len(got):
        sys.exit(f"{len(got) - at} ids more than the {count} documents have")
    print(f"{count} documents, {at} ids: equal")


main(*sys.argv[1:])
