#!/usr/bin/env bash
# Builds the tests and packs what a GPU machine needs to run those of the kernels: no Rust, no repository there,
# only Python with the same torch (for libtorch) and a driver.
#   ./scripts/bundle_gpu_tests.sh [FOLDER]      # default: target/gpu-tests
#   then, on the GPU machine:  FOLDER/run.sh [words of test names]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-target/gpu-tests}
./scripts/setup.sh --no-build --quiet
cargo build --release --locked
# Cargo names the test program, the last one built, in its messages.
suite=$(cargo test --release --locked --test suite --no-run --message-format json 2>/dev/null |
  sed -n 's/.*"executable":"\([^"]*suite-[^"]*\)".*/\1/p' | tail -n 1)
[[ -x $suite ]] || {
  printf 'error: cargo built no test program\n\nhint: run `cargo test --release --test suite --no-run`\n' >&2
  exit 1
}
mkdir -p "$folder"
cp "$suite" "$folder/suite"
cp target/release/tinyllama "$folder/tinyllama"
cp target/release/libtinyllama_cuda.so "$folder/"
cat > "$folder/run.sh" <<'RUN'
#!/usr/bin/env bash
# Runs the GPU tests, or those whose names contain one of the arguments; TORCH names torch's folder where
# python3 has another torch. `tinyllama` beside this measures them: tinyllama bench kernels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
torch=${TORCH:-$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__))')}
export LD_LIBRARY_PATH="$torch/lib:$(dirname "$torch")/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
(($#)) || set -- kernels:: gpu:: gpu_decode:: gpu_step::
exec ./suite --test-threads 1 --nocapture "$@"
RUN
chmod +x "$folder/run.sh"
printf 'packed %s: run %s/run.sh on the GPU machine\n' "$(du -sh "$folder" | cut -f1)" "$folder"
