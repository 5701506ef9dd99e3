#!/usr/bin/env bash
# SEAL on a CPU, from a fresh clone: installs into .venv, then one round of SEAL on SmolLM2-135M.
#
#   bash launch/quickstart.sh [--set KEY=VALUE ...]
#
# Paths are relative to the repository. PYTHON names another interpreter than python3 (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

echo "Quick start: install into .venv if needed, then train SmolLM2-135M on the CPU in runs/quickstart."
bash launch/install.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec .venv/bin/seal-jax train --config configs/quickstart.py --workdir runs/quickstart "$@"
