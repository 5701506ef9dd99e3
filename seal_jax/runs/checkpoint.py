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

import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from seal_jax.hosts.exchange import least

PyTree = Any
Position = dict[str, Any]
Restore = Callable[..., Any]  # Orbax's restore(args=...) of one step or folder

_JSON_ITEM = "position"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or restored into what the run asks for."""


def make_manager(folder: str | os.PathLike, keep: int, best: int = 0) -> ocp.CheckpointManager:
    """Open a folder of checkpoints for writing, and clear what a kill left half written.

    Args:
      folder: created if absent.
      keep: how many of the latest steps stay; with 1 nothing is left to fall back on.
      best: how many of the steps of the highest value stay beside them.
    """
    policies: list[Any] = [policy.LatestN(n=keep)]
    if best:
        stays = policy.BestN(
            get_metric_fn=_value_of, n=best, keep_checkpoints_without_metrics=False
        )
        policies.append(stays)
    return _open(
        folder,
        preservation_policy=policy.AnyPreservationPolicy(policies),
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
    items = _items(pytrees, position, f"step {step}")
    _check_room(str(manager.directory), pytrees)
    value = None if value is None or np.isnan(value) else float(value)
    if not manager.save(step, args=items, metrics={"value": value}):
        raise CheckpointError(
            f"step {step} was not saved: {manager.directory} has steps {manager.all_steps()}"
        )


def _check_room(folder: str, pytrees: Mapping[str, PyTree]) -> None:
    """Raise OSError where the disk is too small: from Orbax's threads it comes as 400 lines."""
    if "://" in folder:
        return
    needed = sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(pytrees)) + 1_000_000
    free = least("disk", shutil.disk_usage(folder).free)
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No space left for a checkpoint: needs {needed / 1e6:,.0f} MB, has {free / 1e6:,.0f}",
            folder,
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
    items = _items(pytrees, position, os.fspath(path))
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
        pytrees, position, complaint = _restore_items(
            partial(checkpointer.restore, _absolute(path)), templates
        )
    if complaint:
        raise CheckpointError(f"damaged: {os.fspath(path)}: {complaint}")
    return pytrees, position


def verify(folder: str | os.PathLike) -> dict[int, str]:
    """Read every step of a folder of checkpoints; returns what is damaged of each, '' if nothing.

    No model is needed: shapes and dtypes are those that were saved.
    """
    with _open(folder, read_only=True) as reader:
        return {
            step: _with_file(_verify(partial(reader.restore, step)), reader.directory / str(step))
            for step in reader.all_steps(read=True)
        }


def verify_alone(path: str | os.PathLike) -> str:
    """Return what is damaged of what `save_alone` saved, or ''."""
    with _open_alone() as checkpointer:
        return _verify(partial(checkpointer.restore, _absolute(path)))


def _verify(restore: Restore) -> str:
    record, complaint = _read(lambda: _restore_record(restore))
    if complaint:
        return complaint
    templates = {
        name: {path: _as_saved(leaf) for path, leaf in leaves.items()}
        for name, leaves in record["leaves"].items()
    }
    return _read(lambda: _restore_leaves(restore, record["leaves"], templates))[1]


def _as_saved(record: Mapping[str, Any]) -> Any:
    """Return a template of a leaf by its record.

    A jax one where it can be: for it Orbax reads every file, as a run does.
    """
    if record["dtype"] == "str":
        return ""
    shape, dtype = tuple(record["shape"]), np.dtype(record["dtype"])
    kept = jax.dtypes.canonicalize_dtype(dtype) == dtype
    return jax.ShapeDtypeStruct(shape, dtype) if kept else np.empty(shape, dtype)


def tree_hash(pytree: PyTree) -> str:
    """Return 16 hex digits that name a pytree's values bit for bit, with paths and dtypes."""
    leaves = _flatten(pytree)
    return _hash_json({path: _describe(path, leaf) for path, leaf in leaves.items()})


def _open(folder: str | os.PathLike, **options: Any) -> ocp.CheckpointManager:
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax logs some twenty lines a save
    options = ocp.CheckpointManagerOptions(**options)
    return ocp.CheckpointManager(_absolute(folder), options=options)


def _open_alone() -> ocp.Checkpointer:
    absl.logging.set_verbosity(absl.logging.ERROR)
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _absolute(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(path)


def _items(pytrees: Mapping[str, PyTree], position: Position, where: str) -> ocp.args.Composite:
    """Return what Orbax is to write: the JSON item, and the leaves of every pytree."""
    if _JSON_ITEM in pytrees:
        raise ValueError(f"{_JSON_ITEM!r} is the name of the JSON item, not of a pytree")
    try:
        record = json.loads(json.dumps({"position": position}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"position of {where} is not JSON: {error}") from error
    flat = {name: _flatten(tree) for name, tree in pytrees.items()}
    record["leaves"] = {
        name: {path: _describe(f"{name}{path}", leaf) for path, leaf in leaves.items()}
        for name, leaves in flat.items()
    }
    items: dict[str, Any] = {
        _JSON_ITEM: ocp.args.JsonSave({"record": record, "hash": _hash_json(record)})
    }
    for name, leaves in flat.items():
        arrays = {
            path: leaf
            for path, leaf in leaves.items()
            if "value" not in record["leaves"][name][path]
        }
        if arrays:
            items[name] = ocp.args.StandardSave(arrays)
    return ocp.args.Composite(**items)


def _restore(
    manager: ocp.CheckpointManager,
    templates: Mapping[str, PyTree],
    step: int | None,
    is_writer: bool,
) -> tuple[int, dict[str, PyTree], Position] | None:
    steps = sorted(manager.all_steps(read=True), reverse=True)
    if step is not None and step not in steps:
        raise CheckpointError(f"{manager.directory} has no step {step}, only {steps}")
    damaged = []
    for candidate in steps if step is None else [step]:
        pytrees, position, complaint = _restore_items(
            partial(manager.restore, candidate), templates
        )
        if not complaint:
            if is_writer and damaged:
                _set_aside(manager, damaged)
            return candidate, pytrees, position
        path = manager.directory / str(candidate)
        complaint = _with_file(complaint, path)
        warnings.warn(f"damaged checkpoint {path}: {complaint}", stacklevel=3)
        damaged.append(candidate)
    if damaged:
        raise CheckpointError(f"no good checkpoint in {manager.directory}: {damaged} damaged")
    return None


def _restore_items(
    restore: Restore, templates: Mapping[str, PyTree] | Callable[[Position], Mapping[str, PyTree]]
) -> tuple[dict[str, PyTree], Position, str]:
    """Return (pytrees, position, '') or ({}, {}, what is damaged)."""
    record, complaint = _read(lambda: _restore_record(restore))
    if complaint:
        return {}, {}, complaint
    if callable(templates):
        templates = templates(record["position"])
    flat = {name: _flatten(template) for name, template in templates.items()}
    for name, leaves in flat.items():
        _check_templates(name, record["leaves"].get(name, {}), leaves)
    leaves, complaint = _read(lambda: _restore_leaves(restore, record["leaves"], flat))
    if complaint:
        return {}, {}, complaint
    pytrees = {
        name: jax.tree.unflatten(jax.tree.structure(template), leaves[name])
        for name, template in templates.items()
    }
    return pytrees, record["position"], ""


def _read(read: Callable[[], Any]) -> tuple[Any, str]:
    """Return (`read()`, '') or, on every process if it failed on any, (None, why)."""
    value, complaint = None, ""
    try:
        value = read()
    except Exception as error:  # a damaged file fails in any way; Orbax raises bare Exception too
        cause = _root_cause(error)
        # Running out of memory is no damage, and must not send a run back a step.
        if isinstance(cause, RuntimeError | MemoryError):
            raise
        complaint = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
    if jax.process_count() > 1:
        if not np.all(multihost_utils.process_allgather(np.array(not complaint))):
            return None, complaint or "damaged as another process reads it"
    return (None, complaint) if complaint else (value, "")


def _with_file(complaint: str, step: os.PathLike) -> str:
    """Return a complaint about a step's folder with the file in it: of JSON, Orbax names none."""
    if not complaint.startswith("JSONDecodeError"):
        return complaint
    for path in sorted(path for path in Path(step).rglob("*") if path.is_file()):
        text = path.read_bytes()
        if text.startswith(b"{"):  # all of Orbax's JSON files are objects
            try:
                json.loads(text)
            except ValueError:
                return f"{complaint} in {path}"
    return complaint


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _restore_record(restore: Restore) -> dict[str, Any]:
    items = restore(args=ocp.args.Composite(**{_JSON_ITEM: ocp.args.JsonRestore()}))
    item = items[_JSON_ITEM]
    if _hash_json(item["record"]) != item["hash"]:
        raise ValueError(f"{_JSON_ITEM}/metadata: its hash does not verify")
    return item["record"]


def _restore_leaves(
    restore: Restore,
    records: Mapping[str, Any],
    templates: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[Any]]:
    """Return each pytree's leaves in order; raise ValueError if a hash does not verify."""
    items = {}
    for name, flat in templates.items():
        targets = {
            path: _target(t) for path, t in flat.items() if "value" not in records[name][path]
        }
        if targets:
            items[name] = ocp.args.StandardRestore(targets)
    arrays = restore(args=ocp.args.Composite(**items)) if items else {}
    leaves: dict[str, list[Any]] = {name: [] for name in templates}
    for name, flat in templates.items():
        for path, template in flat.items():
            record = records[name][path]
            leaf = _decode(record, template) if "value" in record else arrays[name][path]
            if _describe(path, leaf)["hash"] != record["hash"]:
                raise ValueError(f"leaf {name}{path}: its hash does not verify")
            leaves[name].append(leaf)
    return leaves


def _flatten(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _dtype_and_shape(leaf: Any) -> tuple[str, list[int]]:
    if isinstance(leaf, str):
        return "str", []
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return str(array.dtype), list(array.shape)


def _describe(path: str, leaf: Any) -> dict[str, Any]:
    """Return a leaf's dtype, shape and hash, and its value if Orbax would refuse the leaf."""
    dtype, shape = _dtype_and_shape(leaf)
    if isinstance(leaf, str):
        return {"dtype": dtype, "shape": shape, "hash": _hash(leaf.encode()), "value": leaf}
    if 0 in shape:
        data = np.zeros(0, np.uint8)
    elif dtype.startswith(("object", "<U", "key<")):
        raise ValueError(f"leaf {path} of type {type(leaf).__name__} ({dtype}) cannot be saved")
    else:
        data = np.ascontiguousarray(_to_host(leaf)).view(np.uint8)
    description = {"dtype": dtype, "shape": shape, "hash": _hash(data)}
    if 0 in shape or not isinstance(leaf, jax.Array | np.ndarray):
        description["value"] = data.tobytes().hex()
    return description


def _decode(record: Mapping[str, Any], template: Any) -> Any:
    """Return a leaf that was kept in the JSON item, as what its template is."""
    if isinstance(template, str):
        return str(record["value"])
    data = bytes.fromhex(record["value"])
    array = np.ndarray(record["shape"], np.dtype(record["dtype"]), buffer=data).copy()
    if isinstance(template, np.ndarray):
        return array
    if isinstance(template, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(array, _target(template).sharding)
    return array[()] if isinstance(template, np.generic) else array.item()


def _target(template: Any) -> Any:
    """Return what Orbax is to restore for a template: a numpy array, or a placed jax one."""
    if isinstance(template, np.ndarray):
        return template
    sharding = getattr(template, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(template.shape, template.dtype, sharding=sharding)


def _check_templates(name: str, record: Mapping[str, Any], templates: Mapping[str, Any]) -> None:
    for path in [*templates, *record]:
        saved, wanted = "absent", "absent"
        if path in record:
            saved = f"{record[path]['dtype']}{record[path]['shape']}"
        if path in templates:
            dtype, shape = _dtype_and_shape(templates[path])
            wanted = f"{dtype}{shape}"
        if saved != wanted:
            raise CheckpointError(f"{name}{path}: the checkpoint's is {saved}, the run's {wanted}")


def _to_host(leaf: Any) -> np.ndarray:
    """Return the whole of a leaf, also where its shards lie on several processes."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            return jax.device_get(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(jax.device_get(leaf))


def _hash(data: Any) -> str:
    return xxhash.xxh64_hexdigest(data)


def _hash_json(value: Any) -> str:
    return _hash(json.dumps(value, sort_keys=True, allow_nan=False).encode())


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
