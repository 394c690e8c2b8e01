#!/bin/sh
# Cargo's rustc wrapper (.cargo/config.toml): without libtorch a build would spend minutes on dependencies
# and then fail inside torch-sys. This stops it at once, with the fix.
torch=${LIBTORCH:-$(dirname "$0")/../.libtorch}
if ! grep -q "__version__ = '2\.11\.0" "$torch/version.py" 2>/dev/null; then
  printf '\nerror: no libtorch 2.11.0 at %s\n\n' "$torch" >&2
  printf 'hint: run ./scripts/setup.sh once, then build again\n\n' >&2
  exit 1
fi
exec "$@"
