"""O-LoRA: a new adapter reads its inputs from a subspace that earlier adapters did not use.

  loss + strength * sum_i ||A A_i^T||^2 ,  so  dA += 2 strength A G ,  G = sum_i A_i^T A_i

of every adapted map and layer; A [r D] is our `a` (Wang et al., arXiv 2310.14152). Only the sum
G [L D D] is stored, so an edit costs the same whatever came before. Rows are taken at the
length that they have: a row that grew in training counts for more, as in the paper, and the
penalty grows with the number of edits. Chained before the optimizer: it is part of the loss.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seal_jax.continual.given import Maps, check_maps, map_a, present, transformation, zero_maps
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Store, Work
from seal_jax.types import Array, Params

_HIGHEST = jax.lax.Precision.HIGHEST  # TPUs would take products of bfloat16


def o_lora(strength: float, subspaces: Maps | None = None) -> optax.GradientTransformationExtraArgs:
    """Return the transformation; `subspaces` (G) closed over, or an extra argument of update."""

    def change(grads: Params, params: Any, subspaces: Maps) -> Params:
        return map_a(add_penalty, grads, subspaces, present("o_lora", params))

    def add_penalty(grad: jax.Array, subspace: Array, a: Array) -> jax.Array:
        return grad + 2 * strength * jnp.matmul(a, subspace, precision=_HIGHEST)

    return transformation(
        "o_lora", "subspaces", subspaces, change, partial(check_maps, "o_lora's subspaces")
    )


def add_subspace(subspaces: Maps, weights: Params) -> Maps:
    """Return G with one more adapter's A^T A; G begins as `zero_maps` of its weights."""

    def one(a: Array) -> jax.Array:
        return jnp.einsum("...ri,...rj->...ij", a, a, precision=_HIGHEST)

    return {
        block: {target: x + one(weights[block][target]["a"]) for target, x in targets.items()}
        for block, targets in subspaces.items()
    }


def remedy(strength: float = 0.1) -> Remedy:
    """Return O-LoRA.

    Args:
      strength: of the penalty.
    """
    if not strength > 0:
        raise ValueError(f"strength is {strength}: expected more than 0")
    return Remedy(
        before=o_lora(strength),
        begin=lambda work, params, adapters: _nothing(adapters.weights),
        context=lambda store, adapters: {"subspaces": store},
        learn=_learn,
        frame="fresh",
    )


def _learn(work: Work, learner: Learner, edit: Edit, store: Store) -> Store:
    del learner
    assert edit.adapters is not None  # they are trained
    trained = work.placed(np.array([bool(row) for row in edit.texts], np.float32))
    return _add_trained(store, edit.adapters.weights, trained)


_nothing = jax.jit(zero_maps)


@jax.jit
@jax.vmap
def _add_trained(subspaces: Maps, weights: Params, trained: jax.Array) -> Maps:
    """Add a sequence's adapter, if it is trained: one of a rejected self-edit is not."""
    return jax.tree.map(
        lambda old, new: jnp.where(trained > 0, new, old),
        subspaces,
        add_subspace(subspaces, weights),
    )
