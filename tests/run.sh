#!/usr/bin/env bash
# Installs what the tests need into .venv, and runs them: all but the long ones, and those that compile
# for TPU slices, unless -m says otherwise.
#
#   bash tests/run.sh                                  the default set
#   bash tests/run.sh -k checkpoint                    any of pytest's options; -n 0 is one worker
#   bash tests/run.sh -m aot                           every config, for the TPU slices that it names
#   PEERS=1 bash tests/run.sh -m 'long or not long'    all of them, and the comparisons with torch and peft
#
# Without PEERS=1 the comparisons with torch are skipped where there is no torch: it takes gigabytes.
# -m aot installs the TPU's compiler (jax[tpu]), without which tests that compile for one are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=(test ${PEERS:+peers})
[[ " $* " != *aot* ]] || extras+=(tpu)
bash launch/install.sh "${extras[@]}"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Where Python may not write bytecode beside the sources, each of a hundred processes would parse all
# of JAX again.
if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then
  unset PYTHONDONTWRITEBYTECODE
  export PYTHONPYCACHEPREFIX=$PWD/.venv/bytecode
fi
# Two workers, each with whole files, in the order of conftest.py: much of the time is one compiler's.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 "$@"
