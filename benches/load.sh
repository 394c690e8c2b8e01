#!/usr/bin/env bash
# Loading TinyLlama-1.1B (2.2 GB of random bf16) into host memory from the page cache: ours, Python's safetensors and
# torch.load in one run. Makes out/bench-load with 4.4 GB of files; the peers live in .venv-golden.
#   ./benches/load.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tinyllama=${TINYLLAMA:-target/release/tinyllama}
python=${PYTHON:-.venv-golden/bin/python}
out=out/bench-load
if [[ ! -f $out/config.json ]]; then
  "$python" benches/peers/load.py make "$out"
fi
mkdir -p "$out-bin"
ln -sf "../bench-load/pytorch_model.bin" "../bench-load/config.json" "$out-bin/"
cat "$out"/*.safetensors "$out"/*.bin > /dev/null
for _ in 1 2; do
  "$tinyllama" bench load "$out"
  "$tinyllama" bench load "$out-bin"
  "$python" benches/peers/load.py time "$out"
done
