#!/usr/bin/env bash
# Prints the name of the runner image that belongs to a checkout; builds it first where it is missing.
# The name carries a hash of the image's inputs, so an image is rebuilt only when one of them has changed.
# Usage: image.sh [CHECKOUT]
set -euo pipefail
cd "${1:-.}"

inputs=(docker/Dockerfile .dockerignore constraints.txt settings.ini setup.py pyproject.toml)
image="mainrun-nb:$(sha256sum "${inputs[@]}" | sha256sum | cut -c1-12)"
if ! docker image inspect "$image" >/dev/null 2>&1; then
  echo "Building $image ..." >&2
  docker build --file docker/Dockerfile --tag "$image" . >&2
fi
echo "$image"
