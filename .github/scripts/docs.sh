#!/usr/bin/env bash
# The documentation site: nbdev turns the chapters into pages (_proc), Quarto renders them into _proc/_docs.
# Notebooks are rendered with the outputs that they carry; nothing is run. Quarto must be on the path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bin=${MAINRUN_BIN:-$PWD/.venv/bin}

command -v quarto >/dev/null || { echo "quarto is not on the path; see quarto.org" >&2; exit 2; }
"$bin/nbdev-proc-nbs" --n-workers 2
cd _proc
if [ -n "${GITHUB_REPOSITORY:-}" ]; then  # what lies outside the book is linked where it lies
  sed -i "s#](\.\./#](${GITHUB_SERVER_URL:-https://github.com}/$GITHUB_REPOSITORY/blob/${GITHUB_SHA:-main}/#g" ./*.ipynb
fi
quarto render --no-execute
test -f _docs/index.html
