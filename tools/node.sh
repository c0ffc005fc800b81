#!/usr/bin/env bash
# Puts Node 24 into build/node, where the tests of WebAssembly in a JavaScript engine find it, unless `node` is as new.
set -euo pipefail
cd "$(dirname "$0")/.."

version=24.21.0
folder=build/node
installed=$folder/node_modules/.bin/node

major() { "$1" --version 2>/dev/null | sed -n 's/^v\([0-9]*\).*/\1/p'; }

if [ "$(major node)" -ge 24 ] 2>/dev/null || [ "$(major "$installed")" = 24 ]; then exit 0; fi
if ! command -v npm >/dev/null; then
  echo "Node 24 is not installed and there is no npm to get it with: install either." >&2
  exit 0
fi
mkdir -p "$folder"
npm install --silent --no-save --no-audit --no-fund --prefix "$folder" "node@$version"
[ "$(major "$installed")" = 24 ] || echo "npm installed no Node 24 that runs here" >&2
