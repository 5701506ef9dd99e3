#!/usr/bin/env bash
# Trains on this machine's CPU. Paths are relative to the repository.
#
#   bash launch/cpu.sh [--dry-run] --config configs/quickstart.py --workdir runs/cpu
#
# Tried: Linux x86-64, Python 3.11 and 3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/code.sh

if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
run bash launch/install.sh
export JAX_PLATFORMS=cpu PATH="$PWD/.venv/bin:$PATH"
run exec seal-jax train "$@"
