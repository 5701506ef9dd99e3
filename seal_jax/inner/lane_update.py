"""What the optimizer does in the inner loop: at its start, for one lane of a step, and at its end.

The optimizer's state lies beside the adapters, every leaf with a leading [A]. One adapter at a time
is taken out of both, updated, and put back where it was.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seal_jax.models.config import ModelConfig
from seal_jax.models.lora import take
from seal_jax.optim import (
    Optimizer,
    accumulate,
    all_finite,
    evaluation_point,
    scheduled_rate,
    update,
)
from seal_jax.sharding import place_state
from seal_jax.types import Adapters, Context, InnerBatch, InnerState, Params


class InnerSetup(NamedTuple):
    """What an inner loop is made of: all of it is static."""

    config: ModelConfig
    optimizer: Optimizer
    schedule: str = "linear"
    # Divides the population over the axis of 'adapter': each part of it trains its own adapters on
    # its own shard of the batches (see `pack`), and no part waits for another.
    mesh: Mesh | None = None
    warmup_steps: int = 0  # updates in which the learning rate rises from 0
    dropout: float = 0.0  # the share of an adapter's inputs that is dropped in training
    # Steps whose gradients' mean makes one update; what is left at the end of a run makes one too.
    accumulation: int = 1
    divergence: str = "forward"  # from a teacher's distributions


class Carry(NamedTuple):
    """What a step's lanes change, one after the other."""

    weights: Params  # of the population, as all but the losses
    opt_state: Any
    steps: jax.Array
    losses: jax.Array  # f32[U]


def update_lane(
    setup: InnerSetup,
    batch: InnerBatch,
    grads: Params,
    u: jax.Array,
    carry: Carry,
    context: Context | None = None,
) -> Carry:
    """Update the adapter that takes lane `u`.

    Args:
      grads: [U ...] of the lanes, [2 U ...] with those of the reference rows behind them.
      context: see `make_inner_update`.
    """
    a = batch.lanes[u]
    shown = dict(take(context or {}, a))
    if batch.references is not None:
        shown["memory_grads"] = _memory_grads(setup, batch, grads, u)
    weights, opt_state = take(carry.weights, a), take(carry.opt_state, a)
    accumulation = setup.accumulation
    num_updates = -(-batch.num_steps[a] // accumulation)
    done = carry.steps[a] // accumulation
    schedule = setup.schedule if batch.schedule is None else batch.schedule[a]
    rate = scheduled_rate(schedule, batch.learning_rate[a], done, num_updates, setup.warmup_steps)
    steps = carry.steps[a] + 1
    ends = (steps % accumulation == 0) | (steps == batch.num_steps[a])
    tx = accumulate(setup.optimizer(rate), accumulation, ends)
    loss, own = carry.losses[u], take(grads, u)
    updates, new_state = update(tx, own, opt_state, weights, loss, context=shown)
    new = jax.tree.map(lambda w, change: w + change.astype(w.dtype), weights, updates)
    finite = all_finite(new)
    if batch.references is not None:
        finite &= all_finite(shown["memory_grads"])
    if accumulation == 1:  # else the step may still end a group
        finite &= jnp.isfinite(loss)

    # A branch: a choice between new and old would read and write both.
    stacks = jax.lax.cond(
        finite,
        lambda stacks, ones: jax.tree.map(partial(_put_at, a), stacks, ones),
        lambda stacks, _: stacks,
        (carry.weights, carry.opt_state),
        (new, new_state),
    )
    losses = carry.losses.at[u].set(jnp.where(finite, loss, jnp.nan))
    return Carry(*stacks, carry.steps.at[a].add(1), losses)


def _memory_grads(setup: InnerSetup, batch: InnerBatch, grads: Params, u: jax.Array) -> Params:
    """Return the gradient of the reference row of lane `u`.

    Raises:
      ValueError: an update is made of several steps.
    """
    if setup.accumulation > 1:
        raise ValueError(
            f"reference rows with accumulation={setup.accumulation}: the optimizer is shown the"
            " gradient of one step's reference row, and an update of several steps has several"
        )
    return take(grads, batch.lanes.shape[0] + u)


def _put_at(index: jax.Array, stack: jax.Array, one: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, one.astype(stack.dtype), index, 0)


def start_state(setup: InnerSetup, adapters: Adapters, learning_rate: jax.Array) -> InnerState:
    """Return the state before the first step; learning_rate f32[A] is each adapter's."""

    def init(rate: jax.Array, weights: Params) -> Any:
        return accumulate(setup.optimizer(rate), setup.accumulation, True).init(weights)

    opt_state = jax.vmap(init)(learning_rate, adapters.weights)
    # The caller keeps its adapters, and the steps donate theirs: nothing is shared.
    adapters = jax.tree.map(jnp.copy, adapters)
    state = InnerState(adapters, opt_state, jnp.zeros(adapters.scale.shape, jnp.int32))
    # Zeros depend on no argument: jit would put all on every device.
    return place_state(state, setup.mesh, setup.config.rules)


def evaluated(setup: InnerSetup, adapters: Adapters, opt_state: Any) -> Adapters:
    """Return the adapters after the last step as their optimizer evaluates them."""
    weights = jax.vmap(evaluation_point)(opt_state, adapters.weights)
    return place_state(adapters._replace(weights=weights), setup.mesh, setup.config.rules)
