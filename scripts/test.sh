#!/usr/bin/env bash
# Sets up what is missing and runs all tests, or those whose names contain the arguments:
#   ./scripts/test.sh            ./scripts/test.sh config
# Tests are built in the release profile, so that dependencies are compiled once.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh --no-build
exec cargo test --release --locked -- "$@"
