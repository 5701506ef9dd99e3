"""Files of a run: JSON that is whole or absent, and lines of JSON.

Of several processes all call these functions, and the first one writes.

`metrics.jsonl` is the source of truth of a run: one object per line, in the order of the steps. A
kill can tear only its last line; reading skips it, and the next append removes it. A line with a
step is a result, and counts once, however often it is there.
"""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from seal_jax.hosts import manifest
from seal_jax.hosts.exchange import is_first, least
from seal_jax.hosts.json_text import parse_json, read_value
from seal_jax.hosts.replacing import replace_text

_RESERVED = ("step", "time", "nonfinite")
# What a result is the result of: in a ledger of inner runs, in edits.jsonl, in metrics.jsonl.
_KEYS = (("step", "name", "text"), ("step", "problem", "edit"), ("step",))


def append_metrics(path: str | os.PathLike, step: int, metrics: Mapping[str, Any]) -> None:
    """Append one line: outer step, wall time and flat numbers, or arrays of one number, by name.

    A NaN or infinity is written as null and its name listed under 'nonfinite', since bare NaN is
    not JSON. The file is opened for each line, so that a kill loses no line that was written.

    Raises:
      ValueError: a name is reserved ('step', 'time', 'nonfinite').
      TypeError: a value is not one number.
    """
    numbers = {name: _to_number(name, value) for name, value in metrics.items()}
    line: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
    line |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    if nonfinite := [name for name, x in numbers.items() if not math.isfinite(x)]:
        line["nonfinite"] = nonfinite
    append_json(path, line)


def _to_number(name: str, value: Any) -> float | int:
    if name in _RESERVED:
        raise ValueError(f"metric {name!r}: the name is reserved")
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"metric {name!r}: needs one number, got {value!r}")
    return int(array.item()) if array.dtype.kind in "biu" else float(array.item())


def append_json(path: str | os.PathLike, line: Mapping[str, Any]) -> None:
    """Append one object as a line of JSON, after dropping a last line that a kill tore."""
    if not is_first():
        return
    with open(path, "ab+") as file:
        _drop_torn_line(file)
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def _drop_torn_line(file: BinaryIO) -> None:
    """Cut a file, open for 'ab+', back to the end of its last whole line."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read_jsonl(path: str | os.PathLike, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, without a last line that a kill tore.

    Args:
      keys: that every object has.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a whole line is not a JSON object with these keys, or two lines have different
        results for one thing; the message names file and line.
    """
    with open(path, "rb") as file:
        whole, _, _ = file.read().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        row = parse_json(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: not a JSON object: {line[:80]!r}")
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"{path}:{number}: has no {', '.join(missing)}: {line[:80]!r}")
        rows.append(row)
    return _once(path, rows)


def _once(path: str | os.PathLike, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without those that repeat an earlier one."""
    lines: dict[str, int] = {}  # by what the row is the result of
    kept = []
    for number, row in enumerate(rows, start=1):
        key = next(({k: row[k] for k in names} for names in _KEYS if row.keys() >= {*names}), None)
        first = lines.setdefault(json.dumps(key), number) if key else number
        if first == number:
            kept.append(row)
        elif _without_clock(rows[first - 1]) != _without_clock(row):
            raise ValueError(
                f"{path}: lines {first} and {number} differ, and both are the result of {key}:"
                " perhaps two runs wrote there at once. Begin again in another folder; or delete"
                f" the wrong one, and {manifest.MANIFEST} beside it, which has both"
            )
    return kept


def _without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "time" and not k.startswith("seconds/")}


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """Return the object that a JSON file of ours holds; None where there is no file."""
    return read_object(path) if os.path.exists(path) else None


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Return the object that a JSON file of somebody else's holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds anything else; the message names it.
    """
    found = read_value(path)
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(f"{os.fspath(path)}: expected a JSON object, found {kind}.")
    return found


def truncate_after(path: str | os.PathLike, step: int) -> None:
    """Drop the lines of every step above `step`, which a resumed run will redo.

    The file is replaced in one move, if any line goes; one that does not exist is left so.
    """
    if not is_first() or not os.path.exists(path):
        return
    data = Path(path).read_bytes()
    read_jsonl(path, keys=["step"])  # or what is wrong is said
    whole = data.split(b"\n")[:-1]
    kept = b"".join(line + b"\n" for line in whole if json.loads(line)["step"] <= step)
    if len(kept) < len(data):
        manifest.shorten(path, kept)
        replace_text(path, kept.decode())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file that is, after a kill at any moment, either the old one or the whole new one."""
    if is_first():
        manifest.forget(os.path.dirname(path), [os.path.basename(path)])
        replace_text(path, text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as sorted JSON, atomically; NaN and infinity raise ValueError."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def check_room(folder: str, needed: int, what: str) -> None:
    """Raise OSError where a disk has no room for so many bytes; all processes call it.

    From Orbax's threads it comes as 400 lines.
    """
    if "://" in folder:
        return
    free = least("disk", shutil.disk_usage(folder).free)
    if free < needed:
        sizes = f"needs {needed / 1e6:,.0f} MB, has {free / 1e6:,.0f}"
        raise OSError(errno.ENOSPC, f"No space left for {what}: {sizes}", folder)


def remove(path: str | os.PathLike) -> None:
    """Delete a file, if there is one."""
    if is_first() and os.path.exists(path):
        manifest.forget(os.path.dirname(path), [os.path.basename(path)])
        os.remove(path)
