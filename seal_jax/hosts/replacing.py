"""Files and folders that take the place of what was there in one move: whole, or absent."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Generator[Path]:
    """Yield a temporary folder beside `path` that takes its name at the end: whole, or absent.

    `path` may be an empty folder.
    """
    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        yield temporary


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Write a file that is, after a kill at any moment, either the old one or the whole new one."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Generator[Path]:
    """Yield a path for what takes the place of `path` at the end, if nothing is raised."""
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _delete(temporary)  # of a killed process with the same number, as in a container
    try:
        yield temporary
        temporary.replace(path)
    finally:
        _delete(temporary)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name must survive a power cut, too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_folder(path: str | os.PathLike) -> None:
    """Delete a folder, if it is there: after a kill at any moment it is whole, or absent."""
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.tmp")
    _delete(temporary)  # of a killed process
    if path.exists():
        path.rename(temporary)
        _delete(temporary)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
