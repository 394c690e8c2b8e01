# Sourced by the scripts here, in the repository's root: makes .venv-golden where it is missing or of other packages,
# and sets `python`. It borrows torch from .venv, so that nothing big is installed twice.
VENV=.venv-golden
if ! cmp -s scripts/golden/requirements.txt "$VENV/requirements.txt"; then
  echo "golden: installing the pinned packages into $VENV" >&2
  rm -rf "$VENV"
  python3 -m venv "$VENV"
  realpath .venv/lib/python3.*/site-packages >"$(echo "$VENV"/lib/python3.*/site-packages)/libtorch.pth"
  "$VENV/bin/python" -m pip install -q --disable-pip-version-check -r scripts/golden/requirements.txt
  cp scripts/golden/requirements.txt "$VENV/requirements.txt"
fi
python="$VENV/bin/python"
