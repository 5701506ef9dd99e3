"""What a checkpoint notes of every leaf: dtype, shape, hash, and the value of one Orbax refuses.

And of the value that ranks a step: a hash, too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils

PyTree = Any
Leaf = Any  # an array, a number or a string; of a template also a jax.ShapeDtypeStruct
Record = dict[str, Any]  # dtype, shape and hash; value, where Orbax would refuse the leaf


def flatten(tree: PyTree) -> dict[str, Leaf]:
    """Return the leaves by their key paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def describe(path: str, leaf: Leaf) -> Record:
    """Return the record of a leaf.

    Raises:
      ValueError: it cannot be saved.
    """
    dtype, shape = _dtype_and_shape(leaf)
    if isinstance(leaf, str):
        return {"dtype": dtype, "shape": shape, "hash": _hash(leaf.encode()), "value": leaf}
    if 0 in shape:
        data = np.zeros(0, np.uint8)
    elif dtype.startswith(("object", "<U", "key<")):
        raise ValueError(f"leaf {path} of type {type(leaf).__name__} ({dtype}) cannot be saved")
    else:
        data = np.ascontiguousarray(_to_host(leaf)).view(np.uint8)
    record = {"dtype": dtype, "shape": shape, "hash": _hash(data.data)}
    if 0 in shape or not isinstance(leaf, jax.Array | np.ndarray):
        record["value"] = data.tobytes().hex()
    return record


def decode(record: Record, template: Leaf) -> Leaf:
    """Return a leaf whose value is in its record, as what its template is."""
    if isinstance(template, str):
        return str(record["value"])
    data = bytes.fromhex(record["value"])
    array = np.ndarray(record["shape"], np.dtype(record["dtype"]), buffer=data).copy()
    if isinstance(template, np.ndarray):
        return array
    if isinstance(template, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(array, _sharding_of(template))
    return array[()] if isinstance(template, np.generic) else array.item()


def template_of(record: Record) -> Leaf:
    """Return a template of a leaf as it was saved.

    A jax one where it can be: for it Orbax reads every file, as a run does.
    """
    if record["dtype"] == "str":
        return ""
    shape, dtype = tuple(record["shape"]), np.dtype(record["dtype"])
    kept = jax.dtypes.canonicalize_dtype(dtype) == dtype
    return jax.ShapeDtypeStruct(shape, dtype) if kept else np.empty(shape, dtype)


def target_of(template: Leaf) -> np.ndarray | jax.ShapeDtypeStruct:
    """Return what Orbax is to restore for a template: a numpy array, or a placed jax one."""
    if isinstance(template, np.ndarray):
        return template
    sharding = _sharding_of(template)
    return jax.ShapeDtypeStruct(template.shape, template.dtype, sharding=sharding)


def _sharding_of(template: Leaf) -> jax.sharding.Sharding:
    sharding = getattr(template, "sharding", None)
    if sharding is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return sharding


def difference(records: Mapping[str, Record], templates: Mapping[str, Leaf]) -> str:
    """Return the first leaf that is not of its template's dtype and shape, or ''."""
    for path in [*templates, *records]:
        saved, wanted = "absent", "absent"
        if path in records:
            saved = f"{records[path]['dtype']}{records[path]['shape']}"
        if path in templates:
            dtype, shape = _dtype_and_shape(templates[path])
            wanted = f"{dtype}{shape}"
        if saved != wanted:
            return f"{path}: the checkpoint's is {saved}, the run's {wanted}"
    return ""


def hash_json(value: Any) -> str:
    return _hash(json.dumps(value, sort_keys=True, allow_nan=False).encode())


def with_hash(value: float | None) -> dict[str, Any]:
    """Return what Orbax is to write as the metrics of a step: the value that ranks it."""
    return {"value": value, "hash": _hash(repr(value).encode())}  # it may be infinite


def damaged_value(step: Path) -> str:
    """Return what is wrong with the value of a step's folder, or ''; it may have none."""
    path = step / "metrics" / "metrics"
    if not path.parent.exists():
        return ""
    try:
        found = json.loads(path.read_bytes())
        value, hashed = found["value"], found.get("hash")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"metrics/metrics: {type(error).__name__}: {error}"
    good = hashed in (None, _hash(repr(value).encode()))  # older ones have no hash
    return "" if good else "metrics/metrics: its hash does not verify"


def _hash(data: bytes | memoryview) -> str:
    return xxhash.xxh64_hexdigest(data)


def _dtype_and_shape(leaf: Leaf) -> tuple[str, list[int]]:
    if isinstance(leaf, str):
        return "str", []
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return str(array.dtype), list(array.shape)


def _to_host(leaf: Leaf) -> np.ndarray:
    """Return the whole of a leaf, also where its shards lie on several processes."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            return jax.device_get(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(jax.device_get(leaf))
