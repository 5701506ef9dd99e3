"""SIGTERM: clouds send it some 30 s before they take a machine, and `tpu_vm.sh stop` does.

The process notes it and goes on to the end of its wave, whose results are then on disk. There all
processes of a run ask each other whether anybody was told to end, and all end or none does.
"""

import signal
import threading

from seal_jax.hosts.exchange import exchange

_TOLD = threading.Event()


class Stopped(Exception):
    """Some process of the run was told to end; what is finished is on disk."""


def listen() -> None:
    """Note the first SIGTERM in place of dying of it; a second one ends this process at once."""
    _TOLD.clear()
    signal.signal(signal.SIGTERM, _note)


def stop_if_told() -> None:
    """Raise Stopped on every process where one of them was told to end; all call this together."""
    said = exchange("stop", "yes" if _TOLD.is_set() else "no")
    if told := [str(i) for i, word in enumerate(said) if word == "yes"]:
        raise Stopped(f"process {', '.join(told)} got SIGTERM")


def _note(number: int, frame: object) -> None:
    del frame
    _TOLD.set()
    signal.signal(number, signal.SIG_DFL)
