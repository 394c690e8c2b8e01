#!/usr/bin/env bash
# Sets up everything the project needs besides Rust, Python 3.10+ with pip, and a C++ compiler:
#   .venv      pip's torch 2.11.0 (libtorch) and, on Linux x86-64, NVIDIA's CUDA compiler
#   .libtorch  a link to it, which .cargo/config.toml points the build at
#   target/    the built program (left out with --no-build)
# Run it as often as you like: what is there is kept, what is half done is completed.
#   TL_NO_CUDA=1 ./scripts/setup.sh     no CUDA compiler, no GPU kernels
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.11.0
PACKAGES=("torch==$TORCH")
if [[ "$(uname -sm)" == "Linux x86_64" && -z "${TL_NO_CUDA:-}" ]]; then
  PACKAGES+=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
    nvidia-cuda-cccl==13.0.85)
fi
STAMP=.venv/tinyllama-setup
NEEDED_GB=8 # .venv 4.3, target 1.5, pip's downloads 2

fail() { # problem, next action
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 1
}
say() { printf 'setup: %s\n' "$*" >&2; }

# Whether version $1 is at least $2.
at_least() { [[ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" == "$2" ]]; }

check_tools() {
  local want have
  command -v cargo >/dev/null || fail "cargo is not installed" "install Rust with rustup"
  want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
  have=$(rustc --version | cut -d' ' -f2)
  at_least "$have" "$want" || fail "Rust $want or newer is needed, found $have" "rustup update stable"
  command -v python3 >/dev/null || fail "python3 is not installed" "apt-get install python3 python3-venv"
  have=$(python3 -c 'import platform; print(platform.python_version())')
  at_least "$have" 3.10 || fail "Python 3.10 or newer is needed, found $have" "install a newer python3"
  python3 -c 'import venv, ensurepip' 2>/dev/null ||
    fail "python3 has no venv module" "apt-get install python3-venv"
  command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++ compiler" "apt-get install g++"
}

check_disk() {
  local free
  free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1000000)}')
  say "needs about $NEEDED_GB GB of disk, $free GB are free"
  ((free >= NEEDED_GB)) || fail "$NEEDED_GB GB of disk are needed here, $free GB are free" "free some space"
}

install_packages() {
  local started=$SECONDS
  # A venv without our stamp was interrupted or is another one: make it anew if its python is broken.
  if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    rm -rf .venv
    python3 -m venv .venv
  fi
  say "installing ${PACKAGES[*]} into .venv (about 2.5 GB to download)"
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar on "${PACKAGES[@]}" >&2 ||
    fail "pip could not install the packages" "check the network, then run this script again"
  printf '%s\n' "${PACKAGES[@]}" >"$STAMP"
  say "packages installed in $((SECONDS - started)) s"
}

link_libtorch() {
  local torch
  torch=$(echo .venv/lib/python3.*/site-packages/torch)
  grep -q "__version__ = '$TORCH" "$torch/version.py" 2>/dev/null ||
    fail "torch $TORCH is not in .venv" "remove .venv and run this script again"
  ln -sfn "$torch" .libtorch
}

if [[ ! -f "$STAMP" || "$(<"$STAMP")" != "$(printf '%s\n' "${PACKAGES[@]}")" ]]; then
  check_tools
  check_disk
  install_packages
fi
link_libtorch
if [[ "${1:-}" != --no-build ]]; then
  started=$SECONDS
  cargo build --release --locked
  say "built target/release/tinyllama in $((SECONDS - started)) s"
  say "done; try: ./scripts/run.sh pretrain configs/quickstart.yaml"
fi
