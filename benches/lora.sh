#!/usr/bin/env bash
# LoRA on TinyLlama-1.1B (random weights) on one card, ours and transformers + PEFT in the same minutes, one JSON object a
# line: tokens a second (median of the steps after the fifth) and peak memory.
#   ./benches/lora.sh [STEPS]      # default: 40; needs `pip install transformers peft` for the peer
# TINYLLAMA and PYTHON name other programs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
steps=${1:-40}
# shellcheck source=benches/common.sh
source benches/common.sh

$python benches/peers/lora.py base "$folder/base" 2>/dev/null && cp data/quickstart/tokenizer/* "$folder/base/"
$python benches/peers/lora.py rows "$folder/rows.jsonl" 2000
ours() { # targets, batch, length
  local out="$folder/out-$1-$2"
  "$tinyllama" finetune configs/finetune/tinyllama-guanaco-lora.yaml --set initial_checkpoint_dir="$folder/base" \
    --set out_dir="$out" --set finetune.data.train="$folder/rows.jsonl" --set finetune.data.template=guanaco \
    --set finetune.data.val_fraction=0 --set finetune.data.loss_on=all --set "finetune.lora.targets=[$1]" \
    --set train.micro_batch_size="$2" --set train.global_batch_size="$2" --set train.max_seq_length="$3" \
    --set train.max_steps="$steps" --set train.activation_checkpointing=none --set eval.final_validation=false "${@:4}" > /dev/null 2> "$out.log" ||
    { tail -n 5 "$out.log" >&2; return; }
  $python - "$out/metrics.jsonl" "$1" "$2" "$3" <<'PY'
import json, statistics, sys
steps = [json.loads(line) for line in open(sys.argv[1])]
steps = [s for s in steps if "loss" in s][5:]
print(json.dumps({"ours": "tinyllama", "targets": sys.argv[2], "batch": int(sys.argv[3]), "tokens": int(sys.argv[4]),
                  "tokens_per_sec": statistics.median(s["tokens_per_sec"] for s in steps),
                  "peak_gib": max(s["peak_memory_gib"] or 0 for s in steps), "losses": [round(s["loss"], 3) for s in steps[:: max(1, len(steps) // 4)]]}))
PY
}
for batch in 8 16; do
  for targets in q_proj,v_proj all; do
    $python benches/peers/lora.py train "$folder/base" "$batch" 1024 "$steps" "$([[ $targets == all ]] && echo all || echo qv)" 2>/dev/null ||
      echo '{"peer": "transformers + PEFT: not installed, or failed"}'
    ours "$targets" "$batch" 1024
  done
done
