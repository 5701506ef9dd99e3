"""The inner loop: many short LoRA fine-tunes side by side, as a pure function of arrays.

For every adapter, and whatever shares the step with it:

  for row in its rows:
    loss = -mean log p(row's text);  adapter -= optimizer(learning_rate(step), grad)

A step takes some of the population's adapters, one per lane, the first lanes first (see
packing.py). The base is frozen and shared. Learning rate and number of steps are data, and the
schedule may be, so programs differ only by shape.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Mesh
from jax.tree_util import Partial

from seal_jax.models.config import ModelConfig
from seal_jax.models.logits import next_token_logp
from seal_jax.models.lora import take
from seal_jax.models.lora_product import Chunks, make_chunks, token_lanes
from seal_jax.models.rope import rope_tables
from seal_jax.models.transformer import Packed, hidden_states
from seal_jax.optim import (
    Optimizer,
    accumulate,
    all_finite,
    evaluation_point,
    has_evaluation_point,
    scheduled_rate,
    update,
)
from seal_jax.sharding import on_shards, place_state, shaped, to_host
from seal_jax.types import Adapters, InnerBatch, InnerSettings, InnerState, Params


def lane_losses(
    config: ModelConfig,
    params: Params,
    adapters: Adapters,
    batch: InnerBatch,
    rope: tuple | None = None,
    dropout: tuple[float, jax.Array] | None = None,
    on_input: Callable | None = None,
) -> jax.Array:
    """Return the mean negative log-likelihood f32[U] of each lane's row; 0 for an empty lane.

    Args:
      adapters: U of them, one per lane.
      batch: one step: lanes [U], chunk_lanes [n], chunk_tokens [n c], the rest [W T].
      rope: see `hidden_states`.
      dropout: how much of an adapter's input to drop, and each lane's key [U] for it.
      on_input: see `Packed`; dropout is one.
    """
    num_lanes, num_tokens = adapters.scale.shape[0], batch.tokens.size
    chunks = make_chunks(batch.chunk_lanes, batch.chunk_tokens, num_tokens)
    hidden, _ = hidden_states(
        config,
        params,
        batch.tokens,
        batch.positions,
        jnp.abs(batch.segments),
        adapters,
        packed=Packed(
            key_segments=batch.segments,  # nobody sees padding, not even itself
            chunks=chunks,
            rope=rope,
            on_input=on_input if dropout is None else Partial(_drop, *dropout, chunks),
        ),
    )
    finite = jnp.isfinite(hidden).all(axis=-1)
    hidden = jnp.where(finite[..., None], hidden, 0)
    logp = next_token_logp(config, params, hidden, batch.tokens, batch.loss_weight)
    weights = batch.loss_weight[:, 1:]
    lane = token_lanes(chunks).reshape(batch.tokens.shape)
    in_lane = (lane[None] == jnp.arange(num_lanes)[:, None, None]).astype(jnp.float32)  # [U W T]
    lost = jnp.einsum("uwt,wt->u", in_lane, (~finite).astype(jnp.float32))
    in_lane = in_lane[:, :, 1:]
    total = jnp.einsum("uwt,wt->u", in_lane, logp * weights)
    losses = -total / jnp.maximum(jnp.einsum("uwt,wt->u", in_lane, weights), 1)
    return jnp.where(lost > 0, jnp.nan, losses)


def _drop(
    rate: jax.Array,
    keys: jax.Array,
    chunks: Chunks,
    x: jax.Array,
    name: jax.Array,
    probe: None,
) -> jax.Array:
    """Drop `rate` of x [M D], and scale up the rest.

    What is dropped of a token depends on its adapter's key, its place in the row and the map's
    name, so not on what else is in the step.
    """
    del probe
    first = jnp.where(chunks.in_use[:, 0, 0], chunks.token[:, 0], x.shape[0])
    start = jnp.full(keys.shape, x.shape[0]).at[chunks.lane].min(first)
    lane = jnp.maximum(token_lanes(chunks), 0)

    def keep(key: jax.Array, place: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, place), name)
        return jax.random.bernoulli(key, 1.0 - rate, x.shape[1:])

    kept = jax.vmap(keep)(keys[lane], jnp.arange(x.shape[0]) - start[lane])
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), 0)


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


def inner_setup(
    config: ModelConfig, optimizer: Optimizer, inner: InnerSettings, mesh: Mesh
) -> InnerSetup:
    """Return what the config's inner section says of the loop."""
    config = dataclasses.replace(config, remat=inner.remat)
    steps = inner.warmup_steps, inner.dropout, inner.accumulation
    return InnerSetup(config, optimizer, inner.schedule, mesh, *steps)


class Carry(NamedTuple):
    """What a step's lanes change, one after the other."""

    weights: Params  # of the population, as all but the losses
    opt_state: Any
    steps: jax.Array
    losses: jax.Array  # f32[U]


def inner_step(
    setup: InnerSetup,
    params: Params,
    state: InnerState,
    batch: InnerBatch,
    rope: tuple | None = None,
) -> tuple[InnerState, jax.Array]:
    """Take one step: a batch of lanes [U], tokens [W T], learning_rate, num_steps, seed [A].

    Returns:
      The new state, and the losses f32[U] before the step. A lane whose loss or update is not
      finite keeps its adapter and reports NaN.
    """
    grads, losses = lane_gradients(setup, params, state, batch, rope)
    used = batch.lanes >= 0
    losses = jnp.where(used, losses, 0.0)
    carry = Carry(state.adapters.weights, state.opt_state, state.step, losses)
    update_one = partial(update_lane, setup, batch, grads)
    # One adapter at a time: nothing but its own numbers is moved, and an empty lane costs nothing.
    with jax.named_scope("optimizer"):
        new = jax.lax.fori_loop(0, used.sum(), update_one, carry)
    adapters = state.adapters._replace(weights=new.weights)
    return InnerState(adapters, new.opt_state, new.steps), new.losses


def lane_gradients(
    setup: InnerSetup, params: Params, state: InnerState, batch: InnerBatch, rope: tuple | None
) -> tuple[Params, jax.Array]:
    """Return the gradient [U ...] of each lane's loss by its adapter, and the losses f32[U]."""
    config, lane = setup.config, jnp.maximum(batch.lanes, 0)
    scale = state.adapters.scale[lane]
    with jax.named_scope("take_lanes"):
        # Layer by layer: what the model takes, and its gradients, need no stacks of their own.
        leaves, treedef = jax.tree.flatten(state.adapters.weights)
        layers = range(config.num_layers)
        weights = tuple(treedef.unflatten([x[lane, i] for x in leaves]) for i in layers)

    drop = None
    if setup.dropout > 0:
        key_of = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))
        drop = setup.dropout, key_of(batch.seed[lane], state.step[lane])

    def total(weights: Any) -> tuple[jax.Array, jax.Array]:
        losses = lane_losses(config, params, Adapters(weights, scale), batch, rope, drop)
        return losses.sum(), losses

    grads, losses = jax.grad(total, has_aux=True)(weights)
    with jax.named_scope("stack_grads"):
        return jax.tree.map(lambda *layers: jnp.stack(layers, axis=1), *grads), losses


def update_lane(
    setup: InnerSetup, batch: InnerBatch, grads: Params, u: jax.Array, carry: Carry
) -> Carry:
    """Update the adapter that takes lane `u`."""
    a = batch.lanes[u]
    weights, opt_state = take(carry.weights, a), take(carry.opt_state, a)
    accumulation = setup.accumulation
    num_updates = -(-batch.num_steps[a] // accumulation)
    done = carry.steps[a] // accumulation
    schedule = setup.schedule if batch.schedule is None else batch.schedule[a]
    rate = scheduled_rate(schedule, batch.learning_rate[a], done, num_updates, setup.warmup_steps)
    steps = carry.steps[a] + 1
    ends = (steps % accumulation == 0) | (steps == batch.num_steps[a])
    tx = accumulate(setup.optimizer(rate), accumulation, ends)
    updates, new_state = update(tx, take(grads, u), opt_state, weights, carry.losses[u])
    new = jax.tree.map(lambda w, change: w + change.astype(w.dtype), weights, updates)
    finite = all_finite(new)
    if accumulation == 1:  # else the step may still end a group
        finite &= jnp.isfinite(carry.losses[u])

    # A branch: a choice between new and old would read and write both.
    stacks = jax.lax.cond(
        finite,
        lambda stacks, ones: jax.tree.map(partial(_put_at, a), stacks, ones),
        lambda stacks, _: stacks,
        (carry.weights, carry.opt_state),
        (new, new_state),
    )
    losses = carry.losses.at[u].set(jnp.where(finite, carry.losses[u], jnp.nan))
    return Carry(*stacks, carry.steps.at[a].add(1), losses)


def _put_at(index: jax.Array, stack: jax.Array, one: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, one.astype(stack.dtype), index, 0)


def run_steps(
    setup: InnerSetup, params: Params, state: InnerState, batch: InnerBatch
) -> tuple[InnerState, jax.Array]:
    """Take all steps of a batch but the empty ones; return the state, and losses f32[I U]."""
    rope = rope_tables(setup.config, batch.positions)

    def take_step(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
        one, one_rope = batch.map_steps(lambda x: x[i]), jax.tree.map(lambda x: x[i], rope)
        return inner_step(setup, params, state, one, one_rope)

    def skip(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
        del i
        return state, jnp.zeros(batch.lanes.shape[1], jnp.float32)

    def body(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
        return jax.lax.cond((batch.lanes[i] >= 0).any(), take_step, skip, state, i)

    return jax.lax.scan(body, state, jnp.arange(batch.lanes.shape[0]))


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


# (params, adapters, batches, show=None) -> adapters, losses; see make_inner_update
InnerUpdate = Callable[..., tuple[Adapters, list[jax.Array]]]
# The device call in it, to count its memory and operations; takes ShapeDtypeStructs, too.
Trace = Callable[[Params, Adapters, InnerBatch], jax.stages.Traced]


class InnerLoop(NamedTuple):
    """What trains adapters, and what it is made of."""

    setup: InnerSetup
    update: InnerUpdate
    trace: Trace


class _Programs(NamedTuple):
    """The jitted functions of a loop."""

    start: jax.stages.Wrapped
    run: jax.stages.Wrapped
    # Compiler options are of a whole program: within a caller's own, JAX refuses them.
    run_within: jax.stages.Wrapped
    end: jax.stages.Wrapped


def make_inner_loop(setup: InnerSetup) -> InnerLoop:
    """Return the inner loop, as `make_inner_update` describes it."""
    run = on_shards(partial(run_steps, setup), setup.mesh, setup.config.rules)
    programs = _Programs(
        jax.jit(partial(start_state, setup)),
        jax.jit(run, donate_argnums=1, compiler_options=_compiler_options(setup.mesh)),
        jax.jit(run),
        jax.jit(partial(evaluated, setup), donate_argnums=0),
    )
    return InnerLoop(setup, partial(_update, programs), partial(_trace, programs))


def make_inner_update(
    config: ModelConfig,
    optimizer: Optimizer,
    schedule: str = "linear",
    mesh: Mesh | None = None,
    *,
    warmup_steps: int = 0,
    dropout: float = 0.0,
    accumulation: int = 1,
) -> InnerUpdate:
    """Return `inner_update(params, adapters, batches) -> adapters, losses`.

    `inner_update` is pure: batches in their order, each one device call that scans over its steps
    with the whole population as (donated) carry. losses[i] is f32[I U] for batches[i], NaN where a
    lane's step was not finite; an empty lane reports 0.

    The arguments are the fields of `InnerSetup`.
    """
    steps = warmup_steps, dropout, accumulation
    return make_inner_loop(InnerSetup(config, optimizer, schedule, mesh, *steps)).update


def _update(
    programs: _Programs,
    params: Params,
    adapters: Adapters,
    batches: Sequence[InnerBatch],
    show: Callable[[int], None] | None = None,
) -> tuple[Adapters, list[jax.Array]]:
    """Train the adapters; `show` is told after each batch how many rows of jobs it has trained."""
    if not batches:
        return adapters, []
    state, losses = programs.start(adapters, batches[0].learning_rate), []
    is_traced = isinstance(state.step, Tracer)
    run = programs.run_within if is_traced else programs.run
    for batch in batches:
        state, loss = run(params, state, batch)
        losses.append(loss)
        if show is not None:
            num_steps = (to_host(batch.lanes) >= 0).sum()
            jax.block_until_ready(loss)
            show(int(num_steps))
    if has_evaluation_point(state.opt_state):
        return programs.end(state.adapters, state.opt_state), losses
    return state.adapters, losses


def _trace(
    programs: _Programs, params: Params, adapters: Adapters, batch: InnerBatch
) -> jax.stages.Traced:
    given = adapters, batch.learning_rate
    shardings = programs.start.lower(*given).compile().output_shardings
    state = shaped(jax.eval_shape(programs.start, *given), shardings)
    return programs.run.trace(params, state, batch)


def _compiler_options(mesh: Mesh | None) -> dict[str, str | bool] | None:
    """Return what the compiler is told of the steps.

    For TPUs, to give an operation more of the fast memory: products then have room for larger
    tiles. For GPUs, to see that a branch may write into the population where it lies; else JAX
    before 0.11 copies all of the population twice for every lane of every step.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.device_kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        return {"xla_tpu_scoped_vmem_limit_kib": f"{52 * 1024}"}
    if device.platform in ("gpu", "cuda") and jax.__version_info__ < (0, 11):
        return {"xla_gpu_copy_insertion_use_region_analysis": True}
    return None
