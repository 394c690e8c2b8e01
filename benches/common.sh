# What the scripts here share, for them to source behind their own arguments: `[STEPS] [-- more of bench train]` is taken
# apart into `steps` and "$@"; `tinyllama`, `python`, and `folder`, which goes when the script ends.
# shellcheck shell=bash disable=SC2034
if (($#)) && [[ $1 != -- ]]; then
  steps=$1
  shift
fi
[[ ${1:-} != -- ]] || shift
tinyllama=${TINYLLAMA:-target/release/tinyllama}
python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
