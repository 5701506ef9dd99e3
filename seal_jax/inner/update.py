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
from jax.tree_util import Partial

from seal_jax.models.config import ModelConfig
from seal_jax.models.logits import next_token_logp
from seal_jax.models.lora import take
from seal_jax.models.lora_product import Chunks, make_chunks, token_lanes
from seal_jax.models.rope import rope_tables
from seal_jax.models.transformer import Packed, hidden_states
from seal_jax.optim import Optimizer, accumulate, scheduled_rate
from seal_jax.sharding import PARAM_AXES, leading, mesh_axes, num_parts, to_host
from seal_jax.types import Adapters, InnerBatch, InnerState, ParamRules, Params


def lane_losses(
    config: ModelConfig,
    params: Params,
    adapters: Adapters,
    batch: InnerBatch,
    rope: tuple | None = None,
    dropout: tuple[float, jax.Array] | None = None,
) -> jax.Array:
    """Return the mean negative log-likelihood f32[U] of each lane's row; 0 for an empty lane.

    Args:
      adapters: U of them, one per lane.
      batch: one step: lanes [U], chunk_lanes [n], chunk_tokens [n c], the rest [W T].
      rope: see `hidden_states`.
      dropout: how much of an adapter's input to drop, and each lane's key [U] for it.
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
            dropout=None if dropout is None else Partial(_drop, *dropout, chunks),
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
) -> jax.Array:
    """Drop `rate` of x [M D], and scale up the rest.

    What is dropped of a token depends on its adapter's key, its place in the row and the map's
    name, so not on what else is in the step.
    """
    first = jnp.where(chunks.in_use[:, 0, 0], chunks.token[:, 0], x.shape[0])
    start = jnp.full(keys.shape, x.shape[0]).at[chunks.lane].min(first)
    lane = jnp.maximum(token_lanes(chunks), 0)

    def keep(key: jax.Array, place: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, place), name)
        return jax.random.bernoulli(key, 1.0 - rate, x.shape[1:])

    kept = jax.vmap(keep)(keys[lane], jnp.arange(x.shape[0]) - start[lane])
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), 0)


def inner_step(
    config: ModelConfig,
    optimizer: Optimizer,
    schedule: str,
    params: Params,
    state: InnerState,
    batch: InnerBatch,
    rope: tuple | None = None,
    *,
    warmup_steps: int = 0,
    dropout: float = 0.0,
    accumulation: int = 1,
) -> tuple[InnerState, jax.Array]:
    """Take one step: a batch of lanes [U], tokens [W T], learning_rate, num_steps, seed [A].

    Returns:
      The new state, and the losses f32[U] before the step. A lane whose loss or update is not
      finite keeps its adapter and reports NaN.
    """
    lane = jnp.maximum(batch.lanes, 0)
    scale = state.adapters.scale[lane]
    with jax.named_scope("take_lanes"):
        # Layer by layer: what the model takes, and its gradients, need no stacks of their own.
        leaves, treedef = jax.tree.flatten(state.adapters.weights)
        layers = range(config.num_layers)
        weights = tuple(treedef.unflatten([x[lane, i] for x in leaves]) for i in layers)

    drop = None
    if dropout > 0:
        key_of = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))
        drop = dropout, key_of(batch.seed[lane], state.step[lane])

    def total(weights: Params) -> tuple[jax.Array, jax.Array]:
        losses = lane_losses(config, params, Adapters(weights, scale), batch, rope, drop)
        return losses.sum(), losses

    grads, losses = jax.grad(total, has_aux=True)(weights)
    with jax.named_scope("stack_grads"):
        grads = jax.tree.map(lambda *layers: jnp.stack(layers, axis=1), *grads)

    def update_lane(u: jax.Array, carry: tuple) -> tuple:
        (population, opt_states), steps, losses = carry
        a = batch.lanes[u]
        weights, opt_state = take(population, a), take(opt_states, a)
        num_updates = -(-batch.num_steps[a] // accumulation)
        done = steps[a] // accumulation
        rate = scheduled_rate(schedule, batch.learning_rate[a], done, num_updates, warmup_steps)
        tx = accumulate(optimizer(rate), accumulation, batch.num_steps[a])
        updates, new_state = tx.update(take(grads, u), opt_state, weights)
        new = jax.tree.map(lambda w, change: w + change.astype(w.dtype), weights, updates)
        finite = jnp.isfinite(losses[u])
        for x in jax.tree.leaves(new):
            finite &= jnp.isfinite(x).all()

        def put(stacks: tuple, ones: tuple) -> tuple:
            return jax.tree.map(partial(_put_at, a), stacks, ones)

        # A branch: a choice between new and old would read and write both.
        stacks = (population, opt_states)
        stacks = jax.lax.cond(finite, put, lambda stacks, _: stacks, stacks, (new, new_state))
        losses = losses.at[u].set(jnp.where(finite, losses[u], jnp.nan))
        return stacks, steps.at[a].add(1), losses

    # One adapter at a time: nothing but its own numbers is moved, and an empty lane costs nothing.
    used = batch.lanes >= 0
    carry = (state.adapters.weights, state.opt_state), state.step, jnp.where(used, losses, 0.0)
    with jax.named_scope("optimizer"):
        (weights, opt_state), steps, losses = jax.lax.fori_loop(0, used.sum(), update_lane, carry)
    return InnerState(state.adapters._replace(weights=weights), opt_state, steps), losses


def _put_at(index: jax.Array, stack: jax.Array, one: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, one.astype(stack.dtype), index, 0)


def make_inner_update(
    config: ModelConfig,
    optimizer: Optimizer,
    schedule: str = "linear",
    mesh: Mesh | None = None,
    *,
    warmup_steps: int = 0,
    dropout: float = 0.0,
    accumulation: int = 1,
) -> Callable[..., tuple[Adapters, list[jax.Array]]]:
    """Return `inner_update(params, adapters, batches) -> adapters, losses`.

    `inner_update` is pure: batches in their order, each one device call that scans over its steps
    with the whole population as (donated) carry. losses[i] is f32[I U] for batches[i], NaN where a
    lane's step was not finite; an empty lane reports 0.

    Args:
      mesh: divides the population over the axis of 'adapter': each part of it trains its own
        adapters on its own shard of the batches (see `pack`), and no part waits for another.
      warmup_steps: updates in which the learning rate rises from 0.
      dropout: the share of an adapter's inputs that is dropped in training.
      accumulation: the steps whose gradients' mean makes one update; what is left at the end of a
        run makes one too.
    """

    def place(state: InnerState) -> InnerState:
        """Keep the state divided as the adapters are: else it is copied whole, or not donated."""
        if mesh is None:
            return state
        where = leading(mesh, "adapter", state.step.shape[0], config.rules)
        return jax.lax.with_sharding_constraint(state, where)

    @jax.jit
    def start(adapters: Adapters) -> InnerState:
        tx = accumulate(optimizer(jnp.float32(0)), accumulation, 1)
        opt_state = jax.vmap(tx.init)(adapters.weights)
        # The caller keeps its adapters, and the steps donate theirs: nothing is shared.
        adapters = jax.tree.map(jnp.copy, adapters)
        state = InnerState(adapters, opt_state, jnp.zeros(adapters.scale.shape, jnp.int32))
        return place(state)  # zeros depend on no argument: jit would put all on every device

    def run_steps(params: Params, state: InnerState, batch: InnerBatch):
        step = partial(
            inner_step,
            config,
            optimizer,
            schedule,
            params,
            warmup_steps=warmup_steps,
            dropout=dropout,
            accumulation=accumulation,
        )
        rope = rope_tables(config, batch.positions)

        def take_step(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
            one = InnerBatch(*(x[i] for x in batch[:7]), *batch[7:])
            return step(state, one, jax.tree.map(lambda x: x[i], rope))

        def skip(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
            del i
            return state, jnp.zeros(batch.lanes.shape[1], jnp.float32)

        def body(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
            return jax.lax.cond((batch.lanes[i] >= 0).any(), take_step, skip, state, i)

        return jax.lax.scan(body, state, jnp.arange(batch.lanes.shape[0]))

    def run(params: Params, state: InnerState, batch: InnerBatch):
        state, losses = _on_shards(run_steps, mesh, config.rules)(params, state, batch)
        return place(state), losses

    run_batch = jax.jit(run, donate_argnums=1, compiler_options=_compiler_options(mesh))
    # Compiler options are of a whole program: within a caller's own, JAX refuses them.
    run_batch_within = jax.jit(run)

    def inner_update(
        params: Params,
        adapters: Adapters,
        batches: Sequence[InnerBatch],
        show: Callable[[int], None] | None = None,
    ) -> tuple[Adapters, list[jax.Array]]:
        state, losses = start(adapters), []
        is_traced = isinstance(state.step, jax.core.Tracer)
        for batch in batches:
            state, loss = (run_batch_within if is_traced else run_batch)(params, state, batch)
            losses.append(loss)
            if show is not None:
                num_steps = (to_host(batch.lanes) >= 0).sum()
                jax.block_until_ready(loss)
                show(int(num_steps))
        return state.adapters, losses

    def trace_batch(params: Params, adapters: Adapters, batch: InnerBatch) -> jax.stages.Traced:
        """Trace the device call that `inner_update` makes; arguments may be ShapeDtypeStructs."""
        shardings = start.lower(adapters).compile().output_shardings
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(start, adapters),
            shardings,
        )
        return run_batch.trace(params, state, batch)

    inner_update.trace_batch = trace_batch  # to count its memory and operations
    return inner_update


def _compiler_options(mesh: Mesh | None) -> dict[str, str | bool] | None:
    """Return what the compiler is told of the steps.

    For TPUs, to give an operation more of the fast memory: products then have room for larger
    tiles, which is 4 % of a step on a v6e and a v5p, 1 % on a v5e, by the compiler's own model
    (libtpu 0.0.42.1). It has 32 of 128 MiB by itself on a v6e.

    For GPUs, to see that a branch may write into the population where it lies. That of JAX 0.10
    does not look, and copies all of the population twice for every lane of every step.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.device_kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        return {"xla_tpu_scoped_vmem_limit_kib": f"{52 * 1024}"}
    if device.platform in ("gpu", "cuda") and jax.__version_info__ < (0, 11):
        return {"xla_gpu_copy_insertion_use_region_analysis": True}
    return None


def _on_shards(run_steps: Callable, mesh: Mesh | None, rules: ParamRules) -> Callable:
    """Return `run_steps` as every part of the mesh does it, with its own adapters and lanes."""
    if mesh is None or num_shards(mesh, rules) == 1:
        return run_steps
    axes = mesh_axes("adapter", rules)

    def on_shard(params: Params, state: InnerState, batch: InnerBatch):
        first = jax.lax.axis_index(axes) * state.step.shape[0]
        lanes = jnp.where(batch.lanes >= 0, batch.lanes - first, -1)
        return run_steps(params, state, batch._replace(lanes=lanes))

    by_adapter, by_batch = PartitionSpec(axes), _batch_specs(axes)
    return jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), by_adapter, by_batch),
        out_specs=(by_adapter, by_batch.lanes),
        axis_names=set(axes),
        check_vma=False,
    )


def _batch_specs(axes: tuple[str, ...]) -> InnerBatch:
    """Return how the arrays of a batch are divided over axes of the mesh."""
    by_lane, by_adapter = PartitionSpec(None, axes), PartitionSpec(axes)
    return InnerBatch(*(by_lane,) * 7, *(by_adapter,) * 3)


def num_shards(mesh: Mesh, rules: ParamRules = ()) -> int:
    """Return into how many parts `make_inner_update(mesh=mesh)` divides a population.

    One, where the axes that divide it divide the base too. Over other axes the parts stay apart:
    the chips that share a base talk with each other, and with nobody else.
    """
    axes = {axis for name in PARAM_AXES for axis in mesh_axes(name, rules) if mesh.shape[axis] > 1}
    apart = axes.isdisjoint(mesh_axes("adapter", rules))
    return num_parts(mesh, "adapter", rules) if apart else 1


def batch_sharding(mesh: Mesh, rules: ParamRules = ()) -> InnerBatch:
    """Return where `make_inner_update(mesh=mesh)` wants the arrays of a batch."""
    axes = () if num_shards(mesh, rules) == 1 else mesh_axes("adapter", rules)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec if axes else PartitionSpec()),
        _batch_specs(axes),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
