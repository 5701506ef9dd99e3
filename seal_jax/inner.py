"""The inner loop: many short LoRA fine-tunes side by side, as a pure function of arrays.

For every adapter, and whatever shares the step with it:

  for row in its rows:
    loss = -mean log p(row's text);  adapter -= optimizer(learning_rate(step), grad)

A step takes some of the population's adapters, one per lane, the first lanes first (see
self_edit.py). The base is frozen and shared. Learning rate and number of steps are data, so
programs differ only by shape.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seal_jax.lora import take
from seal_jax.models.config import ModelConfig
from seal_jax.models.lora_product import make_chunks, token_lanes
from seal_jax.models.transformer import hidden_states, rope_tables, token_logp
from seal_jax.optim import Optimizer, scheduled_rate
from seal_jax.sharding import RULES
from seal_jax.types import Adapters, InnerBatch, InnerState, Params


def lane_losses(
    config: ModelConfig,
    params: Params,
    adapters: Adapters,
    batch: InnerBatch,
    rope: tuple | None = None,
) -> jax.Array:
    """Return the mean negative log-likelihood f32[U] of each lane's row; 0 for an empty lane.

    Args:
      adapters: U of them, one per lane.
      batch: one step: lanes [U], chunks [n 3], the rest [W T].
    """
    num_lanes, num_tokens = adapters.scale.shape[0], batch.tokens.size
    chunks = make_chunks(batch.chunks, num_tokens)
    hidden, _ = hidden_states(
        config,
        params,
        batch.tokens,
        batch.positions,
        jnp.abs(batch.segments),
        adapters,
        key_segments=batch.segments,  # nobody sees padding, not even itself
        chunks=chunks,
        rope=rope,
    )
    finite = jnp.isfinite(hidden).all(axis=-1)
    hidden = jnp.where(finite[..., None], hidden, 0)[:, :-1]
    targets, weights = batch.tokens[:, 1:], batch.loss_weight[:, 1:]
    logp = token_logp(config, params, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    lane = token_lanes(chunks).reshape(batch.tokens.shape)
    in_lane = (lane[None] == jnp.arange(num_lanes)[:, None, None]).astype(jnp.float32)  # [U W T]
    lost = jnp.einsum("uwt,wt->u", in_lane, (~finite).astype(jnp.float32))
    in_lane = in_lane[:, :, 1:]
    total = jnp.einsum("uwt,wt->u", in_lane, logp.reshape(targets.shape) * weights)
    losses = -total / jnp.maximum(jnp.einsum("uwt,wt->u", in_lane, weights), 1)
    return jnp.where(lost > 0, jnp.nan, losses)


def inner_step(
    config: ModelConfig,
    optimizer: Optimizer,
    schedule: str,
    params: Params,
    state: InnerState,
    batch: InnerBatch,
    rope: tuple | None = None,
) -> tuple[InnerState, jax.Array]:
    """Take one step: lanes [U], chunks [n 3], tokens [W T], learning_rate and num_steps [A].

    Returns:
      The new state, and the losses f32[U] before the step. A lane whose loss or update is not
      finite keeps its adapter and reports NaN.
    """
    lane = jnp.maximum(batch.lanes, 0)
    scale = state.adapters.scale[lane]
    weights = take(state.adapters.weights, lane)

    def total(weights: Params) -> tuple[jax.Array, jax.Array]:
        losses = lane_losses(config, params, Adapters(weights, scale), batch, rope)
        return losses.sum(), losses

    grads, losses = jax.grad(total, has_aux=True)(weights)

    def update_lane(u: jax.Array, carry: tuple) -> tuple:
        (population, opt_states), steps, losses = carry
        a = batch.lanes[u]
        weights, opt_state = take(population, a), take(opt_states, a)
        rate = scheduled_rate(schedule, batch.learning_rate[a], steps[a], batch.num_steps[a])
        updates, new_state = optimizer(rate).update(take(grads, u), opt_state, weights)
        new = jax.tree.map(lambda w, change: w + change.astype(w.dtype), weights, updates)
        finite = jnp.isfinite(losses[u])
        for x in jax.tree.leaves(new):
            finite &= jnp.isfinite(x).all()

        def put(stack: jax.Array, x: jax.Array, old: jax.Array) -> jax.Array:
            return stack.at[a].set(jnp.where(finite, x.astype(old.dtype), old))

        stacks = jax.tree.map(put, (population, opt_states), (new, new_state), (weights, opt_state))
        losses = losses.at[u].set(jnp.where(finite, losses[u], jnp.nan))
        return stacks, steps.at[a].add(1), losses

    # One adapter at a time: nothing but its own numbers is moved, and an empty lane costs nothing.
    used = batch.lanes >= 0
    carry = (state.adapters.weights, state.opt_state), state.step, jnp.where(used, losses, 0.0)
    (weights, opt_state), steps, losses = jax.lax.fori_loop(0, used.sum(), update_lane, carry)
    return InnerState(state.adapters._replace(weights=weights), opt_state, steps), losses


def make_inner_update(
    config: ModelConfig, optimizer: Optimizer, schedule: str = "linear", mesh: Mesh | None = None
) -> Callable[..., tuple[Adapters, list[jax.Array]]]:
    """Return `inner_update(params, adapters, batches) -> adapters, losses`.

    `inner_update` is pure: batches in their order, each one device call that scans over its steps
    with the whole population as (donated) carry. losses[i] is f32[I U] for batches[i], NaN where a
    lane's step was not finite; an empty lane reports 0.

    Args:
      mesh: divides the population over the axis of 'adapter': each part of it trains its own
        adapters on its own shard of the batches (see `pack`), and no part waits for another.
    """

    @jax.jit
    def start(adapters: Adapters) -> InnerState:
        opt_state = jax.vmap(optimizer(jnp.float32(0)).init)(adapters.weights)
        # The caller keeps its adapters, and the steps donate theirs: nothing is shared.
        adapters = jax.tree.map(jnp.copy, adapters)
        return InnerState(adapters, opt_state, jnp.zeros(adapters.scale.shape, jnp.int32))

    def run_steps(params: Params, state: InnerState, batch: InnerBatch):
        step = partial(inner_step, config, optimizer, schedule, params)
        rope = rope_tables(config, batch.positions)

        def take_step(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
            one = InnerBatch(*(x[i] for x in batch[:6]), *batch[6:])
            return step(state, one, jax.tree.map(lambda x: x[i], rope))

        def skip(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
            del i
            return state, jnp.zeros(batch.lanes.shape[1], jnp.float32)

        def body(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
            return jax.lax.cond((batch.lanes[i] >= 0).any(), take_step, skip, state, i)

        return jax.lax.scan(body, state, jnp.arange(batch.lanes.shape[0]))

    run_batch = jax.jit(_on_shards(run_steps, mesh), donate_argnums=1)

    def inner_update(
        params: Params,
        adapters: Adapters,
        batches: Sequence[InnerBatch],
        show: Callable[[int], None] | None = None,
    ) -> tuple[Adapters, list[jax.Array]]:
        state, losses = start(adapters), []
        for batch in batches:
            state, loss = run_batch(params, state, batch)
            losses.append(loss)
            if show is not None:
                num_steps = (jax.device_get(batch.lanes) >= 0).sum()
                jax.block_until_ready(loss)
                show(int(num_steps))
        return state.adapters, losses

    return inner_update


def _on_shards(run_steps: Callable, mesh: Mesh | None) -> Callable:
    """Return `run_steps` as every part of the mesh does it, with its own adapters and lanes."""
    axis = RULES["adapter"]
    if mesh is None or num_shards(mesh) == 1:
        return run_steps

    def on_shard(params: Params, state: InnerState, batch: InnerBatch):
        first = jax.lax.axis_index(axis) * state.step.shape[0]
        lanes = jnp.where(batch.lanes >= 0, batch.lanes - first, -1)
        return run_steps(params, state, batch._replace(lanes=lanes))

    by_adapter = PartitionSpec(axis)
    return jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), by_adapter, _BATCH_SPEC),
        out_specs=(by_adapter, _BATCH_SPEC.lanes),
        axis_names={axis},
        check_vma=False,
    )


_BY_LANE, _BY_ADAPTER = PartitionSpec(None, RULES["adapter"]), PartitionSpec(RULES["adapter"])
_BATCH_SPEC = InnerBatch(*(_BY_LANE,) * 6, _BY_ADAPTER, _BY_ADAPTER)


def num_shards(mesh: Mesh) -> int:
    """Return into how many parts `make_inner_update(mesh=mesh)` divides a population.

    One, where the base is divided too: XLA of JAX 0.12 aborts on a loop that is manual over one
    axis of the mesh and automatic over the others, so there the compiler divides everything.
    """
    size = mesh.shape[RULES["adapter"]]
    return size if size == mesh.size else 1


def batch_sharding(mesh: Mesh) -> InnerBatch:
    """Return where `make_inner_update(mesh=mesh)` wants the arrays of a batch."""
    whole = num_shards(mesh) == 1
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, PartitionSpec() if whole else spec),
        _BATCH_SPEC,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
