"""The device side of the policy update: a fresh start, scores, the loss, and a training step."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from seal_jax import keys
from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.models.logits import next_token_logp, unembed
from seal_jax.models.transformer import hidden_states
from seal_jax.objectives.objective import Objective, Tokens, kl_penalty
from seal_jax.optim import Optimizer, evaluation_point, scheduled_rate, training_point, update
from seal_jax.sharding import param_shardings, replicated, to_device
from seal_jax.types import Adapters, Array, OuterSettings, Params, Rollout, TrainState


class UpdateSettings(NamedTuple):
    """The settings of a policy update."""

    learning_rate: float
    num_epochs: int
    batch_size: int  # rows that make one update
    # 'lora' trains a fresh adapter in each outer step and merges it; 'full' trains every parameter,
    # with one optimizer state for the whole run.
    update: str = "lora"
    rank: int = 0  # of the adapter, as alpha and targets
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    schedule: str = "linear"
    microbatch_size: int = 1  # rows whose gradient is computed at once
    kl_coef: float = 0.0  # the weight of `kl_penalty`, at the first step
    kl_target: float = 0.0  # KL per token that it is adapted to, see `kl_coefficient`; 0 keeps it
    entropy_coef: float = 0.0  # the weight of the policy's entropy, which is subtracted
    # Take rollouts that another step's policy wrote, and their own log-probabilities as the old
    # ones. Otherwise such a rollout is a ValueError: its rewards tell of adapters of that policy.
    allow_stale: bool = False


def update_settings(outer: OuterSettings) -> UpdateSettings:
    """Return what the config's outer section says of the policy update."""
    names = set(UpdateSettings._fields) & set(OuterSettings._fields)
    return UpdateSettings(**{name: getattr(outer, name) for name in names})


class PolicySetup(NamedTuple):
    """What a policy update is made of: all of it is static."""

    config: ModelConfig
    objective: Objective
    optimizer: Optimizer
    settings: UpdateSettings
    mesh: Mesh
    seed: int

    @property
    def has_values(self) -> bool:
        return self.objective.gae is not None


class TrainRows(NamedTuple):
    """What a training step takes of its rows: [n m ...], n microbatches of m rows."""

    tokens: Array  # i32[.. T]
    loss_mask: Array  # bool[.. T]
    old_logp: Array  # f32[.. T], as those that follow
    ref_logp: Array
    advantages: Array
    old_values: Array
    returns: Array
    weight: Array  # f32[..] of each token's loss; 0 fills a batch up


class Penalties(NamedTuple):
    """Coefficients of what is added to every objective's loss; f32[] each, traced."""

    kl: ArrayLike
    entropy: ArrayLike


def rollout_logp(
    config: ModelConfig, params: Params, adapters: Adapters | None, rollout: Rollout
) -> jax.Array:
    """Return log p f32[B T] of the written tokens of a rollout [B T]; 0 elsewhere."""
    return score(config, params, adapters, rollout.tokens, rollout.loss_mask)[0]


def score(
    config: ModelConfig, params: Params, adapters: Adapters | None, tokens: Array, loss_mask: Array
) -> tuple[jax.Array, jax.Array]:
    """Return log p f32[B T] of the written tokens, and the hidden states [B T D] before each."""
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = jnp.ones((B, T), jnp.int32)  # causal: the padding behind a row is seen by none
    hidden, _ = hidden_states(config, params, tokens, positions, segments, adapters)
    logp = jnp.pad(next_token_logp(config, params, hidden, tokens, loss_mask), ((0, 0), (1, 0)))
    return logp, jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))


def token_entropy(
    config: ModelConfig, params: Params, hidden: jax.Array, tile: int = 1024
) -> jax.Array:
    """Return the entropy of the next token's distribution, f32[B T] of hidden states [B T D].

    Tile by tile, and once more in the backward pass: the [tokens, V] logits are never whole.
    """

    @jax.checkpoint
    def one_tile(hidden: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(unembed(config, params, hidden))
        return -(jnp.exp(logp) * logp).sum(axis=-1)

    flat = hidden.reshape(-1, hidden.shape[-1])
    tile = min(tile, len(flat))
    tiles = jnp.pad(flat, ((0, -len(flat) % tile), (0, 0))).reshape(-1, tile, flat.shape[-1])
    return jax.lax.map(one_tile, tiles).reshape(-1)[: len(flat)].reshape(hidden.shape[:-1])


def _head_values(head: Params, hidden: jax.Array) -> jax.Array:
    """Return the value head's f32[B T] of hidden states [B T D]."""
    return hidden.astype(jnp.float32) @ head["kernel"] + head["bias"]


@partial(jax.jit, static_argnames="config")
def score_rows(
    config: ModelConfig,
    params: Params,
    head: Params | None,
    tokens: jax.Array,
    loss_mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return log p and values f32[B T] of the written tokens."""
    logp, hidden = score(config, params, None, tokens, loss_mask)
    values = _head_values(head, hidden) if head is not None else jnp.zeros_like(logp)
    return logp, jnp.where(loss_mask, values, 0)


def init_train_state(
    config: ModelConfig,
    params: Params,
    optimizer: Optimizer,
    *,
    mesh: Mesh,
    learning_rate: float,
    update: str,
    value_head: bool = False,
    **lora_kwargs: Any,
) -> TrainState:
    """Return the state before the first outer step.

    Args:
      learning_rate: of the policy update, as `update`; see `UpdateSettings`.
      value_head: whether there is one: it starts at 0 and lives through all steps.
      lora_kwargs: rank, alpha, targets.
    """
    head = None
    if value_head:
        head = to_device(_zero_head(config), replicated(mesh))
    given = params, head, to_device(keys.fold_one(0), replicated(mesh))
    fresh = partial(_fresh, config, (optimizer, learning_rate), update, lora_kwargs)
    # The optimizer's zeros depend on no argument: without a word jit puts them on one device.
    where = param_shardings(mesh, jax.eval_shape(fresh, *given), config.rules)
    adapters, opt_state = jax.jit(fresh, out_shardings=where)(*given)
    return TrainState(jax.device_put(np.int32(0)), params, adapters, opt_state, head)


def state_shapes(
    config: ModelConfig,
    params: Params,
    optimizer: Optimizer,
    *,
    update: str,
    value_head: bool = False,
    **lora_kwargs: Any,
) -> TrainState:
    """Return what `init_train_state` would, as ShapeDtypeStructs without a sharding."""

    def state(params: Params, head: Params | None) -> TrainState:
        key = jax.random.key(0)
        fresh = _fresh(config, (optimizer, 0.0), update, lora_kwargs, params, head, key)
        return TrainState(jnp.int32(0), params, *fresh, head)

    return jax.eval_shape(state, params, _zero_head(config) if value_head else None)


def _zero_head(config: ModelConfig) -> Params:
    return {"kernel": np.zeros(config.embed_dim, np.float32), "bias": np.float32(0)}


def _fresh(
    config: ModelConfig,
    optimizer_and_rate: tuple[Optimizer, float],
    update: str,
    lora_kwargs: Mapping[str, Any],
    params: Params,
    head: Params | None,
    key: jax.Array,
) -> tuple[Adapters | None, optax.OptState]:
    """Return a new adapter (None if full), and the optimizer's state before its first step."""
    adapters, trained = None, params
    if update == "lora":
        adapters = lora.init_adapter(config, key, **lora_kwargs)
        trained = lora.take(adapters, 0).weights
    optimizer, rate = optimizer_and_rate
    return adapters, optimizer(jnp.float32(rate)).init(with_head(trained, head))


@partial(jax.jit, static_argnames="setup")
def fresh_adapter(
    setup: PolicySetup, params: Params, head: Params | None, key: jax.Array
) -> tuple[Adapters, optax.OptState]:
    """Return the adapter that an outer step trains, and its optimizer's state."""
    settings = setup.settings
    sizes = {"rank": settings.rank, "alpha": settings.alpha, "targets": settings.targets}
    optimizer = setup.optimizer, settings.learning_rate
    new = _fresh(setup.config, optimizer, "lora", sizes, params, head, key)
    return jax.lax.with_sharding_constraint(new, replicated(setup.mesh))


def with_head(trained: Params, head: Params | None) -> Params:
    return {"policy": trained} if head is None else {"policy": trained, "value": head}


def batch_loss(
    setup: PolicySetup,
    trained: Params,
    frozen: Params,
    scale: jax.Array,
    rows: TrainRows,
    penalties: Penalties,
) -> jax.Array:
    """Return the loss f32[] of a microbatch, every token by its row's weight."""
    config, settings = setup.config, setup.settings
    params, adapters = trained["policy"], None
    if settings.update == "lora":
        params, adapters = frozen, adapter_of(trained["policy"], scale)
    logp, hidden = score(config, params, adapters, rows.tokens, rows.loss_mask)
    values = jnp.zeros_like(logp)
    if setup.has_values:
        values = _head_values(trained["value"], hidden)
    loss = setup.objective.loss(
        Tokens(logp, rows.old_logp, rows.advantages, values, rows.old_values, rows.returns)
    )
    if settings.kl_coef > 0:
        loss += penalties.kl * kl_penalty(logp, rows.ref_logp)
    if settings.entropy_coef > 0:
        loss -= penalties.entropy * token_entropy(config, params, hidden)
    return (jnp.where(rows.loss_mask, loss, 0) * rows.weight[:, None]).sum()


@partial(jax.jit, static_argnames="setup", donate_argnames=("trained", "opt_state"))
def train_step(
    setup: PolicySetup,
    trained: Params,
    frozen: Params,
    opt_state: optax.OptState,
    scale: jax.Array,
    rows: TrainRows,
    penalties: Penalties,
    step: jax.Array,
    num_steps: jax.Array,
) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
    """Take a batch's gradient, summed over microbatches, and update what is trained.

    Returns:
      What is trained, the optimizer's state, the loss, and the norm of gradient and update.
    """
    given = frozen, scale
    loss_and_grads = jax.value_and_grad(partial(batch_loss, setup))
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
    one = partial(loss_and_grads, trained, *given, penalties=penalties)
    loss, grads = _sum_over(rows, one, zero)

    def value_fn(trained: Params) -> jax.Array:
        one = partial(batch_loss, setup, trained, *given, penalties=penalties)
        return _sum_over(rows, one, jnp.float32(0))

    settings = setup.settings
    rate = scheduled_rate(settings.schedule, jnp.float32(settings.learning_rate), step, num_steps)
    tx = setup.optimizer(rate)
    updates, opt_state = update(tx, grads, opt_state, trained, loss, value_fn)
    trained = jax.tree.map(lambda w, u: w + u.astype(w.dtype), trained, updates)
    trained, opt_state = _in_place(setup, (trained, opt_state))
    return trained, opt_state, loss, optax.tree.norm((grads, updates))


def _sum_over(rows: TrainRows, function: Callable[[TrainRows], Any], zero: Any) -> Any:
    """Return the sum of `function` over microbatches."""

    def add(total: Any, microbatch: TrainRows) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    return jax.lax.scan(add, zero, rows)[0]


def _in_place(setup: PolicySetup, new: Any) -> Any:
    """Leave arrays where they came from: else a next step is compiled anew, or donates nothing."""
    where = replicated(setup.mesh)
    if setup.settings.update == "full":
        where = param_shardings(setup.mesh, new, setup.config.rules)
    return jax.lax.with_sharding_constraint(new, where)


@partial(jax.jit, static_argnames="setup", donate_argnames="trained")
def to_evaluation(setup: PolicySetup, trained: Params, opt_state: optax.OptState) -> Params:
    """Return what the optimizer evaluates, given what it trains."""
    return _in_place(setup, evaluation_point(opt_state, trained))


@partial(jax.jit, static_argnames="setup", donate_argnames="trained")
def to_training(setup: PolicySetup, trained: Params, opt_state: optax.OptState) -> Params:
    """Return what the optimizer trains, given what it evaluates."""
    return _in_place(setup, training_point(opt_state, trained))


def adapter_of(weights: Params, scale: jax.Array) -> Adapters:
    """Return a stack of one."""
    return Adapters(jax.tree.map(lambda x: x[None], weights), scale)


@jax.jit
def take_first(adapters: Adapters) -> Adapters:
    return lora.take(adapters, 0)


@jax.jit
def merge(weights: Params, scale: jax.Array, params: Params) -> tuple[Adapters, Params]:
    """Return the adapter as a stack of one, and the policy with it merged."""
    adapters = adapter_of(weights, scale)
    return adapters, lora.merge(params, adapters)
