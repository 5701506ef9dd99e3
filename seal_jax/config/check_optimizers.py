"""Optimizers tried on a few numbers, before a model is loaded or a folder is claimed.

What seal_jax/optim.py says of an optimizer cannot be read off a function, so it takes some steps on
a small quadratic: with some learning rate, and with a rate of 0 after the same start.
"""

import json
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from optax import contrib

from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.models.transformer import init_params
from seal_jax.objectives import make_objective
from seal_jax.optim import (
    Optimizer,
    OtherShapes,
    accumulate,
    all_finite,
    evaluation_point,
    has_evaluation_point,
    make_optimizer,
    nodes_of,
    optimizer_of,
    update,
)
from seal_jax.outer.policy_step import with_head
from seal_jax.types import InnerSettings, OuterSettings, Params, Settings

# Some optimizers move only every so many steps.
_NUM_STEPS = 128
_RATE = 0.01  # with which any should get down here
_SIZES = ModelConfig(
    vocab_size=8,
    num_layers=2,
    embed_dim=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=6,
    max_length=8,
)


class _Case(NamedTuple):
    """What a loop's optimizer is tried with; hashable."""

    section: str  # 'inner' or 'outer'
    called: str  # the key of the config, and what it holds
    optimizer: Optimizer | None
    optax_name: str
    optax_kwargs: str  # as JSON
    update: str  # 'full', or 'lora'
    targets: tuple[str, ...]
    has_values: bool  # beside what is trained there is a value head
    dtype: str  # of what is trained
    accumulation: int
    most_steps: int  # that one state can see
    warmup: bool
    has_value_fn: bool


def check_optimizers(settings: Settings) -> None:
    """Refuse optimizers with which a loop would train nothing, or not what they promise.

    Raises:
      ValueError: one names no optimizer of optax, or takes no such arguments; it fails; its updates
        are zero, not finite or the same at any learning rate; it needs what its loop has not.
    """
    inner, outer = settings.inner, settings.outer
    rows = outer.problems_per_step * settings.sample.num_edits
    batches = -(-rows // outer.batch_size) * outer.num_epochs
    is_full = outer.update == "full"  # one state for the whole run, else a new one in each step
    objective = make_objective(outer.objective, **outer.objective_kwargs)
    of_inner = _Case(
        *_named("inner", inner),
        update="lora",
        targets=inner.targets,
        has_values=False,
        dtype="float32",
        accumulation=inner.accumulation,
        most_steps=_NUM_STEPS,
        warmup=inner.warmup_steps > 0,
        has_value_fn=False,
    )
    of_outer = _Case(
        *_named("outer", outer),
        update=outer.update,
        targets=outer.targets,
        has_values=objective.gae is not None,
        dtype=settings.model.dtype if is_full else "float32",
        accumulation=1,
        most_steps=_NUM_STEPS if is_full else min(batches, _NUM_STEPS),
        warmup=False,
        has_value_fn=True,
    )
    for case in (of_inner, of_outer):
        _check(case)


def check_updates_are_all(settings: Settings, names: str) -> None:
    """Refuse an optimizer of the inner loop that evaluates other parameters than it updates.

    What projects updates says nothing of those.

    Args:
      names: of the remedies that project.

    Raises:
      ValueError: it is one.
    """
    section = settings.inner
    called, params = _named("inner", section)[1], {"a": _numbers((2, 3))}
    tx = optimizer_of(section)(jnp.float32(_RATE))
    try:
        state = jax.eval_shape(tx.init, params)
    except OtherShapes:
        return  # see `_check`
    if has_evaluation_point(state):
        raise ValueError(
            f"{called}: it evaluates other parameters than it updates, and {names} would project"
            " the updates alone"
        )


def _named(name: str, section: InnerSettings | OuterSettings) -> tuple[Any, ...]:
    """Return the first fields of a `_Case`: which optimizer it is."""
    optimizer, kwargs = section.optimizer, json.dumps(dict(section.optax_kwargs), sort_keys=True)
    called = f"{name}.optax_name = {section.optax_name!r} with {kwargs}"
    if optimizer is not None:
        called = f"{name}.optimizer = {optimizer.__module__}:{optimizer.__qualname__}"
    return name, called, optimizer, section.optax_name, kwargs


@cache
def _check(case: _Case) -> None:
    kwargs = json.loads(case.optax_kwargs)
    try:
        optimizer = make_optimizer(
            optax_name=case.optax_name, optax_kwargs=kwargs, optimizer=case.optimizer
        )
    except ValueError as error:
        raise ValueError(f"{case.section}.{error}") from error
    params = _trained_like(case)
    try:
        complaint = _unfit(optimizer, params) or _fault(case, optimizer, params)
    except OtherShapes:
        return  # it is made for the run's own model: where it does not fit that, the loop says so
    except Exception as error:  # it is anybody's code
        what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if isinstance(error, jax.errors.JAXTypeError):
            what += (
                " The learning rate is traced: the schedule's value now, and no number of Python's."
                f" What it follows is {case.section}.schedule"
            )
        raise ValueError(f"{case.called}: it fails: {what}") from error
    if complaint:
        raise ValueError(f"{case.called}: {complaint}")


def _unfit(optimizer: Optimizer, params: Params) -> str:
    """Say what is wrong that updates do not show; '' if nothing is."""
    state = jax.eval_shape(lambda rate: optimizer(rate).init(params), jnp.float32(0))
    if nodes_of(contrib.SAMState, state):
        return (
            "sharpness-aware minimization leaves the parameters at a worse point in every other"
            " step, and a run may end there"
        )
    if nodes_of(contrib.GaLoreState, state):
        return (
            "GaLore projects arrays of two axes, and ours have the layers as a third: it would"
            " leave them to its base optimizer"
        )
    for node in nodes_of(contrib.MuonState, state):
        if not any(x.ndim > 2 for x in jax.tree.leaves(node.mu)):
            return (
                "Muon takes arrays of two axes for matrices, and ours have the layers as a third:"
                " it would leave them to Adam. Its argument muon_weight_dimension_numbers can be"
                " seal_jax.optim.muon_dimensions"
            )
    return ""


def _fault(case: _Case, optimizer: Optimizer, params: Params) -> str:
    """Say what is wrong with the updates; '' if nothing is."""
    moves, finite, losses = _try(case, optimizer, params)
    if not finite[0]:
        return "what it makes of finite gradients is not finite"
    if not moves[0].any():
        return f"it trains nothing: all its updates are 0, in {_NUM_STEPS} steps"
    if not moves[0, : case.most_steps].any():
        return (
            f"it trains nothing: an outer step makes {case.most_steps} updates at most, each time"
            " from a new state, and so many are 0"
        )
    if np.array_equal(moves[0], moves[1]):
        return (
            "the learning rate does not reach its updates: they are the same with"
            f" {_RATE} and with 0, so {case.section}.learning_rate and"
            f" {case.section}.schedule have no effect"
        )
    if losses[1] > 1.001 * losses[0]:
        return (
            f"it climbs: the loss of a small problem goes from {losses[0]:g} to {losses[1]:g}."
            " Updates are added, so they have to go against the gradient"
        )
    if case.warmup and not finite[1]:
        return (
            "its updates are not finite at a learning rate of 0, with which"
            f" {case.section}.warmup_steps begins"
        )
    return ""


def _try(
    case: _Case, optimizer: Optimizer, params: Params
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return updates f32[2 steps n] at the rate and at 0, whether they are finite, and losses.

    The losses f32[2] are those before and after all steps at the rate.
    """
    start, goal = params, jax.tree.map(lambda x: -0.5 * x[::-1] if x.ndim else 2 * x, params)
    goal = jax.tree.map(lambda x, w: jnp.asarray(x, w.dtype), goal, params)

    def loss_of(params: Params) -> jax.Array:
        return 0.5 * optax.tree.norm(optax.tree.sub(params, goal), squared=True).astype(jnp.float32)

    def step(rate: jax.Array, carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params)
        tx = accumulate(optimizer(rate), case.accumulation, (i + 1) % case.accumulation == 0)
        value_fn = loss_of if case.has_value_fn else None
        updates, new = update(tx, grads, state, params, loss, value_fn)
        new = jax.tree.map(lambda old, x: jnp.asarray(x).astype(old.dtype), state, new)
        params = jax.tree.map(lambda w, u: w + u.astype(w.dtype), params, updates)
        return (params, new), ravel_pytree(updates)[0].astype(jnp.float32)

    def run(rate: jax.Array, first_rate: jax.Array) -> tuple[jax.Array, ...]:
        state = accumulate(optimizer(first_rate), case.accumulation, True).init(start)
        state = jax.tree.map(jnp.asarray, state)
        steps = jnp.arange(_NUM_STEPS)
        (params, state), moves = jax.lax.scan(partial(step, rate), (start, state), steps)
        last = evaluation_point(state, params)
        return moves, jnp.isfinite(moves).all() & all_finite(last), loss_of(last)

    rates = jnp.float32([_RATE, 0.0])
    both = jax.jit(lambda rates: jax.lax.map(lambda now: run(now, rates[0]), rates))
    moves, finite, losses = jax.device_get(both(rates))
    return moves, finite, np.array([loss_of(start), losses[0]])


def _trained_like(case: _Case) -> Params:
    """Return numbers in the shape of what the loop trains, but small."""
    if case.update == "full":
        shapes = jax.eval_shape(partial(init_params, _SIZES), jax.random.key(0))
    else:
        sizes = {"rank": 3, "alpha": 3.0, "targets": case.targets}
        adapter = jax.eval_shape(partial(lora.init_adapter, _SIZES, **sizes), jax.random.key(0))
        shapes = jax.eval_shape(partial(lora.take, index=0), adapter).weights
    params = jax.tree.map(lambda x: _numbers(x.shape).astype(case.dtype), shapes)
    if case.section == "inner":
        return params
    head = {"kernel": _numbers((_SIZES.embed_dim,)), "bias": _numbers(())}
    return with_head(params, head if case.has_values else None)


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers in [-1, 1], none of them 0."""
    return np.sin(1.0 + np.arange(np.prod(shape))).astype(np.float32).reshape(shape)
