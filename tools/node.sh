#!/usr/bin/env bash
# Puts Node 24 and wabt, a second reader of WebAssembly, into build/node, where the tests find them, unless both are there.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(node@24.21.0 wabt@1.0.39) # always together: npm removes what it is not asked for
folder=build/node
programs=$folder/node_modules/.bin

major() { "$1" --version 2>/dev/null | sed -n 's/^v\([0-9]*\).*/\1/p'; }
has_node() { [ "$(major node)" -ge 24 ] 2>/dev/null || [ "$(major "$programs/node")" = 24 ]; }
has_wabt() { command -v wasm-validate >/dev/null || [ -e "$programs/wasm-validate" ]; }

if has_node && has_wabt; then exit 0; fi
if ! command -v npm >/dev/null; then
  echo "There is no npm to get ${packages[*]} with: install it, or these." >&2
  exit 0
fi
mkdir -p "$folder"
npm install --silent --no-save --no-audit --no-fund --prefix "$folder" "${packages[@]}"
has_node || echo "npm installed no Node 24 that runs here" >&2
