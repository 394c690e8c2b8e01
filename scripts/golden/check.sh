#!/usr/bin/env bash
# Remakes a sample of the golden vectors with the real PyTorch, transformers, sentencepiece and
# tensorboard, and compares them with the committed ones. Reuses libtorch's Python from .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."

source scripts/golden/venv.sh
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

remake() { # SCRIPT ARGUMENTS...; what it says is shown where it fails
  # One thread: the models are tiny, and threads would fight with whatever else runs here.
  OMP_NUM_THREADS=1 "$python" "scripts/golden/$1.py" "${@:2}" >"$out/log" 2>&1 ||
    { cat "$out/log" >&2; exit 1; }
}
remake model --out "$out/golden/model"
remake init --out "$out/golden"
remake train --out "$out/golden/train"
# Further generators go here: `remake NAME ...`, and the name of the folder in the loop below.
remake tokenizer "$out/golden/tokenizer"
remake sampling "$out/golden/generate/sampling.json"
remake chat_templates --out "$out/golden"
remake texts fixture "$out/golden/texts"
remake chat_layout write "$out/golden/chat_layout/layout.json"
for set in model init train tokenizer generate chat texts chat_layout; do
  "$python" scripts/golden/compare.py "tests/golden/$set" "$out/golden/$set"
done
"$python" scripts/golden/packed.py --check
"$python" scripts/golden/reader.py --check
"$python" scripts/golden/schedule.py --check
"$python" scripts/golden/tensorboard_check.py --check-golden

# A run of our own, read by the real packages: events by tensorboard, the checkpoint by transformers.
run="$out/run"
./target/release/tinyllama pretrain configs/quickstart.yaml --set "out_dir=$run" \
  --set train.max_steps=4 --set train.lr_warmup_steps=2 --set train.log_interval=1 \
  --set eval.interval=2 --set eval.max_iters=2 --set eval.final_validation=false \
  --set eval.initial_validation=false --set train.sample_prompt=null 2>"$out/log" ||
  { cat "$out/log"; exit 1; }
"$python" scripts/golden/tensorboard_check.py "$run"
tokens=0,17,300,42,7,1999,8
./target/release/tinyllama score --checkpoint "$run" --tokens "$tokens" --json >"$out/ours.json"
"$python" scripts/golden/score.py "$run/final" "$tokens" >"$out/theirs.json" 2>"$out/log" ||
  { cat "$out/log" >&2; exit 1; }
"$python" - "$out/ours.json" "$out/theirs.json" <<'PY'
import json, sys
ours, theirs = (json.load(open(path)) for path in sys.argv[1:])
assert ours["tokens"] == theirs["tokens"]
pairs = zip(ours["logprobs"][1:], theirs["logprobs"][1:])
error = max(abs(a - b) for a, b in pairs)
assert error < 2e-4 and abs(ours["nll"] - theirs["nll"]) < 2e-4, (ours, theirs)
print(f"score of a trained checkpoint equals transformers: max difference {error:.1e}")
PY
