#!/usr/bin/env bash
# Ours and plain PyTorch on one card in the same minutes, TinyLlama 1.1B:
#   ./benches/compare.sh CONFIG MICRO_BATCH ACCUMULATION [STEPS] [-- more arguments of `bench train`]
#   ./benches/compare.sh configs/tinyllama-1xh100.yaml 16 1
# The peers have fp32 master weights and bf16 autocast, eager and torch.compile, cuDNN attention; they train on random
# tokens. TINYLLAMA and PYTHON name other programs, PEER_ARGS more arguments of the peers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# < 3)); then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
config=$1 micro=$2 accumulation=$3 steps=50
shift 3
source benches/common.sh

# The peers first: the card is at its warmest for ours.
for mode in eager compile; do
  # shellcheck disable=SC2086
  "$python" benches/peers/train.py --mode "$mode" --micro-batch "$micro" --accumulation "$accumulation" \
    --steps "$steps" ${PEER_ARGS:-} > "$folder/$mode.json" ||
    printf '{"peer": "PyTorch, %s: failed"}' "$mode" > "$folder/$mode.json"
done
"$tinyllama" bench train "$config" --steps "$steps" --json --set train.micro_batch_size="$micro" \
  --set train.global_batch_size=$((micro * accumulation)) "$@" > "$folder/ours.json"

"$python" - "$folder" <<'PY'
import json, sys

ours, *peers = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("ours", "eager", "compile"))
shown = lambda x, form: "n/a" if x is None else form.format(x)
print(f"{ours['device']}: {ours['micro_batch_size']} x {ours['accumulation']} sequences a step, {ours['steps']} steps")
print(f"{'':48} {'tok/s':>9} {'mfu':>7} {'causal':>7} {'GiB':>6} {'ours is':>8}")
for r in (ours, *peers):
    name = r.get("peer", f"tinyllama, {r.get('precision')}")
    if "tokens_per_sec" not in r:
        print(name)
        continue
    ratio = ours["tokens_per_sec"] / r["tokens_per_sec"]
    print(
        f"{name:48} {r['tokens_per_sec']:9.0f} {shown(r['mfu'], '{:7.1%}'):>7} {shown(r['mfu_causal'], '{:7.1%}'):>7} "
        f"{shown(r['peak_memory_gib'], '{:6.1f}'):>6} {ratio:7.2f}x"
    )
PY
