#!/usr/bin/env bash
# Fetches the Llama / Llama-2 tokenizer (32,000 tokens) as tokenizer.json and tokenizer_config.json.
#
#   ./scripts/fetch_llama_tokenizer.sh [OUT_DIR=checkpoints/llama-tokenizer]
#
# Meta's own file sits behind a licence form; llama-tokenizer-js (MIT) carries the same vocabulary and
# merges. Needs npm and python3; downloads 0.4 MB.
set -euo pipefail

package="llama-tokenizer-js@1.2.2"
here="$(cd "$(dirname "$0")" && pwd)"
out="${1:-checkpoints/llama-tokenizer}"

stop() {
    printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
    exit 1
}

command -v npm >/dev/null || stop "npm is not installed" "for example \`apt-get install npm\`"
command -v python3 >/dev/null || stop "python3 is not installed" "for example \`apt-get install python3\`"

tmp="$(mktemp -d)"
trap 'rm -rf "$tmp"' EXIT
echo "fetching $package" >&2
(cd "$tmp" && npm pack "$package" --silent >npm.log 2>&1) || {
    cat "$tmp/npm.log" >&2
    stop "npm could not fetch $package" "check the network, then run this script again"
}
tar -xzf "$tmp"/llama-tokenizer-js-*.tgz -C "$tmp"
python3 "$here/llama_tokenizer.py" "$tmp/package/llama-tokenizer.js" "$out"

echo "wrote $out/tokenizer.json and tokenizer_config.json" >&2
