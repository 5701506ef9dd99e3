#!/usr/bin/env bash
# Trains on this worker of a Cloud TPU: every worker of a slice runs it, with the same arguments.
#
#   bash launch/tpu_worker.sh --config configs/CONFIG.py --workdir gs://BUCKET/RUN
#
# tpu_vm.sh, queued_resource.sh and skypilot.yaml end here. An argument gs://BUCKET/PATH becomes a path
# of that bucket, mounted with gcsfuse: a run is written as plain files. JAX_COMPILATION_CACHE_DIR may
# be gs:// too; JAX writes it itself. DRY_RUN=1 prints what would run.
# Not tried on a TPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/code.sh

mount_bucket() { # BUCKET: on ~/gcs/BUCKET, once
  local folder=$HOME/gcs/$1
  if mountpoint -q "$folder"; then return; fi
  command -v gcsfuse > /dev/null || [ -n "$DRY_RUN" ] ||
    fail "gcsfuse is not installed; bash launch/tpu_setup.sh does it"
  run mkdir -p "$folder"
  # A checkpoint takes its name by renaming its folder.
  run gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" "$folder"
}

arguments=()
for argument in "$@"; do
  if [[ $argument == gs://* ]]; then
    path=${argument#gs://}
    mount_bucket "${path%%/*}"
    argument=$HOME/gcs/$path
  fi
  arguments+=("$argument")
done

export PATH="$PWD/.venv/bin:$PATH"
export JAX_PLATFORMS=tpu,cpu   # named, a missing TPU is an error
export SEAL_JAX_DISTRIBUTED=1  # the workers of a slice find each other
run exec seal-jax train ${arguments[@]+"${arguments[@]}"}
