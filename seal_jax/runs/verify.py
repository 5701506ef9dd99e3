"""`seal-jax verify RUN`: read all that a run has written, and say what is damaged."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from seal_jax.hosts.console import progress
from seal_jax.hosts.files import read_json, read_jsonl
from seal_jax.runs import checkpoint
from seal_jax.runs.adapters import list_adapters
from seal_jax.runs.folder import find_run


def verify_run(path: str) -> tuple[list[str], list[str]]:
    """Return what is good, and what is damaged with why, of a run and its random control.

    Checkpoints and adapters are read whole and compared with their hashes.

    Raises:
      FileNotFoundError: there is no run.
    """
    run = find_run(path)
    if run is None:
        raise FileNotFoundError(
            f"{path}: no run: expected a folder with config.json, as of `train`"
        )
    good, damaged = [], []
    for name, complaint in progress(list(_findings(run.root)), "verify", "file"):
        for what, why in complaint().items():
            place = f"{name}/{what}" if what else name
            (damaged if why else good).append(f"{place}: {why}" if why else place)
    return good, damaged


def _findings(root: Path) -> Iterator[tuple[str, Callable[[], dict[str, str]]]]:
    """Yield names and functions that return what is wrong with each thing of that name."""
    for folder in (root, root / "random"):
        for path in sorted(folder.glob("*.json*")):
            read = read_jsonl if path.suffix == ".jsonl" else read_json
            yield _name(root, path), lambda path=path, read=read: _parsed(lambda: read(path))
        steps = folder / "checkpoints"
        if steps.is_dir():
            yield _name(root, steps), lambda steps=steps: _numbered(checkpoint.verify(steps))
        for adapter in list_adapters(str(folder)):
            path = folder / "adapters" / adapter
            yield _name(root, path), lambda path=path: {"": checkpoint.verify_alone(path)}


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _numbered(found: dict[int, str]) -> dict[str, str]:
    return {str(step): why for step, why in sorted(found.items())}


def _parsed(read: Callable[[], Any]) -> dict[str, str]:
    try:
        read()
    except (OSError, ValueError) as error:
        return {"": str(error)}
    return {"": ""}
