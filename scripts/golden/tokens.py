"""Compares the ids of a prepared folder with Python's, document by document, and the rows that were left out.

    .venv-golden/bin/python scripts/golden/tokens.py FOLDER TOKENIZER SOURCE...

TOKENIZER is a tokenizer.json (read by `tokenizers`) or a tokenizer.model (by `sentencepiece`). Sources are .jsonl files
(key `text`) or plain texts, a file a document, in sorted order as `prepare` takes them. Rows without a text and files that
are no UTF-8 are left out, as there, and counted: the counts must be those of `manifest.json`. Documents stand back to
back, each ended by `</s>` (or `<|endoftext|>`) once; a file's header says its length.
"""

import collections
import json
import pathlib
import struct
import sys

import numpy as np

BATCH = 1 << 23  # characters encoded together


def packed(folder):
    """The ids of all files of a folder, in order: (N,)."""
    parts = []
    for path in sorted(pathlib.Path(folder).glob("*.bin")):
        data = path.read_bytes()
        assert data[:7] == b"LITPKDS", path
        version, dtype, tokens = struct.unpack("<QBQ", data[7:24])
        assert version == 1, path
        ids = np.frombuffer(data[24:], {8: np.dtype("<u2"), 4: np.dtype("<i4")}[dtype])
        assert len(ids) == tokens, path
        parts.append(ids)
    return np.concatenate(parts)


def row(line):
    """(text, None) of a line of JSON, or (None, why it is left out)."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except ValueError:
        return None, "no JSON"
    if not isinstance(value, dict):
        return None, "no JSON object"
    text = value.get("text")
    if not isinstance(text, str):
        return None, "no text under `text`"
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, "no JSON"  # half a surrogate pair: `json` takes it, RFC 8259 has no meaning for it
    return (text, None) if text else (None, "empty")


def documents(path):
    """(text, None), or (None, why it is left out), for each row of a source."""
    if path.suffix == ".jsonl":
        for line in path.read_bytes().split(b"\n"):
            if line.strip(b" \t\n\r\f"):
                yield row(line)
        return
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        yield None, "not UTF-8"
        return
    yield (text, None) if text else (None, "empty")


def encoder(path):
    """A function from a list of texts to lists of ids, each ended by the end-of-text id once."""
    if path.endswith(".model"):
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=path)
        eos = model.eos_id()
        plain = lambda texts: model.encode(texts, num_threads=-1)
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(path)
        eos = tokenizer.token_to_id("</s>")
        if eos is None:
            eos = tokenizer.token_to_id("<|endoftext|>")
        plain = lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode(texts):
        return [ids if ids and ids[-1] == eos else ids + [eos] for ids in plain(texts)]

    return encode


def batches(texts):
    """Lists of a few million characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def compare(folder, tokenizer, sources):
    """Documents, ids and {reason: rows left out} of a folder that holds what Python makes of the sources."""
    encode, got, at, count = encoder(tokenizer), packed(folder), 0, 0
    skipped = collections.Counter()

    def texts():
        for source in sorted(map(pathlib.Path, sources)):
            for text, why in documents(source):
                if why:
                    skipped[why] += 1
                else:
                    yield text

    for batch in batches(texts()):
        for text, want in zip(batch, encode(batch)):
            here = got[at : at + len(want)]
            if not np.array_equal(here, want):
                first = next((i for i, (a, b) in enumerate(zip(here, want)) if a != b), len(here))
                sys.exit(f"{folder}: document {count} differs from id {first} on; it begins {text[:40]!r}")
            at += len(want)
            count += 1
    if at != len(got):
        sys.exit(f"{folder}: {len(got) - at} ids more than the {count} documents have")
    manifest = json.loads((pathlib.Path(folder) / "manifest.json").read_text())
    told = {"documents": manifest["documents"], "tokens": manifest["tokens"], "skipped": manifest["skipped"]}
    expected = {"documents": count, "tokens": at, "skipped": dict(skipped)}
    if told != expected:
        sys.exit(f"{folder}: manifest.json says {told}, expected {expected}")
    return count, at, dict(skipped)


if __name__ == "__main__":
    n_documents, n_ids, left_out = compare(sys.argv[1], sys.argv[2], sys.argv[3:])
    print(f"{n_documents} documents, {n_ids} ids, left out {sum(left_out.values())} {left_out}: equal")
