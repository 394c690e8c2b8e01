#!/usr/bin/env bash
# Every strategy on the first N cards of a machine beside one of them, in the same minutes:
#   ./benches/ranks.sh CONFIG CARDS MICRO_BATCH ACCUMULATION [STEPS] [-- more arguments of `bench train`]
#   ./benches/ranks.sh configs/tinyllama-1xh100.yaml 8 16 1
# Tokens a second and card, that as a share of one card's, the time in which nothing ran beside communication, peak memory,
# and how far the losses are from those of one card that trains the same batches by accumulation. On the CPU
# (`-- --set device=cpu`) ranks are processes over Gloo that share its cores. TINYLLAMA and PYTHON name other programs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# < 4)); then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
config=$1 cards=$2 micro=$3 accumulation=$4 steps=20
shift 4
source benches/common.sh
# NVLink multicast can put a shared host's cards out of service.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

bench() { # name, sequences a step, arguments...
  "$tinyllama" bench train "$config" --warmup 5 --steps "$steps" --json --set "train.micro_batch_size=$micro" \
    --set "train.global_batch_size=$2" "${@:3}" > "$folder/$1.json"
}
step=$((micro * accumulation))
bench warm-up "$step" --profile-steps 0 "$@" # products are timed once for a card
bench 'one card' "$step" "$@"
bench 'the same batches' $((step * cards)) --profile-steps 0 "$@"
for strategy in full_shard shard_grad_op hybrid_shard ddp; do
  bench "$strategy" $((step * cards)) --devices "$cards" --set "distributed.strategy=$strategy" "$@"
done

"$python" - "$folder" << 'PYTHON'
import json
import pathlib
import sys

folder = pathlib.Path(sys.argv[1])
read = lambda name: json.loads((folder / f"{name}.json").read_text())
one, same = read("one card"), read("the same batches")
print(f"{one['device']}, {one['model']}, {one['precision']}, {one['micro_batch_size']} x {one['accumulation']}")
print(f"{'':<16}{'tok/s a card':>14}{'share':>9}{'alone, ms':>11}{'GiB':>8}{'losses':>10}")
for name in ["one card", "full_shard", "shard_grad_op", "hybrid_shard", "ddp"]:
    run = read(name)
    speed = run["tokens_per_sec"] / run["ranks"]
    share = speed / one["tokens_per_sec"]
    alone = (run["profile"] or {}).get("communication_alone_ms")
    memory = run["peak_memory_gib"]
    apart = max(abs(a / b - 1) for a, b in zip(run["losses"], same["losses"]))
    text = lambda x, form: "n/a" if x is None else format(x, form)
    losses = "" if name == "one card" else f"{apart:.1e}"
    print(f"{name:<16}{speed:>14.0f}{share:>9.1%}{text(alone, '.2f'):>11}{text(memory, '.1f'):>8}{losses:>10}")
PYTHON
