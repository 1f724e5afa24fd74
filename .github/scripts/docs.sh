#!/usr/bin/env bash
# The documentation site: nbdev turns the chapters into pages (_proc), Quarto renders them into _proc/_docs.
# Notebooks are rendered with the outputs that they carry; nothing is run. Quarto must be on the path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bin=${MAINRUN_BIN:-$PWD/.venv/bin}

command -v quarto >/dev/null || { echo "quarto is not on the path; see quarto.org" >&2; exit 2; }
"$bin/nbdev-proc-nbs" --n-workers 2
cd _proc
repository=$("$bin/python" -c 'from nbdev.config import get_config; print(get_config().git_url)')
if [ -n "$repository" ]; then # pyproject.toml says where the repository lies: what is outside the book is linked where it lies
  sed -i "s#](\.\./#]($repository/blob/${GITHUB_SHA:-main}/#g" ./*.ipynb
else # a link to it would lead nowhere: nbdev's to the sources go, and of the book's own the text stays
  sed -i -E 's#\[source\]\(/blob/[^)]*\)\{[^}]*\}(\\n)*##g; s#\[([^][]*)\]\(\.\./[^)]*\)#\1#g' ./*.ipynb
fi
quarto render --no-execute
test -f _docs/index.html
