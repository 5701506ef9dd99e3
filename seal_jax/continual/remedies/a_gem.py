"""Averaged gradient episodic memory: no step that makes the memory's loss grow, to first order.

  g <- g - (g . m / m . m) m   where g . m < 0, else g   (Chaudhry et al., arXiv 1812.00420)

m is the gradient of the memory's loss at the same parameters. It stores nothing itself: the memory
is texts. Chained before the optimizer, as it compares two gradients. Works on any pytree.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from seal_jax.continual.given import check_alike, transformation
from seal_jax.continual.remedies.remedy import Remedy
from seal_jax.types import Params


def a_gem(memory_grads: Params | None = None) -> optax.GradientTransformationExtraArgs:
    """Return the transformation; `memory_grads` closed over, or an extra argument of update.

    A memory without a gradient (zeros) changes nothing. One that is not finite makes the updates
    NaN, so that the loop sees it.
    """
    return transformation(
        "a_gem",
        "memory_grads",
        memory_grads,
        _project,
        lambda memory, params: check_alike("a_gem's memory_grads", memory, params),
    )


def _project(grads: Params, params: Any, memory: Params) -> Params:
    del params
    against, square = _dot(grads, memory), _dot(memory, memory)
    # Not `against < 0`: a comparison with NaN is false.
    square = jnp.maximum(square, jnp.finfo(jnp.float32).tiny)
    factor = jnp.where(against >= 0, 0.0, against / square)

    def one(g: jax.Array, m: jax.Array) -> jax.Array:
        return (g.astype(jnp.float32) - factor * m.astype(jnp.float32)).astype(g.dtype)

    return jax.tree.map(one, grads, memory)


def _dot(x: Params, y: Params) -> jax.Array:
    """Return the dot product of two pytrees, in float32 on every platform."""
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), x, y
    )
    return sum(jax.tree.leaves(products), jnp.float32(0))


def remedy() -> Remedy:
    """Return A-GEM: every step also takes the gradient of a batch of the memory."""
    return Remedy(memory="reservoir", reference=True, before=a_gem())
