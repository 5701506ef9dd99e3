"""One process of a run fails: the others end too, with its message.

They may wait for it in a computation, which no exception reaches.
"""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time

import jax
from jax._src import distributed  # JAX has no public name for it

_GRACE = 3.0  # seconds, for a process to end by itself where another has failed
_ENDS = threading.Event()  # this process does, by itself
_FAILED, _FIRST_FAILED = "seal_jax/failed", "seal_jax/first_failed"


def watch_others() -> None:
    """End this process a moment after another has failed, from now on, in a thread."""
    watch = threading.Thread(target=_end_where_another_fails, daemon=True)
    watch.start()

    def stop_watching() -> None:  # before Python ends it within a call of JAX's, which aborts
        _ENDS.set()
        watch.join()

    atexit.register(stop_watching)


def _end_where_another_fails() -> None:
    client, code, message = distributed.global_state.client, "", ""
    assert client is not None  # JAX has connected the processes
    while not message:
        if _ENDS.wait(1.0):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has failed
            code, _, message = client.key_value_try_get(_FIRST_FAILED).partition(" ")
    if not _ENDS.wait(_GRACE):
        what = "was told to" if code == "0" else "failed"
        print(f"ended, as another process {what}: {message}", file=sys.stderr, flush=True)
        os._exit(0 if code == "0" else 2)


def end_others(message: str, code: int) -> None:
    """Tell the others that this process has failed; they end with the same message.

    Returns where all have failed, each for itself; else this process ends here: the first after the
    others, which need its service, and another before the first, without which JAX aborts it.

    Args:
      code: what this process ends with; 0 if it was told to end, and the others end with 0 then.
    """
    state = distributed.global_state
    if state.client is None:
        return
    _ENDS.set()
    said = f"process {state.process_id} on {socket.gethostname()}: {message}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or is gone
        state.client.key_value_set(f"{_FAILED}/{state.process_id}", said)
        state.client.key_value_set(_FIRST_FAILED, f"{code} {said}")
    deadline = time.monotonic() + (_GRACE / 2 if state.process_id else 2 * _GRACE)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        while time.monotonic() < deadline:
            if len(state.client.key_value_dir_get(_FAILED)) == state.num_processes:
                return
            time.sleep(0.1)
    sys.stderr.flush()
    os._exit(code)  # the others are gone: nobody comes to JAX's barrier at the end
