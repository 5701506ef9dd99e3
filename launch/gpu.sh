#!/usr/bin/env bash
# Trains on this machine's NVIDIA GPUs. Paths are relative to the repository.
#
#   bash launch/gpu.sh --config configs/CONFIG.py --workdir runs/gpu
#   CUDA=12 bash launch/gpu.sh ...          for drivers too old for CUDA 13 (below 580)
#
# Not tried: the resolution of the requirements is, the run on a GPU is not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh "cuda${CUDA:-13}"
export JAX_PLATFORMS=cuda,cpu PATH="$PWD/.venv/bin:$PATH"  # named, a missing GPU is an error
exec seal-jax train "$@"
