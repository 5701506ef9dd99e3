"""Null-space projection: an adapter that does not see the inputs of earlier texts.

  C = sum over the memory's tokens of x^T x ,  P = sum of v v^T over C's weakest eigenvectors v
  a <- a P at the start,  and every update of a:  da <- da P

Then (x a^T) b is about 0 for every x of the memory, whatever b is: what its texts do in the model
stays. AlphaEdit (Fang et al., arXiv 2410.02355) projects its update so, taking eigenvalues below an
absolute threshold; Adam-NSCL (Wang et al., arXiv 2103.07113) projects what Adam makes of the
gradient. Here the weakest eigenvectors are taken as long as they have together at most a share
`energy` of C's trace: trace(P C) <= energy * trace(C), at any scale of the inputs.

Chained after the optimizer: what it adds has to lie in the null space.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from seal_jax.continual.decompositions import of_each
from seal_jax.continual.edit_gradients import text_batches
from seal_jax.continual.edits import fresh_adapters
from seal_jax.continual.given import Maps, check_maps, map_a, transformation, zero_maps
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Store, Work
from seal_jax.types import Adapters, Array, Params


def null_space(projectors: Maps | None = None) -> optax.GradientTransformationExtraArgs:
    """Return the transformation; `projectors` closed over, or an extra argument of update."""

    def change(updates: Params, params: Any, projectors: Maps) -> Params:
        del params
        return map_a(_projected, updates, projectors)

    check = partial(check_maps, "null_space's projectors")
    return transformation("null_space", "projectors", projectors, change, check)


def start(weights: Params, projectors: Maps) -> Params:
    """Return the weights of a fresh adapter, or of a stack, with `a` in the null space.

    It is not made longer again: a memory that leaves little room leaves a small `a`.
    """
    return map_a(_projected, weights, projectors)


def projectors_of(covariances: Maps, energy: float = 1e-3) -> Maps:
    """Return P f32[... D D] for each C; of no memory (zeros) the identity, of NaN NaN.

    The trace of P is the number of directions that are left; at 0 an adapter cannot use the map.

    Args:
      energy: the largest share of the memory's energy in what is left; rounding is about 1e-6.
    """
    if not 0 < energy < 1:
        raise ValueError(f"null_space: energy = {energy}, expected a share between 0 and 1")

    def one(covariance: Array) -> jax.Array:
        values, vectors = of_each(jnp.linalg.eigh, covariance)  # from the weakest on
        below = jnp.cumsum(jnp.maximum(values, 0.0), axis=-1)
        weak = vectors * (below <= energy * below[..., -1:])[..., None, :]
        return jnp.matmul(weak, weak.swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(one, covariances)


def add_covariance(stored: Maps, new: Maps, decay: float = 1.0) -> Maps:
    """Return decay * stored + new. By default a sum: the first text counts as much as the last."""
    return jax.tree.map(lambda old, x: decay * old + x, stored, new)


def _projected(a: Array, projector: Array) -> jax.Array:
    # TPUs would take products of bfloat16, and leave a hundredth.
    return jnp.matmul(a, projector, precision=jax.lax.Precision.HIGHEST)


def remedy(energy: float = 1e-3, decay: float = 1.0) -> Remedy:
    """Return the null-space projection.

    Args:
      energy: the largest share of the memory's energy in what is left, see `projectors_of`.
      decay: of what earlier edits' texts have left in the covariance, with each edit.
    """
    projectors_of({}, energy)
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}: expected more than 0 and at most 1")
    return Remedy(
        after=null_space(),
        begin=_begin,
        context=lambda store, adapters: {"projectors": store["projectors"]},
        start=lambda store, adapters: _start(adapters, store["projectors"]),
        learn=partial(_learn, energy, decay),
        frame="own",
    )


def _begin(work: Work, params: Params, adapters: Adapters) -> Store:
    del work, params
    nothing = jax.jit(zero_maps)(adapters.weights)
    return {"covariances": nothing, "projectors": _projectors_of(nothing, 0.5)}


@jax.jit
def _start(adapters: Adapters, projectors: Maps) -> Adapters:
    return adapters._replace(weights=start(adapters.weights, projectors))


def _learn(
    energy: float, decay: float, work: Work, learner: Learner, edit: Edit, store: Any
) -> Store:
    """Add the inputs of the edit's texts, as the model after the edit has them."""
    batches = text_batches(work, edit)
    if not batches:
        return store
    found = work.look.covariances(
        learner.params, fresh_adapters(work, learner, edit.number + 1), batches
    )
    covariances = _add_covariance(store["covariances"], found, decay)
    return {"covariances": covariances, "projectors": _projectors_of(covariances, energy)}


_projectors_of = jax.jit(projectors_of, static_argnums=1)
_add_covariance = jax.jit(add_covariance, static_argnums=2)
