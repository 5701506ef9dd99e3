"""SIGTERM: clouds send it some 30 s before they take a machine, and `tpu_vm.sh stop` does.

Before the run has begun it ends the process at once, with code 0: all that is on disk is whole.
Later the process goes on to the end of its wave, whose results are then on disk. There all
processes of a run ask each other whether anybody was told to end, and all end or none does. A
second one ends the process at once.

Python lets signals wait for the main thread, which may compile a program for minutes. So a thread
reads them, too.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Generator

_TOLD, _BEGUN = threading.Event(), threading.Event()
_KILLED = 128 + signal.SIGTERM  # the exit code that shells give


class Stopped(Exception):
    """Some process of the run was told to end; what is finished is on disk."""


@contextlib.contextmanager
def listening() -> Generator[None]:
    """Hear SIGTERM in this block, which the main thread runs."""
    _TOLD.clear()
    _BEGUN.clear()
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    reader = threading.Thread(target=_read, args=(heard,), daemon=True)
    reader.start()
    last_pipe = signal.set_wakeup_fd(tell)  # before the handler: no signal falls between
    last_handler = signal.signal(signal.SIGTERM, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, last_handler or signal.SIG_DFL)
        signal.set_wakeup_fd(last_pipe)
        os.close(tell)
        reader.join()
        os.close(heard)


def stop_if_told() -> None:
    """Raise Stopped on every process where one of them was told to end; all call this together.

    Raises:
      ValueError: on every process: another run has begun in their folder.
    """
    # JAX comes with these, and `listening` must not wait for it.
    from seal_jax.hosts.exchange import exchange
    from seal_jax.hosts.folder_lock import successor

    _BEGUN.set()
    said = exchange("stop", "told" if _TOLD.is_set() else successor())
    if others := [word for word in said if word not in ("", "told")]:
        raise ValueError(others[0])
    if told := [str(i) for i, word in enumerate(said) if word]:
        raise Stopped(f"process {', '.join(told)} got SIGTERM")


def _note(number: int, frame: object) -> None:
    del number, frame
    _TOLD.set()


def _read(heard: int) -> None:
    """Read the numbers of signals until the pipe is closed; end if there is nothing to finish."""
    count = 0
    while number := os.read(heard, 1):
        if number[0] != signal.SIGTERM:
            continue
        count += 1
        if count > 1:
            os._exit(_KILLED)
        if not _BEGUN.is_set():
            _end()


def _end() -> None:
    message = "got SIGTERM before the run began"
    print(f"{message}: the same command begins it", file=sys.stderr, flush=True)
    if "seal_jax.hosts.failure" in sys.modules:  # else nobody has been looked for
        from seal_jax.hosts.failure import end_others

        end_others(message, 0)
    os._exit(0)


def _die_of_it() -> None:
    """Let a forked process die of SIGTERM; what it hears, its parent would read."""
    if signal.getsignal(signal.SIGTERM) is _note:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_die_of_it)
