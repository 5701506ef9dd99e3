"""From slices on the host to arrays on the devices, one parameter at a time.

Which slices, the shardings say: every distinct one that this process's devices hold is read once,
in its final dtype and layout, and becomes the array (on the CPU without a copy).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from seal_jax.models.names import Param
from seal_jax.models.tensor_file import Index, aligned_empty

Params = dict[str, Any]  # nested dict with arrays at the leaves
Shardings = Callable[[Params], Any]  # tree of shapes and dtypes -> tree of shardings


def build_params(
    table: Iterable[Param],
    read: Callable[[Param], np.ndarray],
    dtype: Any,
    where: str,
    shardings: Shardings | None = None,
) -> Params:
    """Read each parameter whole, in its file layout, and return our tree on the devices.

    For formats whose tensors cannot be read in slices.

    Args:
        dtype: every leaf is cast to it.
        where: what messages start with.
        shardings: see `weights.load_safetensors`.

    Raises:
        ValueError: a tensor's shape is not the one that the config asks for.
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)

    def open_param(param: Param) -> Callable[[Index], np.ndarray]:
        array = read(param)
        if array.shape != param.file_shape:
            raise ValueError(
                f"{where}: {param.hf_name} has shape {array.shape}, the config asks for "
                f"{param.file_shape}."
            )
        ours = array.T if param.is_kernel else array

        def read_slice(index: Index) -> np.ndarray:
            out = aligned_empty(ours[tuple(index)].shape, dtype)
            out[...] = ours[tuple(index)]
            return out

        return read_slice

    return place(list(table), open_param, dtype, shardings)


def place(
    table: Sequence[Param],
    open_param: Callable[[Param], Callable[[Index], np.ndarray]],
    dtype: Any,
    shardings: Shardings | None,
) -> Params:
    """Return the tree of parameters on the devices, one parameter after the other.

    Args:
        open_param: returns a function of an index into the parameter. What that function returns is
            aligned and never changed, since on the CPU it becomes the array itself. It is called
            once for each distinct slice, however many devices hold that slice.
    """
    sharding_of = sharding_of_each(table, dtype, shardings)
    params: Params = {}
    for param in table:
        array = _place_one(param.shape, sharding_of(param), open_param(param), dtype)
        # Until the transfer is done, the host keeps its copy: never more than one parameter.
        _insert(params, param.path, jax.block_until_ready(array))
    return params


def _place_one(
    shape: tuple[int, ...],
    sharding: Sharding | None,
    read: Callable[[Index], np.ndarray],
    dtype: Any,
) -> jax.Array:
    pieces = {}
    for bounds, devices in shards_of(shape, sharding).items():
        piece = read([slice(*bound) for bound in bounds])
        pieces |= {device: jax.device_put(piece, device) for device in devices}
    if sharding is None:
        return pieces[None]
    order = sharding.addressable_devices_indices_map(shape)
    return jax.make_array_from_single_device_arrays(
        shape, sharding, [pieces[device] for device in order], dtype=dtype
    )


def sharding_of_each(
    table: Sequence[Param], dtype: Any, shardings: Shardings | None
) -> Callable[[Param], Sharding | None]:
    """Return a function from a parameter to its sharding, None for the default device."""
    if shardings is None:
        return lambda param: None
    shapes: Params = {}
    for param in table:
        _insert(shapes, param.path, jax.ShapeDtypeStruct(param.shape, dtype))
    by_path = dict(leaves_of(shardings(shapes)))
    return lambda param: by_path["/".join(param.path)]


def shards_of(shape: tuple[int, ...], sharding: Sharding | None) -> dict[tuple, list]:
    """Return the devices of this process that hold each slice, by the slice's (start, stop)s."""
    if sharding is None:
        return {tuple((0, size) for size in shape): [None]}
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    return devices


def leaves_of(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (path joined by '/', leaf)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves_of(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _insert(tree: Params, path: Sequence[str], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
