#!/usr/bin/env bash
# Decoding of TinyLlama-1.1B, ours and others in the same minutes, one JSON object a line:
#   ./benches/decode.sh gpu              one card, random weights: batch 1 short and long, 1,000 sequences; PyTorch
#                                        with CUDA graphs and transformers where they are installed
#   ./benches/decode.sh cpu [FILE]       two threads, Q4_0 of random weights (made if FILE is not there): llama.cpp
# TINYLLAMA and PYTHON name other programs. The peers of `cpu` need `pip install gguf llama-cpp-python`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tinyllama=${TINYLLAMA:-target/release/tinyllama}
python=${PYTHON:-.venv/bin/python}
peer() { "$python" benches/peers/decode.py "$@" 2>/dev/null || printf '{"peer": "%s: not installed, or failed"}\n' "$1"; }

case ${1:-} in
  gpu)
    ours() { "$tinyllama" bench decode --preset tiny-llama-1.1b --device cuda --json "$@"; }
    for peer in torch transformers; do
      peer $peer 1 16 256
      peer $peer 1 900 100
    done
    ours --prompt-tokens 16 --new-tokens 256
    ours --prompt-tokens 900 --new-tokens 100
    ours --prompt-tokens 16 --new-tokens 256 --quantize int8:128
    ours --prompt-tokens 16 --new-tokens 256 --quantize int4:128
    ours --prompts 100 --samples 10 --prompt-tokens 128 --new-tokens 256
    ours --prompts 100 --samples 10 --prompt-tokens 128 --new-tokens 256 --temperature 0.8
    peer torch 1000 128 256 # minutes: last
    ;;
  cpu)
    file=${2:-out/bench-decode/tiny-llama-q4_0.gguf}
    mkdir -p "$(dirname "$file")"
    [[ -f $file ]] || "$python" benches/peers/decode.py gguf "$file" > /dev/null 2>&1 || { echo "error: cannot make $file: pip install gguf llama-cpp-python" >&2; exit 1; }
    for round in 1 2; do
      peer llama.cpp "$file" 256 32
      "$tinyllama" bench decode --checkpoint "$file" --device cpu --json --prompt-tokens 256 --new-tokens 32
    done
    ;;
  *)
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
