"""Orthogonal gradient descent: no step along stored directions.

  u <- u - sum_k (u . v_k) v_k        (Farajtabar et al., arXiv 1910.07104, Algorithm 1)

The v_k are orthonormal gradients at texts of earlier edits, so that to first order nothing that
they stand for changes. The authors store gradients of the model's outputs; the gradient of a text's
loss, which is taken here, lies in their span. Works on any pytree, in the policy's loop too.

Chained after the optimizer, what is added to the parameters has no part along any v_k. Before one,
as the authors do it with plain SGD, Adam's division by its second moment would turn it back.

Directions are of the parameters that they were taken at: to use them for a fresh adapter, take
them at that adapter (`directions_of` its memory's gradients), or let all adapters start alike.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import keys
from seal_jax.continual.edit_gradients import text_gradients
from seal_jax.continual.given import check_alike, transformation
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Store, Work
from seal_jax.types import Adapters, Array, Params

# The length that a unit vector keeps without its part in the span of the others: below, it is
# rounding more than a direction.
_LEAST = 1e-3


class Directions(NamedTuple):
    """Up to K directions. A pytree of constant size."""

    vectors: Any  # the parameters' pytree, f32[K ...]: orthonormal, or 0 where there is none yet
    count: Array  # i32[] how many have been offered, but for those that were left out


def ogd(directions: Directions | None = None) -> optax.GradientTransformationExtraArgs:
    """Return the transformation; `directions` closed over, or an extra argument of update."""

    def change(updates: Params, params: Any, directions: Directions) -> Params:
        del params
        left = _without(directions.vectors, updates)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), left, updates)

    def check(directions: Directions, params: Params) -> None:
        check_alike("ogd's directions", directions.vectors, params, leading=1)

    return transformation("ogd", "directions", directions, change, check)


def no_directions(params: Params, num: int) -> Directions:
    """Return room for `num` directions of the parameters."""
    if num < 1:
        raise ValueError(f"ogd stores {num} directions; expected 1 or more")
    vectors = jax.tree.map(lambda x: jnp.zeros((num, *jnp.shape(x))), params)
    return Directions(vectors, jnp.int32(0))


def add_direction(directions: Directions, direction: Params, key: jax.Array) -> Directions:
    """Return the directions with one more, of any length, made orthonormal to those that stay.

    Where there is no room, a direction takes the place of another by chance (a reservoir: each
    that was offered is kept with the same probability), or of none. One is left out, and not
    counted, if it is not finite or less than 0.1 % of its length lies outside of the others' span.

    Args:
      key: decides whose place it takes.
    """
    num, count = jax.tree.leaves(directions.vectors)[0].shape[0], directions.count
    drawn = jax.random.randint(key, (), 0, jnp.maximum(count, num) + 1)
    return _put(directions, direction, jnp.where(count < num, count, drawn))


def directions_of(grads: Params) -> Directions:
    """Return the orthonormal directions of n gradients, a pytree of [n ...]."""
    num = jax.tree.leaves(grads)[0].shape[0]
    empty = no_directions(jax.tree.map(lambda x: x[0], grads), num)

    def body(directions: Directions, one: Params) -> tuple[Directions, None]:
        return _put(directions, one, directions.count), None

    return jax.lax.scan(body, empty, grads)[0]


def _put(directions: Directions, direction: Params, slot: Array) -> Directions:
    """Return the directions with one more in `slot`; beyond the last, it is only counted."""
    old = directions.vectors
    num = jax.tree.leaves(old)[0].shape[0]
    is_slot = jnp.arange(num) == slot

    def at_slot(stack: jax.Array, one: jax.Array | float) -> jax.Array:
        return jnp.where(is_slot.reshape(-1, *[1] * (stack.ndim - 1)), one, stack)

    others = jax.tree.map(lambda x: at_slot(x, 0.0), old)
    unit = _scaled(direction)
    for _ in range(2):  # once more for what rounding leaves: Kahan's "twice is enough"
        unit = _without(others, unit)
    is_new = _length(unit) > _LEAST  # not so of NaN
    unit = _scaled(unit)
    new = jax.tree.map(lambda x, one: at_slot(x, one[None]), others, unit)
    new = jax.tree.map(lambda x, y: jnp.where(is_new, x, y), new, old)
    return Directions(new, directions.count + is_new)


def _without(vectors: Params, tree: Params) -> Params:
    """Return the tree in float32 without its part in the span of orthonormal vectors [K ...]."""
    highest = jax.lax.Precision.HIGHEST  # TPUs would take products of bfloat16
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    parts = jax.tree.map(lambda v, x: jnp.tensordot(v, x, x.ndim, precision=highest), vectors, tree)
    along = sum(jax.tree.leaves(parts))  # f32[K]
    return jax.tree.map(
        lambda v, x: x - jnp.tensordot(along, v, 1, precision=highest), vectors, tree
    )


def _length(tree: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _scaled(tree: Params) -> Params:
    """Return the tree in float32 and of length 1, or 0 as it is."""
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    largest = jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]).max()
    for size_of in (lambda _: largest, _length):  # squares of small numbers would be 0
        size = size_of(tree)
        tree = jax.tree.map(lambda x, size=size: x / jnp.where(size == 0, 1.0, size), tree)
    return tree


def remedy(num: int = 32, per_edit: int = 8) -> Remedy:
    """Return OGD: the directions are gradients of earlier texts, by adapters that begin alike.

    Args:
      num: directions that are stored.
      per_edit: texts of an edit that give one.
    """
    if num < 1 or per_edit < 1:
        raise ValueError(f"num is {num}, per_edit {per_edit}: expected 1 or more")
    return Remedy(
        after=ogd(),
        begin=partial(_begin, num),
        context=lambda store, adapters: {"directions": store},
        learn=partial(_learn, per_edit),
        frame="fixed",
    )


def _begin(num: int, work: Work, params: Params, adapters: Adapters) -> Store:
    del work, params
    return jax.jit(jax.vmap(partial(no_directions, num=num)))(adapters.weights)


def _learn(per_edit: int, work: Work, learner: Learner, edit: Edit, store: Store) -> Store:
    """Add the gradients of the edit's texts at the model after the edit."""
    found = text_gradients(work, learner, edit, per_edit)
    if found is None:
        return store
    step = keys.CONTINUAL_STEP + edit.number
    path = work.stages.settings.seed, keys.REFERENCE, step
    drawn = work.placed(keys.fold([(*path, s, 4) for s in range(work.num)]))
    return _add_each(store, found[0], drawn)


@jax.jit
@jax.vmap
def _add_each(directions: Directions, grads: Params, key: jax.Array) -> Directions:
    """Add the gradients [n ...] of one sequence; what is 0 is left out."""

    def add(directions: Directions, one: tuple[Params, jax.Array]) -> tuple[Directions, None]:
        grad, number = one
        return add_direction(directions, grad, jax.random.fold_in(key, number)), None

    numbers = jnp.arange(len(jax.tree.leaves(grads)[0]))
    return jax.lax.scan(add, directions, (grads, numbers))[0]
