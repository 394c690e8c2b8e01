#!/usr/bin/env bash
# Sets up and builds what is missing, then runs the program:
#   ./scripts/run.sh pretrain configs/quickstart.yaml
# It runs in the repository's root, where the paths in configs/ begin. The program replaces this
# shell, so its output, exit code and signals are its own; what comes before goes to stderr.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./scripts/setup.sh --no-build --quiet
cargo build --release --locked
exec cargo run --release --locked --quiet -- "$@"
