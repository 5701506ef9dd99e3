#!/usr/bin/env bash
# Installs what the tests need into .venv, and runs them: all but the long ones, and those that compile
# for TPU slices (-m aot, needs libtpu), unless -m says otherwise.
#
#   bash tests/run.sh                                  the default set
#   bash tests/run.sh -k checkpoint                    any of pytest's options; -n 0 is one worker
#   PEERS=1 bash tests/run.sh -m 'long or not long'    all of them, and the comparisons with torch and peft
#
# Without PEERS=1 the comparisons with torch are skipped where there is no torch: it takes gigabytes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh test ${PEERS:+peers}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Two workers, each with whole files: much of the time is one compiler's.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --durations=10 "$@"
