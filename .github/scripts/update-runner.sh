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
fail() { printf '%s\n' "${*//[[:cntrl:]]/?}" >&2; exit 2; } # one line, whatever was found
[[ $commit =~ ^[0-9a-f]{40}$ ]] || fail "the commit is '$commit'; allowed are 40 hexadecimal digits"
source=$(realpath -e -- "$source" 2>/dev/null) || fail "the checkout is '$1'; there is no such folder"

mkdir -p "$MAINRUN_HOME/worktrees"
exec 9>"$MAINRUN_HOME/update.lock"
flock 9

# A job that was killed may have left any step half done, so each can be done again: git's own locks go (this job holds the only
# one that counts), and so does what belongs to a worktree that never got its name. git init loses nothing of a repository.
repo="$MAINRUN_HOME/repo.git"
rm -rf "$MAINRUN_HOME"/worktrees/*.new
for entry in "$repo"/worktrees/*; do
  name=$(basename "$entry")
  [ -d "$MAINRUN_HOME/worktrees/${name%%.*}" ] || rm -rf "$entry"
done
[ ! -d "$repo" ] || find "$repo" -name '*.lock' -not -path '*/worktrees/*' -delete
git init --quiet --bare "$repo"
git -C "$repo" fetch --quiet --no-tags "$source" "$commit"
git -C "$repo" update-ref "refs/deployed/$commit" "$commit" # keeps it from being collected as garbage

current=$(basename "$(readlink "$MAINRUN_HOME/current" || true)")
if [ -n "$current" ] && [ "$current" != "$commit" ] && git -C "$repo" merge-base --is-ancestor "$commit" "$current"; then
  echo "The runner already has the newer $current."
  exit 0
fi

worktree="$MAINRUN_HOME/worktrees/$commit"
if [ ! -d "$worktree" ]; then
  git -C "$repo" worktree add --quiet --detach "$worktree.new" "$commit"
  git -C "$repo" worktree move "$worktree.new" "$worktree"
fi
git -C "$repo" worktree repair "$worktree" >/dev/null # it may have got its name, and not yet have been told
image=$("$scripts/image.sh" "$worktree")

# The switch is one rename, after everything else has succeeded.
ln -sfn "worktrees/$commit" "$MAINRUN_HOME/current.new"
mv -T "$MAINRUN_HOME/current.new" "$MAINRUN_HOME/current"
echo "The runner is at $commit with $image."
