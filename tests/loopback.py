"""Several processes as one run, on loopback."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

from tiny_run import TESTS


def launch(command, port, index, count=2, timeout="20", cwd=None, **variables):
    """Start process `index` of `count`, with one CPU device."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "SEAL_JAX_TIMEOUT": timeout,
        **variables,
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def finish(*group):
    """Wait for the processes; returns (exit code, stdout, stderr) of each."""

    def end(process):
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    with ThreadPoolExecutor(len(group)) as pool:  # nobody waits with a full pipe
        return list(pool.map(end, group))
