"""What people see of a run: lines, and how far it is. The first of several processes speaks."""

import sys
from collections.abc import Iterable, Sized
from functools import partial
from typing import TextIO

from tqdm import tqdm

from seal_jax.hosts.exchange import is_first


def say(text: str) -> None:
    """Print at once."""
    if is_first():
        print(text, flush=True)


def progress(iterable_or_total: Iterable | int, desc: str, unit: str = "it") -> tqdm:
    """Show how far a loop is, on stderr: iterate over the result, or call `.update(n)`.

    In a terminal it is a bar. Elsewhere (a log file, a pod) it is plain lines with the time left:
    at most one in 10 s, and only when a tenth more is done or a minute has passed.

    Args:
      iterable_or_total: what to iterate over, or the number of units that `.update` will count.
      desc: what is being done.
      unit: what is counted.
    """
    iterable, total = iterable_or_total, None
    if isinstance(iterable, int):
        iterable, total = None, iterable
    elif isinstance(iterable, Sized):
        total = len(iterable)
    bar = partial(tqdm, iterable, desc, total, unit=unit, disable=not is_first())
    if sys.stderr.isatty():
        return bar(file=sys.stderr, dynamic_ncols=True)
    return bar(
        file=_PlainLines(sys.stderr),
        mininterval=10,
        maxinterval=60,
        miniters=max(1, (total or 0) // 10),
        bar_format=_PLAIN_FORMAT if total else None,
    )


_PLAIN_FORMAT = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} so far, {remaining} left"


class _PlainLines:
    """A text stream that turns tqdm's rewriting of one line into lines of their own."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text and text != self._last:  # closing a bar repeats its last line
            self._stream.write(f"{text}\n")
            self._last = text

    def flush(self) -> None:
        self._stream.flush()
