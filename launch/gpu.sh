#!/usr/bin/env bash
# Trains on NVIDIA GPUs: all of this machine's, or those of a Slurm job. Paths are relative to the
# repository.
#
#   bash launch/gpu.sh [--dry-run] --config configs/CONFIG.py --workdir runs/gpu
#   CUDA=12 bash launch/gpu.sh ...          for drivers too old for CUDA 13 (below 580)
#
# Under Slurm, one task for each GPU, from a folder that all nodes see:
#   bash launch/install.sh cuda13           once, on the login node
#   srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 bash launch/gpu.sh --config ... --workdir ...
#
# XLA multiplies with cuBLAS: so the inner loop of Qwen2.5-7B compiled in 12 s on an H100; without the
# flag that of SmolLM2's sizes had not after 150 s, for its search for Triton's tiles as it seems.
# Products then stay apart: XLA would make one of three by joining their weights anew at every token,
# which Triton does as it reads them and cuBLAS cannot. What you set in XLA_FLAGS comes after, and
# counts.
#
# Not tried on a GPU: the resolution of the requirements is, and `bench inner` with the first flag was
# run. What both do was read from programs compiled for an H200.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/code.sh

if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
  # Tasks that install into one folder at once would spoil it.
  [ -x .venv/bin/seal-jax ] || [ -n "$DRY_RUN" ] ||
    fail "no .venv: run 'bash launch/install.sh cuda${CUDA:-13}' once, before srun"
  export SEAL_JAX_DISTRIBUTED=1
else
  run bash launch/install.sh "cuda${CUDA:-13}"
fi
export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false --xla_gpu_dot_merger_threshold_mb=0 ${XLA_FLAGS:-}"
export JAX_PLATFORMS=cuda,cpu PATH="$PWD/.venv/bin:$PATH"  # named, a missing GPU is an error
run exec seal-jax train "$@"
