"""One run at a time in a folder: a lock on FOLDER/lock, which the system frees with the process.

The file says who holds it. Where locks do not reach other machines (gcsfuse), or there are none,
what it says is all there is: the run that began last writes its name there, and the one before it,
should it still be alive, finds that and ends.
"""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from seal_jax.hosts.exchange import ask_first

NAME = "lock"
_PATIENCE = 1.0  # seconds, for a process that was killed just now to be gone
_HELD: "dict[int, _Lock]" = {}  # of this process, by descriptor


class _Lock(NamedTuple):
    path: Path
    holder: dict[str, Any]
    made: list[Path]  # folders that did not exist before, the innermost first


@contextlib.contextmanager
def hold(folder: str | os.PathLike) -> Generator[None]:
    """Keep other runs out of a folder, which is made if there is none, for this block.

    The first process of a run holds it for all. A process that is forked meanwhile does not.

    Raises:
      ValueError: another run holds it; the message says which.
    """
    taken: list[int] = []
    try:
        ask_first("lock", lambda: taken.append(_take(Path(folder).absolute())))
        yield
    finally:
        for descriptor in taken:
            _free(descriptor)


def successor() -> str:
    """Return which other run has written its name into a lock that this process holds, or ''."""
    for path, mine, _ in _HELD.values():
        found = _read(path)
        if found and found != mine:
            return f"{path.parent}: another run has begun there and goes on: {_say(found)}"
    return ""


def _take(folder: Path) -> int:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path, deadline = folder / NAME, time.monotonic() + _PATIENCE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            why = ""
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{folder}: another run writes there: {_say(_read(path))}. Let it end, or"
                    " choose another --workdir"
                ) from None
            time.sleep(0.1)
            continue
        except OSError as error:
            why = str(error)
        if os.fstat(descriptor).st_nlink or time.monotonic() > deadline:
            break
        os.close(descriptor)  # its holder has deleted it meanwhile
    holder = _myself()
    _warn(folder, _read(path), holder, why)
    _HELD[descriptor] = _Lock(path, holder, made)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        os.fsync(descriptor)  # a mounted bucket shows it to others then
    except OSError:  # the disk is full
        _free(descriptor)
        raise
    return descriptor


def _free(descriptor: int) -> None:
    """Let others in; a folder that was made for this lock goes if it is empty."""
    if descriptor not in _HELD:
        return  # in a forked process
    path, holder, made = _HELD.pop(descriptor)
    with contextlib.suppress(OSError):  # a folder is not empty, or gone
        if _read(path) == holder:
            path.unlink()
        for folder in made:
            folder.rmdir()
    os.close(descriptor)


def _warn(folder: Path, last: dict[str, Any], me: dict[str, Any], why: str) -> None:
    if why:
        print(
            f"warning: {folder} cannot be locked ({why}): nothing keeps a second run out",
            file=sys.stderr,
        )
    if last and (why or last.get("host") != me["host"]):
        print(
            f"warning: {folder}: the run before did not say that it ended: {_say(last)}. If it"
            " still runs, it ends when it sees this one",
            file=sys.stderr,
        )


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def _say(holder: dict[str, Any]) -> str:
    if not holder:
        return "it has not said who it is"
    found = {name: holder.get(name, "?") for name in ("pid", "host", "since", "command")}
    return "process {pid} on {host} since {since} ({command})".format(**found)


def _read(path: Path) -> dict[str, Any]:
    """Return whom the file names; {} where nobody holds it, or is about to."""
    try:
        found = json.loads(path.read_bytes() or b"{}")
    except (OSError, ValueError):  # deleted by hand, or half written
        return {}
    return found if isinstance(found, dict) else {}


def _leave_to_parent() -> None:
    """Close the locks in a forked process, which would keep them when its parent is gone."""
    while _HELD:
        os.close(_HELD.popitem()[0])


os.register_at_fork(after_in_child=_leave_to_parent)
