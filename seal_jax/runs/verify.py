"""`seal-jax verify RUN`: read all that a run has written, and say what is damaged or lost."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from seal_jax.hosts.console import progress
from seal_jax.hosts.files import read_jsonl, read_object
from seal_jax.hosts.manifest import (
    MANIFEST,
    Entry,
    added,
    arm_folders,
    is_unfinished,
    losses,
    not_entered,
    read_manifest,
)
from seal_jax.runs import checkpoint
from seal_jax.runs.adapters import list_adapters
from seal_jax.runs.folder import find_run

_WITHOUT_HASHES = (
    " Nor whether a checkpoint or an adapter is the other arm's or another run's:"
    f" {MANIFEST} is of an older version and has no hashes of them."
)


def verify_run(path: str) -> tuple[list[str], list[str]]:
    """Return what is good, and what is damaged or lost with why, of a run and its other arms.

    Files are compared with the manifest. Checkpoints and adapters are read whole and compared with
    their hashes.

    Raises:
      FileNotFoundError: there is no run.
    """
    root = _root_of(path)
    good, damaged = [], []
    for file, check in progress(list(_checks(root)), "verify", "file"):
        for step, why in sorted(check().items()):
            place = (file / str(step)).relative_to(root).as_posix()
            (damaged if why else good).append(f"{place}: {why}" if why else place)
    return good, damaged


def unfinished(path: str) -> list[str]:
    """Return the adapters that a kill left half written or half deleted, and no run uses."""
    root = _root_of(path)
    return [
        f"{(folder / 'adapters' / adapter).relative_to(root)}: left by a kill, and not used: it is"
        " made again where it is wanted"
        for folder in arm_folders(root)
        for adapter in list_adapters(str(folder))
        if _is_unfinished(folder, adapter)
    ]


def unknown(path: str) -> str:
    """Return a sentence on what `verify_run` cannot know of a run."""
    root = _root_of(path)
    folders = [folder for folder in arm_folders(root) if folder.is_dir()]
    if any(_entries(folder) is None for folder in folders):
        return (
            "Not known: whether a file was changed, cut or deleted such that the rest can be read:"
            f" there is no {MANIFEST} to compare with."
        )
    late = [f / name for f in folders for name in not_entered(f) if name not in added(f)]
    manifests = [read_manifest(folder) for folder in folders]
    older = any(found and found.checkpoints and not found.hashes for found in manifests)
    names = ", ".join(path.relative_to(root).as_posix() for path in late)
    return (
        f"Not known: what a killed run wrote after the last entry of {MANIFEST}"
        f"{f' (here: {names})' if late else ''}, and whether that was itself replaced."
        f"{_WITHOUT_HASHES if older else ''}"
    )


def _root_of(path: str) -> Path:
    run = find_run(path)
    if run is not None:
        return run.root
    folder = Path(path).expanduser().absolute()
    for root in (folder, folder.parent, folder.parent.parent):  # RUN/random/checkpoints
        if "config.json" in (_entries(root) or ()):
            return root  # config.json is damaged or lost
    raise FileNotFoundError(f"{path}: no run: expected a folder with config.json, as of `train`")


def _entries(folder: Path) -> dict[str, Entry] | None:
    """Return the files in a folder's manifest; None without a good one."""
    try:
        found = read_manifest(folder)
    except ValueError:
        return None
    return None if found is None else found.files


def _checks(root: Path) -> Iterator[tuple[Path, Callable[[], dict]]]:
    """Yield each path, and a function that returns what is wrong there, by step or by ''."""
    for folder in arm_folders(root):
        lost = _late(folder) | losses(folder)
        found = {path.name for path in folder.glob("[!.]*.json*")}
        for name in sorted({*found, *(_entries(folder) or ()), *lost}):
            yield folder / name, partial(_check, folder / name, lost.get(name, ""))
        steps = folder / "checkpoints"
        if steps.is_dir():
            yield steps, partial(checkpoint.verify, steps)
        for adapter in list_adapters(str(folder)):
            path = folder / "adapters" / adapter
            if not _is_unfinished(folder, adapter):
                yield path, lambda path=path: {"": checkpoint.verify_alone(path)}


def _late(folder: Path) -> dict[str, str]:
    """Return what of the files was added; of checkpoints and adapters, whoever reads them says."""
    try:
        found = added(folder)
    except ValueError:
        return {}  # of a damaged manifest, which is named by itself
    kinds = ("adapters/", "checkpoints/")
    return {name: why for name, why in found.items() if not name.startswith(kinds)}


def _is_unfinished(folder: Path, adapter: str) -> bool:
    return _entries(folder) is not None and is_unfinished(folder, f"adapters/{adapter}")


def _check(path: Path, why: str) -> dict[str, str]:
    """Return what is wrong with a file: that it cannot be read, or else what is known of it."""
    try:
        if path.suffix == ".jsonl" and path.is_file():
            read_jsonl(path)
        elif path.suffix == ".json" and path.is_file():
            read_object(path)
    except (OSError, ValueError) as error:
        return {"": str(error)}
    return {"": why}
