#!/usr/bin/env bash
# Brings the runner's own copy of the code to a new commit: update-runner.sh SOURCE COMMIT
#   SOURCE        a checkout on this machine that holds the commit (the workflow's own), so that no token is needed here at all
#   MAINRUN_HOME  repo.git (no remotes), worktrees/COMMIT (one per commit, never changed again), current -> the newest one
# A running job keeps the worktree that it started in: nothing here is changed in place or removed.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MAINRUN_HOME:?}"
source=${1:?a checkout that holds the commit}
commit=${2:?the commit}
fail() { echo "$*" >&2; exit 2; }
[[ $commit =~ ^[0-9a-f]{40}$ ]] || fail "the commit is '$commit'; allowed are 40 hexadecimal digits"

mkdir -p "$MAINRUN_HOME/worktrees"
exec 9>"$MAINRUN_HOME/update.lock"
flock 9

repo="$MAINRUN_HOME/repo.git"
[ -d "$repo" ] || git init --quiet --bare "$repo"
git -C "$repo" fetch --quiet --no-tags "$(realpath "$source")" "$commit"
git -C "$repo" update-ref "refs/deployed/$commit" "$commit" # keeps it from being collected as garbage

current=$(basename "$(readlink "$MAINRUN_HOME/current" || true)")
if [ -n "$current" ] && [ "$current" != "$commit" ] && git -C "$repo" merge-base --is-ancestor "$commit" "$current"; then
  echo "The runner already has the newer $current."
  exit 0
fi

worktree="$MAINRUN_HOME/worktrees/$commit"
if [ ! -d "$worktree" ]; then
  git -C "$repo" worktree prune
  git -C "$repo" worktree add --quiet --detach "$worktree.new" "$commit"
  git -C "$repo" worktree move "$worktree.new" "$worktree"
fi
image=$("$scripts/image.sh" "$worktree")

# The switch is one rename, after everything else has succeeded.
ln -sfn "worktrees/$commit" "$MAINRUN_HOME/current.new"
mv -T "$MAINRUN_HOME/current.new" "$MAINRUN_HOME/current"
echo "The runner is at $commit with $image."
