#!/usr/bin/env bash
# Runs a command in the runner image, with the checkout that it is called from as the code. Usage: in-image.sh COMMAND [ARG ...]
#   MAINRUN_HOME    the runner's folder: runs/ and data/ are mounted under their own names, .env holds keys (WANDB_API_KEY)
#   MAINRUN_DOCKER  more arguments for docker run, if any;  MAINRUN_LOCAL=1: no container, the command as it is
set -euo pipefail
: "${MAINRUN_HOME:?the folder of runs, data and .env on the runner}"
mkdir -p "$MAINRUN_HOME/runs" "$MAINRUN_HOME/data"

if [ "${MAINRUN_LOCAL:-0}" = 1 ]; then
  exec "$@"
fi

options=(--rm --init --no-healthcheck --gpus all --ipc host --user "$(id -u):$(id -g)" --env HOME=/tmp --env USER=mainrun)
options+=(--volume "$PWD:/app:ro" --volume "$MAINRUN_HOME/runs:$MAINRUN_HOME/runs" --volume "$MAINRUN_HOME/data:/data")
if [ -f "$MAINRUN_HOME/.env" ]; then
  options+=(--env-file "$MAINRUN_HOME/.env")
fi
if [ -n "${HN_TITLES:-}" ]; then
  options+=(--env "HN_TITLES=$HN_TITLES")
fi
if [ -n "${MAINRUN_DOCKER:-}" ]; then
  read -ra more <<<"$MAINRUN_DOCKER"
  options+=("${more[@]}")
fi
image=$("$(dirname "${BASH_SOURCE[0]}")/image.sh" .)
exec docker run "${options[@]}" "$image" "$@"
