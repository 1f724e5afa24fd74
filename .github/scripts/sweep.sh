#!/usr/bin/env bash
# A sweep on the runner, in the image. The same NAME again goes on where the last job stopped, except with wandb.
# In:  SEARCH and BASE (sweeps/*.yaml), TRIALS, JOBS, ENGINE (local, ray, wandb), NAME, MAINRUN_HOME, MAINRUN_JOB (see in-image.sh)
# Out: $MAINRUN_HOME/runs/sweep-$NAME on the runner; artifacts/ with report.html; a summary for GITHUB_STEP_SUMMARY
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${SEARCH:?}" "${BASE:?}" "${NAME:?}" "${MAINRUN_HOME:?}"
fail() { printf '%s\n' "${*//[[:cntrl:]]/?}" >&2; exit 2; } # one line, whatever was found

[[ $MAINRUN_HOME =~ ^/[A-Za-z0-9_./-]+$ ]] || fail "MAINRUN_HOME is '$MAINRUN_HOME'; allowed is an absolute path of plain characters"
for file in "$SEARCH" "$BASE"; do
  [[ $file =~ ^sweeps/[A-Za-z0-9_/.-]+\.yaml$ && $file != *..* ]] || fail "'$file': allowed is a file sweeps/**.yaml"
  [ -f "$file" ] || fail "'$file': there is no such file"
done
[[ $NAME =~ ^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$ ]] || fail "NAME is '$NAME'; allowed are up to 100 letters, digits, '_', '.' and '-'"
[[ ${TRIALS:-20} =~ ^[1-9][0-9]{0,5}$ ]] || fail "TRIALS is '$TRIALS'; allowed is a whole number"
[[ ${JOBS:-1} =~ ^[1-9][0-9]{0,2}$ ]] || fail "JOBS is '$JOBS'; allowed is a whole number"
[[ ${ENGINE:-local} =~ ^(local|ray|wandb)$ ]] || fail "ENGINE is '$ENGINE'; allowed are local, ray and wandb"

folder="$MAINRUN_HOME/runs/sweep-$NAME"
command=(mainrun-sweep "$SEARCH" --config "$BASE" --out "$folder" --trials "${TRIALS:-20}" --jobs "${JOBS:-1}" --engine "${ENGINE:-local}")
again="with the same name to go on"
if [ "${ENGINE:-local}" = wandb ]; then
  again="with another name: W&B's own sweeps are not resumed"
  [ ! -d "$folder" ] || fail "the sweep '$NAME' exists; start it $again"
elif [ -d "$folder" ]; then
  command+=(--resume)
fi

# One job at a time has the GPU; the others wait here, and none is cancelled.
mkdir -p "$MAINRUN_HOME" artifacts
exec 9>"$MAINRUN_HOME/gpu.lock"
flock 9

status=0
"$scripts/in-image.sh" "${command[@]}" || status=$?
if [ -d "$folder" ]; then
  "$scripts/in-image.sh" mainrun-report "$folder" || status=${status/#0/1}
  find "$folder" -maxdepth 1 -type f \( -name '*.html' -o -name '*.csv' -o -name '*.json' -o -name '*.yaml' \) -exec cp {} artifacts/ \;
fi
{
  echo "## Sweep $NAME"
  echo
  if [ "$status" = 0 ]; then
    echo "Finished. The report is in this run's artifacts."
  else
    echo "Stopped with exit code $status. Start the workflow again $again."
  fi
} >>"${GITHUB_STEP_SUMMARY:-/dev/stdout}"
exit "$status"
