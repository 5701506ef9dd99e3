"""What a command is to write is looked at before its work, not after. Imports no JAX."""

import os
import tempfile
from pathlib import Path


def check_output(path: str | os.PathLike, option: str, folder: bool = False) -> None:
    """Raise ValueError now where a file, or a folder, could not be written later; leaves no trace.

    The folder of a new file must be there. A new folder is made with those above it.

    Args:
      option: of the command line, which names the path.
    """
    where, target = f"{option} {os.fspath(path)}", Path(path).absolute()
    if "\0" in where:
        raise ValueError(f"{option} {os.fspath(path)!r}: no path has a zero byte")
    if not os.fspath(path):
        raise ValueError(f"{where}: expected a {'folder' if folder else 'file'} to write")
    means_folder = os.path.basename(path) in ("", ".")  # a/ and a/.
    try:
        os.lstat(target)
        there = True
    except (FileNotFoundError, NotADirectoryError):
        there = False
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from error
    if (means_folder and not folder) or (there and target.is_dir() != folder):
        raise ValueError(f"{where}: expected a {'folder' if folder else 'file'} to write")
    if there and not folder:
        if not os.access(target, os.W_OK):
            raise ValueError(f"{where}: is there, and may not be written")
        return
    above = nearest_folder(target) if folder else target.parent
    try:
        with tempfile.TemporaryFile(dir=above):  # has no name
            pass
    except OSError as error:
        raise ValueError(f"{where}: cannot write in {above}: {error.strerror}") from error


def nearest_folder(path: str | os.PathLike) -> Path:
    """Return the folder, or the one in which it would be made."""
    folder = Path(path).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder
