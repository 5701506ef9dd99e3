"""A model of its own for each of S sequences: the kernels that change are f32[S in out].

  y = x @ kernel[s]    for the rows of sequence s

All other params are shared. Rows are grouped by sequence as they are by adapter: of B rows, rows
[i * B/S, (i + 1) * B/S) are of sequence i. Adapters on top are S too, or G in a row for each
sequence. Kernels are float32 whatever the model's dtype, or small changes would be rounded away one
by one; products are in the model's dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seal_jax.models.lora import TARGETS
from seal_jax.models.quantize import is_quantized, product
from seal_jax.sharding import param_shardings, platform
from seal_jax.types import Adapters, Array, ParamRules, Params

_Kernels = dict[str, list[jax.Array]]  # of each target, the layers' [S in out]


def own_kernels(
    params: Params,
    targets: Sequence[str],
    num: int,
    mesh: Mesh | None = None,
    rules: ParamRules = (),
) -> Params:
    """Return params with `num` equal copies of the targets' kernels, f32[num in out].

    Args:
      mesh: where they lie, as `param_shardings` says.
      rules: of `ModelConfig.rules`.

    Raises:
      ValueError: params are quantized, or have such kernels already; an unknown target.
    """
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets or num < 1:
        raise ValueError(
            f"kernels of one's own are of at least one sequence, for some of {', '.join(TARGETS)};"
            f" found num = {num}, targets {list(targets)}"
        )
    if is_quantized(params):
        raise ValueError("quantized params cannot have kernels for each sequence: they would round")
    if num_own(params) is not None:
        raise ValueError(f"params have kernels for each of {num_own(params)} sequences already")

    def copies(kernels: _Kernels) -> _Kernels:
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x.astype(jnp.float32)[None], (num, *x.shape)), kernels
        )

    kernels = _kernels_of(params, targets)
    shapes = jax.eval_shape(copies, kernels)
    where = None if mesh is None else param_shardings(mesh, shapes, rules)
    return _with_kernels(params, jax.jit(copies, out_shardings=where)(kernels))


def num_own(params: Any) -> int | None:
    """Return S, of params or of one kernel; None without kernels of S sequences.

    Raises:
      ValueError: they are not all of as many.
    """
    found = {leaf.shape[0] for leaf in jax.tree.leaves(params) if leaf.ndim == 3}
    if len(found) > 1:
        raise ValueError(f"kernels of {sorted(found)} sequences: expected one number")
    return found.pop() if found else None


def own_leaves(params: Params) -> dict[str, jax.Array]:
    """Return the kernels that each sequence has of its own, by their place: as they are saved."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.ndim == 3}


def with_leaves(params: Params, leaves: dict[str, jax.Array]) -> Params:
    """Return params with the kernels that `own_leaves` made of others."""

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaves.get(jax.tree_util.keystr(path), leaf)

    return jax.tree_util.tree_map_with_path(one, params)


def check_groups(params: Params, num_adapters: int | None, num_groups: int) -> None:
    """Raise ValueError where rows in so many groups would take another's adapter or kernel."""
    if num_adapters not in (None, num_groups):
        raise ValueError(
            f"rows in {num_groups} groups: expected one for each adapter, {num_adapters}"
        )
    num = num_own(params)
    if num is not None and num_groups % num:
        raise ValueError(
            f"rows in {num_groups} groups: expected one, or as many, for each of the {num}"
            " sequences that have kernels of their own"
        )


def each_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x @ kernel[s], [M F] in x's dtype, of x [M D] grouped by sequence; kernel [S D F]."""
    grouped = x.reshape(kernel.shape[0], -1, x.shape[-1])
    return _grouped_product(grouped, kernel).reshape(x.shape[0], -1)


@jax.custom_vjp
def _grouped_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x @ kernel, [S T F], of x [S T D], and keep no more than the two for the gradient."""
    return _for_each(lambda x, kernel: product("td,df->tf", x, kernel, x.dtype), x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return _grouped_product(x, kernel), (x, kernel)


def _backward(saved: tuple, grads: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    d_x = _for_each(lambda g, kernel: product("tf,df->td", g, kernel, g.dtype), grads, kernel)
    wide = {"preferred_element_type": kernel.dtype}
    return d_x, _for_each(lambda x, g: jnp.einsum("td,tf->df", x, g, **wide), x, grads)


_grouped_product.defvjp(_forward, _backward)


def _for_each(function: Callable, *arrays: jax.Array) -> jax.Array:
    """Return the function of each sequence's arrays, all with a leading [S]."""
    if platform() == "cpu":  # where a batched product takes longer than one after another
        return jax.lax.map(lambda one: function(*one), arrays)
    return jax.vmap(function)(*arrays)


def merge_each(params: Params, adapters: Adapters, factor: Array | None = None) -> Params:
    """Return params with adapter s added to the kernels of sequence s, in float32.

      kernel[s] += factor[s] * scale[s] * a[s].T @ b[s]

    Args:
      adapters: S of them.
      factor: f32[S], 1 by default; 0 leaves kernels as they are, whatever the adapter.

    Raises:
      ValueError: they are not S; an adapted kernel that sequences share.
    """
    shapes = adapters.scale.shape, adapters.scale.shape if factor is None else factor.shape
    kernels = _checked(params, adapters.weights, shapes)
    return _with_kernels(params, _merged(kernels, adapters, factor))


def deltas_of(adapters: Adapters) -> Params:
    """Return scale * a.T @ b of each adapter as {block: {target: f32[A L in out]}}.

    They are as large as the kernels: `merge_each` makes those of one layer at a time.
    """
    scale = jnp.asarray(adapters.scale)[:, None, None, None]

    def delta(ab: Params) -> jax.Array:
        exact = jax.lax.Precision.HIGHEST
        return scale * jnp.einsum("slrd,slrf->sldf", ab["a"], ab["b"], precision=exact)

    return {
        block: {target: delta(ab) for target, ab in targets.items()}
        for block, targets in adapters.weights.items()
    }


def add_each(params: Params, deltas: Params) -> Params:
    """Return params with the changes of their kernels added, in float32.

    Args:
      deltas: {block: {target: f32[S L in out]}}.

    Raises:
      ValueError: they are not of S sequences; a changed kernel that sequences share.
    """
    kernels = _checked(params, deltas, [leaf.shape[:1] for leaf in jax.tree.leaves(deltas)])
    return _with_kernels(params, _added(kernels, deltas))


def model_at(params: Params, s: int) -> Params:
    """Return the model of sequence s: ordinary params, in the model's dtype.

    Raises:
      IndexError: there is no such sequence.
    """
    num = num_own(params)
    if num is None or not 0 <= s < num:
        raise IndexError(f"sequence {s}: there are kernels of {num or 0} sequences")
    dtype = params["embed"]["embedding"].dtype

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.ndim != 3:
            return leaf
        return jax.lax.index_in_dim(leaf, s, keepdims=False).astype(dtype)

    return jax.tree.map(one, params)


@jax.jit
def _merged(kernels: _Kernels, adapters: Adapters, factor: Array | None) -> _Kernels:
    scale = adapters.scale if factor is None else adapters.scale * factor
    scale = scale[:, None, None]

    def one(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # On TPUs the default would round a and b to bfloat16.
        delta = jnp.einsum("srd,srf->sdf", a, b, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(scale == 0, kernel, kernel + scale * delta)

    weights = {t: ab for targets in adapters.weights.values() for t, ab in targets.items()}
    return {
        target: [
            one(kernel, weights[target]["a"][:, i], weights[target]["b"][:, i])
            for i, kernel in enumerate(layers)
        ]
        for target, layers in kernels.items()
    }


@jax.jit
def _added(kernels: _Kernels, deltas: Params) -> _Kernels:
    return {
        target: [kernel + deltas[TARGETS[target]][target][:, i] for i, kernel in enumerate(layers)]
        for target, layers in kernels.items()
    }


def _checked(params: Params, changes: Params, sizes: Sequence[tuple[int, ...]]) -> _Kernels:
    """Return the kernels that {block: {target: ...}} names, where all sizes are [S]."""
    num = num_own(params)
    if num is None or set(sizes) != {(num,)}:
        raise ValueError(
            f"changes of kernels of shapes {sorted(set(sizes))}: expected {[(num or 0,)]}, one for"
            " each sequence that has kernels of its own"
        )
    kernels = _kernels_of(params, [target for block in changes.values() for target in block])
    shared = [target for target, layers in kernels.items() if num_own(layers) is None]
    if shared:
        raise ValueError(
            f"the kernels of {', '.join(shared)} are shared by the sequences: adapt those alone for"
            " which own_kernels was asked"
        )
    return kernels


def _kernels_of(params: Params, targets: Sequence[str]) -> _Kernels:
    layers = [params[f"layers_{i}"] for i in range(sum(x.startswith("layers_") for x in params))]
    return {
        target: [layer[TARGETS[target]][target]["kernel"] for layer in layers] for target in targets
    }


def _with_kernels(params: Params, kernels: _Kernels) -> Params:
    changed = dict(params)
    for target, layers in kernels.items():
        block = TARGETS[target]
        for i, kernel in enumerate(layers):
            layer = changed[f"layers_{i}"]
            linear = layer[block][target] | {"kernel": kernel}
            changed[f"layers_{i}"] = layer | {block: layer[block] | {target: linear}}
    return changed
