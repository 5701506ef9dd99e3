#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice: run it on every worker at once, from a clone on each.
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='
#     cd seal_jax && bash launch/tpu_vm.sh --config configs/CONFIG.py --workdir gs://BUCKET/RUN'
#
# Images with Ubuntu 22.04 have Python 3.10: install 3.11 or newer and name it with PYTHON=python3.11.
# Not tried: the resolution of the requirements is, the run on a TPU is not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh tpu
export JAX_PLATFORMS=tpu,cpu PATH="$PWD/.venv/bin:$PATH"  # named, a missing TPU is an error
exec seal-jax train "$@"
