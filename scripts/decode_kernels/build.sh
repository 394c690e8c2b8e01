#!/usr/bin/env bash
# libdecode.so from csrc/decode, all files at once (half a minute on 16 cores), for check.py and bench.py: no Rust, no
# libtorch headers. Needs nvcc 13 and a Hopper card.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../csrc"
objects=$(mktemp -d)
for file in decode/*.cu rmsnorm.cu swiglu.cu "$here/abi.cu"; do
  nvcc -std=c++17 -O3 -Xcompiler -fPIC -gencode=arch=compute_90a,code=sm_90a -I. -c "$file" -o "$objects/$(basename "$file").o" &
done
wait
nvcc -shared -cudart shared -o "$here/libdecode.so" "$objects"/*.o
