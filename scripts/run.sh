#!/usr/bin/env bash
# Sets up what is missing, builds, and runs the program:
#   ./scripts/run.sh pretrain configs/quickstart.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh --no-build
cargo build --release --locked
exec ./target/release/tinyllama "$@"
