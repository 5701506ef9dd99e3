"""Optimizers by optax name or by function, for both loops.

An optimizer here is a function `learning_rate -> optax.GradientTransformation`. The learning rate
that it gets is a traced scalar, the schedule's value at this step: a self-edit chooses its own
rate and number of steps, and still a hundred self-edits share one compiled program.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from seal_jax.types import InnerSettings, OuterSettings

Optimizer = Callable[[jax.Array], optax.GradientTransformation]


def find_factory(optax_name: str) -> Callable[..., optax.GradientTransformation]:
    """Return optax's function of that (dotted) name, as 'adamw' or 'contrib.muon'.

    Raises:
      ValueError: optax has no such name.
    """
    factory: Any = optax
    for part in optax_name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise ValueError(f"optax_name={optax_name!r}: optax has no function of that name")
    return factory


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
) -> Optimizer:
    """Return `learning_rate -> GradientTransformation`.

    Args:
      optax_name: the name of an optax function whose first argument is the learning rate.
      optax_kwargs: its other arguments.
      optimizer: a function of the learning rate, used in place of the name.
      grad_clip: clips the gradient of one adapter (or of the policy) to this global norm; None
        does not.
    """
    if optimizer is None:
        factory, kwargs = find_factory(optax_name), dict(optax_kwargs or {})
        if optax_name == "contrib.muon":
            kwargs.setdefault("muon_weight_dimension_numbers", muon_dimensions)

        def optimizer(learning_rate: jax.Array) -> optax.GradientTransformation:
            return factory(learning_rate, **kwargs)

    def clipped(learning_rate: jax.Array) -> optax.GradientTransformation:
        tx = optax.with_extra_args_support(optimizer(learning_rate))
        if grad_clip is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(grad_clip), tx)

    return clipped


def optimizer_of(section: InnerSettings | OuterSettings) -> Optimizer:
    """Return the optimizer that a loop's settings name."""
    return make_optimizer(
        optax_name=section.optax_name,
        optax_kwargs=section.optax_kwargs,
        optimizer=section.optimizer,
        grad_clip=section.grad_clip,
    )


def accumulate(
    tx: optax.GradientTransformation, num_steps: int, all_steps: jax.Array | int
) -> optax.GradientTransformation:
    """Return `tx` on the mean gradient of `num_steps` steps, and of those left of `all_steps`."""
    if num_steps == 1:
        return tx

    def group_size(num_updates: jax.Array) -> jax.Array:
        return jnp.minimum(num_steps, jnp.maximum(all_steps - num_updates * num_steps, 1))

    # It is only ever given an array.
    steps = optax.MultiSteps(tx, group_size)  # ty: ignore[invalid-argument-type]
    return steps.gradient_transformation()


def scheduled_rate(
    schedule: str,
    learning_rate: jax.Array,
    step: jax.Array,
    num_steps: jax.Array,
    warmup_steps: int = 0,
) -> jax.Array:
    """Return the learning rate at `step` of `num_steps`; all of them may be traced.

    'linear' falls to 0 after the last step, as the Trainer of Hugging Face does it; 'cosine'
    likewise. Before, it rises from 0 for `warmup_steps`.
    """
    left = jnp.maximum(num_steps - warmup_steps, 1).astype(jnp.float32)
    done = jnp.maximum(step - warmup_steps, 0).astype(jnp.float32) / left
    factors = {
        "constant": jnp.ones_like(done),
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
    }
    if schedule not in factors:
        raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(factors)}")
    rise = (
        jnp.minimum(step.astype(jnp.float32) / max(warmup_steps, 1), 1.0) if warmup_steps else 1.0
    )
    return learning_rate * jnp.maximum(factors[schedule], 0.0) * rise
