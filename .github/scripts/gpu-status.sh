#!/usr/bin/env bash
# What the runner's GPUs are doing, as a table for GITHUB_STEP_SUMMARY. It waits for no lock: it must answer while a run trains.
# --pid host lets it name the processes of other containers.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

status=0
report=$(MAINRUN_DOCKER="--pid host" "$scripts/in-image.sh" mainrun-gpu) || status=$?
printf '%s\n' "${report:-mainrun-gpu gave no answer (exit code $status); see the log of this step.}" | tee -a "${GITHUB_STEP_SUMMARY:-/dev/null}"
exit "$status"
