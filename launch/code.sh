# Sourced by the scripts beside it: --dry-run, and how code reaches every worker at one commit.
# shellcheck shell=bash

DRY_RUN=${DRY_RUN:-}

# Run a command, or print it, quoted, where DRY_RUN is set.
run() {
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$@"
    echo
  else
    # `exec` is no program: what follows it takes this process's place.
    "$@"
  fi
}

quoted() { printf '%q ' "$@"; }

fail() {
  echo "launch/$(basename "$0"): $*" >&2
  exit 2
}

# Fail unless every named variable is set.
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || fail "set $name, for example ${name}=...; see the head of this script"
  done
}

# Print the commit that is checked out. What is not committed would not arrive: refused.
commit() {
  [ -z "$(git status --porcelain)" ] ||
    fail "the working tree has changes that are not committed, and only commits travel"
  git rev-parse HEAD
}

# make_bundle FILE: write that commit with its history as one file, with which `git fetch` works.
make_bundle() { run git bundle create --quiet "$1" HEAD; }

# unpack_command BUNDLE COMMIT: print what a worker runs, in its home, to get seal_jax/ at COMMIT.
unpack_command() {
  printf 'git init --quiet seal_jax && git -C seal_jax fetch --quiet %q HEAD' "$1"
  printf ' && git -C seal_jax checkout --quiet --force --detach %q\n' "$2"
}
