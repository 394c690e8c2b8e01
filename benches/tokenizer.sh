#!/usr/bin/env bash
# Encoding speed of one core, ours beside Python's `tokenizers` and `sentencepiece`, on the same documents in one run:
#   ./benches/tokenizer.sh [PASSES=3] [-- more files of documents (.jsonl with a key `text`)]
# English is the State of the Union addresses and Moby Dick (fetched with npm where it is), code is the standard library of
# Python. Llama's tokenizer must be in checkpoints/llama-tokenizer (scripts/fetch_llama_tokenizer.sh), or name another of its
# kind in TOKENIZER. The peers live in .venv-bench, made here; texts and the peers' model are kept in out/bench-tokenizer.
# CORE (0) names the processor, TINYLLAMA another program of ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

passes=3
if (($#)) && [[ $1 != -- ]]; then
  passes=$1
  shift
fi
[[ ${1:-} != -- ]] || shift
tinyllama=${TINYLLAMA:-target/release/tinyllama}
tokenizer=${TOKENIZER:-checkpoints/llama-tokenizer}
out=out/bench-tokenizer
python=.venv-bench/bin/python
core=(taskset -c "${CORE:-0}")
export TOKENIZERS_PARALLELISM=false RAYON_NUM_THREADS=1

if ! "$python" -c 'import sentencepiece, tokenizers, google.protobuf' 2> /dev/null; then
  python3 -m venv .venv-bench
  "$python" -m pip install --quiet 'tokenizers==0.22.*' 'sentencepiece==0.2.*' protobuf
fi
mkdir -p "$out"
if [[ ! -s $out/code.jsonl ]]; then
  folders=()
  if command -v npm > /dev/null; then
    for package in datasets-sotu datasets-moby-dick; do
      mkdir -p "$out/$package"
      (cd "$out/$package" && npm pack --silent "@stdlib/$package@0.2.3" && tar -xzf ./*.tgz) > /dev/null
      folders+=("$out/$package/package/data")
    done
  else
    echo "npm is not installed: English is left out" >&2
  fi
  python3 benches/peers/tokenizer.py texts "$out" "${folders[@]}"
fi
"$python" benches/peers/tokenizer.py model "$tokenizer/tokenizer.json" "$out/tokenizer.model"

files=("$@")
for name in english code; do
  [[ ! -s $out/$name.jsonl ]] || files+=("$out/$name.jsonl")
done
"${core[@]}" "$python" benches/peers/tokenizer.py run "$tokenizer/tokenizer.json" "$out/tokenizer.model" "$passes" \
  "${files[@]}" > "$out/peers.json"
ours() { # tokenizer, name
  "${core[@]}" "$tinyllama" bench tokenizer --tokenizer "$1" --passes "$passes" --no-reference --json \
    --input "${files[@]}" > "$out/$2.json"
}
ours "$tokenizer" 'tokenizer.json'
ours "$out/tokenizer.model" 'tokenizer.model'

"$python" - "$out" << 'PYTHON'
import json
import pathlib
import sys

folder = pathlib.Path(sys.argv[1])
rows = json.loads((folder / "peers.json").read_text())
for name in "tokenizer.json", "tokenizer.model":
    ours = json.loads((folder / f"{name}.json").read_text())["files"]
    rows += [{"peer": f"tinyllama, {name}", **file} for file in ours]
for file in dict.fromkeys(row["file"] for row in rows):
    here = [row for row in rows if row["file"] == file]
    best = max(row["tokens_per_sec_core"] for row in here if not row["peer"].startswith("tinyllama"))
    print(f"{pathlib.Path(file).name}: {here[0]['documents']} documents, {here[0]['bytes'] / 1e6:.1f} MB, one core")
    print(f"  {'':<28}{'Mtok/s':>9}{'first pass':>12}{'MB/s':>8}{'of the best peer':>18}   ids")
    for row in here:
        speed, first = row["tokens_per_sec_core"], row["tokens"] / row["first_pass_seconds"]
        print(
            f"  {row['peer']:<28}{speed / 1e6:>9.2f}{first / 1e6:>12.2f}{row['bytes'] / row['seconds'] / 1e6:>8.1f}"
            f"{speed / best:>17.2f}x   {row['tokens']} {row['ids_crc32']}"
        )
    # A literal </s> is a special token to a tokenizer.json and plain text to a tokenizer.model: the two kinds may differ.
    ids = {row["peer"]: row["ids_crc32"] for row in here}
    for ours, peer in ("tokenizer.json", "tokenizers"), ("tokenizer.model", "sentencepiece"):
        theirs = next(crc for name, crc in ids.items() if name.split()[0] == peer)
        if ids[f"tinyllama, {ours}"] != theirs:
            sys.exit(f"error: the ids of {file} by {ours} are not those of {peer}")
print("the ids of tokenizer.json are those of tokenizers, and those of tokenizer.model those of sentencepiece")
PYTHON
