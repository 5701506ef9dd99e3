"""Elastic weight consolidation: parameters that earlier texts depend on stay where they were.

  loss + strength / 2 * sum_i F_i (theta_i - center_i)^2 ,  F <- decay * F + mean of squared grads

(Kirkpatrick et al., arXiv 1612.00796, eq. 3; the online sum with decay: Schwarz et al., arXiv
1805.06370.) F is the diagonal of the empirical Fisher matrix, from gradients of the
loss on one text each; as the loss is a mean over tokens, it is smaller than that of the text's log
probability by the square of the number of tokens. Works on any pytree. Chained before the
optimizer: it is part of the loss.

F is of the parameters that its gradients were taken at. For adapters that are merged and begin
anew, `center` is the fresh adapter, and F comes from the memory's gradients there.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax.continual.edit_gradients import text_gradients
from seal_jax.continual.given import check_alike, present, transformation
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Store, Work
from seal_jax.types import Params


class Importance(NamedTuple):
    """What ties the parameters, each the parameters' pytree."""

    fisher: Any
    center: Any


def ewc(
    strength: float, importance: Importance | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation; `importance` closed over, or an extra argument of update."""

    def add_pull(g: jax.Array, w: jax.Array, fisher: jax.Array, center: jax.Array) -> jax.Array:
        away = w.astype(jnp.float32) - center.astype(jnp.float32)
        return (g.astype(jnp.float32) + strength * fisher * away).astype(g.dtype)

    def change(grads: Params, params: Any, importance: Importance) -> Params:
        return jax.tree.map(add_pull, grads, present("ewc", params), *importance)

    return transformation("ewc", "importance", importance, change, _check)


def _check(importance: Importance, params: Params) -> None:
    for name, tree in zip(Importance._fields, importance, strict=True):
        check_alike(f"ewc's {name}", tree, params)


def no_fisher(params: Params) -> Params:
    """Return the Fisher diagonal of no text yet: zeros, f32 like the parameters."""
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x)), params)


def add_fisher(
    fisher: Params, grads: Params, decay: float = 1.0, num_texts: jax.Array | float | None = None
) -> Params:
    """Return decay * fisher + the mean over texts of the squared gradients.

    Args:
      grads: [n ...], a gradient for each text.
      num_texts: how many of the n there are, where the gradients of the others are 0; n by default.
    """

    def one(old: jax.Array, g: jax.Array) -> jax.Array:
        count = g.shape[0] if num_texts is None else jnp.maximum(num_texts, 1)
        return decay * old + jnp.square(g.astype(jnp.float32)).sum(axis=0) / count

    return jax.tree.map(one, fisher, grads)


def remedy(strength: float = 1e4, decay: float = 1.0, per_edit: int = 8) -> Remedy:
    """Return EWC: the center is the fresh adapter, which begins alike in every edit.

    Args:
      strength: of the penalty.
      decay: of what earlier edits' texts have left in F, with each edit.
      per_edit: texts of an edit that count.
    """
    if not strength > 0 or not 0 < decay <= 1:
        raise ValueError(
            f"strength is {strength}, decay {decay}: expected more than 0, and at most 1 of decay"
        )
    return Remedy(
        before=ewc(strength),
        begin=lambda work, params, adapters: _no_fisher(adapters.weights),
        context=lambda store, adapters: {"importance": Importance(store, adapters.weights)},
        learn=partial(_learn, decay, per_edit),
        frame="fixed",
    )


def _learn(
    decay: float, per_edit: int, work: Work, learner: Learner, edit: Edit, store: Store
) -> Store:
    """Add the squared gradients of the edit's texts at the model after the edit."""
    found = text_gradients(work, learner, edit, per_edit)
    if found is None:
        return store
    grads, counts = found
    return _add_fishers(store, grads, counts, decay)


_no_fisher = jax.jit(no_fisher)


@partial(jax.jit, static_argnums=3)
def _add_fishers(fisher: Params, grads: Params, counts: jax.Array, decay: float) -> Params:
    return jax.vmap(partial(add_fisher, decay=decay))(fisher, grads, num_texts=counts)
