"""The inner loop: many short LoRA fine-tunes side by side, as a pure function of arrays.

For every adapter, and whatever shares the step with it:

  for row in its rows:
    loss = -mean log p(row's text);  adapter -= optimizer(learning_rate(step), grad)

Texts that have a teacher cost their divergence from it instead; see models/divergence.py.

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

from seal_jax.inner.lane_update import Carry, InnerSetup, evaluated, start_state, update_lane
from seal_jax.models.config import ModelConfig
from seal_jax.models.divergence import next_token_costs
from seal_jax.models.logits import next_token_logp
from seal_jax.models.lora_product import Chunks, make_chunks, token_lanes
from seal_jax.models.rope import rope_tables
from seal_jax.models.transformer import Packed, hidden_states
from seal_jax.optim import KEYWORDS, Optimizer, has_evaluation_point
from seal_jax.sharding import on_shards, shaped, to_host
from seal_jax.types import Adapters, Context, InnerBatch, InnerSettings, InnerState, Params


def lane_losses(
    config: ModelConfig,
    params: Params,
    adapters: Adapters,
    batch: InnerBatch,
    rope: tuple | None = None,
    dropout: tuple[float, jax.Array] | None = None,
    divergence: str = "forward",  # from the teachers of the texts that have one
    on_input: Callable | None = None,
) -> jax.Array:
    """Return the mean cost f32[U] of a token of each lane's row; 0 for an empty lane.

    That is its negative log-likelihood, or the divergence from its teacher.

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
    given = config, params, hidden, batch.tokens, batch.loss_weight
    if batch.teacher is None:
        logp = next_token_logp(*given)
    else:
        finite &= ~jnp.isnan(batch.teacher.logp).any(axis=-1)
        logp = -next_token_costs(*given, batch.teacher, divergence)
    if batch.text_weight is not None:
        logp *= batch.text_weight[:, 1:]
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


def inner_setup(
    config: ModelConfig, optimizer: Optimizer, inner: InnerSettings, mesh: Mesh
) -> InnerSetup:
    """Return what the config's inner section says of the loop."""
    config = dataclasses.replace(config, remat=inner.remat)
    steps = inner.warmup_steps, inner.dropout, inner.accumulation
    return InnerSetup(config, optimizer, inner.schedule, mesh, *steps, inner.divergence)


def inner_step(
    setup: InnerSetup,
    params: Params,
    state: InnerState,
    batch: InnerBatch,
    rope: tuple | None = None,
    context: Context | None = None,
) -> tuple[InnerState, jax.Array]:
    """Take one step: a batch of lanes [U], tokens [W T], learning_rate, num_steps, seed [A].

    Returns:
      The new state, and the losses f32[U] before the step. A lane whose loss or update is not
      finite keeps its adapter and reports NaN; likewise where its reference row is not.
    """
    grads, losses = lane_gradients(setup, params, state, batch, rope)
    used = batch.lanes >= 0
    if batch.references is not None:
        losses, of_references = jnp.split(losses, 2)
        losses = jnp.where(jnp.isfinite(of_references), losses, jnp.nan)
    losses = jnp.where(used, losses, 0.0)
    carry = Carry(state.adapters.weights, state.opt_state, state.step, losses)
    update_one = partial(update_lane, setup, batch, grads, context=context)
    # One adapter at a time: nothing but its own numbers is moved, and an empty lane costs nothing.
    with jax.named_scope("optimizer"):
        new = jax.lax.fori_loop(0, used.sum(), update_one, carry)
    adapters = state.adapters._replace(weights=new.weights)
    return InnerState(adapters, new.opt_state, new.steps), new.losses


def lane_gradients(
    setup: InnerSetup, params: Params, state: InnerState, batch: InnerBatch, rope: tuple | None
) -> tuple[Params, jax.Array]:
    """Return the gradient [U ...] of each lane's loss by its adapter, and the losses f32[U].

    Reference rows have as many lanes more, behind the others.
    """
    config, lane = setup.config, jnp.maximum(batch.lanes, 0)
    if batch.references is not None:
        lane = jnp.concatenate([lane, jnp.maximum(batch.references, 0)])
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
        stack = Adapters(weights, scale)
        losses = lane_losses(config, params, stack, batch, rope, drop, setup.divergence)
        return losses.sum(), losses

    grads, losses = jax.grad(total, has_aux=True)(weights)
    with jax.named_scope("stack_grads"):
        return jax.tree.map(lambda *layers: jnp.stack(layers, axis=1), *grads), losses


def run_steps(
    setup: InnerSetup,
    params: Params,
    state: InnerState,
    batch: InnerBatch,
    context: Context | None = None,
) -> tuple[InnerState, jax.Array]:
    """Take all steps of a batch but the empty ones; return the state, and losses f32[I U]."""
    rope = rope_tables(setup.config, batch.positions)

    def take_step(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
        one, one_rope = batch.map_steps(lambda x: x[i]), jax.tree.map(lambda x: x[i], rope)
        return inner_step(setup, params, state, one, one_rope, context)

    def skip(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
        del i
        return state, jnp.zeros(batch.lanes.shape[1], jnp.float32)

    def body(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
        return jax.lax.cond((batch.lanes[i] >= 0).any(), take_step, skip, state, i)

    return jax.lax.scan(body, state, jnp.arange(batch.lanes.shape[0]))


# (params, adapters, batches, show=None, context=None) -> adapters, losses; see make_inner_update
InnerUpdate = Callable[..., tuple[Adapters, list[jax.Array]]]
# The device call in it, to count its memory and operations; takes ShapeDtypeStructs, too.
Trace = Callable[..., jax.stages.Traced]  # (params, adapters, batch, context=None)


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
    divergence: str = "forward",
) -> InnerUpdate:
    """Return `inner_update(params, adapters, batches) -> adapters, losses`.

    `inner_update` is pure: batches in their order, each one device call that scans over its steps
    with the whole population as (donated) carry. losses[i] is f32[I U] for batches[i], NaN where a
    lane's step was not finite; an empty lane reports 0.

    Its argument `context` is a dict {keyword: pytree, every leaf with a leading [A]}. What it has
    for adapter a is given to each update of it, unchanged, by these keywords (optax's extra
    arguments): to those transformations that take them. With reference rows (`Job.references`) the
    gradient of a step's is given, too, as `memory_grads`. A transformation that asks for a keyword
    that is not there is a TypeError.

    The arguments are the fields of `InnerSetup`.
    """
    steps = warmup_steps, dropout, accumulation
    setup = InnerSetup(config, optimizer, schedule, mesh, *steps, divergence)
    return make_inner_loop(setup).update


def _update(
    programs: _Programs,
    params: Params,
    adapters: Adapters,
    batches: Sequence[InnerBatch],
    show: Callable[[int], None] | None = None,
    context: Context | None = None,
) -> tuple[Adapters, list[jax.Array]]:
    """Train the adapters; `show` is told after each batch how many rows of jobs it has trained."""
    _check_context(context, adapters.scale.shape[0])
    if not batches:
        return adapters, []
    state, losses = programs.start(adapters, batches[0].learning_rate), []
    is_traced = isinstance(state.step, Tracer)
    run = programs.run_within if is_traced else programs.run
    for batch in batches:
        state, loss = run(params, state, batch, context)
        losses.append(loss)
        if show is not None:
            num_steps = (to_host(batch.lanes) >= 0).sum()
            jax.block_until_ready(loss)
            show(int(num_steps))
    if has_evaluation_point(state.opt_state):
        return programs.end(state.adapters, state.opt_state), losses
    return state.adapters, losses


def _check_context(context: Context | None, num_adapters: int) -> None:
    """Refuse what would hide one of optim's keywords, or give an adapter another one's part."""
    if taken := sorted(set(context or {}) & set(KEYWORDS)):
        raise ValueError(f"context has {', '.join(taken)}: the inner loop itself gives these")
    for path, x in jax.tree_util.tree_leaves_with_path(context):
        if jnp.shape(x)[:1] != (num_adapters,):
            raise ValueError(
                f"context{jax.tree_util.keystr(path)} is {jnp.shape(x)}: expected one for each of"
                f" {num_adapters} adapters, along its first axis"
            )


def _trace(
    programs: _Programs,
    params: Params,
    adapters: Adapters,
    batch: InnerBatch,
    context: Context | None = None,
) -> jax.stages.Traced:
    given = adapters, batch.learning_rate
    shardings = programs.start.lower(*given).compile().output_shardings
    state = shaped(jax.eval_shape(programs.start, *given), shardings)
    return programs.run.trace(params, state, batch, context)


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
