#!/usr/bin/env bash
# A Cloud TPU VM or pod slice, from your own machine with `gcloud`.
#
#   export NAME=seal ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite
#   bash launch/tpu_vm.sh create
#   bash launch/tpu_vm.sh setup          this clone's commit, Python and .venv, on every worker
#   bash launch/tpu_vm.sh run --config configs/CONFIG.py --workdir gs://BUCKET/RUN
#   bash launch/tpu_vm.sh logs           worker 0's, as it is written; WORKER=3 another's
#   bash launch/tpu_vm.sh status         of the VM, and whether each worker still runs
#   bash launch/tpu_vm.sh stop           SIGTERM on every worker
#   bash launch/tpu_vm.sh delete
#
# --dry-run before the command prints what it would do. SPOT=1 creates a spot VM; queued_resource.sh
# also comes back after it was taken away. JAX_COMPILATION_CACHE_DIR, which may be gs://, is handed on.
# VERSION: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e and
# tpu-ubuntu2204-base for v4. Not tried on Google's cloud; tests look at what it would call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/code.sh

if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
command=${1:-}
[ $# -eq 0 ] || shift
need NAME ZONE
tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
on_every_worker() { tpu ssh "$NAME" --worker=all --command="$1"; }

case $command in
  create)
    need TYPE VERSION
    spot=()
    [ -z "${SPOT:-}" ] || spot=(--spot)
    # Workers read and write buckets with the VM's own account.
    tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION" \
      --scopes=https://www.googleapis.com/auth/cloud-platform ${spot[@]+"${spot[@]}"}
    ;;
  setup)
    commit=$(commit)
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    make_bundle "$folder/seal_jax.bundle"
    tpu scp "$folder/seal_jax.bundle" "$NAME": --worker=all
    unpack=$(unpack_command '../seal_jax.bundle' "$commit")
    on_every_worker "$unpack && bash seal_jax/launch/tpu_setup.sh"
    ;;
  run)
    settings=
    if [ -n "${JAX_COMPILATION_CACHE_DIR:-}" ]; then
      settings=$(quoted "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR")
    fi
    on_every_worker "nohup env ${settings}bash seal_jax/launch/tpu_worker.sh $(quoted "$@")\
> seal_jax.log 2>&1 < /dev/null & echo \$! > seal_jax.pid"
    ;;
  logs) tpu ssh "$NAME" --worker="${WORKER:-0}" --command="tail -n 100 -F seal_jax.log" ;;
  status)
    tpu describe "$NAME" --format='value(state,health)'
    on_every_worker 'kill -0 "$(cat seal_jax.pid)" && echo "$(hostname) runs" ||
      echo "$(hostname) does not run"; tail -n 1 seal_jax.log'
    ;;
  stop) on_every_worker 'kill -TERM "$(cat seal_jax.pid)"' ;;
  delete) tpu delete "$NAME" --quiet ;;
  *) fail "no command '$command'; there are create, setup, run, logs, status, stop, delete" ;;
esac
