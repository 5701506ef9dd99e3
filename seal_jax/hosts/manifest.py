"""The manifest of a run's folder: what the run has written there, with sizes and checksums.

  {"files": {"edits.jsonl": {"bytes": 2948, "crc32": "1c291ca3"}, "model/config.json": ...},
   "folders": ["adapters/policy-0", "random"], "checkpoints": [1, 2],
   "hashes": {"adapters/policy-0": "8f...", "checkpoints/2": ...}, "crc32": of all this}

An entry changes where the run writes, and nowhere else: so what is lost or damaged stays told. New
files are written first and entered then; what is replaced, cut or removed leaves the manifest
first. So a kill at any moment leaves a folder that has all that its manifest says, and may have
more. A line-by-line file (.jsonl) may be longer than its entry: its first bytes count.

A CRC-32 can be carried on from the end of an entry, so that no line is read twice. Checkpoints and
adapters have hashes of their own; the manifest says which there are, and by their hash that each is
the one that was written there. RUN/random has its own manifest, and so has every other arm that is
trained in a folder of its own.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from seal_jax.hosts.console import say
from seal_jax.hosts.exchange import is_first
from seal_jax.hosts.folder_lock import NAME as LOCK
from seal_jax.hosts.replacing import replace_text

MANIFEST = "manifest.json"
KEY = "manifest"  # config.json has it, so that a manifest that is lost is missed
_FILES = (
    *("config.json", "policy.json", "texts.json", "summary.json", "summary.md", "model/**/*"),
    *("metrics.jsonl", "edits.jsonl", "eval_*.jsonl", "pending_*.jsonl", "judged_*.json"),
    *("tune.json", "tune.md", "tune.png", "tune_sweep.json", "tune_runs.jsonl"),
    *("tune_texts_*.json", "summary.png"),
)
_REMADE = (
    *(MANIFEST, "summary.", "eval_", "pending_", "adapters/", "checkpoints/"),
    *("tune.", "tune_runs", "tune_texts_"),
)
_ABSENT = "was written and is not there"
_LATE = "was added after the run had ended"
_SUMMARY = ("summary.json", "summary.md", "config.json", "policy.json")  # written anew by `eval`
_RECORD = "position/metadata"  # of a checkpoint or an adapter: JSON with its hash


class Entry(NamedTuple):
    """What a file holds, or begins with."""

    num_bytes: int
    crc32: int


class Manifest(NamedTuple):
    """What a run has written into a folder; names are relative to it."""

    files: dict[str, Entry]
    folders: frozenset[str]
    checkpoints: frozenset[int]
    hashes: dict[str, str]  # of checkpoints and adapters; older manifests have none


def read_manifest(folder: str | os.PathLike) -> Manifest | None:
    """Return the manifest of a folder; None where there is none.

    Raises:
      ValueError: it is damaged.
    """
    path = Path(folder, MANIFEST)
    if not os.path.lexists(path):
        return None
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("crc32")
        if checksum != _hex(zlib.crc32(_dump(content).encode())):
            raise ValueError("its checksum does not verify")
        files = {n: Entry(e["bytes"], int(e["crc32"], 16)) for n, e in content["files"].items()}
        steps = frozenset(content["checkpoints"])
        return Manifest(files, frozenset(content["folders"]), steps, content.get("hashes", {}))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {why}") from error


def begin(folder: str | os.PathLike) -> None:
    """Give a folder a manifest, of what is there, unless it has one; make the folder if need be."""
    os.makedirs(folder, exist_ok=True)
    if is_first() and not Path(folder, MANIFEST).exists():
        _write(folder, Manifest({}, frozenset(), frozenset(), {}))
        update(folder, settled=True)


def update(folder: str | os.PathLike, settled: bool = False) -> None:
    """Enter what the run has written since the last entry; does nothing without a manifest.

    Args:
      settled: no checkpoint is being saved. Else only the newest one is sure to stay.

    Raises:
      ValueError: the manifest is damaged.
    """
    before = read_manifest(folder) if is_first() else None
    if before is None:
        return
    files = dict(before.files)
    for path in _written(Path(folder)):
        name = path.relative_to(folder).as_posix()
        if name not in files or _is_ledger(name):
            files[name] = _extended(path, files.get(name, Entry(0, 0)))
    steps = _checkpoint_steps(folder)
    steps = steps if settled else frozenset(sorted(steps)[-1:])
    if not _made_room(steps, before):
        steps |= before.checkpoints
    folders = before.folders | set(_folders(Path(folder)))
    hashes = {}
    for name in [*folders, *map(_checkpoint, steps)]:
        if found := before.hashes.get(name) or _hash_in(Path(folder, name)):
            hashes[name] = found
    after = Manifest(files, folders, steps, hashes)
    if after != before:
        _write(folder, after)


def forget(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Take files or folders out of the manifest, before they are replaced or removed.

    Of a checkpoint only its hash goes: that it is lost stays told until it is made again.
    """
    found = read_manifest(folder) if is_first() else None
    gone = set(names)
    if found is not None and not gone.isdisjoint({*found.files, *found.folders, *found.hashes}):
        files = {name: entry for name, entry in found.files.items() if name not in gone}
        hashes = {name: value for name, value in found.hashes.items() if name not in gone}
        _write(folder, Manifest(files, found.folders - gone, found.checkpoints, hashes))


def forget_checkpoints(folder: str | os.PathLike, above: int) -> None:
    """Take the hashes of checkpoints out of the manifest before their steps are made again."""
    found = read_manifest(folder) if is_first() else None
    steps = () if found is None else found.checkpoints
    forget(folder, [_checkpoint(step) for step in steps if step > above])


def refuted(path: str | os.PathLike, found: str) -> str:
    """Return why a checkpoint or an adapter is not the one that the run wrote there, or ''.

    Args:
      path: FOLDER/checkpoints/STEP or FOLDER/adapters/ID, as they are called in the manifest.
      found: its hash.

    Raises:
      ValueError: the manifest is damaged.
    """
    path = Path(path).absolute()
    manifest = read_manifest(path.parent.parent)
    name = f"{path.parent.name}/{path.name}"
    expected = None if manifest is None else manifest.hashes.get(name)
    if expected not in (None, found):
        return "is not the one that the run wrote there"
    return added(path.parent.parent).get(name, "")


def added(folder: str | os.PathLike) -> dict[str, str]:
    """Return what was added to a folder after its run had ended, by name, and that it was.

    Raises:
      ValueError: the manifest is damaged.
    """
    folder = Path(folder).absolute()
    roots = [folder, folder.parent] if folder.name in arm_names(folder.parent) else [folder]
    if not any(found and "summary.json" in found.files for found in map(read_manifest, roots)):
        return {}
    return {name: _LATE for name in not_entered(folder) if name not in _SUMMARY}


def shorten(path: str | os.PathLike, content: bytes) -> None:
    """Enter what will be left of a ledger, before it is cut."""
    path = Path(path)
    found = read_manifest(path.parent)
    if found is not None and path.name in found.files:
        entry = Entry(len(content), zlib.crc32(content))
        _write(path.parent, found._replace(files={**found.files, path.name: entry}))


def losses(folder: str | os.PathLike) -> dict[str, str]:
    """Return what is not in the folder as its manifest says, by name, and why.

    Names are those of files and folders, 'checkpoints/STEP', and 'manifest.json' if it is damaged.
    """
    try:
        found = read_manifest(folder)
    except ValueError as error:
        return {MANIFEST: str(error).partition(": ")[2]}
    if found is None:
        return {MANIFEST: _ABSENT} if _is_missed(Path(folder)) else {}
    lost = {name: _compare(Path(folder, name), entry) for name, entry in found.files.items()}
    lost |= {name: _ABSENT for name in found.folders if not Path(folder, name).is_dir()}
    for arm in arm_names(folder):
        if arm in found.folders and not Path(folder, arm, MANIFEST).exists():
            lost[f"{arm}/{MANIFEST}"] = _ABSENT
    lost |= {_checkpoint(step): _ABSENT for step in lost_checkpoints(folder)}
    return {name: why for name, why in sorted(lost.items()) if why}


def lost_checkpoints(folder: str | os.PathLike, above: int = -1) -> list[int]:
    """Return the steps above one of which the manifest has a checkpoint and the folder none.

    Raises:
      ValueError: the manifest is damaged.
    """
    found, steps = read_manifest(folder), _checkpoint_steps(folder)
    if found is None or _made_room(steps, found):
        return []
    return sorted(step for step in found.checkpoints - steps if step > above)


def not_entered(folder: str | os.PathLike) -> list[str]:
    """Return what is not in the folder's manifest, or of a ledger only its first lines."""
    found, names = read_manifest(folder), []
    if found is None:
        return []
    for path in _written(Path(folder)):
        name = path.relative_to(folder).as_posix()
        entry = found.files.get(name)
        if entry is None or path.stat().st_size > entry.num_bytes:
            names.append(name)
    names += sorted(set(_folders(Path(folder))) - found.folders)
    return names + [*map(_checkpoint, sorted(_checkpoint_steps(folder) - found.checkpoints))]


def is_unfinished(folder: str | os.PathLike, name: str) -> bool:
    """Return whether an adapter was never whole, as far as the manifest knows.

    Args:
      name: adapters/ID.
    """
    found = read_manifest(folder)
    is_new = found is not None and name not in found.folders
    return is_new and not Path(folder, name, _RECORD).exists()


def refuse_damaged(root: str | os.PathLike, reads: tuple[str, ...] = ("",)) -> None:
    """Refuse a run whose files are not what it wrote.

    Not so for what is not there and is no record: a run that goes on makes it again, or goes on
    from an earlier checkpoint.

    Args:
      reads: how the names begin of what is going to be read; all by default.

    Raises:
      ValueError: with all of them.
    """
    damaged = [
        (place, f"{place}{name} {why}")
        for place in ("", *(f"{arm}/" for arm in arm_names(root)))
        for name, why in losses(Path(root, place)).items()
        if name.startswith(reads) and not _is_remade(Path(root, place), name)
    ]
    if damaged:
        manifests = " and ".join(sorted({f"{place}{MANIFEST}" for place, _ in damaged}))
        raise ValueError(
            f"{root}: damaged since it was written: {'; '.join(text for _, text in damaged)}. Put"
            f" it back from a copy; or delete {manifests}, then what is there is taken as it is."
            " `seal-jax verify` names all that is damaged"
        )


def take_up(folder: str | os.PathLike) -> None:
    """Say what a run that goes on has lost, and take out of the manifest what it makes again."""
    lost = losses(folder) if is_first() else {}
    for name, why in lost.items():
        say(f"{Path(folder, name)}: {why}")
    forget(folder, [name for name in lost if "/" not in name and _is_remade(folder, name)])


def _is_remade(folder: str | os.PathLike, name: str) -> bool:
    """Return whether a run that goes on makes a lost thing again, or does without."""
    is_made = name.startswith(_REMADE) or name.partition("/")[0] in arm_names(folder)
    return is_made and not Path(folder, name).exists()


def arm_names(root: str | os.PathLike) -> list[str]:
    """Return the names of the folders in a run's that are, or were, the runs of other arms.

    A run of its own (it has config.json) is none.
    """
    try:
        found = read_manifest(root)
    except ValueError:
        found = None  # `losses` says that it is damaged
    entered = {name for name in found.folders if "/" not in name} if found else set()
    there = {path.parent for path in Path(root).glob(f"*/{MANIFEST}")}
    there = {path.name for path in there if not (path / "config.json").exists()}
    return sorted({"random"} | entered | there)


def arm_folders(root: str | os.PathLike) -> list[Path]:
    """Return a run's folder and those of its other arms, of which some may be lost."""
    return [Path(root), *(Path(root, arm) for arm in arm_names(root))]


def _checkpoint_steps(folder: str | os.PathLike) -> frozenset[int]:
    paths = Path(folder, "checkpoints").glob("[0-9]*")
    return frozenset(int(path.name) for path in paths if path.name.isdecimal() and path.is_dir())


def _checkpoint(step: int) -> str:
    return f"checkpoints/{step}"


def _hash_in(path: Path) -> str | None:
    """Return the hash of a checkpoint or an adapter as it says itself; None if it does not."""
    try:
        found = json.loads((path / _RECORD).read_bytes())["hash"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None  # whoever reads it will say what is wrong
    return found if isinstance(found, str) else None


def _made_room(steps: frozenset[int], found: Manifest) -> bool:
    """Return whether there is a checkpoint that the manifest does not know yet.

    Older ones may have been removed for it.
    """
    return max(steps, default=-1) > max(found.checkpoints, default=-1)


def _is_missed(folder: Path) -> bool:
    """Return whether a folder without a manifest had one.

    Where there is nothing but config.json, the run was killed before that.
    """
    found = {path.name for path in folder.glob("[!.]*")} | {LOCK}
    if not found > {"config.json", LOCK} or not (folder / "config.json").is_file():
        return False
    return f'"{KEY}": "{MANIFEST}"'.encode() in (folder / "config.json").read_bytes()


def _written(folder: Path) -> Iterator[Path]:
    for pattern in _FILES:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def _folders(folder: Path) -> Iterator[str]:
    yield from (arm for arm in arm_names(folder) if (folder / arm / MANIFEST).exists())
    for path in folder.glob(f"adapters/[!.]*/{_RECORD}"):
        if ".orbax-checkpoint-tmp" not in path.parts[-3]:  # half written
            yield f"adapters/{path.parts[-3]}"


def _is_ledger(name: str) -> bool:
    return name.endswith(".jsonl")


def _extended(path: Path, entry: Entry) -> Entry:
    """Return the entry with what the file holds behind it: of a ledger, its whole lines."""
    with open(path, "rb") as file:
        file.seek(entry.num_bytes)
        new = file.read()
    if _is_ledger(path.name):
        new = new[: new.rfind(b"\n") + 1]
    return Entry(entry.num_bytes + len(new), zlib.crc32(new, entry.crc32))


def _compare(path: Path, entry: Entry) -> str:
    """Return what is wrong with a file, or ''."""
    if not path.is_file():
        return _ABSENT
    size = path.stat().st_size
    if size < entry.num_bytes or size > entry.num_bytes and not _is_ledger(path.name):
        return f"has {size:,} bytes, {entry.num_bytes:,} were written"
    checksum, left = 0, entry.num_bytes
    with open(path, "rb") as file:
        while left and (part := file.read(min(left, 1 << 20))):
            checksum, left = zlib.crc32(part, checksum), left - len(part)
    return "" if checksum == entry.crc32 else "its checksum is not that of what was written"


def _write(folder: str | os.PathLike, manifest: Manifest) -> None:
    content = {
        "files": {
            name: {"bytes": entry.num_bytes, "crc32": _hex(entry.crc32)}
            for name, entry in manifest.files.items()
        },
        "folders": sorted(manifest.folders),
        "checkpoints": sorted(manifest.checkpoints),
        "hashes": manifest.hashes,
    }
    checksum = _hex(zlib.crc32(_dump(content).encode()))
    replace_text(Path(folder, MANIFEST), _dump({**content, "crc32": checksum}) + "\n")


def _dump(content: dict) -> str:
    return json.dumps(content, indent=1, sort_keys=True)


def _hex(checksum: int) -> str:
    return f"{checksum:08x}"
