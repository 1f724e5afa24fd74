#!/usr/bin/env bash
# One training run on the runner: papermill executes sweeps/trial.ipynb in the image.
# In:  CONFIG (sweeps/*.yaml), OVERRIDES (key=value ..., separated by spaces), SEED, RUN (the run's name), MAINRUN_HOME
# Out: $MAINRUN_HOME/runs/$RUN on the runner; artifacts/ beside the code; a summary for GITHUB_STEP_SUMMARY
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${CONFIG:?}" "${RUN:?}" "${MAINRUN_HOME:?}"
fail() { echo "$*" >&2; exit 2; }

[[ $CONFIG =~ ^sweeps/[A-Za-z0-9_/.-]+\.yaml$ && $CONFIG != *..* ]] || fail "CONFIG is '$CONFIG'; allowed is a file sweeps/**.yaml"
[ -f "$CONFIG" ] || fail "CONFIG is '$CONFIG'; there is no such file"
[[ $RUN =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || fail "RUN is '$RUN'; allowed are letters, digits, '_', '.' and '-'"
[[ ${SEED:-1337} =~ ^[0-9]{1,9}$ ]] || fail "SEED is '$SEED'; allowed is a whole number"
read -ra overrides <<<"${OVERRIDES:-}"
plain='^[A-Za-z_][A-Za-z0-9_.]*=[]A-Za-z0-9_.,:/+[-]*$' # nothing that YAML or a shell could take for anything else
for override in "${overrides[@]}"; do
  [[ $override =~ $plain ]] || fail "OVERRIDES has '$override'; allowed is key=value"
done

folder="$MAINRUN_HOME/runs/$RUN"
[ ! -e "$folder" ] || fail "RUN is '$RUN'; there is already a run of that name"
mkdir -p "$folder" artifacts
{
  printf 'config: "%s"\nseed: %s\nout: "%s"\noverrides:%s\n' "$CONFIG" "${SEED:-1337}" "$folder/run" "$([ ${#overrides[@]} -gt 0 ] || echo ' []')"
  [ ${#overrides[@]} -eq 0 ] || printf -- '- "%s"\n' "${overrides[@]}"
} >"$folder/parameters.yaml"

# One job at a time has the GPU; the others wait here, and none is cancelled.
export MAINRUN_JOB=$RUN
exec 9>"$MAINRUN_HOME/gpu.lock"
flock 9

status=0
"$scripts/in-image.sh" papermill --no-progress-bar --parameters_file "$folder/parameters.yaml" \
  sweeps/trial.ipynb "$folder/trial.ipynb" || status=$?
for name in trial.ipynb parameters.yaml run/result.json run/config.yaml run/metrics.jsonl run/curves.png run/samples.txt; do
  [ ! -f "$folder/$name" ] || cp "$folder/$name" artifacts/
done
python3 "$scripts/summary.py" "$RUN" "$folder/run/result.json" >>"${GITHUB_STEP_SUMMARY:-/dev/stdout}"
exit "$status"
