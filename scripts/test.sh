#!/usr/bin/env bash
# Sets up what is missing and runs all tests, or those whose names contain one of the arguments:
#   ./scripts/test.sh                  ./scripts/test.sh rope resume
# Tests are built in the release profile, so that dependencies are compiled once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./scripts/setup.sh --no-build --quiet

color=never
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
  color=always
fi
# Each test program prints its own counts; this adds them up.
# shellcheck disable=SC2016
count='
  function number(word) { return match($0, "[0-9]+ " word) ? substr($0, RSTART, RLENGTH) + 0 : 0 }
  { print; fflush() }
  /^test result: / {
    passed += number("passed"); failed += number("failed"); ignored += number("ignored")
  }
  END {
    if (passed + failed + ignored == 0) exit 1
    printf "all tests: %d passed, %d failed, %d ignored", passed, failed, ignored
  }'
code=0
cargo test --release --locked --no-fail-fast --color "$color" -- --color "$color" "$@" |
  awk "$count" || code=${PIPESTATUS[0]}:${PIPESTATUS[1]}
case "$code" in
  0 | *:0) echo ", in $SECONDS s with set-up and build" ;;
  0:*) printf '\nerror: no test has %s in its name\n' "$*" >&2 ;;
esac
[[ $code == 0 ]] || exit $((${code%:*} ? ${code%:*} : 1))
