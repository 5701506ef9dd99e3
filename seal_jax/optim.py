"""Optimizers by optax name or by function, and what both loops do with them.

An optimizer here is a function `learning_rate -> optax.GradientTransformation`. The learning rate
that it gets is a traced scalar, the schedule's value at this step: a self-edit chooses its own
rate and number of steps, and still a hundred self-edits share one compiled program. Both loops do

  state = optimizer(learning_rate).init(params)  # the rate before schedule and warm-up
  for step:
    tx = optimizer(scheduled_rate(step))
    updates, state = update(tx, grads, state, params, loss)
    params += updates
  params = evaluation_point(state, params)  # and training_point where training goes on

so a transformation gets what it may ask for beside the gradient, rates that it keeps in its state
(`optax.inject_hyperparams`) follow the schedule, and schedule-free training is evaluated where its
authors evaluate it. What does not fit is refused before a run, see config/check_optimizers.py.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from seal_jax.types import InnerSettings, OuterSettings, Params

Optimizer = Callable[[jax.Array], optax.GradientTransformation]
ValueFn = Callable[[Params], jax.Array]  # the loss at other parameters
SCHEDULES = ("constant", "linear", "cosine")
# What a transformation may ask for as an extra argument of its update: the loss, its gradient, the
# loss elsewhere, and the gradient of a reference row, where a step has one (see `Job.references`).
KEYWORDS = ("value", "grad", "value_fn", "memory_grads")


class OtherShapes(TypeError):
    """What an optimizer closes over belongs to parameters of other shapes than it is given."""


# Nodes of an optimizer's state that hold rates, and that hold another point to evaluate.
_INJECTED = optax.InjectHyperparamsState, optax.schedules.InjectStatefulHyperparamsState
_AVERAGED = optax.contrib.ScheduleFreeState


def update(
    tx: optax.GradientTransformation,
    grads: Params,
    state: optax.OptState,
    params: Params,
    loss: jax.Array,
    value_fn: ValueFn | None = None,
    context: Mapping[str, Any] | None = None,
) -> tuple[Params, optax.OptState]:
    """Return the updates, which are to be added, and the new state.

    Args:
      loss: f32[], whose gradient `grads` is. Transformations that ask for `value` get it.
      value_fn: what a line search asks; without it one that does is a TypeError.
      context: what else transformations may ask for, by keyword, none of KEYWORDS.

    Raises:
      TypeError: updates have other shapes than the parameters; a transformation asks for something
        that is not there.
    """
    if nodes_of(_INJECTED, state):
        state = _with_rates(state, tx.init(params))
    asked = {"value": loss, "grad": grads, "value_fn": value_fn or _no_value_fn}
    takes_all: Any = optax.with_extra_args_support(tx).update
    updates, state = takes_all(grads, state, params, **asked, **(context or {}))
    _check_shapes(updates, params)
    return updates, state


def _check_shapes(updates: Params, params: Params) -> None:
    """Refuse what broadcasting would make something of."""
    found, expected = jax.tree.structure(updates), jax.tree.structure(params)
    if found != expected:
        raise TypeError(f"its updates are {found}, the parameters {expected}")
    named = jax.tree_util.tree_leaves_with_path(params)
    for (path, w), u in zip(named, jax.tree.leaves(updates), strict=True):
        if jnp.shape(u) != jnp.shape(w):
            where = jax.tree_util.keystr(path)
            raise TypeError(
                f"its update of {where} is {jnp.shape(u)}, the parameter {jnp.shape(w)}"
            )


def _no_value_fn(params: Params) -> jax.Array:
    raise TypeError("it asks for value_fn, as line searches do; adapters side by side have none")


def nodes_of(kind: type | tuple[type, ...], state: optax.OptState) -> list[Any]:
    """Return the outermost nodes of some kind in an optimizer's state."""
    leaves = jax.tree.leaves(state, is_leaf=partial(_is, kind))
    return [node for node in leaves if isinstance(node, kind)]


def _is(kind: type | tuple[type, ...], node: Any) -> bool:
    return isinstance(node, kind)


def _with_rates(state: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    """Return the state with the hyperparameters of a fresh one, made with the rate of this step."""

    def one(old: Any, new: Any) -> Any:
        if not isinstance(old, _INJECTED):
            return old
        inner = _with_rates(old.inner_state, new.inner_state)
        return old._replace(hyperparams=new.hyperparams, inner_state=inner)

    return jax.tree.map(one, state, fresh, is_leaf=partial(_is, _INJECTED))


def has_evaluation_point(state: optax.OptState) -> bool:
    """Return whether the optimizer evaluates other parameters than it trains."""
    return bool(nodes_of(_AVERAGED, state))


def evaluation_point(state: optax.OptState, params: Params) -> Params:
    """Return what the optimizer evaluates, given what it trains.

    Schedule-free training (arXiv 2405.15682) takes gradients at y = b1 x + (1 - b1) z, and
    evaluates the average x; all others evaluate what they train.
    """
    return _mix(state, params, lambda b1, y, z: (y - (1 - b1) * z) / b1)


def training_point(state: optax.OptState, params: Params) -> Params:
    """Return what the optimizer trains, given what it evaluates."""
    return _mix(state, params, lambda b1, x, z: b1 * x + (1 - b1) * z)


def _mix(state: optax.OptState, params: Params, mix: Callable[..., jax.Array]) -> Params:
    def one(z: Any, w: jax.Array) -> jax.Array:
        if isinstance(z, optax.MaskedNode):  # another transformation has this one
            return w
        return mix(node.b1, w, z).astype(w.dtype)

    for node in nodes_of(_AVERAGED, state):
        params = jax.tree.map(one, node.z, params, is_leaf=partial(_is, optax.MaskedNode))
    return params


def find_factory(optax_name: str) -> Callable[..., optax.GradientTransformation]:
    """Return optax's optimizer of that (dotted) name, as 'adamw' or 'contrib.muon'.

    Raises:
      ValueError: optax has none.
    """
    factory: Any = optax
    for part in optax_name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory) or inspect.isclass(factory):
        raise ValueError(f"optax_name = {optax_name!r}: optax has no function of that name")
    first, *_ = [*inspect.signature(factory).parameters, ""]
    if first not in ("learning_rate", "max_learning_rate"):
        raise ValueError(
            f"optax_name = {optax_name!r}: no optimizer, as its first argument is {first!r} and not"
            " a learning rate; a function of your own can make one of it, see"
            " configs/README.md#another-optimizer"
        )
    return factory


def _keywords(optax_name: str, optax_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer is called with beside its rate.

    No weight decay (0) is left out for an optimizer that never decays weights.

    Raises:
      ValueError: it has no argument of such a name.
    """
    _, *known = inspect.signature(find_factory(optax_name)).parameters
    kwargs = dict(optax_kwargs)
    if kwargs.get("weight_decay") == 0 and "weight_decay" not in known:
        del kwargs["weight_decay"]
    if unknown := sorted(set(kwargs) - set(known)):
        raise ValueError(
            f"optax_kwargs = {dict(optax_kwargs)}: optax.{optax_name} takes no"
            f" {', '.join(unknown)}; it takes {', '.join(known) or 'nothing beside its rate'}"
        )
    if optax_name == "contrib.muon":
        kwargs.setdefault("muon_weight_dimension_numbers", muon_dimensions)
    return kwargs


def muon_dimensions(params: Any) -> Any:
    """Say which axes of each array are a matrix: the last two, as [L in out] stacks layers.

    An adapter's `a` is [L r in], the others have what they multiply first.

    Without it Muon would silently be Adam for our adapters: it takes only plain matrices.
    """

    def one(path: tuple, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if x.ndim < 2:
            return None
        axes = x.ndim - 2, x.ndim - 1
        if getattr(path[-1], "key", None) == "a":
            axes = axes[::-1]
        return optax.contrib.MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(
    *,
    optax_name: str = "adamw",
    optax_kwargs: Mapping[str, Any] | None = None,
    optimizer: Optimizer | None = None,
    grad_clip: float | None = 1.0,
    before: Sequence[optax.GradientTransformation] = (),
    after: Sequence[optax.GradientTransformation] = (),
) -> Optimizer:
    """Return `learning_rate -> GradientTransformation`.

    The chain is `before`, the clipping, the optimizer, `after`.

    Args:
      optax_name: the name of an optax function whose first argument is the learning rate.
      optax_kwargs: its other arguments.
      optimizer: a function of the learning rate, used in place of the name.
      grad_clip: clips the gradient of one adapter (or of the policy) to this global norm; None
        does not.
      before: transformations of the gradient as it is, in their order.
      after: transformations of the optimizer's update, in their order; schedule-free optimizers
        refuse them.

    Raises:
      ValueError: optax has no such optimizer, or it has no such arguments.
    """
    if optimizer is None:
        factory, kwargs = find_factory(optax_name), _keywords(optax_name, optax_kwargs or {})

        def optimizer(learning_rate: jax.Array) -> optax.GradientTransformation:
            return factory(learning_rate, **kwargs)

    def clipped(learning_rate: jax.Array) -> optax.GradientTransformation:
        made: Any = optimizer(learning_rate)
        if not (hasattr(made, "init") and hasattr(made, "update")):
            raise TypeError(
                f"it returns {type(made).__name__}, expected an optax.GradientTransformation"
            )
        tx = optax.with_extra_args_support(_alone(made) if after else made)
        clip = () if grad_clip is None else (optax.clip_by_global_norm(grad_clip),)
        chained = *before, *clip, tx, *after
        return optax.chain(*chained) if len(chained) > 1 else tx

    return clipped


def _alone(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `tx`, which is refused where others may not change its updates."""

    def init(params: Any) -> Any:
        state = tx.init(params)
        if has_evaluation_point(state):
            raise TypeError(
                "it is schedule-free and evaluates another point than it trains: what changes its"
                " updates would change only one of the two"
            )
        return state

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(tx).update)


def optimizer_of(
    section: InnerSettings | OuterSettings,
    before: Sequence[optax.GradientTransformation] = (),
    after: Sequence[optax.GradientTransformation] = (),
) -> Optimizer:
    """Return the optimizer that a loop's settings name; see `make_optimizer`."""
    return make_optimizer(
        optax_name=section.optax_name,
        optax_kwargs=section.optax_kwargs,
        optimizer=section.optimizer,
        grad_clip=section.grad_clip,
        before=before,
        after=after,
    )


def accumulate(
    tx: optax.GradientTransformation, num_steps: int, ends: jax.Array | bool
) -> optax.GradientTransformation:
    """Return `tx` on the means over a group of steps; between them its updates are 0.

    The means are of gradients and, where it asks for them, of losses. A step that is not finite
    counts for nothing, but may end a group.

    Args:
      num_steps: that make a group; with 1 this is `tx` itself.
      ends: bool[], whether a group ends with the step.
    """
    if num_steps == 1:
        return tx

    def init(params: Any) -> Any:
        return optax.MultiSteps(_with_loss(tx, {}), 1).init((params, jnp.float32(0)))

    def update_one(updates: Any, state: Any, params: Any = None, **asked: Any) -> tuple[Any, Any]:
        given, means, count = (updates, asked["value"]), state.acc_grads, state.mini_step
        good = all_finite(given)
        given = jax.tree.map(lambda x, mean: jnp.where(good, x, mean.astype(x.dtype)), given, means)
        length = jnp.where(ends, count + 1, count + 2)
        context = {name: x for name, x in asked.items() if name not in KEYWORDS}
        steps: Any = optax.MultiSteps(_with_loss(tx, context), lambda _: length)
        (moves, _), new = steps.update(given, state, (params, jnp.float32(0)))
        counts = good | (jnp.asarray(ends) & (count > 0))
        new = jax.tree.map(lambda x, old: jnp.where(counts, x, old), new, state)
        return jax.tree.map(lambda x: jnp.where(counts, x, 0), moves), new

    return optax.GradientTransformationExtraArgs(init, update_one)


def _with_loss(
    tx: optax.GradientTransformation, context: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Return `tx` on pairs of gradients and loss: MultiSteps takes means of gradients alone."""

    def init(params: Any) -> Any:
        return tx.init(params[0])

    def update_pair(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        grads, loss = updates
        moves, state = update(tx, grads, state, params[0], loss, context=context)
        return (moves, loss), state

    return optax.GradientTransformationExtraArgs(init, update_pair)


def all_finite(tree: Any) -> jax.Array:
    """Return whether every number of a pytree is finite, bool[]."""
    finite = jnp.bool_(True)
    for x in jax.tree.leaves(tree):
        finite &= jnp.isfinite(x).all()
    return finite


def scheduled_rate(
    schedule: str | jax.Array,
    learning_rate: jax.Array,
    step: jax.Array,
    num_steps: jax.Array,
    warmup_steps: int = 0,
) -> jax.Array:
    """Return the learning rate at `step` of `num_steps`; all of them may be traced.

    'linear' falls to 0 after the last step, as the Trainer of Hugging Face does it; 'cosine'
    likewise. Before, it rises from 0 for `warmup_steps`.

    Args:
      schedule: its name, or i32[], its place in SCHEDULES.
    """
    left = jnp.maximum(num_steps - warmup_steps, 1).astype(jnp.float32)
    done = jnp.maximum(step - warmup_steps, 0).astype(jnp.float32) / left
    factors = {
        "constant": jnp.ones_like(done),
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
    }
    if isinstance(schedule, str) and schedule not in factors:
        raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(factors)}")
    if isinstance(schedule, str):
        factor = factors[schedule]
    else:
        factor = jax.lax.select_n(schedule, *[factors[name] for name in SCHEDULES])
    rise = (
        jnp.minimum(step.astype(jnp.float32) / max(warmup_steps, 1), 1.0) if warmup_steps else 1.0
    )
    return learning_rate * jnp.maximum(factor, 0.0) * rise
