"""What becomes of a trained self-edit: how much of it is merged, and into what.

Deltas are what adapters add to the kernels, as full matrices: {block: {target: f32[S L in out]}} of
each of S sequences and L layers, made by `deltas_of` and added by `add_each` of
`models/own_kernels.py`. They are as large as the kernels; what needs none of them (a plain or a
scaled merge) is `merge_each`, with a factor. The functions here compose between the two:

  deltas  = trim(deltas_of(adapters), density=0.2)                  # TIES' first step
  params  = add_each(params, scaled(deltas, factors))               # of a gate
  params  = merge_each(params, adapters, factor=f32[S])             # or of time_scale(k), as SLAO
  answers = ema(answers, params, decay=0.9)                         # a slow copy that answers
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.continual.decompositions import of_each
from seal_jax.types import Adapters, Params


def scaled(deltas: Params, factors: jax.Array | np.ndarray | float) -> Params:
    """Return the deltas times a factor, or times one for each sequence, f32[S]."""
    factors = jnp.asarray(factors, jnp.float32)

    def times(x: jax.Array) -> jax.Array:
        # A factor of 0 takes nothing over, not even what is not finite.
        each = jnp.broadcast_to(factors, x.shape[:1])[:, None, None, None]
        return jnp.where(each == 0, 0.0, each * x)

    return jax.tree.map(times, deltas)


def trim(deltas: Params, density: float) -> Params:
    """Return the deltas with the largest entries of each matrix alone, the others 0.

    Exactly round(density * in * out) entries of each [in out] stay, at least one; of equal
    magnitudes those that come first. The threshold is exact: a binary search over the bits of a
    float32, so 31 counts in place of a sort of the whole matrix.

    Args:
      density: the share that stays, more than 0 and at most 1.

    Raises:
      ValueError: density is not that.

    References:
      Yadav et al., TIES-Merging, arXiv 2306.01708, section 4: its first step. Signs are not
      elected: that takes all edits at once, and here they come one after another.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: expected more than 0 and at most 1")
    if density == 1:
        return deltas

    def one(x: jax.Array) -> jax.Array:
        return _trim(x, max(round(density * x.shape[-2] * x.shape[-1]), 1))

    return jax.tree.map(one, deltas)


@partial(jax.jit, static_argnames="num_kept")
def _trim(x: jax.Array, num_kept: int) -> jax.Array:
    *lead, fan_in, fan_out = x.shape
    flat = x.astype(jnp.float32).reshape(*lead, fan_in * fan_out)
    # Of what has no sign, floats are in the order of their bits. A NaN is above all: it stays seen.
    bits = jax.lax.bitcast_convert_type(jnp.abs(flat), jnp.int32)

    def narrow(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | jnp.left_shift(jnp.int32(1), jnp.int32(30) - i)
        enough = (bits >= higher).sum(-1, keepdims=True) >= num_kept
        return jnp.where(enough, higher, threshold)

    start = jnp.zeros((*lead, 1), jnp.int32)
    threshold = jax.lax.fori_loop(0, 31, narrow, start)  # magnitude num_kept from the top
    above, equal = bits > threshold, bits == threshold
    room = num_kept - above.sum(-1, keepdims=True)
    kept = above | (equal & (jnp.cumsum(equal, axis=-1) <= room))
    return jnp.where(kept, flat, 0.0).reshape(x.shape)


def ema(slow: Any, fast: Any, decay: float) -> Any:
    """Return decay * slow + (1 - decay) * fast, in float32 and then in the slow tree's dtypes.

    What is one array in both trees stays that array, so that shared params are not copied. Equal
    values stay as they are, to the bit.

    Args:
      decay: from 0 (the fast tree) to less than 1.

    Raises:
      ValueError: decay is not that.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}: expected 0 or more and less than 1")

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        return old if old is new else _average(old, new, decay)

    return jax.tree.map(average, slow, fast)


@partial(jax.jit, static_argnums=2)
def _average(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    start = old.astype(jnp.float32)
    return (start + (1 - decay) * (new.astype(jnp.float32) - start)).astype(old.dtype)


def time_scale(number: int) -> float:
    """Return 1 / sqrt(k), by which the k-th edit is merged, from 1.

    SLAO weighs so the step from its merged b to the newly trained one. Here the edits before are in
    the kernels, and the step is the edit's own change.

    References:
      Qiao and Mahdavi, Merge before Forget, arXiv 2512.23017.
    """
    if number < 1:
        raise ValueError(f"the number of an edit is {number}, expected 1 or more")
    return 1 / math.sqrt(number)


def init_from_last(last: Adapters) -> Adapters:
    """Return fresh adapters whose a has orthonormal rows that span the last ones' a.

    a = Q.T of last_a.T = Q R, with R's diagonal not negative, so that Q is unique. b is zero, and
    so the new adapter changes nothing yet. (SLAO begins with the last b, since it has not merged
    the last edit into the kernels.)

    Raises:
      ValueError: the rank is larger than a kernel's input: so many rows cannot be orthonormal.

    References:
      Qiao and Mahdavi, Merge before Forget, arXiv 2512.23017.
    """

    def fresh(ab: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rank, fan_in = ab["a"].shape[-2:]
        if rank > fan_in:
            raise ValueError(f"rank {rank} is larger than the kernel's input, {fan_in}")
        q, r = of_each(jnp.linalg.qr, ab["a"].astype(jnp.float32).swapaxes(-1, -2))
        signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
        return {
            "a": (q * signs[..., None, :]).swapaxes(-1, -2),
            "b": jnp.zeros_like(ab["b"]),
        }

    weights = {
        block: {target: fresh(ab) for target, ab in targets.items()}
        for block, targets in last.weights.items()
    }
    return Adapters(weights, last.scale)


class Gate(NamedTuple):
    """The scale that a gate has chosen for each sequence."""

    scales: np.ndarray  # f32[S]
    refused: np.ndarray  # bool[S]: the edit is not merged at all, its scale is 0


def choose_scales(new: np.ndarray, old: np.ndarray, scales: Sequence[float], weight: float) -> Gate:
    """Return for each sequence the scale of its edit that gains most for what it breaks.

    value(g) = new(g) - new(0) - weight * (old(0) - old(g))

    Of equal values the smallest scale is taken, and a scale at which a score is not finite is never
    taken. An edit whose value is above that of 0 at no scale is refused: `refused` counts it.

    Args:
      new: f[S G] scores of the new edit's own texts at G scales; higher is better.
      old: f[S G] scores of the memory's texts; all 0 where a memory is empty.
      scales: G factors, 0 among them.
      weight: of what is lost on the memory, 0 or more.

    Raises:
      ValueError: shapes do not fit, no scale is 0, one is there twice, or negative; weight is
        negative; or a score at scale 0, of the model as it is, is not finite.

    References:
      STABLE, arXiv 2510.16089: an edit that breaks more than a budget is scaled down or rejected.
      Here several scales are tried, and what an edit gains counts, too.
    """
    new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
    factors = np.asarray(scales, np.float64)
    if new.ndim != 2 or new.shape != old.shape or new.shape[1:] != factors.shape:
        raise ValueError(
            f"expected scores of [S {factors.size}] for new and old, found {new.shape}, {old.shape}"
        )
    if 0 not in factors or not (factors >= 0).all() or len({*scales}) < len(scales):
        raise ValueError(f"scales of a gate: expected 0 and others above, each once: {scales}")
    if not weight >= 0:
        raise ValueError(f"a gate's weight is {weight}, expected 0 or more")
    order = np.argsort(factors)
    new, old, factors = new[:, order], old[:, order], factors[order]
    if not (np.isfinite(new[:, 0]) & np.isfinite(old[:, 0])).all():
        raise ValueError("the scores at scale 0, of the model before the edit, are not all finite")
    with np.errstate(invalid="ignore"):
        value = new - new[:, :1] - weight * (old[:, :1] - old)
    value = np.where(np.isfinite(new) & np.isfinite(old), value, -np.inf)
    best = value.argmax(axis=1)  # the first of equals; at 0 the value is 0
    return Gate(factors[best].astype(np.float32), best == 0)
