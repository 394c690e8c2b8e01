#!/bin/sh
# Cargo's rustc wrapper (.cargo/config.toml). Without libtorch a build would spend minutes on other
# dependencies and then fail inside torch-sys; this stops it at once, with the fix. It costs a
# few milliseconds a crate.
torch=${LIBTORCH:-$(dirname "$0")/../.libtorch}

stop() { # problem, hint
  printf '\nerror: %s\n\nhint: %s, then build again\n\n' "$1" "$2" >&2
  exit 1
}

# `version.py` is pip's torch, `build-version` the C++ distribution.
if ! grep -qs -e "^__version__ = '2\.11\.0['+]" "$torch/version.py" &&
  ! grep -qs -e '^2\.11\.0' "$torch/build-version"; then
  case $torch in
    */.libtorch) ;;
    *) stop "no libtorch 2.11.0 at LIBTORCH=$torch" "unset LIBTORCH and run ./scripts/setup.sh" ;;
  esac
  stop "no libtorch 2.11.0 at $torch" "run ./scripts/setup.sh"
fi
if [ -n "${LIBTORCH_USE_PYTORCH+set}" ]; then
  stop "LIBTORCH_USE_PYTORCH would build against another torch" "unset LIBTORCH_USE_PYTORCH"
fi
exec "$@"
