"""Optimizers tried on a few numbers, before a model is loaded or a folder is claimed.

What seal_jax/optim.py says of an optimizer cannot be read off a function, so it takes some steps on
a small quadratic: with its learning rate, and with a rate of 0 after the same start.
"""

import json
from collections.abc import Sequence
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
from seal_jax.optim import Optimizer, accumulate, evaluation_point, make_optimizer, nodes_of, update
from seal_jax.types import InnerSettings, OuterSettings, Params, Settings

# Some optimizers move only every so many steps.
_NUM_STEPS = 32
# With a larger rate, one that is good elsewhere may leave the range of numbers here.
_LARGEST_RATE = 0.01
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
    learning_rate: float
    update: str  # 'full', or 'lora'
    targets: tuple[str, ...]
    accumulation: int
    warmup: bool
    has_value_fn: bool


def check_optimizers(settings: Settings) -> None:
    """Refuse optimizers with which a loop would train nothing, or not what they promise.

    Raises:
      ValueError: one names no optimizer of optax, or takes no such arguments; it fails; its updates
        are zero, not finite or the same at any learning rate; it needs what its loop has not.
    """
    inner, outer = settings.inner, settings.outer
    warms_up = inner.warmup_steps > 0
    for case in (
        _case("inner", inner, ("lora", inner.targets, inner.accumulation, warms_up, False)),
        _case("outer", outer, (outer.update, outer.targets, 1, False, True)),
    ):
        _check(case)


def _case(name: str, section: InnerSettings | OuterSettings, rest: tuple) -> _Case:
    optimizer, kwargs = section.optimizer, json.dumps(dict(section.optax_kwargs), sort_keys=True)
    called = f"{name}.optax_name = {section.optax_name!r} with {kwargs}"
    if optimizer is not None:
        called = f"{name}.optimizer = {optimizer.__module__}:{optimizer.__qualname__}"
    rate = min(section.learning_rate, _LARGEST_RATE)
    return _Case(name, called, optimizer, section.optax_name, kwargs, rate, *rest)


@cache
def _check(case: _Case) -> None:
    kwargs = json.loads(case.optax_kwargs)
    try:
        optimizer = make_optimizer(
            optax_name=case.optax_name, optax_kwargs=kwargs, optimizer=case.optimizer
        )
    except ValueError as error:
        raise ValueError(f"{case.section}.{error}") from error
    params = _filled(_full_like()) if case.update == "full" else _adapter_like(case.targets)
    try:
        complaint = _unfit(optimizer, params) or _fault(case, optimizer, params)
    except Exception as error:  # it is anybody's code
        what = str(error).strip().partition("\n")[0]
        raise ValueError(f"{case.called}: it fails: {type(error).__name__}: {what}") from error
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
    moves, finite = _try(case, optimizer, params)
    if not finite[0]:
        return "what it makes of finite gradients is not finite"
    if not moves[0].any():
        return "it trains nothing: all its updates are 0"
    if np.array_equal(moves[0], moves[1]):
        return (
            "the learning rate does not reach its updates: they are the same with"
            f" {case.learning_rate:g} and with 0, so {case.section}.learning_rate and"
            f" {case.section}.schedule have no effect"
        )
    if case.warmup and not finite[1]:
        return (
            "its updates are not finite at a learning rate of 0, with which"
            f" {case.section}.warmup_steps begins"
        )
    return ""


def _try(case: _Case, optimizer: Optimizer, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """Return the updates f32[2 steps n] at the rate and at 0, and whether they are finite."""
    start, goal = params, jax.tree.map(lambda x: -0.5 * x[::-1] if x.ndim else 2 * x, params)

    def loss_of(params: Params) -> jax.Array:
        return 0.5 * optax.tree.norm(optax.tree.sub(params, goal), squared=True)

    def step(rate: jax.Array, carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params)
        tx = accumulate(optimizer(rate), case.accumulation, _NUM_STEPS)
        value_fn = loss_of if case.has_value_fn else None
        updates, new = update(tx, grads, state, params, loss, value_fn)
        new = jax.tree.map(lambda old, x: jnp.asarray(x).astype(old.dtype), state, new)
        params = jax.tree.map(lambda w, u: w + u.astype(w.dtype), params, updates)
        return (params, new), ravel_pytree(updates)[0]

    def run(rate_now: jax.Array, first_rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = accumulate(optimizer(first_rate), case.accumulation, 1).init(start)
        state = jax.tree.map(jnp.asarray, state)
        steps = partial(step, rate_now)
        (params, state), moves = jax.lax.scan(steps, (start, state), None, _NUM_STEPS)
        last, _ = ravel_pytree(evaluation_point(state, params))
        return moves, jnp.isfinite(moves).all() & jnp.isfinite(last).all()

    rates = jnp.float32([case.learning_rate, 0.0])
    both = jax.jit(lambda rates: jax.lax.map(lambda now: run(now, rates[0]), rates))
    moves, finite = both(rates)
    return np.asarray(moves), np.asarray(finite)


def _full_like() -> Params:
    return jax.eval_shape(partial(init_params, _SIZES), jax.random.key(0))


def _adapter_like(targets: Sequence[str]) -> Params:
    sizes = {"rank": 3, "alpha": 3.0, "targets": targets}
    shapes = jax.eval_shape(partial(lora.init_adapter, _SIZES, **sizes), jax.random.key(0))
    return _filled(jax.eval_shape(partial(lora.take, index=0), shapes).weights)


def _filled(shapes: Any) -> Params:
    """Return arrays of these shapes with numbers in [-1, 1], none of them 0."""

    def one(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.sin(1.0 + np.arange(np.prod(shape.shape))).astype(np.float32).reshape(shape.shape)

    return jax.tree.map(one, shapes)
