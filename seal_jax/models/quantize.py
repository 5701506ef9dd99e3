"""A quantized frozen base: kernels as int8 or NormalFloat4, in qwix's QArray.

  int8  w[i, o] ~ code[i, o] * scale[0, o]                 one scale per output channel
  nf4   w[i, o] ~ LEVELS[code[i, o]] * scale[i // 64, o]   one per 64 inputs of a channel

(QLoRA, arXiv 2305.14314, for nf4.) Adapters, norms and biases keep their precision. The embedding
and an output head are int8 under either word, with one scale per token: logits are read off them.

Of qwix only QArray and int8's rounding are used: its nf4 looks codes up in a table, which is slow
on TPUs. A scale has its parameter's dtype, which so remains the model's.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from seal_jax.models.turned_kernels import Turned, at_least_two, turned_product
from seal_jax.sharding import auto_axes, lookup_specs
from seal_jax.types import Array, ParamRules, Params

QUANTIZATIONS = ("none", "int8", "nf4")
TILE = 64  # inputs that share a scale under nf4
# Quantiles of a normal distribution with 0 among them, from QLoRA's appendix E.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize_params(params: Params, word: str) -> Params:
    """Return params with kernels and embedding as QArrays; 'none' returns params as they are.

    Leaf by leaf: beside params and result there is never more than one tensor on the devices. Codes
    and scales lie where their parameter lies.

    Raises:
      ValueError: an unknown word, or params that are quantized already.
    """
    if word not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}; found {word!r}")
    if word == "none":
        return params
    if is_quantized(params):
        raise ValueError("these params are quantized already")

    def one(path: tuple, leaf: jax.Array) -> Any:
        module, name = (entry.key for entry in path[-2:])
        if name == "embedding":
            return _to_int8(leaf, axis=0)
        if name != "kernel":
            return leaf
        return _to_int8(leaf, axis=1) if word == "int8" or module == "lm_head" else _to_nf4(leaf)

    return jax.tree_util.tree_map_with_path(one, params)


def is_quantized(params: Params) -> bool:
    """Return whether any parameter is a QArray."""
    return any(map(_is_qarray, jax.tree.leaves(params, is_leaf=_is_qarray)))


def _is_qarray(x: Any) -> bool:
    # By its fields, so that only those who quantize import qwix.
    return hasattr(x, "qvalue")


@partial(jax.jit, static_argnames="axis")
def _to_int8(x: jax.Array, axis: int) -> Any:
    import qwix

    x32 = x.astype(jnp.float32)
    return qwix.quantize(x32, jnp.int8, channelwise_axes=(axis,), scale_dtype=x.dtype)


@jax.jit
def _to_nf4(x: jax.Array) -> Any:
    """Quantize a kernel [in out]; a tile is the largest divisor of `in` that divides TILE."""
    import qwix

    fan_in, fan_out = x.shape
    tile = math.gcd(fan_in, TILE)
    tiles = x.astype(jnp.float32).reshape(fan_in // tile, tile, fan_out)
    largest = jnp.abs(tiles).max(axis=1)
    scale = jnp.where(largest > 0, largest, 1.0).astype(x.dtype)
    relative = tiles / scale.astype(jnp.float32)[:, None]
    middles = [(a + b) / 2 for a, b in zip(LEVELS[:-1], LEVELS[1:], strict=True)]
    codes = jnp.asarray(sum((relative > middle).astype(jnp.int8) for middle in middles))
    return qwix.QArray(codes.reshape(x.shape).astype(jnp.uint4), scale, None, "nf4")


def dequantize(kernel: Any, dtype: Any) -> jax.Array:
    """Return an nf4 kernel [in out] as numbers."""
    codes = kernel.qvalue.astype(jnp.int32)
    # A table of 16 by selects, bit by bit: TPUs have no fast lookup.
    values = [jnp.asarray(level, dtype) for level in LEVELS]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    num_tiles, fan_out = kernel.scale.shape
    tiles = values[0].reshape(num_tiles, -1, fan_out) * kernel.scale.astype(dtype)[:, None]
    return tiles.reshape(codes.shape)


def take_rows(table: Any, index: Array, rules: ParamRules = ()) -> jax.Array:
    """Return table[index]: the embeddings [M D] of tokens i32[M].

    Args:
      rules: how the table is divided, see sharding.py.
    """
    if not _is_qarray(table):
        return _take(table, index, rules)
    scale = _take(table.scale, index, rules)
    return _take(table.qvalue, index, rules).astype(scale.dtype) * scale


def _take(table: jax.Array, index: Array, rules: ParamRules) -> jax.Array:
    """Return table[index]; within a shard_map over some axes, by hand over the others.

    XLA aborts on that lookup where both of the table's axes are divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual not in mesh.axis_types:
        return table[index]
    specs = lookup_specs(mesh, table.shape, rules)
    if specs is None:
        return table[index]
    vocab = specs.table[0]

    def take_here(part: jax.Array, index: Array) -> jax.Array:
        index = index - jax.lax.axis_index(vocab) * len(part)
        here = (index >= 0) & (index < len(part))
        rows = part[jnp.where(here, index, 0)]
        return jax.lax.psum(jnp.where(here[:, None], rows, 0), vocab)

    return jax.shard_map(
        take_here,
        in_specs=(specs.table, specs.index),
        out_specs=specs.rows,
        axis_names=auto_axes(mesh),
        check_vma=False,
    )(table, index)


def product(contract: str, x: jax.Array, kernel: Any, dtype: Any) -> jax.Array:
    """Return einsum(contract, x, kernel) in `dtype`.

    Where the kernel is a QArray, it is frozen, and the result's last axis is its channels. A turned
    one is only for what has no gradient.
    """
    if isinstance(kernel, Turned):
        return turned_product(x, kernel).astype(dtype)
    if not _is_qarray(kernel):
        kernel = kernel.astype(x.dtype)
        if x.dtype == jnp.float32:
            return jnp.einsum(contract, x, kernel, preferred_element_type=dtype)
        return _half_product(contract, jnp.dtype(dtype), at_least_two(x), kernel)[: len(x)]
    return _frozen_product(contract, jnp.dtype(dtype), x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _half_product(contract: str, dtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply half-precision numbers, forward and backward.

    The rule that JAX would derive for float32 results multiplies by float32 gradients.
    """
    return _half_einsum(contract, x, kernel, dtype)


def _half_forward(contract: str, dtype: Any, x: jax.Array, kernel: jax.Array):
    return _half_product(contract, dtype, x, kernel), (x, kernel)


def _half_backward(contract: str, dtype: Any, residuals: tuple, g: jax.Array):
    del dtype
    x, kernel = residuals
    to_x, to_kernel = _transposes(contract)
    g = g.astype(x.dtype)
    return _half_einsum(to_x, g, kernel, x.dtype), _half_einsum(to_kernel, x, g, kernel.dtype)


_half_product.defvjp(_half_forward, _half_backward)


def _half_einsum(contract: str, x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """Return the einsum of half-precision arrays in `dtype`; sums are float32 on every device.

    A CPU is faster with a float32 result, rounded then; elsewhere a rounded one is less to move.
    """

    def wide(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(contract, x, y, preferred_element_type=jnp.float32).astype(dtype)

    def narrow(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(contract, x, y, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, y, cpu=wide, default=narrow)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen_product(contract: str, dtype: Any, x: jax.Array, kernel: Any) -> jax.Array:
    numbers, scale = _numbers(kernel, x)
    y = jnp.einsum(contract, x, numbers, preferred_element_type=jnp.float32)
    return _scaled(y, scale).astype(dtype)


def _forward(contract: str, dtype: Any, x: jax.Array, kernel: Any):
    # Codes are kept for the backward pass and made numbers again there: as numbers they would be
    # the whole model in full precision.
    return _frozen_product(contract, dtype, x, kernel), (kernel, jnp.zeros((0,), x.dtype))


def _backward(contract: str, dtype: Any, residuals: tuple, g: jax.Array):
    del dtype
    kernel, like = residuals
    to_x, _ = _transposes(contract)
    numbers, scale = _numbers(kernel, g.astype(like.dtype))
    g = _scaled(g, scale).astype(like.dtype)
    return jnp.einsum(to_x, g, numbers, preferred_element_type=like.dtype), None


_frozen_product.defvjp(_forward, _backward)


def _scaled(y: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Return y times a scale for each of its last axis, if there is one."""
    if scale is None:
        return y
    return y * scale.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))


def _transposes(contract: str) -> tuple[str, str]:
    """Return the contractions of gradients: (y, kernel -> x), and (x, y -> kernel)."""
    operands, y = contract.split("->")
    x, kernel = operands.split(",")
    return f"{y},{kernel}->{x}", f"{x},{y}->{kernel}"


def _numbers(kernel: Any, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return what to multiply x with, in its dtype, and what to scale each channel with then."""
    kernel = jax.tree.map(partial(_not_before, x), kernel)
    if kernel.qvalue.dtype == jnp.uint4:
        return dequantize(kernel, x.dtype), None
    # Scaled behind the product: the conversion alone is fused into it, and rounds nothing.
    return kernel.qvalue.astype(x.dtype), kernel.scale


def _not_before(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return y, to be had no sooner than x.

    A compiler that is free to would make numbers of all layers' codes at once. XLA:CPU is, and it
    drops barriers: there an addition of nothing keeps the order.
    """

    def add_nothing(x: jax.Array, y: jax.Array) -> jax.Array:
        return y + (x[(0,) * x.ndim] > jnp.inf).astype(y.dtype)

    def barrier(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier((x, y))[1]

    return jax.lax.platform_dependent(x, y, cpu=add_nothing, default=barrier)
