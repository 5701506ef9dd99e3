"""The device programs of a run, made from shapes alone: nothing is loaded, and nothing runs.

They are the jitted functions that the run calls itself, lowered with its largest shapes. What a run
learns from its data is assumed: see Lengths.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from seal_jax.config.setup import row_tokens
from seal_jax.inner.packing import empty_batch
from seal_jax.inner.population import adapter_bytes, largest_shapes
from seal_jax.inner.steps import LONGEST
from seal_jax.inner.teachers import Reading, longest_row, score_tokens
from seal_jax.inner.update import inner_setup, make_inner_loop
from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.models.model import Model
from seal_jax.models.padded_lengths import bucket_of
from seal_jax.models.quantize import quantize_params
from seal_jax.models.transformer import init_params
from seal_jax.objectives import make_objective
from seal_jax.optim import optimizer_of
from seal_jax.outer.answers import score_rows
from seal_jax.outer.policy_step import (
    Penalties,
    PolicySetup,
    TrainRows,
    state_shapes,
    train_step,
    update_settings,
)
from seal_jax.sampling import decode
from seal_jax.sharding import (
    batch_sharding,
    leading,
    num_parts,
    num_shards,
    param_shardings,
    replicated,
    shaped,
    tree_bytes,
)
from seal_jax.tasks import TASKS
from seal_jax.tasks.task import asks_once
from seal_jax.types import Adapters, InnerBatch, OuterSettings, Params, Settings, TrainState

Shape = jax.ShapeDtypeStruct
_POLICY_KIND = ("update", "rank", "alpha", "targets")


class Lengths(NamedTuple):
    """What the data decide, in tokens: guesses, where there are no data at hand."""

    passage: int = 256  # on average
    longest_passage: int = 768
    question: int = 64  # with the prompt around it
    num_questions: int = 5  # of a passage


class Program(NamedTuple):
    """One program and how to make it."""

    name: str
    trace: Callable[[], jax.stages.Traced]
    size: int  # of what the config bounds: adapters, rows
    key: str  # which key of the config bounds it
    loops: int = 1  # how often a loop runs whose count is data
    steps: int = 1  # of what is counted, in one call
    each: int = 0  # bytes on a device that one more of it takes; 0: its share of the program's own


def model_shapes(settings: Settings, model: ModelConfig, mesh: Mesh) -> Model:
    """Return the policy as ShapeDtypeStructs with their shardings, without a tokenizer."""
    rules = settings.rules
    model = dataclasses.replace(model, attention=settings.model.attention, rules=rules)
    dtype = settings.model.dtype
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), dtype))
    params = shaped(params, param_shardings(mesh, params, rules))
    return Model(model, params, None)  # ty: ignore[invalid-argument-type]  # shapes have no text


def programs(settings: Settings, model: Model, mesh: Mesh, lengths: Lengths) -> Iterator[Program]:
    """Yield the programs of a run in the order in which it calls them."""
    yield from _writing(settings, model, mesh, lengths)
    base = jax.eval_shape(partial(quantize_params, word=settings.inner.quantize), model.params)
    base = shaped(base, param_shardings(mesh, base, model.config.rules))
    if settings.inner.num_taught:
        yield _teaching(settings, model, base, mesh, lengths)
    yield _inner_step(settings, model, base, mesh, lengths)
    asked_once = asks_once(TASKS[settings.task["name"]])  # then the final table has log-likelihoods
    if "log_likelihood" in settings.reward.weights or asked_once:
        yield _scoring(settings, model, base, mesh, lengths)
    yield _policy_update(settings, model, mesh, lengths)


def num_adapters(settings: Settings, mesh: Mesh) -> int:
    """Return how many adapters the inner step is compiled for; those that -1 finds are counted."""
    shards = num_parts(mesh, "adapter", settings.rules)
    wanted = settings.inner.max_adapters
    return shards if wanted == -1 else -(-wanted // shards) * shards


def _rows(model: Model, mesh: Mesh, *shape: int, dtype: DTypeLike = jnp.int32) -> Shape:
    where = leading(mesh, "rows", shape[0], model.config.rules)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _everywhere(mesh: Mesh, *shape: int, dtype: DTypeLike = jnp.float32) -> Shape:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))


def _writing(settings: Settings, model: Model, mesh: Mesh, lengths: Lengths) -> Iterator[Program]:
    """Yield prefill and decode of self-edits; answers have shorter caches, and adapters."""
    section = settings.sample
    B = min(section.max_rows, settings.outer.problems_per_step * section.num_edits)
    P, S = -(-B // 4), bucket_of(min(lengths.longest_passage, model.config.max_length))
    prompts = _rows(model, mesh, P, S), _rows(model, mesh, P)
    keep_seen = section.repetition_penalty != 1
    arguments = (model.config, model.params, None, *prompts)
    prefill = partial(decode.prefill.trace, *arguments, mesh=mesh, keep_seen=keep_seen)
    yield Program("prefill", prefill, size=P, key="sample.max_rows")
    dtype = model.params["embed"]["embedding"].dtype
    # Each row with a prompt of its own: as rows are that come and go.
    sizes = (B, B, S, section.most_tokens, section.most_tokens)
    shape = decode.RowsShape(dtype, *sizes, keep_seen=keep_seen)
    rows = decode.rows_shapes(model.config, shape, mesh)
    stop_ids, num_steps = (_everywhere(mesh, *shape, dtype=jnp.int32) for shape in ((2,), ()))
    arguments = (model.config, model.params, None, rows, stop_ids, num_steps)
    yield Program(
        "decode",
        partial(decode.decode.trace, *arguments, mesh=mesh),
        size=B,
        key="sample.max_rows",
        each=-(-tree_bytes(rows) // B),  # the cache above all
    )


def _teaching(
    settings: Settings, model: Model, base: Params, mesh: Mesh, lengths: Lengths
) -> Program:
    """Return the base that reads a passage and as much written behind it."""
    B, longest = settings.answer.max_rows, 2 * lengths.longest_passage
    shape = B, bucket_of(min(longest, longest_row(model.config)))
    tokens = _rows(model, mesh, *shape)
    rows = Reading._make([tokens, tokens, _rows(model, mesh, *shape, dtype=jnp.bool_)])
    score = partial(score_tokens.trace, model.config, base, rows, settings.inner.num_taught)
    return Program("teaching", score, size=B, key="answer.max_rows")


def _adapter_shapes(settings: Settings, model: Model, mesh: Mesh) -> Adapters:
    inner, A = settings.inner, num_adapters(settings, mesh)
    kind = {"rank": inner.rank, "alpha": inner.alpha, "targets": inner.targets}
    init = partial(lora.init_adapters, model.config, **kind)
    adapters = jax.eval_shape(lambda: init(jax.random.split(jax.random.key(0), A)))
    return shaped(adapters, leading(mesh, "adapter", A, model.config.rules))


def _inner_step(
    settings: Settings, model: Model, base: Params, mesh: Mesh, lengths: Lengths
) -> Program:
    inner, A = settings.inner, num_adapters(settings, mesh)
    optimizer = optimizer_of(inner)
    loop = make_inner_loop(inner_setup(model.config, optimizer, inner, mesh))
    adapters = _adapter_shapes(settings, model, mesh)
    longest = row_tokens(settings, lengths.longest_passage, model.config.max_length)
    with jax.set_mesh(mesh):  # for the row lengths of its platform
        shape = largest_shapes(longest, inner.tokens_per_step)[-1]
    shards = num_shards(mesh, model.config.rules)
    batch = empty_batch(shape, A, inner.steps_per_call, shards, num_taught=inner.num_taught)
    batch = shaped(batch, batch_sharding(mesh, model.config.rules))
    each = adapter_bytes(adapters, loop.setup)
    return Program(
        "inner step",
        partial(loop.trace, base, adapters, InnerBatch(*batch)),
        size=A,
        key="inner.max_adapters",
        loops=batch.lanes.shape[1] // shards,
        steps=inner.steps_per_call,
        each=each * num_parts(mesh, "adapter", model.config.rules) // A,
    )


def _scoring(
    settings: Settings, model: Model, base: Params, mesh: Mesh, lengths: Lengths
) -> Program:
    """Return the likelihood of the right answers, asked of every adapter in flight.

    As in `mean_logp` there are `answer.max_rows` rows at once, or one of every adapter.
    """
    A, adapters = num_adapters(settings, mesh), _adapter_shapes(settings, model, mesh)
    each = min(lengths.num_questions, max(1, settings.answer.max_rows // A))
    shape = (A * each, bucket_of(lengths.question + settings.answer.max_tokens))
    tokens = _rows(model, mesh, *shape)
    arrays = tokens, tokens, _rows(model, mesh, *shape, dtype=jnp.bool_)
    score = partial(score_rows.trace, model.config, base, adapters, *arrays)
    size = max(1, A * each // lengths.num_questions)  # adapters that a call is the whole exam of
    return Program("scoring", score, size=size, key="inner.max_adapters")


def _policy_update(settings: Settings, model: Model, mesh: Mesh, lengths: Lengths) -> Program:
    """Return one batch of the policy's training."""
    outer = settings.outer
    objective = make_objective(outer.objective, **outer.objective_kwargs)
    optimizer = optimizer_of(outer)
    config = dataclasses.replace(model.config, remat=outer.remat)
    setup = PolicySetup(config, objective, optimizer, update_settings(outer), mesh, seed=0)
    kind = {name: getattr(outer, name) for name in _POLICY_KIND}
    has_values = objective.gae is not None
    state = state_shapes(model.config, model.params, optimizer, value_head=has_values, **kind)
    count = _everywhere(mesh, dtype=jnp.int32)
    arguments = (
        *_trained(outer, model, state, mesh),
        _train_rows(settings, model, mesh, lengths),
        Penalties._make([_everywhere(mesh)] * 2),
        count,
        count,
    )
    step = partial(train_step.trace, setup, *arguments)
    return Program("policy update", step, size=outer.microbatch_size, key="outer.microbatch_size")


def _trained(
    outer: OuterSettings, model: Model, state: TrainState, mesh: Mesh
) -> tuple[Params, Params, Any, Any]:
    """Return the shapes of what is trained, what is not, the optimizer's state and the scale."""
    everywhere = replicated(mesh)
    head = {} if state.value_head is None else {"value": shaped(state.value_head, everywhere)}
    if outer.update == "full":
        where = param_shardings(mesh, state.opt_state, model.config.rules)
        return {**head, "policy": model.params}, {}, shaped(state.opt_state, where), ()
    assert state.adapters is not None
    adapter = jax.eval_shape(partial(lora.take, index=0), state.adapters)
    trained = {**head, "policy": shaped(adapter.weights, everywhere)}
    scale = shaped(state.adapters.scale, everywhere)
    return trained, model.params, shaped(state.opt_state, everywhere), scale


def _train_rows(settings: Settings, model: Model, mesh: Mesh, lengths: Lengths) -> TrainRows:
    m = settings.outer.microbatch_size
    n = -(-settings.outer.batch_size // m)
    T = bucket_of(min(lengths.longest_passage + settings.sample.most_tokens, LONGEST))
    rows = (
        _everywhere(mesh, n, m, T, dtype=jnp.int32),
        _everywhere(mesh, n, m, T, dtype=jnp.bool_),
        *(_everywhere(mesh, n, m, T) for _ in range(5)),
        _everywhere(mesh, n, m),
    )
    return shaped(TrainRows._make(rows), leading(mesh, "batch", m, model.config.rules, before=1))
