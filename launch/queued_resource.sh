#!/usr/bin/env bash
# Trains on spot TPUs that Google may take away: queue for them, run, and queue again until it is done.
#
#   export NAME=seal ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite BUCKET=my-bucket
#   bash launch/queued_resource.sh [--dry-run] --config configs/CONFIG.py --workdir gs://my-bucket/RUN
#
# Each worker's start-up script takes this clone's commit from the bucket and runs launch/tpu_worker.sh.
# The same arguments resume the run, so a slice that comes back goes on where the last one was. It is
# done when gs://.../summary.json exists; then the TPUs are deleted. Where a worker ends with an error,
# its log goes to gs://BUCKET/seal_jax/failed/, and the TPUs are deleted too. Keep this script running
# (tmux).
#
# RETRIES (20): how often a lost slice is asked for again. POLL (60): seconds between two looks.
# Interrupting this script deletes nothing:
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
# Not tried on Google's cloud; tests look at what it would call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/code.sh

if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
need NAME ZONE TYPE VERSION BUCKET
retries=${RETRIES:-20} poll=${POLL:-60}
workdir=
for ((i = 1; i < $#; i++)); do
  if [ "${!i}" = --workdir ]; then
    next=$((i + 1))
    workdir=${!next}
  fi
done
[[ $workdir == gs://* ]] ||
  fail "--workdir '$workdir' would be lost with the TPUs: it must be gs://BUCKET/PATH"

commit=$(commit)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
bundle=gs://$BUCKET/seal_jax/$commit.bundle
make_bundle "$folder/seal_jax.bundle"
run gcloud storage cp "$folder/seal_jax.bundle" "$bundle"

startup=$folder/startup.sh
lost=0 began=$(date -u +%Y%m%dT%H%M%SZ)
# Where the workers of this slice, and of no other, put the log of a run that ended with an error.
failed() { echo "gs://$BUCKET/seal_jax/failed/$NAME-$began-$lost/"; }
write_startup() {
  echo '#!/usr/bin/env bash'
  echo 'set -euo pipefail'
  echo 'export HOME=/root && cd "$HOME"'
  quoted gcloud storage cp "$bundle" seal_jax.bundle
  echo
  unpack_command ../seal_jax.bundle "$commit"
  if [ -n "${JAX_COMPILATION_CACHE_DIR:-}" ]; then
    quoted export "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR"
    echo
  fi
  echo "{ bash seal_jax/launch/tpu_setup.sh && bash seal_jax/launch/tpu_worker.sh $(quoted "$@"); } \\"
  echo '  2>&1 | tee seal_jax.log && exit'
  printf 'gcloud storage cp seal_jax.log %q"$(hostname).log"\n' "$(failed)"
  echo 'exit 1'
}

queue() { run gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }
create() { # the arguments of seal-jax train
  write_startup "$@" > "$startup"
  if [ -n "$DRY_RUN" ]; then sed 's/^/    /' "$startup"; fi
  queue create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    --spot --scopes=https://www.googleapis.com/auth/cloud-platform \
    --metadata-from-file=startup-script="$startup"
}
is_done() { gcloud storage ls "${workdir%/}/summary.json" > /dev/null 2>&1; }
has_failed() { gcloud storage ls "$(failed)" > /dev/null 2>&1; }

create "$@"
if [ -n "$DRY_RUN" ]; then
  queue describe "$NAME" --format='value(state.state)'
  queue delete "$NAME" --force --quiet
  exit
fi
seen='' suspect=''
while ! is_done; do
  # A look that fails (the network) is one look less.
  state=$(queue describe "$NAME" --format='value(state.state)') || state=UNKNOWN
  [ "$state" = "$seen" ] || echo "$(date -u +%FT%TZ) $NAME is $state"
  seen=$state
  case $state in
    FAILED | SUSPENDED)
      queue delete "$NAME" --force --quiet
      lost=$((lost + 1))
      [ "$lost" -le "$retries" ] || fail "lost the TPUs $lost times, RETRIES=$retries: giving up"
      echo "lost the TPUs; asking again, $lost of $retries"
      suspect=
      create "$@"
      ;;
    ACTIVE)
      if has_failed; then
        # Workers of a slice that is being taken away may end so, too: look again.
        if [ -n "$suspect" ]; then
          queue delete "$NAME" --force --quiet
          fail "the run ended with an error: see the logs in $(failed). The TPUs are deleted"
        fi
        suspect=1
      fi
      sleep "$poll"
      ;;
    *) sleep "$poll" ;;
  esac
done
echo "$workdir/summary.json is there: done"
queue delete "$NAME" --force --quiet
