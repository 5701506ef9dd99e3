"""Checkpoints that are verified: Orbax writes them, hashes of our own prove them.

Orbax has no checksum on array data, casts to another dtype without a word and refuses strings,
scalars and empty arrays as leaves. So every pytree is saved flat, {key path: array}, beside a
JSON item with the position of the run, the hash, dtype and shape of every leaf, and the leaves
that Orbax refuses. A step is restored only if all of that agrees; else the one before it is.

    manager = make_manager(folder, keep=2)
    restored = restore(manager, {"policy": params, "opt_state": opt_state})  # None in a new folder
    save(manager, step, {"policy": params, "opt_state": opt_state}, {"step": step})
    wait(manager)
"""

import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from seal_jax.hosts.files import check_room
from seal_jax.hosts.manifest import lost_checkpoints, refuted
from seal_jax.runs.checkpoint_items import (
    Position,
    Restore,
    items_of,
    read_leaves,
    read_record,
    with_file,
)
from seal_jax.runs.leaf_records import (
    PyTree,
    damaged_value,
    describe,
    difference,
    flatten,
    hash_json,
    template_of,
    with_hash,
)

Value = TypeVar("Value")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or restored into what the run asks for."""


class _Damaged(Exception):
    """What is on disk is not what was saved."""


def make_manager(folder: str | os.PathLike, keep: int, best: int = 0) -> ocp.CheckpointManager:
    """Open a folder of checkpoints for writing, and clear what a kill left half written.

    Args:
      folder: created if absent.
      keep: how many of the latest steps stay; with 1 nothing is left to fall back on.
      best: how many of the steps of the highest value stay beside them.

    Raises:
      CheckpointError: the value of a step is damaged.
    """
    stay: list[policy.PreservationPolicy] = [policy.LatestN(n=keep)]
    if best:
        stay.append(
            policy.BestN(get_metric_fn=_value_of, n=best, keep_checkpoints_without_metrics=False)
        )
    return _open(
        folder,
        preservation_policy=policy.AnyPreservationPolicy(stay),
        best_fn=_value_of if best else None,  # or Orbax drops the values
        cleanup_tmp_directories=True,
    )


def _value_of(metrics: Mapping[str, Any]) -> float:
    value = metrics["value"]
    return -np.inf if value is None else value


def save(
    manager: ocp.CheckpointManager,
    step: int,
    pytrees: Mapping[str, PyTree],
    position: Position,
    value: float | None = None,
) -> None:
    """Save a step, in the background once the arrays are copied from the devices.

    All processes call it with the same step. An earlier save is finished first, and if that
    failed (a full disk), this raises its error; `wait` finishes the last one.

    Args:
      manager: from `make_manager`.
      step: above every step that the folder has.
      pytrees: what to save, by name; a leaf is an array, a number or a string.
      position: JSON values that say where the run is.
      value: by which the best are found; NaN and None are below all others.

    Raises:
      CheckpointError: the folder already has this step or a later one.
      ValueError: `position` is not JSON, by a NaN for example, or a leaf cannot be saved.
      OSError: the disk has no room for it; the steps before stay.
    """
    items = items_of(pytrees, position, str(step), f"step {step}")
    needed = sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(pytrees)) + 1_000_000
    check_room(str(manager.directory), needed, "a checkpoint")
    value = None if value is None or np.isnan(value) else float(value)
    if not manager.save(step, args=items, metrics=with_hash(value)):
        raise CheckpointError(
            f"step {step} was not saved: {manager.directory} has steps {manager.all_steps()}, and"
            " a new one must be above them"
        )


def wait(manager: ocp.CheckpointManager) -> None:
    """Return when every save is on disk; raise the error of one that failed."""
    manager.wait_until_finished()


def restore(
    source: ocp.CheckpointManager | str | os.PathLike,
    templates: Mapping[str, PyTree],
    step: int | None = None,
) -> tuple[int, dict[str, PyTree], Position] | None:
    """Restore the newest step whose hashes verify.

    A damaged step is reported by a warning that names the step's folder and the leaf. If `source`
    is a manager, it is also set aside in `damaged/`, so that the step can be saved again.

    Args:
      source: a manager, or the folder of one, which is then only read.
      templates: for each pytree wanted, one of its structure: a leaf is an array or a
        `jax.ShapeDtypeStruct` (its sharding is where the leaf goes, by default the first device;
        the number of devices may differ from when it was saved), a number or a string.
      step: this step and no other.

    Returns:
      (step, pytrees, position), or None if there are no checkpoints at all.

    Raises:
      CheckpointError: there are checkpoints but none is good, `step` is not one of them, or a
        leaf is absent or of another dtype or shape than its template.
    """
    if isinstance(source, ocp.CheckpointManager):
        return _restore(source, templates, step, is_writer=True)
    with _open(source, read_only=True) as reader:
        return _restore(reader, templates, step, is_writer=False)


def save_alone(path: str | os.PathLike, pytrees: Mapping[str, PyTree], position: Position) -> None:
    """Save pytrees as one folder beside no steps; return when they are on disk.

    What was at `path` before is replaced. All processes call it.

    Raises:
      ValueError: as `save`.
    """
    items = items_of(pytrees, position, os.path.basename(path), os.fspath(path))
    with _open_alone() as checkpointer:
        checkpointer.save(_absolute(path), args=items, force=True)


def restore_alone(
    path: str | os.PathLike, templates: Callable[[Position], Mapping[str, PyTree]]
) -> tuple[dict[str, PyTree], Position]:
    """Restore what `save_alone` saved.

    Args:
      templates: returns the templates, see `restore`, for the position that was saved.

    Raises:
      CheckpointError: it is damaged, or of other dtypes or shapes than the templates.
    """
    with _open_alone() as checkpointer:
        try:
            return _restore_items(partial(checkpointer.restore, _absolute(path)), path, templates)
        except _Damaged as damage:
            raise CheckpointError(f"damaged: {os.fspath(path)}: {damage}") from damage


def verify(folder: str | os.PathLike) -> dict[int, str]:
    """Read every step of a folder of checkpoints; returns what is damaged of each, '' if nothing.

    No model is needed: shapes and dtypes are those that were saved.
    """
    return {
        int(path.name): damaged_value(path) or with_file(verify_alone(path), path)
        for path in _steps(folder)
    }


def verify_alone(path: str | os.PathLike) -> str:
    """Return what is damaged of what `save_alone` saved, or ''."""
    with _open_alone() as checkpointer:
        return _verify(partial(checkpointer.restore, _absolute(path)), path)


def _verify(restore: Restore, path: str | os.PathLike) -> str:
    try:
        record = _read(lambda: read_record(restore, path))
        records = record["leaves"]
        templates = {
            name: {path: template_of(record) for path, record in leaves.items()}
            for name, leaves in records.items()
        }
        _read(lambda: read_leaves(restore, records, templates))
    except _Damaged as damage:
        return str(damage)
    try:
        return refuted(path, hash_json(record))
    except ValueError:
        return ""  # of a damaged manifest, which is named by itself


def _steps(folder: str | os.PathLike) -> list[Path]:
    # A kill leaves unfinished ones, whose names have more than digits.
    return [path for path in Path(folder).glob("*") if path.name.isdecimal() and path.is_dir()]


def tree_hash(pytree: PyTree) -> str:
    """Return 16 hex digits that name a pytree's values bit for bit, with paths and dtypes."""
    return hash_json({path: describe(path, leaf) for path, leaf in flatten(pytree).items()})


def _open(folder: str | os.PathLike, **options: Any) -> ocp.CheckpointManager:
    for path in _steps(folder):
        if complaint := damaged_value(path):  # Orbax would rank by it, or name no file
            raise CheckpointError(f"damaged checkpoint {path}: {complaint}")
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax logs some twenty lines a save
    return ocp.CheckpointManager(_absolute(folder), options=ocp.CheckpointManagerOptions(**options))


def _open_alone() -> ocp.Checkpointer:
    absl.logging.set_verbosity(absl.logging.ERROR)
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _absolute(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(path)


def _restore(
    manager: ocp.CheckpointManager,
    templates: Mapping[str, PyTree],
    step: int | None,
    is_writer: bool,
) -> tuple[int, dict[str, PyTree], Position] | None:
    steps = sorted(manager.all_steps(read=True), reverse=True)
    if step is not None and step not in steps:
        raise CheckpointError(f"{manager.directory} has no step {step}, only {steps}")
    lost = lost_checkpoints(os.path.dirname(manager.directory), above=max(steps, default=-1))
    if lost and step is None:
        complaint = f"checkpoints of {manager.directory} were written and are not there: {lost}"
        warnings.warn(complaint, stacklevel=3)
    damaged = []
    for candidate in steps if step is None else [step]:
        path = manager.directory / str(candidate)
        try:
            found = _restore_items(partial(manager.restore, candidate), path, lambda _: templates)
        except _Damaged as damage:
            complaint = with_file(str(damage), path)
            warnings.warn(f"damaged checkpoint {path}: {complaint}", stacklevel=3)
            damaged.append(candidate)
            continue
        if is_writer and damaged:
            _set_aside(manager, damaged)
        return candidate, *found
    if damaged or lost:
        gone = f"{damaged} damaged, {lost} lost"
        raise CheckpointError(f"no good checkpoint in {manager.directory}: {gone}")
    return None


def _restore_items(
    restore: Restore,
    path: str | os.PathLike,
    make_templates: Callable[[Position], Mapping[str, PyTree]],
) -> tuple[dict[str, PyTree], Position]:
    """Return the pytrees and the position; raise _Damaged where it is not what was saved there."""
    record = _read(lambda: read_record(restore, path))
    if complaint := refuted(path, hash_json(record)):
        raise _Damaged(complaint)
    templates = make_templates(record["position"])
    flat = {name: flatten(template) for name, template in templates.items()}
    for name, leaves in flat.items():
        if found := difference(record["leaves"].get(name, {}), leaves):
            raise CheckpointError(f"{name}{found}")
    leaves = _read(lambda: read_leaves(restore, record["leaves"], flat))
    pytrees = {
        name: jax.tree.unflatten(jax.tree.structure(template), leaves[name])
        for name, template in templates.items()
    }
    return pytrees, record["position"]


def _read(read: Callable[[], Value]) -> Value:
    """Return `read()`; raise _Damaged on every process if it failed on any."""
    complaint = ""
    try:
        value = read()
    except Exception as error:  # a damaged file fails in any way; Orbax raises bare Exception too
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # Running out of memory is no damage, and must not send a run back a step.
        if isinstance(cause, RuntimeError | MemoryError):
            raise
        complaint = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
    if jax.process_count() > 1:
        if not np.all(multihost_utils.process_allgather(np.array(not complaint))):
            complaint = complaint or "damaged as another process reads it"
    if complaint:
        raise _Damaged(complaint)
    return value


def _set_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
    """Move damaged steps out of the manager's sight, as it never overwrites one."""
    if jax.process_index() == 0:
        folder = manager.directory / "damaged"
        folder.mkdir(exist_ok=True)
        for step in steps:
            (manager.directory / str(step)).rename(folder / f"{step}.{time.time_ns()}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    manager.reload()
