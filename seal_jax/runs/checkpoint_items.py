"""What Orbax writes and reads of one checkpoint or adapter: a JSON item, and arrays.

  position/metadata   {"record": {"name", "position", "leaves"}, "hash": of the record}
  NAME/               the arrays of one pytree, {key path: array}

`name` is that of the folder, so that one that stands under another name is no good.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from seal_jax.runs.leaf_records import (
    Leaf,
    PyTree,
    Record,
    decode,
    describe,
    flatten,
    hash_json,
    target_of,
)

Position = dict[str, Any]
Restore = Callable[..., Any]  # Orbax's restore(args=...) of one step or folder

_JSON_ITEM = "position"


def items_of(
    pytrees: Mapping[str, PyTree], position: Position, name: str, where: str
) -> ocp.args.Composite:
    """Return what Orbax is to write: the JSON item, and the leaves of every pytree.

    Args:
      name: of the folder that it becomes.
      where: in messages.

    Raises:
      ValueError: `position` is not JSON, or a leaf cannot be saved.
    """
    if _JSON_ITEM in pytrees:
        raise ValueError(f"{_JSON_ITEM!r} is the name of the JSON item, not of a pytree")
    try:
        record = json.loads(json.dumps({"name": name, "position": position}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"position of {where} is not JSON: {error}") from error
    flat = {name: flatten(tree) for name, tree in pytrees.items()}
    record["leaves"] = {
        name: {path: describe(f"{name}{path}", leaf) for path, leaf in leaves.items()}
        for name, leaves in flat.items()
    }
    items: dict[str, Any] = {
        _JSON_ITEM: ocp.args.JsonSave({"record": record, "hash": hash_json(record)})
    }
    for name, leaves in flat.items():
        records = record["leaves"][name]
        arrays = {path: leaf for path, leaf in leaves.items() if "value" not in records[path]}
        if arrays:
            items[name] = ocp.args.StandardSave(arrays)
    return ocp.args.Composite(**items)


def read_record(restore: Restore, path: str | os.PathLike) -> dict[str, Any]:
    """Return the position, and the records of all leaves.

    Raises:
      ValueError: its hash does not verify, or it is another one than the folder's name says.
    """
    try:
        items = restore(args=ocp.args.Composite(**{_JSON_ITEM: ocp.args.JsonRestore()}))
    except KeyError:
        raise ValueError(f"{_JSON_ITEM}/ is not there") from None
    item = items[_JSON_ITEM]
    if hash_json(item["record"]) != item["hash"]:
        raise ValueError(f"{_JSON_ITEM}/metadata: its hash does not verify")
    name = os.path.basename(path)
    if (saved_as := _saved_as(item["record"], name)) != name:
        raise ValueError(f"it was saved as {saved_as}, not as {name}")
    return item["record"]


def _saved_as(record: Mapping[str, Any], name: str) -> str:
    """Return the name that was noted; that of the folder where older versions noted nothing."""
    position = record["position"]
    if "name" in record:
        return record["name"]
    if "next_step" in position:
        return str(position["next_step"])
    if name.startswith("policy-") and position.get("parents") is not None:
        return f"policy-{len(position['parents'])}"  # each step's adapter has those before it
    return name


def read_leaves(
    restore: Restore,
    records: Mapping[str, Mapping[str, Record]],
    templates: Mapping[str, Mapping[str, Leaf]],
) -> dict[str, list[Leaf]]:
    """Return each pytree's leaves in order; raise ValueError if a hash does not verify."""
    items = {}
    for name, flat in templates.items():
        targets = {
            path: target_of(t) for path, t in flat.items() if "value" not in records[name][path]
        }
        if targets:
            items[name] = ocp.args.StandardRestore(targets)
    arrays = restore(args=ocp.args.Composite(**items)) if items else {}
    leaves: dict[str, list[Leaf]] = {name: [] for name in templates}
    for name, flat in templates.items():
        for path, template in flat.items():
            record = records[name][path]
            leaf = decode(record, template) if "value" in record else arrays[name][path]
            if describe(path, leaf)["hash"] != record["hash"]:
                raise ValueError(f"leaf {name}{path}: its hash does not verify")
            leaves[name].append(leaf)
    return leaves


def with_file(complaint: str, step: os.PathLike) -> str:
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
