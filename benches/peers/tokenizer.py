"""Python's tokenizers, the peers of `tinyllama bench tokenizer`: `tokenizers` and `sentencepiece` on the same documents.

    python benches/peers/tokenizer.py texts OUT_DIR [FOLDER_OF_ENGLISH_TEXTS..]    english.jsonl, code.jsonl, mixed.jsonl
    python benches/peers/tokenizer.py model TOKENIZER_JSON OUT_MODEL               SentencePiece's form of Llama's vocabulary
    python benches/peers/tokenizer.py run TOKENIZER_JSON MODEL PASSES FILE..       prints one JSON object

One core: start it with TOKENIZERS_PARALLELISM=false and on one processor (benches/tokenizer.sh does).
"""

import json
import statistics
import sys
import sysconfig
import time
import zlib
from array import array
from pathlib import Path

SPACE = "\u2581"


def write_texts(out, folders):
    """Documents, one a line: English prose, this Python's standard library, and what is in neither."""
    english = [p for folder in folders for p in sorted(Path(folder).rglob("*.txt"))]
    english = [p for p in english if p.name not in ("contents.txt", "data.txt")]  # the parts are there one by one
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [p for p in sorted(library.rglob("*.py")) if "-packages" not in str(p)]
    for name, paths in ("english", english), ("code", code):
        with open(out / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for path in paths:
                try:
                    text = path.read_bytes().decode("utf-8")
                except UnicodeDecodeError:
                    continue  # tests of other encodings
                if text:
                    file.write(json.dumps({"text": text}) + "\n")


def write_model(tokenizer_json, out):
    """Llama's `tokenizer.model` from its `tokenizer.json`: pieces by id, scores by the order of the merges."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    file = json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))
    vocab = file["model"]["vocab"]
    rank = {}
    for i, merge in enumerate(file["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, i)
    special = {token["content"] for token in file["added_tokens"]}
    model = pb.ModelProto()
    for token, _ in sorted(vocab.items(), key=lambda item: item[1]):
        piece = model.pieces.add(piece=token, score=0.0, type=pb.ModelProto.SentencePiece.NORMAL)
        if token == "<unk>":
            piece.type = pb.ModelProto.SentencePiece.UNKNOWN
        elif token in special:
            piece.type = pb.ModelProto.SentencePiece.CONTROL
        elif len(token) == 6 and token.startswith("<0x"):
            piece.type = pb.ModelProto.SentencePiece.BYTE
        else:
            piece.score = -float(rank.get(token, len(rank)))
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(vocab)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    Path(out).write_bytes(model.SerializeToString())


def timed(encode, texts, passes):
    """Ids, seconds of the first pass, and of the median of those after it."""
    seconds = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        ids = encode(texts)
        seconds.append(time.perf_counter() - start)
    return ids, seconds[0], statistics.median(seconds[1:])


def run(tokenizer_json, model, passes, files):
    import sentencepiece
    import tokenizers

    hugging_face = tokenizers.Tokenizer.from_file(tokenizer_json)
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    peers = {
        f"tokenizers {tokenizers.__version__}": lambda texts: hugging_face.encode_batch(texts, add_special_tokens=False),
        f"sentencepiece {sentencepiece.__version__}": lambda texts: sp.encode(texts, num_threads=1),
    }
    out = []
    for file in files:
        texts = [json.loads(line)["text"] for line in open(file, encoding="utf-8")]
        for name, encode in peers.items():
            encoded, first, seconds = timed(encode, texts, passes)
            crc, tokens = 0, 0
            for ids in encoded:
                ids = ids if isinstance(ids, list) else ids.ids
                crc, tokens = zlib.crc32(array("I", ids).tobytes(), crc), tokens + len(ids)
            out.append({
                "peer": name, "file": file, "documents": len(texts), "tokens": tokens, "ids_crc32": f"{crc:08x}",
                "bytes": sum(len(text.encode()) for text in texts), "first_pass_seconds": first, "seconds": seconds,
                "tokens_per_sec_core": tokens / seconds,
            })
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "texts":
        write_texts(Path(rest[0]), rest[1:])
    elif verb == "model":
        write_model(*rest)
    else:
        run(rest[0], rest[1], int(rest[2]), rest[3:])
