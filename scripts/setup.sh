#!/usr/bin/env bash
# Prepares this checkout:
#   .venv      pip's torch (libtorch) and, on Linux x86-64, pip's CUDA compiler, all pinned
#   .libtorch  a link to that torch, where .cargo/config.toml points the build
#   target/    the program, unless --no-build
# Run it at any time, also after an interruption: what is half done is completed, what is done is
# kept. A stamp file lists what was installed; while it is current, all this takes milliseconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.11.0 # the one libtorch that tch 0.24 works with; scripts/rustc.sh checks the same
CUDA_COMPILER=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
  nvidia-cuda-cccl==13.0.85)
# Measured on Linux x86-64, rounded up.
VENV_GB=6     # .venv: 5.2
DOWNLOAD_GB=3 # wheels while pip unpacks them: 2.5, and again in pip's cache; later target/ fits there
STAMP=.venv/.setup-done

usage() {
  cat <<USAGE
usage: scripts/setup.sh [--no-build] [--quiet]

Installs libtorch $TORCH and a CUDA compiler into .venv, then builds target/release/tinyllama.
It needs Rust, Python 3.10 or later with venv and pip, a C++17 compiler, and $((VENV_GB + DOWNLOAD_GB)) GB of disk.

  --no-build   stop before \`cargo build\`
  --quiet      print nothing where nothing is to be done

  TL_NO_CUDA=1   leave out the CUDA compiler and the GPU kernels; the program loads no CUDA library
  TL_CUDA_ARCHS  architectures to compile kernels for, as 80 or 90a (default: both)
  PYTHON=...     the Python to use (default: python3)
USAGE
}

fail() { # problem, hint
  printf '\nerror: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 1
}

say() { printf 'setup: %s\n' "$*" >&2; }

# Whether version $1 is at least $2; compares major.minor.
at_least() {
  local have_major have_minor want_major want_minor rest
  IFS=. read -r have_major have_minor rest <<<"$1"
  IFS=. read -r want_major want_minor rest <<<"$2"
  ((have_major > want_major || (have_major == want_major && have_minor >= want_minor)))
}

# How long each part took, for the closing table.
parts=()
part_start=0
finish_part() { # name
  parts+=("$(printf '%-9s %4d s' "$1" "$((SECONDS - part_start))")")
  part_start=$SECONDS
}

# ---- what this machine has ----------------------------------------------------------------------

check_rust() {
  local wanted tool found
  wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
  for tool in cargo rustc; do
    command -v "$tool" >/dev/null ||
      fail "\`$tool\` is not on PATH" "install Rust $wanted or later with rustup"
    found=$("$tool" --version | cut -d' ' -f2)
    at_least "$found" "$wanted" ||
      fail "$tool $found is too old, $wanted is needed" "run \`rustup update stable\`"
  done
}

check_compiler() {
  local cxx=${CXX:-c++}
  # CXX may carry a wrapper or flags: it is split into words on purpose.
  # shellcheck disable=SC2086
  printf '#include <filesystem>\nint main() { if constexpr (true) return 0; }\n' |
    $cxx -std=c++17 -fsyntax-only -x c++ - 2>/dev/null ||
    fail "\`$cxx\` is no C++17 compiler with its standard library" \
      "run \`apt-get install g++\`, or set CXX to a compiler"
}

check_python() {
  local found
  command -v "$python" >/dev/null ||
    fail "\`$python\` is not on PATH" "run \`apt-get install python3 python3-venv\`"
  found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  at_least "$found" 3.10 ||
    fail "\`$python\` is Python $found, 3.10 or later is needed" \
      "install a newer one and run \`PYTHON=/path/to/python3 ./scripts/setup.sh\`"
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "\`$python\` cannot make a virtual environment with pip" \
      "run \`apt-get install python$found-venv\` (or python3-venv)"
}

free_gb() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1000000) }'; }
file_system() { df -Pk "$1" | awk 'NR == 2 { print $1, $6 }'; }

# Refuses a disk that is too small before anything is downloaded. pip's cache is left out where it
# would not fit. What an interrupted run already put here counts as done.
check_disk() {
  local cache=${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}} have=0 free need
  while [[ ! -d $cache ]]; do cache=$(dirname "$cache"); done
  [[ ! -d .venv ]] || have=$(du -sk .venv/ | awk '{ print int($1 / 1000000) }')
  need=$((VENV_GB + DOWNLOAD_GB - have))
  free=$(free_gb .)
  say "disk: $need GB are needed here, $free GB are free"
  ((free >= need)) ||
    fail "$need GB of disk are needed in $PWD, $free GB are free" \
      "free some space, or clone to a larger disk"
  if [[ $(file_system "$cache") == "$(file_system .)" ]]; then
    free=$((free - need))
  else
    free=$(free_gb "$cache")
  fi
  if ((free < DOWNLOAD_GB)); then
    say "pip's cache is not used: there is no room for another $DOWNLOAD_GB GB"
    pip_options+=(--no-cache-dir)
  fi
}

# ---- what is there already ----------------------------------------------------------------------

# Whether .libtorch holds the wanted torch. Starts no process: this is on the way to every run.
torch_is_right() {
  local line
  [[ -r .libtorch/version.py ]] || return 1
  while IFS= read -r line; do
    [[ $line != "__version__ = '$TORCH"['+']* ]] || return 0
  done <.libtorch/version.py
  return 1
}

# Whether the stamp covers what is wanted now.
is_current() {
  local stamp package
  [[ -r $STAMP ]] && torch_is_right || return 1
  stamp=$'\n'$(<"$STAMP")$'\n'
  for package in "${packages[@]}"; do
    [[ $stamp == *$'\n'"$package"$'\n'* ]] || return 1
  done
}

# ---- parts --------------------------------------------------------------------------------------

make_venv() {
  local info
  rm -f "$STAMP"
  if [[ -e .venv/bin/python ]] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "completing .venv, which is half made or out of date"
    # pip writes INSTALLER after a package's files. Without it the package may be half unpacked, yet
    # pip would take it for installed.
    for info in .venv/lib/python3.*/site-packages/*.dist-info; do
      [[ ! -d $info || -e $info/INSTALLER ]] || rm -rf "$info"
    done
  else
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv >&2 ||
      fail "\`$python -m venv .venv\` failed" "see its messages above"
  fi
}

install_packages() {
  say "installing ${packages[*]} (2.5 GB to download, unless pip has them cached)"
  # pip's temporary files go to the disk that was checked, not to a possibly small /tmp.
  rm -rf .venv/tmp
  mkdir .venv/tmp
  TMPDIR="$PWD/.venv/tmp" .venv/bin/python -m pip install "${pip_options[@]}" "${packages[@]}" >&2 ||
    fail "pip could not install the packages" \
      "see its messages above (network? proxy?), then run ./scripts/setup.sh again: it continues"
  rm -rf .venv/tmp
}

link_libtorch() {
  local site
  site=$(.venv/bin/python -c 'import sys; print("lib/python%d.%d/site-packages" % sys.version_info[:2])')
  ln -sfn ".venv/$site/torch" .libtorch
  torch_is_right ||
    fail "torch $TORCH is not in .venv/$site" "remove .venv and run ./scripts/setup.sh again"
  [[ ${#packages[@]} == 1 || -x .venv/$site/nvidia/cu13/bin/nvcc ]] ||
    fail "nvcc is not at .venv/$site/nvidia/cu13/bin/nvcc" \
      "remove .venv and run ./scripts/setup.sh again, or set TL_NO_CUDA=1 to do without it"
}

install() {
  trap 'say "interrupted; run ./scripts/setup.sh again: it continues"; exit 130' INT
  trap 'exit 143' TERM
  check_rust
  check_compiler
  check_python
  check_disk
  finish_part checks
  make_venv
  finish_part .venv
  install_packages
  link_libtorch
  printf '%s\n' "${packages[@]}" >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  finish_part packages
}

build() {
  check_rust
  say "cargo build --release --locked"
  cargo build --release --locked ||
    fail "the build failed" "see cargo's messages above, then run ./scripts/setup.sh again"
  finish_part build
}

# ---- main ---------------------------------------------------------------------------------------

with_build=1
quiet=0
for argument in "$@"; do
  case "$argument" in
    --no-build) with_build=0 ;;
    --quiet) quiet=1 ;;
    -h | --help) usage && exit 0 ;;
    *)
      printf 'error: unknown argument "%s"\n\n' "$argument" >&2
      usage >&2
      exit 2
      ;;
  esac
done

# Settings of another environment would send packages elsewhere, or make pip find them there.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER
python=${PYTHON:-python3}
pip_options=(--no-input --disable-pip-version-check)
packages=("torch==$TORCH")
if [[ $(uname -sm) == "Linux x86_64" && -z ${TL_NO_CUDA+set} ]]; then
  packages+=("${CUDA_COMPILER[@]}")
fi

if ! is_current; then
  # One at a time: a second set-up waits for the first and then finds its work done.
  if command -v flock >/dev/null; then
    mkdir -p target
    exec 9>target/.setup-lock
    flock -n 9 || { say "another set-up is at work here, waiting" && flock 9; }
  fi
  is_current || install
  exec 9>&-
elif ((!quiet)); then
  say "libtorch $TORCH is set up in .venv"
fi
if ((with_build)); then
  build
fi
if ((${#parts[@]})); then
  say "done"
  printf '  %s\n' "${parts[@]}" >&2
  ((!with_build)) || say "try \`./scripts/run.sh pretrain configs/quickstart.yaml\`"
fi
