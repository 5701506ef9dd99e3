"""The policy update: fit the policy to its rollouts under an objective, as LoRA or in full.

  score each row under the policy, and under the reference
  for epoch:  for batch of rows:
    loss = average over tokens of objective.loss(...) + kl_coef KL - entropy_coef entropy

Rows that no advantage moves are left out on the host: ReST-EM trains on few of them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seal_jax import keys
from seal_jax.hosts.console import progress, say
from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.models.logits import next_token_logp, unembed
from seal_jax.models.transformer import hidden_states
from seal_jax.objectives.objective import (
    AVERAGES,
    Objective,
    Past,
    Tokens,
    kl_coefficient,
    kl_penalty,
    token_advantages,
)
from seal_jax.optim import Optimizer, scheduled_rate
from seal_jax.sharding import leading, param_shardings, replicated, to_device, to_host
from seal_jax.types import Adapters, Params, Rollout, TrainState


class TrainRows(NamedTuple):
    """What a training step takes of its rows: [n m ...], n microbatches of m rows."""

    tokens: Any  # i32[.. T]
    loss_mask: Any  # bool[.. T]
    old_logp: Any  # f32[.. T], as those that follow
    ref_logp: Any
    advantages: Any
    old_values: Any
    returns: Any
    weight: Any  # f32[..] of each token's loss; 0 fills a batch up


class Penalties(NamedTuple):
    """Coefficients of what is added to every objective's loss; f32[] each, traced."""

    kl: Any
    entropy: Any


def rollout_logp(
    config: ModelConfig, params: Params, adapters: Adapters | None, rollout: Rollout
) -> jax.Array:
    """Return log p f32[B T] of the written tokens of a rollout [B T]; 0 elsewhere."""
    return _score(config, params, adapters, rollout.tokens, rollout.loss_mask)[0]


def _score(
    config: ModelConfig, params: Params, adapters: Adapters | None, tokens, loss_mask
) -> tuple[jax.Array, jax.Array]:
    """Return log p f32[B T] of the written tokens, and the hidden states [B T D] before each."""
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = jnp.ones((B, T), jnp.int32)  # causal: the padding behind a row is seen by none
    hidden, _ = hidden_states(config, params, tokens, positions, segments, adapters)
    logp = next_token_logp(config, params, hidden, tokens, loss_mask)
    logp = jnp.pad(logp, ((0, 0), (1, 0)))
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


def _values(head: Params, hidden: jax.Array) -> jax.Array:
    """Return the value head's f32[B T] of hidden states [B T D]."""
    return hidden.astype(jnp.float32) @ head["kernel"] + head["bias"]


def init_train_state(
    config: ModelConfig,
    params: Params,
    optimizer: Optimizer,
    *,
    mesh,
    update: str,
    value_head: bool = False,
    **lora_kwargs: Any,
) -> TrainState:
    """Return the state before the first outer step.

    Args:
      update: 'lora' trains a fresh adapter in each outer step and merges it; 'full' trains every
        parameter, with one optimizer state for the whole run.
      value_head: whether there is one: it starts at 0 and lives through all steps.
      lora_kwargs: rank, alpha, targets.
    """
    head = None
    if value_head:
        head = to_device(_zero_head(config), replicated(mesh))
    given = params, head, to_device(keys.fold_one(0), replicated(mesh))
    fresh = _make_fresh(config, optimizer, update, lora_kwargs)
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
        fresh = _make_fresh(config, optimizer, update, lora_kwargs)
        return TrainState(jnp.int32(0), params, *fresh(params, head, jax.random.key(0)), head)

    return jax.eval_shape(state, params, _zero_head(config) if value_head else None)


def _zero_head(config: ModelConfig) -> Params:
    return {"kernel": np.zeros(config.embed_dim, np.float32), "bias": np.float32(0)}


def _make_fresh(
    config: ModelConfig, optimizer: Optimizer, update: str, lora_kwargs: dict[str, Any]
) -> Callable[..., tuple[Adapters | None, Any]]:
    """Return `fresh(params, head, key)`: a new adapter (None if full), and the optimizer's state
    before its first step."""

    def fresh(params: Params, head: Params | None, key: jax.Array):
        adapters, trained = None, params
        if update == "lora":
            adapters = lora.init_adapter(config, key, **lora_kwargs)
            trained = lora.take(adapters, 0).weights
        return adapters, optimizer(jnp.float32(0)).init(_with_head(trained, head))

    return fresh


def _with_head(trained: Params, head: Params | None) -> Params:
    return {"policy": trained} if head is None else {"policy": trained, "value": head}


def minibatches(
    rows: TrainRows,
    rng: np.random.Generator,
    *,
    average: str,
    longest: int,
    num_epochs: int,
    batch_size: int,
    microbatch_size: int,
) -> Iterator[TrainRows]:
    """Yield batches [n m ...] of rows [B ...], each weighted by its batch.

    Rows are shuffled in every epoch; n microbatches of m rows hold `batch_size` rows or, if there
    are fewer, all. A short batch is filled up with rows of weight 0.

    Args:
      average: a key of AVERAGES.
      longest: tokens that a self-edit may have.
    """
    num_rows = len(rows.tokens)
    lengths = rows.loss_mask.sum(axis=1)
    size = -(-min(batch_size, num_rows) // microbatch_size) * microbatch_size
    shape = (size // microbatch_size, microbatch_size)
    for _ in range(num_epochs if num_rows else 0):
        order = rng.permutation(num_rows)
        for start in range(0, num_rows, batch_size):
            chosen = order[start : start + batch_size]
            index = np.resize(chosen, size)
            weight = np.zeros(size, np.float32)
            weight[: len(chosen)] = AVERAGES[average](np.maximum(lengths[chosen], 1), longest)
            batch = [x[index].reshape(*shape, -1) for x in rows[:-1]]
            yield TrainRows(*batch, weight.reshape(shape))


class _Settings(NamedTuple):
    """What the functions below share of make_policy_update's arguments."""

    config: ModelConfig
    objective: Objective
    mesh: Any
    update: str
    microbatch_size: int
    kl: bool  # whether there is a KL penalty, so that rows are scored by the reference, too
    entropy: bool
    allow_stale: bool

    @property
    def values(self) -> bool:
        return self.objective.gae is not None


def make_policy_update(
    config: ModelConfig,
    objective: Objective,
    optimizer: Optimizer,
    *,
    mesh,
    seed: int,
    update: str = "lora",
    schedule: str = "linear",
    learning_rate: float,
    num_epochs: int,
    batch_size: int,
    microbatch_size: int = 1,
    kl_coef: float = 0.0,
    kl_target: float = 0.0,
    entropy_coef: float = 0.0,
    allow_stale: bool = False,
    **lora_kwargs: Any,
) -> Callable[..., tuple[TrainState, dict[str, float]]]:
    """Return `policy_update(state, rollout, advantages, label, past, reference) -> state, metrics`.

    rollout is on the host, [B T]; advantages is f32[B], nan for rows that are left out (see
    `Objective`); past is a `Past`; reference are the params that the KL penalty holds the policy
    to. A batch's gradient is summed over microbatches, so memory follows `microbatch_size` and the
    result `batch_size`. A microbatch is divided over the axes of 'batch', where they divide it.

    Where no row has an advantage nothing is trained, and metrics count `policy/no_advantage`. Where
    a loss, gradient or step is not finite the whole update is taken back, and `policy/skipped` is
    1. The state's step moves on in either case.

    Args:
      kl_coef: the weight of `kl_penalty`, at the first step.
      kl_target: KL per token that the weight is adapted to, see `kl_coefficient`; 0 keeps it.
      entropy_coef: the weight of the policy's entropy, which is subtracted.
      allow_stale: take rollouts that another step's policy wrote, and their own log-probabilities
        as the old ones. Otherwise such a rollout is a ValueError: its rewards tell of adapters of
        that policy.
    """
    settings = _Settings(
        config,
        objective,
        mesh,
        update,
        microbatch_size,
        kl=kl_coef > 0,
        entropy=entropy_coef > 0,
        allow_stale=allow_stale,
    )
    score = _make_score(settings)
    start, end = _make_ends(settings, optimizer, seed, lora_kwargs)
    train_step = _make_train_step(settings, optimizer, schedule, learning_rate)

    def train(
        state: TrainState, step: int, batches: Sequence[TrainRows], kl: float, label: str
    ) -> tuple[TrainState, list[float]]:
        """Return the state after all batches, and their losses; the last is nan if one failed."""
        everywhere = replicated(mesh)
        by_row = leading(mesh, "batch", microbatch_size, config.rules, before=1)
        penalties = to_device(Penalties(np.float32(kl), np.float32(entropy_coef)), everywhere)
        trained, frozen, scale, opt_state = start(state, step)
        losses = []
        for i, batch in enumerate(progress(batches, f"{label}: policy update", "batch")):
            counters = to_device((np.int32(i), np.int32(len(batches))), everywhere)
            placed = to_device(batch, by_row)
            with jax.set_mesh(mesh):  # for the attention kernels
                trained, opt_state, *numbers = train_step(
                    trained, frozen, opt_state, scale, placed, penalties, *counters
                )
            loss, norm = map(float, to_host(numbers))
            losses.append(loss if np.isfinite(norm) else np.nan)
            if not np.isfinite(losses[-1]):
                say(
                    f"{label}: update skipped: batch {i} has loss {loss}, and its gradient and step"
                    f" together the norm {norm}; lower outer.learning_rate?"
                )
                losses[-1] = np.nan
                trained, frozen, scale, opt_state = start(state, step)
                break
        return end(state, step, trained, scale, opt_state), losses

    def policy_update(
        state: TrainState,
        rollout: Rollout,
        advantages: np.ndarray,
        label: str = "policy",
        past: Past = Past(),  # noqa: B008
        reference: Params | None = None,
    ) -> tuple[TrainState, dict[str, float]]:
        step = int(to_host(state.step))
        if rollout.step != step and not allow_stale:
            raise ValueError(
                f"{label}: the policy of outer step {rollout.step} wrote this rollout, and its"
                f" rewards are of that policy's adapters; this is the policy of step {step}."
                " allow_stale=True trains on it all the same"
            )
        used = _used_rows(settings, advantages)
        kl = kl_coefficient(kl_coef, kl_target, past.kls)
        metrics: dict[str, float] = {
            "policy/num_rows": int(used.sum()),
            "policy/no_advantage": int(not used.any()),
        }
        batches: Sequence[TrainRows] = ()
        if used.any():
            chosen = Rollout(*(x[used] for x in rollout[:3]), step=step)
            rows, scored = _make_rows(settings, score, state, chosen, advantages[used], reference)
            metrics |= scored
            batches = list(
                minibatches(
                    rows,
                    np.random.default_rng([seed, keys.POLICY, step]),
                    average=objective.average,
                    longest=rollout.tokens.shape[1],
                    num_epochs=num_epochs,
                    batch_size=batch_size,
                    microbatch_size=microbatch_size,
                )
            )
        if settings.kl:
            metrics["policy/kl_coef"] = kl
        state, losses = train(state, step, batches, kl, label)
        skipped = bool(np.isnan(losses).any())
        metrics |= {"policy/num_batches": len(losses), "policy/skipped": int(skipped)}
        if losses and not skipped:
            metrics |= {"policy/loss_first": losses[0], "policy/loss_last": losses[-1]}
        return state, metrics

    policy_update.train_step = train_step  # the device call in it, for those who compile ahead
    return policy_update


def _used_rows(settings: _Settings, advantages: np.ndarray) -> np.ndarray:
    """Return which rows are trained on, bool[B]."""
    known = ~np.isnan(advantages)
    if settings.values:
        return known
    if not advantages[known].any():
        return np.zeros_like(known)
    # A penalty acts on rows without an advantage, too.
    return known & (settings.kl or settings.entropy or (advantages != 0))


def _make_score(settings: _Settings) -> Callable[..., list[np.ndarray]]:
    """Return `score(params, head, rollout)`: log p and values, f32[B T] each, on the host."""
    size = settings.microbatch_size
    by_row = leading(settings.mesh, "batch", size, settings.config.rules)

    @jax.jit
    def score_rows(params: Params, head: Params | None, tokens, loss_mask):
        logp, hidden = _score(settings.config, params, None, tokens, loss_mask)
        values = _values(head, hidden) if head is not None else jnp.zeros_like(logp)
        return logp, jnp.where(loss_mask, values, 0)

    def score(params: Params, head: Params | None, rollout: Rollout) -> list[np.ndarray]:
        parts = []
        B = len(rollout.tokens)
        for start in range(0, B, size):
            index = np.minimum(np.arange(start, start + size), B - 1)
            placed = to_device((rollout.tokens[index], rollout.loss_mask[index]), by_row)
            with jax.set_mesh(settings.mesh):  # for the attention kernels
                parts.append(to_host(score_rows(params, head, *placed)))
        return [np.concatenate(part)[:B] for part in zip(*parts, strict=True)]

    return score


def _make_rows(
    settings: _Settings,
    score: Callable,
    state: TrainState,
    rollout: Rollout,
    advantages: np.ndarray,
    reference: Params | None,
) -> tuple[TrainRows, dict[str, float]]:
    """Return the rows to train on, scored by the policy and the reference, and metrics of that."""
    loss_mask, zeros = rollout.loss_mask, np.zeros_like(rollout.logp)
    logp, values = score(state.params, state.value_head, rollout)
    differences = np.abs(logp - rollout.logp)[loss_mask]
    metrics = {"outer/ratio_at_start": float(np.exp(differences.max(initial=0.0)))}
    ref_logp = zeros
    if settings.kl:
        ref_logp = score(reference, None, rollout)[0]
        log_ratio = (ref_logp - logp)[loss_mask]
        metrics["policy/kl"] = float(np.mean(np.expm1(log_ratio) - log_ratio))
    by_token, returns = np.where(loss_mask, advantages[:, None], zeros), zeros
    if settings.values:
        gae = settings.objective.gae
        by_token, returns = token_advantages(gae, advantages, values, loss_mask)
        errors = (values - returns)[loss_mask]
        metrics["policy/value_error"] = float(np.sqrt(np.mean(errors**2)))
    old_logp = rollout.logp if settings.allow_stale else logp
    weight = np.zeros(len(advantages), np.float32)  # of its batch, later
    rows = (rollout.tokens, loss_mask, old_logp, ref_logp, by_token, values, returns, weight)
    return TrainRows(*rows), metrics


def _make_train_step(
    settings: _Settings, optimizer: Optimizer, schedule: str, learning_rate: float
) -> Callable:
    """Return the jitted step: a batch's gradient, summed over microbatches, and its update."""
    config, objective, mesh = settings.config, settings.objective, settings.mesh

    def where(trees):
        full = settings.update == "full"
        return param_shardings(mesh, trees, config.rules) if full else replicated(mesh)

    def loss_of(trained, frozen: Params, scale, rows: TrainRows, penalties: Penalties) -> jax.Array:
        params, adapters = trained["policy"], None
        if settings.update == "lora":
            params, adapters = frozen, _adapter(trained["policy"], scale)
        logp, hidden = _score(config, params, adapters, rows.tokens, rows.loss_mask)
        values = jnp.zeros_like(logp)
        if settings.values:
            values = _values(trained["value"], hidden)
        loss = objective.loss(
            Tokens(logp, rows.old_logp, rows.advantages, values, rows.old_values, rows.returns)
        )
        if settings.kl:
            loss += penalties.kl * kl_penalty(logp, rows.ref_logp)
        if settings.entropy:
            loss -= penalties.entropy * token_entropy(config, params, hidden)
        return (jnp.where(rows.loss_mask, loss, 0) * rows.weight[:, None]).sum()

    @partial(jax.jit, donate_argnums=(0, 2))
    def train_step(trained, frozen, opt_state, scale, rows, penalties, step, num_steps):
        def one(total, microbatch):
            loss, grads = jax.value_and_grad(loss_of)(trained, frozen, scale, microbatch, penalties)
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        (loss, grads), _ = jax.lax.scan(one, zero, rows)
        rate = scheduled_rate(schedule, jnp.float32(learning_rate), step, num_steps)
        updates, opt_state = optimizer(rate).update(grads, opt_state, trained)
        trained = jax.tree.map(lambda w, u: w + u.astype(w.dtype), trained, updates)
        # Where they came from: else the next step is compiled anew, or donates nothing.
        trained, opt_state = jax.lax.with_sharding_constraint(
            (trained, opt_state), where((trained, opt_state))
        )
        return trained, opt_state, loss, optax.tree.norm((grads, updates))

    return train_step


def _make_ends(
    settings: _Settings, optimizer: Optimizer, seed: int, lora_kwargs: dict[str, Any]
) -> tuple[Callable, Callable]:
    """Return `start(state, step) -> trained, frozen, scale, opt_state`, and what makes a state of
    them again."""
    everywhere, full = replicated(settings.mesh), settings.update == "full"
    fresh = jax.jit(
        _make_fresh(settings.config, optimizer, settings.update, lora_kwargs),
        out_shardings=everywhere,
    )
    copied = partial(jax.tree.map, jnp.copy)  # training donates; the caller keeps its state

    @jax.jit
    def take_first(adapters: Adapters) -> Adapters:
        return lora.take(adapters, 0)

    @jax.jit
    def merge(trained: Params, scale: jax.Array, params: Params) -> tuple[Adapters, Params]:
        adapters = _adapter(trained, scale)
        return adapters, lora.merge(params, adapters)

    def start(state: TrainState, step: int) -> tuple[Any, Params, Any, Any]:
        head = copied(state.value_head)
        if full:
            return _with_head(copied(state.params), head), {}, (), copied(state.opt_state)
        key = to_device(keys.fold_one(seed, keys.POLICY, step), everywhere)
        adapters, opt_state = fresh(state.params, head, key)
        trained = _with_head(take_first(adapters).weights, head)
        return trained, state.params, adapters.scale, opt_state

    def end(state: TrainState, step: int, trained, scale, opt_state) -> TrainState:
        adapters, params = None, trained["policy"]
        if not full:
            adapters, params = merge(params, scale, state.params)
        next_step = to_device(np.int32(step + 1), everywhere)
        return TrainState(next_step, params, adapters, opt_state, trained.get("value"))

    return start, end


def _adapter(weights: Params, scale: jax.Array) -> Adapters:
    """Return a stack of one."""
    return Adapters(jax.tree.map(lambda x: x[None], weights), scale)
