"""Writes Llama's tokenizer.json and tokenizer_config.json from llama-tokenizer-js (MIT).

    python3 scripts/llama_tokenizer.py package/llama-tokenizer.js OUT_DIR

The JavaScript file holds two base64 strings: the 32,000 pieces, one a line, and the 61,249 merges in
order of rank, each two little-endian uint16 piece ids. Needs no package. fetch_llama_tokenizer.sh
calls it.
"""

import base64
import json
import re
import struct
import sys
from pathlib import Path

SPACE = "\u2581"


def base64_of(source, name):
    found = re.search(name + r"""\s*=\s*["'`]([A-Za-z0-9+/=\s]+)["'`]""", source)
    if not found:
        sys.exit(f"error: no `{name}` in the JavaScript file; is this llama-tokenizer-js 1.2.2?")
    return base64.b64decode(found.group(1))


def special(token, id):
    return {"id": id, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def check(pieces, pairs):
    """Merges a known text by rank, lowest first: the ids every Llama user knows."""
    rank = {pair: i for i, pair in reversed(list(enumerate(pairs)))}
    word = list(SPACE + "Hello" + SPACE + "world")
    while True:
        ranks = [rank.get(pair, len(pairs)) for pair in zip(word, word[1:])]
        if not ranks or min(ranks) == len(pairs):
            break
        i = ranks.index(min(ranks))
        word[i:i + 2] = [word[i] + word[i + 1]]
    ids = [1] + [pieces.index(piece) for piece in word]
    if ids != [1, 15043, 3186]:
        sys.exit(f'error: "Hello world" gives {ids}, expected [1, 15043, 3186]: a damaged download?')
    print(f'checked: "Hello world" -> {ids}', file=sys.stderr)


def main():
    source, out = Path(sys.argv[1]).read_text(encoding="utf-8"), Path(sys.argv[2])
    pieces = base64_of(source, "llama_vocab_base64").decode("utf-8").split("\n")
    raw = base64_of(source, "llama_merges_binary")
    pairs = [(pieces[a], pieces[b]) for a, b in struct.iter_unpack("<HH", raw)]
    if (len(pieces), len(pairs)) != (32000, 61249):
        sys.exit(f"error: expected 32000 pieces and 61249 merges, got {len(pieces)} and {len(pairs)}")
    check(pieces, pairs)
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    bos_of_second = {"SpecialToken": {"id": "<s>", "type_id": 1}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special(token, id) for id, token in enumerate(["<unk>", "<s>", "</s>"])],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, bos_of_second, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "ignore_merges": False, "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": pairs,
        },
    }
    # Not "LlamaTokenizer": transformers 5 would build its own from the vocabulary, with other ids after
    # leading spaces than SentencePiece gives.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": None, "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        part = out / f"{name}.part"
        part.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        part.replace(out / name)


if __name__ == "__main__":
    main()
