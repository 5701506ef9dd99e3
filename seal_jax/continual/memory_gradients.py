"""What remedies ask of a memory of texts: gradients at the current adapters, and inputs.

  of_rows      the gradient of each row's loss by its adapter, for OGD, EWC and A-GEM
  covariances  sum over text tokens of x^T x, x the input of each adapted map, for the null space

A memory is a job for each adapter (see `make_job`, and `pack`, which makes batches of jobs). The
gradient of a text is that of a row with one text; that of the whole memory, of a row with all of
them. Nothing is trained. Both are programs like those of the inner loop, over the same lanes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from seal_jax.continual.given import Maps, zero_maps
from seal_jax.inner.update import InnerSetup, lane_gradients, lane_losses
from seal_jax.models.lora_product import Chunks, make_chunks
from seal_jax.models.rope import rope_tables
from seal_jax.sharding import on_shards, place_state, to_host
from seal_jax.types import Adapters, Context, InnerBatch, InnerState, Params

# (setup, params, state, one step, its rope) -> state; the state's `opt_state` is what is found
_Look = Callable[[InnerSetup, Params, InnerState, InnerBatch, tuple], InnerState]


class MemoryGradients(NamedTuple):
    """What looks at a memory; see `make_memory_gradients`."""

    of_rows: Callable[..., tuple[Params, jax.Array]]
    covariances: Callable[..., Maps]


def make_memory_gradients(setup: InnerSetup) -> MemoryGradients:
    """Return two functions of (params, adapters, batches); `setup` is the inner loop's.

    of_rows(params, adapters, batches, num_rows) -> the gradients [A num_rows ...] of each job's
      rows, in their order, and the losses f32[A num_rows]. A row that a job does not have has
      gradient 0 and loss NaN; of one that is not finite it is NaN, too. Without dropout.
    covariances(params, adapters, batches) -> {block: {target: f32[A L D D]}}, of texts without
      their padding.
    """
    setup = setup._replace(dropout=0.0)
    rows, inputs = (
        jax.jit(on_shards(partial(_all_steps, look, setup), setup.mesh, setup.config.rules))
        for look in (_look_at_rows, _look_at_inputs)
    )

    def of_rows(
        params: Params, adapters: Adapters, batches: Sequence[InnerBatch], num_rows: int
    ) -> tuple[Params, jax.Array]:
        longest = max((int(to_host(batch.num_steps).max()) for batch in batches), default=0)
        if longest > num_rows:
            raise ValueError(f"a memory of {longest} rows, expected at most {num_rows}")
        return _look(setup, rows, params, _no_rows(adapters, num_rows), batches)

    def covariances(params: Params, adapters: Adapters, batches: Sequence[InnerBatch]) -> Maps:
        return _look(setup, inputs, params, _no_inputs(adapters), batches)

    return MemoryGradients(of_rows, covariances)


def _look(
    setup: InnerSetup,
    run: Callable,
    params: Params,
    state: InnerState,
    batches: Sequence[InnerBatch],
) -> Any:
    state = place_state(state, setup.mesh, setup.config.rules)
    for batch in batches:
        state, _ = run(params, state, batch)
    return state.opt_state


# Compiled, as a run allows no number of the host's to slip onto the devices.
@partial(jax.jit, static_argnums=1)
def _no_rows(adapters: Adapters, num_rows: int) -> InnerState:
    num = adapters.scale.shape[0]
    grads = jax.tree.map(
        lambda x: jnp.zeros((num, num_rows, *x.shape[1:]), x.dtype), adapters.weights
    )
    return _begin(adapters, (grads, jnp.full((num, num_rows), jnp.nan)))


@jax.jit
def _no_inputs(adapters: Adapters) -> InnerState:
    return _begin(adapters, zero_maps(adapters.weights))


def _begin(adapters: Adapters, found: Any) -> InnerState:
    return InnerState(adapters, found, jnp.zeros(adapters.scale.shape, jnp.int32))


def _all_steps(
    look: _Look,
    setup: InnerSetup,
    params: Params,
    state: InnerState,
    batch: InnerBatch,
    context: Context | None = None,
) -> tuple[InnerState, jax.Array]:
    """Look at all steps of a batch but the empty ones."""
    del context  # optimizers have one
    rope = rope_tables(setup.config, batch.positions)

    def one_step(state: InnerState, i: jax.Array) -> InnerState:
        one, one_rope = batch.map_steps(lambda x: x[i]), jax.tree.map(lambda x: x[i], rope)
        return look(setup, params, state, one, one_rope)

    def body(state: InnerState, i: jax.Array) -> tuple[InnerState, jax.Array]:
        is_used = (batch.lanes[i] >= 0).any()
        state = jax.lax.cond(is_used, one_step, lambda state, _: state, state, i)
        return state, jnp.zeros(batch.lanes.shape[1])  # one for each lane, as losses of a step are

    return jax.lax.scan(body, state, jnp.arange(batch.lanes.shape[0]))


def _look_at_rows(
    setup: InnerSetup, params: Params, state: InnerState, batch: InnerBatch, rope: tuple
) -> InnerState:
    """Put the gradient and the loss of each lane's row in their place."""
    found = lane_gradients(setup, params, state, batch, rope)
    lane, row = _places(state, batch), state.step[jnp.maximum(batch.lanes, 0)]
    new = jax.tree.map(lambda all, x: all.at[lane, row].set(x, mode="drop"), state.opt_state, found)
    return state._replace(opt_state=new, step=state.step.at[lane].add(1, mode="drop"))


def _look_at_inputs(
    setup: InnerSetup, params: Params, state: InnerState, batch: InnerBatch, rope: tuple
) -> InnerState:
    """Add each lane's x^T x to its adapter's.

    They are read as the gradient of a probe beside each map's `a` and `b`, so that the model has
    no further output. No loss is computed for it: the gradient depends on x alone.
    """
    lanes = jnp.maximum(batch.lanes, 0)
    chunks = make_chunks(batch.chunk_lanes, batch.chunk_tokens, batch.tokens.size)
    on_input = Partial(_watch, chunks, (batch.segments > 0).reshape(-1))
    layers = [
        jax.tree.map(lambda x, i=i: x[lanes, i], state.adapters.weights)
        for i in range(setup.config.num_layers)
    ]

    def total(probes: list[Maps]) -> jax.Array:
        weights: Any = tuple(map(_with_probes, layers, probes))
        adapters = Adapters(weights, state.adapters.scale[lanes])
        losses = lane_losses(setup.config, params, adapters, batch, rope, on_input=on_input)
        return losses.sum()

    squares = jax.grad(total)([zero_maps(weights) for weights in layers])
    squares = jax.tree.map(lambda *layers: jnp.stack(layers, axis=1), *squares)
    lane = _places(state, batch)
    new = jax.tree.map(lambda all, x: all.at[lane].add(x, mode="drop"), state.opt_state, squares)
    return state._replace(opt_state=new)


def _places(state: InnerState, batch: InnerBatch) -> jax.Array:
    """Return the adapter of each lane i32[U]; of an empty one the place behind the last."""
    return jnp.where(batch.lanes >= 0, batch.lanes, state.step.shape[0])


def _with_probes(weights: Params, probes: Maps) -> Params:
    return {
        block: {target: ab | {"probe": probes[block][target]} for target, ab in targets.items()}
        for block, targets in weights.items()
    }


def _watch(
    chunks: Chunks, is_text: jax.Array, x: jax.Array, name: jax.Array, probe: jax.Array
) -> jax.Array:
    del name
    return _watched(x, probe, chunks, is_text)


@jax.custom_vjp
def _watched(x: jax.Array, probe: jax.Array, chunks: Chunks, is_text: jax.Array) -> jax.Array:
    """Return x [M D]; the gradient of probe f32[U D D] is each lane's sum over text of x^T x."""
    del probe, chunks, is_text
    return x


def _watched_backward(saved: tuple, grads: jax.Array) -> tuple:
    x, probe, chunks, is_text = saved
    counts = chunks.in_use & is_text[chunks.token][..., None]  # [n c 1]
    slots = jnp.where(counts, x[chunks.token], 0)
    squares = jnp.einsum(
        "nci,ncj->nij", slots, slots, precision="highest", preferred_element_type=jnp.float32
    )
    # An empty chunk's place is behind the last lane, and dropped.
    lane = jnp.where(chunks.in_use[:, 0, 0], chunks.lane, probe.shape[0])
    return grads, jnp.zeros_like(probe).at[lane].add(squares, mode="drop"), None, None


_watched.defvjp(
    lambda x, probe, chunks, is_text: (x, (x, probe, chunks, is_text)), _watched_backward
)
