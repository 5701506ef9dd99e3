"""From slices on the host to arrays on the devices, one parameter at a time.

Which slices, the shardings say: every distinct one that this process's devices hold is read once,
in its final dtype and layout, and becomes the array (on the CPU without a copy).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from seal_jax.models.names import Param
from seal_jax.models.tensor_file import Index, aligned_empty
from seal_jax.types import Params

Shardings = Callable[[Params], Any]  # tree of shapes and dtypes -> tree of shardings
ReadSlice = Callable[[Index], np.ndarray]


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

    def open_param(param: Param) -> ReadSlice:
        array = read(param)
        if array.shape != param.file_shape:
            raise ValueError(
                f"{where}: {param.hf_name} has shape {array.shape}, the config asks for "
                f"{param.file_shape}."
            )
        return partial(_cast_slice, array.T if param.is_kernel else array, dtype)

    return place(list(table), open_param, dtype, shardings)


def place(
    table: Sequence[Param],
    open_param: Callable[[Param], ReadSlice],
    dtype: Any,
    shardings: Shardings | None,
) -> Params:
    """Return the tree of parameters on the devices, one parameter after the other.

    Args:
      open_param: returns a function of an index into the parameter, called once for each distinct
        slice. What that returns is aligned and never changed: on the CPU it becomes the array.
    """
    sharding_of = sharding_of_each(table, dtype, shardings)
    params = {}
    for param in table:
        array = _place_one(param.shape, sharding_of[param.path], open_param(param), dtype)
        # Until the transfer is done, the host keeps its copy: never more than one parameter.
        params[param.path] = jax.block_until_ready(array)
    return unflatten_dict(params)


def _cast_slice(array: np.ndarray, dtype: Any, index: Index) -> np.ndarray:
    piece = array[tuple(index)]
    out = aligned_empty(piece.shape, dtype)
    out[...] = piece
    return out


def _place_one(
    shape: tuple[int, ...], sharding: Sharding | None, read: ReadSlice, dtype: Any
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
) -> dict[tuple[str, ...], Sharding | None]:
    """Return the sharding of each parameter by its path, None for the default device."""
    shapes = {param.path: jax.ShapeDtypeStruct(param.shape, dtype) for param in table}
    if shardings is None:
        return dict.fromkeys(shapes)
    return flatten_dict(shardings(unflatten_dict(shapes)))


def shards_of(shape: tuple[int, ...], sharding: Sharding | None) -> dict[tuple, list]:
    """Return the devices of this process that hold each slice, by the slice's (start, stop)s."""
    if sharding is None:
        return {tuple((0, size) for size in shape): [None]}
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # it is of devices that are here
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    return devices
