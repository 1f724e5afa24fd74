#!/usr/bin/env bash
# Runs a command in the runner image, with the checkout that it is called from as the code. Usage: in-image.sh COMMAND [ARG ...]
#   MAINRUN_HOME    the runner's folder: runs/ and data/ are mounted under their own names, .env holds keys (WANDB_API_KEY)
#   MAINRUN_JOB     the name of a job that wants the GPU for itself, if it is one; containers that earlier jobs left are stopped first
#   MAINRUN_DOCKER  more arguments for docker run, if any;  MAINRUN_LOCAL=1: no container, the command as it is
set -euo pipefail
: "${MAINRUN_HOME:?the folder of runs, data and .env on the runner}"
mkdir -p "$MAINRUN_HOME/runs" "$MAINRUN_HOME/data"

if [ "${MAINRUN_LOCAL:-0}" = 1 ]; then
  exec "$@"
fi

options=(--rm --init --no-healthcheck --gpus all --ipc host --user "$(id -u):$(id -g)" --env HOME=/tmp --env USER=mainrun)
options+=(--volume "$PWD:/app:ro" --volume "$MAINRUN_HOME/runs:$MAINRUN_HOME/runs" --volume "$MAINRUN_HOME/data:/data")
git_dir=$(git rev-parse --path-format=absolute --git-common-dir 2>/dev/null || true)
if [ -n "$git_dir" ] && [[ $git_dir != "$PWD"/* ]]; then # of a worktree: a run writes down its commit
  options+=(--volume "$git_dir:$git_dir:ro")
fi
if [ -f "$MAINRUN_HOME/.env" ]; then
  options+=(--env-file "$MAINRUN_HOME/.env")
fi
if [ -n "${HN_TITLES:-}" ]; then
  options+=(--env "HN_TITLES=$HN_TITLES")
fi
if [ -n "${MAINRUN_DOCKER:-}" ]; then
  read -rd '' -a more <<<"$MAINRUN_DOCKER" || true # up to the end, new lines included
  options+=("${more[@]}")
fi
if [ -n "${MAINRUN_JOB:-}" ]; then
  # A job can be killed without its container, which then still has the GPU; stopped, its run saves its state.
  docker ps --quiet --filter label=mainrun-job | xargs --no-run-if-empty docker stop -t 600 >&2
  options+=(--label mainrun-job --name "$MAINRUN_JOB")
fi
image=$("$(dirname "${BASH_SOURCE[0]}")/image.sh" .)
exec docker run "${options[@]}" "$image" "$@"
