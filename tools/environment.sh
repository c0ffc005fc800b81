#!/usr/bin/env bash
# Makes the virtual environment .venv with the package (editable) and everything it and its tests import.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch_index=https://download.pytorch.org/whl/cpu

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
  echo "$python is $("$python" --version 2>&1 || true); Python 3.11, 3.12 or 3.13 is needed: make … PYTHON=python3.12" >&2
  exit 1
fi
# ensurepip is what Debian puts into python3-venv.
[ -x .venv/bin/pip ] || "$python" -m venv --clear .venv

# PyTorch's own index has builds without CUDA, which are 20 times smaller. pip would retry for minutes if it were not there.
index=()
if .venv/bin/python -c "import urllib.request; urllib.request.urlopen('$torch_index/torch/', timeout=10)" 2>/dev/null; then
  index=(--extra-index-url "$torch_index")
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${index[@]}" -c constraints.txt -e '.[wasm,gpu,test]'
