"""Kernels as a CPU wants them where tokens are few: [out in], on the left of the product.

XLA for CPUs rearranges the right side of a product first. With few tokens that takes as long as
the product; here only the tokens are rearranged. One token alone is a product of a matrix and a
vector, which rearranges nothing, but is slow in bfloat16.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax.sharding import platform
from seal_jax.types import Params

_MANY = 96  # up to so many rows of one token it is worth it


class Turned(NamedTuple):
    """A kernel that `product` takes as it takes one [in out]."""

    transposed: jax.Array  # [out in]


def turns(device: str, num_rows: int, dtype: jnp.dtype) -> bool:
    """Whether decoding so many rows with params of type `dtype` is faster with turned kernels."""
    few = 1 if jnp.dtype(dtype) == jnp.bfloat16 else 2
    return device == "cpu" and few <= num_rows <= _MANY


def turn_kernels(params: Params) -> Params:
    """Return params whose kernels are turned, but for quantized ones and those of S sequences.

    There are few tokens for each of those in any case: turned they are no faster.
    """

    def one(path: tuple, leaf: jax.Array) -> Any:
        return Turned(leaf.T) if _is_kernel(path, leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def kernels(params: Params) -> list[jax.Array]:
    """Return what `turn_kernels` makes a copy of."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [leaf for path, leaf in leaves if _is_kernel(path, leaf)]


def _is_kernel(path: tuple, leaf: jax.Array) -> bool:
    # A quantized kernel is no leaf: its parts are.
    return getattr(path[-1], "key", None) == "kernel" and leaf.ndim == 2


def turned_product(x: jax.Array, kernel: Turned) -> jax.Array:
    """Return x @ kernel, f32[T F] of x [T D]."""
    transposed = kernel.transposed.astype(x.dtype)
    tokens = at_least_two(x)
    y = jnp.einsum("fd,td->ft", transposed, tokens, preferred_element_type=jnp.float32)
    # Behind a barrier, or XLA turns the product itself.
    return jax.lax.optimization_barrier(y).T[: len(x)]


def at_least_two(x: jax.Array) -> jax.Array:
    """Return tokens [T D]; on CPUs with a second one of zeros, where one in bfloat16 is alone."""
    alone = len(x) == 1 and x.dtype == jnp.bfloat16 and platform() == "cpu"
    return jnp.pad(x, ((0, 1), (0, 0))) if alone else x
