#!/usr/bin/env bash
# Trains on this machine's CPU. Paths are relative to the repository.
#
#   bash launch/cpu.sh --config configs/quickstart.py --workdir runs/cpu
#
# Tried: Linux x86-64, Python 3.11 and 3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh
export JAX_PLATFORMS=cpu PATH="$PWD/.venv/bin:$PATH"
exec seal-jax train "$@"
