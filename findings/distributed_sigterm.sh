#!/usr/bin/env bash
# JAX 0.10.2: after jax.distributed.initialize a process no longer ends when it is told to.
#
# initialize() turns on a preemption service that takes SIGTERM for the whole process. It writes a
# line to the log and returns: the process goes on, and a handler that Python code had set before is
# not called any more. So `kill PID`, a pod's eviction and a launcher's clean-up wait for their grace
# period and then kill for good, unless the program asks reached_preemption_sync_point in its loop.
# With jax_enable_preemption_service=False SIGTERM does what it did.
#
# Seen: with the default the handler is not called; with the service off it is.
# The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2

for enabled in 1 0; do
  JAX_PLATFORMS=cpu JAX_ENABLE_PREEMPTION_SERVICE=$enabled "$folder/venv/bin/python" - "$enabled" <<'PYTHON'
import os
import signal
import socket
import sys
import time

import jax

enabled = sys.argv[1] == "1"
called = []
signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(2)
print(f"preemption service {'on' if enabled else 'off'}: alive, and the handler was called {len(called)} times")
assert len(called) == (0 if enabled else 1), "it no longer does so"
PYTHON
done
