"""`seal-jax verify RUN`: read all that a run has written, and say what is damaged."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

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
    for file, check in progress(list(_checks(run.root)), "verify", "file"):
        for step, why in sorted(check().items()):
            place = (file / str(step)).relative_to(run.root).as_posix()
            (damaged if why else good).append(f"{place}: {why}" if why else place)
    return good, damaged


def _checks(root: Path) -> Iterator[tuple[Path, Callable[[], dict]]]:
    """Yield each path, and a function that returns what is wrong there, by step or by ''."""
    for folder in (root, root / "random"):
        for path in sorted(folder.glob("*.json*")):
            yield path, partial(_parse, path)
        steps = folder / "checkpoints"
        if steps.is_dir():
            yield steps, partial(checkpoint.verify, steps)
        for adapter in list_adapters(str(folder)):
            path = folder / "adapters" / adapter
            yield path, lambda path=path: {"": checkpoint.verify_alone(path)}


def _parse(path: Path) -> dict[str, str]:
    try:
        read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    except (OSError, ValueError) as error:
        return {"": str(error)}
    return {"": ""}
