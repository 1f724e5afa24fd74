#!/usr/bin/env bash
# One training run on the runner: papermill executes sweeps/trial.ipynb in the image.
# In:  CONFIG (sweeps/*.yaml), OVERRIDES (key=value ..., separated by blanks or new lines), SEED, RUN (the run's name), MAINRUN_HOME
# Out: $MAINRUN_HOME/runs/$RUN on the runner; artifacts/ beside the code; a summary for GITHUB_STEP_SUMMARY
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${CONFIG:?}" "${RUN:?}" "${MAINRUN_HOME:?}"
fail() { printf '%s\n' "${*//[[:cntrl:]]/?}" >&2; exit 2; } # one line, whatever was found

[[ $MAINRUN_HOME =~ ^/[A-Za-z0-9_./-]+$ ]] || fail "MAINRUN_HOME is '$MAINRUN_HOME'; allowed is an absolute path of plain characters"
[[ $CONFIG =~ ^sweeps/[A-Za-z0-9_/.-]+\.yaml$ && $CONFIG != *..* ]] || fail "CONFIG is '$CONFIG'; allowed is a file sweeps/**.yaml"
[ -f "$CONFIG" ] || fail "CONFIG is '$CONFIG'; there is no such file"
[[ $RUN =~ ^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$ ]] || fail "RUN is '$RUN'; allowed are up to 100 letters, digits, '_', '.' and '-'"
[[ ${SEED:-1337} =~ ^[0-9]{1,9}$ ]] || fail "SEED is '$SEED'; allowed is a whole number"
seed=$((10#${SEED:-1337})) # in base 10: YAML takes 0123 for 83
IFS=$' \t\r\n' read -rd '' -a overrides <<<"${OVERRIDES:-}" || true # up to the end, which is what makes read answer 1
# Nothing that YAML or a shell could take for anything else, and no path: the container writes to its run's folder alone.
plain='^[A-Za-z_][A-Za-z0-9_.]*=[]A-Za-z0-9_.,:+[-]*$'
titles='^data\.source=(hackernews|synthetic|hf:[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+|/data/[A-Za-z0-9_./-]+)$'
for override in "${overrides[@]}"; do
  case $override in
    hyperparams.log_file=*) fail "OVERRIDES has '$override'; a job's log lies in its run's folder" ;;
    data.source=*) [[ $override =~ $titles && $override != *..* ]] ||
      fail "OVERRIDES has '$override'; allowed are hackernews, synthetic, hf:OWNER/NAME and a path below /data" ;;
    *) [[ $override =~ $plain ]] || fail "OVERRIDES has '$override'; allowed is key=value" ;;
  esac
done

folder="$MAINRUN_HOME/runs/$RUN"
[ ! -e "$folder" ] || fail "RUN is '$RUN'; there is already a run of that name"
mkdir -p "$folder" artifacts
{
  printf 'config: "%s"\nseed: %s\nout: "%s"\noverrides:%s\n' "$CONFIG" "$seed" "$folder/run" "$([ ${#overrides[@]} -gt 0 ] || echo ' []')"
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
