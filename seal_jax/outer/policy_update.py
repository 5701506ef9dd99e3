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
from jax.sharding import Mesh

from seal_jax import keys
from seal_jax.hosts.console import progress, say
from seal_jax.models.config import ModelConfig
from seal_jax.objectives.objective import (
    AVERAGES,
    Objective,
    Past,
    kl_coefficient,
    token_advantages,
)
from seal_jax.optim import Optimizer, has_evaluation_point
from seal_jax.outer.policy_step import (
    Penalties,
    PolicySetup,
    TrainRows,
    UpdateSettings,
    fresh_adapter,
    merge,
    score_rows,
    take_first,
    to_evaluation,
    to_training,
    train_step,
    with_head,
)
from seal_jax.sharding import leading, replicated, to_device, to_host
from seal_jax.types import Params, Rollout, TrainState

# (state, rollout, advantages, label, past, reference) -> state, metrics
PolicyUpdate = Callable[..., tuple[TrainState, dict[str, float]]]


class Training(NamedTuple):
    """What an update trains, and what it needs for that."""

    trained: Params  # the policy (or its adapter's weights), and the value head if there is one
    opt_state: optax.OptState
    frozen: Params = {}  # the policy below an adapter
    scale: jax.Array | tuple[()] = ()  # of the adapter


def make_policy_update(
    config: ModelConfig,
    objective: Objective,
    optimizer: Optimizer,
    *,
    mesh: Mesh,
    seed: int,
    **settings: Any,
) -> PolicyUpdate:
    """Return `policy_update(state, rollout, advantages, label, past, reference) -> state, metrics`.

    rollout is on the host, [B T]; advantages is f32[B], nan for rows that are left out (see
    `Objective`); past is a `Past`; reference are the params that the KL penalty holds the policy
    to. A batch's gradient is summed over microbatches, so memory follows `microbatch_size` and the
    result `batch_size`. A microbatch is divided over the axes of 'batch', where they divide it.

    Where no row has an advantage nothing is trained, and metrics count `policy/no_advantage`. Where
    a loss, gradient or step is not finite the whole update is taken back, and `policy/skipped` is
    1. The state's step moves on in either case.

    Args:
      settings: the fields of `UpdateSettings`.
    """
    given = UpdateSettings(**settings)
    given = given._replace(targets=tuple(given.targets))
    return partial(update_policy, PolicySetup(config, objective, optimizer, given, mesh, seed))


def update_policy(
    setup: PolicySetup,
    state: TrainState,
    rollout: Rollout,
    advantages: np.ndarray,
    label: str = "policy",
    past: Past = Past(),  # noqa: B008
    reference: Params | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Return the state after the update, and its metrics; see `make_policy_update`."""
    settings, step = setup.settings, int(to_host(state.step))
    if rollout.step != step and not settings.allow_stale:
        raise ValueError(
            f"{label}: the policy of outer step {rollout.step} wrote this rollout, and its"
            f" rewards are of that policy's adapters; this is the policy of step {step}."
            " allow_stale=True trains on it all the same"
        )
    used = used_rows(setup, advantages)
    metrics: dict[str, float] = {
        "policy/num_rows": int(used.sum()),
        "policy/no_advantage": int(not used.any()),
    }
    batches: Sequence[TrainRows] = ()
    if used.any():
        chosen = Rollout(*(x[used] for x in rollout[:3]), step=step)
        rows, scored = score_rollout(setup, state, chosen, advantages[used], reference)
        metrics |= scored
        rng = np.random.default_rng([setup.seed, keys.POLICY, step])
        batches = list(minibatches(setup, rows, rng))
    kl = kl_coefficient(settings.kl_coef, settings.kl_target, past.kls)
    if settings.kl_coef > 0:
        metrics["policy/kl_coef"] = kl
    state, losses = train_batches(setup, state, step, batches, kl, label)
    skipped = bool(np.isnan(losses).any())
    metrics |= {"policy/num_batches": len(losses), "policy/skipped": int(skipped)}
    if losses and not skipped:
        metrics |= {"policy/loss_first": losses[0], "policy/loss_last": losses[-1]}
    return state, metrics


def train_batches(
    setup: PolicySetup,
    state: TrainState,
    step: int,
    batches: Sequence[TrainRows],
    kl: float,
    label: str,
) -> tuple[TrainState, list[float]]:
    """Return the state after all batches, and their losses; the last is nan if one failed."""
    settings, everywhere = setup.settings, replicated(setup.mesh)
    rules = setup.config.rules
    by_row = leading(setup.mesh, "batch", settings.microbatch_size, rules, before=1)
    coefficients = Penalties(np.float32(kl), np.float32(settings.entropy_coef))
    penalties = to_device(coefficients, everywhere)
    training, losses = start(setup, state, step), []
    moves = bool(batches) and has_evaluation_point(training.opt_state)
    if moves and settings.update == "full":  # a fresh adapter is at both points
        training = training._replace(trained=to_training(setup, *training[:2]))
    for i, batch in enumerate(progress(batches, f"{label}: policy update", "batch")):
        counters = to_device((np.int32(i), np.int32(len(batches))), everywhere)
        placed = to_device(batch, by_row)
        trained, opt_state, frozen, scale = training
        with jax.set_mesh(setup.mesh):  # for the attention kernels
            trained, opt_state, *numbers = train_step(
                setup, trained, frozen, opt_state, scale, placed, penalties, *counters
            )
        training = Training(trained, opt_state, frozen, scale)
        loss, norm = map(float, to_host(numbers))
        losses.append(loss if np.isfinite(norm) else np.nan)
        if not np.isfinite(losses[-1]):
            say(
                f"{label}: update skipped: batch {i} has loss {loss}, and its gradient and step"
                f" together the norm {norm}; lower outer.learning_rate?"
            )
            losses[-1] = np.nan
            training = start(setup, state, step)
            moves = False
            break
    if moves:
        training = training._replace(trained=to_evaluation(setup, *training[:2]))
    return end(setup, state, step, training), losses


def start(setup: PolicySetup, state: TrainState, step: int) -> Training:
    """Return what training begins with."""
    copied = partial(jax.tree.map, jnp.copy)  # training donates; the caller keeps its state
    head = copied(state.value_head)
    if setup.settings.update == "full":
        trained = with_head(copied(state.params), head)
        return Training(trained, copied(state.opt_state))
    key = to_device(keys.fold_one(setup.seed, keys.POLICY, step), replicated(setup.mesh))
    adapters, opt_state = fresh_adapter(setup, state.params, head, key)
    trained = with_head(take_first(adapters).weights, head)
    return Training(trained, opt_state, state.params, adapters.scale)


def end(setup: PolicySetup, state: TrainState, step: int, training: Training) -> TrainState:
    """Return the state after the update; an adapter is merged into its policy."""
    trained, adapters = training.trained, None
    params = trained["policy"]
    if setup.settings.update == "lora":
        adapters, params = merge(params, training.scale, state.params)
    next_step = to_device(np.int32(step + 1), replicated(setup.mesh))
    return TrainState(next_step, params, adapters, training.opt_state, trained.get("value"))


def used_rows(setup: PolicySetup, advantages: np.ndarray) -> np.ndarray:
    """Return which rows are trained on, bool[B]."""
    known = ~np.isnan(advantages)
    if setup.has_values:
        return known
    if not advantages[known].any():
        return np.zeros_like(known)
    # A penalty acts on rows without an advantage, too.
    penalized = setup.settings.kl_coef > 0 or setup.settings.entropy_coef > 0
    return known & (penalized or (advantages != 0))


def score_rollout(
    setup: PolicySetup,
    state: TrainState,
    rollout: Rollout,
    advantages: np.ndarray,
    reference: Params | None,
) -> tuple[TrainRows, dict[str, float]]:
    """Return the rows to train on, scored by the policy and the reference, and metrics of that."""
    score = partial(_score, setup)
    loss_mask, zeros = rollout.loss_mask, np.zeros_like(rollout.logp)
    logp, values = score(state.params, state.value_head, rollout)
    differences = np.abs(logp - rollout.logp)[loss_mask]
    metrics = {"outer/ratio_at_start": float(np.exp(differences.max(initial=0.0)))}
    ref_logp = zeros
    if setup.settings.kl_coef > 0:
        assert reference is not None
        ref_logp = score(reference, None, rollout)[0]
        log_ratio = (ref_logp - logp)[loss_mask]
        metrics["policy/kl"] = float(np.mean(np.expm1(log_ratio) - log_ratio))
    by_token, returns = np.where(loss_mask, advantages[:, None], zeros), zeros
    if setup.objective.gae is not None:
        by_token, returns = token_advantages(setup.objective.gae, advantages, values, loss_mask)
        errors = (values - returns)[loss_mask]
        metrics["policy/value_error"] = float(np.sqrt(np.mean(errors**2)))
    old_logp = rollout.logp if setup.settings.allow_stale else logp
    weight = np.zeros(len(advantages), np.float32)  # of its batch, later
    rows = (rollout.tokens, loss_mask, old_logp, ref_logp, by_token, values, returns, weight)
    return TrainRows(*rows), metrics


def _score(
    setup: PolicySetup,
    params: Params,
    head: Params | None,
    rollout: Rollout,
) -> list[np.ndarray]:
    """Return log p and values, f32[B T] each, microbatch by microbatch."""
    B, size = len(rollout.tokens), setup.settings.microbatch_size
    by_row = leading(setup.mesh, "batch", size, setup.config.rules)
    parts = []
    for first in range(0, B, size):
        index = np.minimum(np.arange(first, first + size), B - 1)
        placed = to_device((rollout.tokens[index], rollout.loss_mask[index]), by_row)
        with jax.set_mesh(setup.mesh):  # for the attention kernels
            parts.append(to_host(score_rows(setup.config, params, head, *placed)))
    return [np.concatenate(part)[:B] for part in zip(*parts, strict=True)]


def minibatches(
    setup: PolicySetup, rows: TrainRows, rng: np.random.Generator
) -> Iterator[TrainRows]:
    """Yield batches [n m ...] of rows [B ...], each weighted by its batch.

    Rows are shuffled in every epoch; n microbatches of m rows hold `batch_size` rows or, if there
    are fewer, all. A short batch is filled up with rows of weight 0.
    """
    settings, (num_rows, longest) = setup.settings, rows.tokens.shape
    average = AVERAGES[setup.objective.average]
    lengths = rows.loss_mask.sum(axis=1)
    m = settings.microbatch_size
    size = -(-min(settings.batch_size, num_rows) // m) * m
    for _ in range(settings.num_epochs):
        order = rng.permutation(num_rows)
        for first in range(0, num_rows, settings.batch_size):
            chosen = order[first : first + settings.batch_size]
            index = np.resize(chosen, size)
            weight = np.zeros(size, np.float32)
            weight[: len(chosen)] = average(np.maximum(lengths[chosen], 1), longest)
            batch = [x[index].reshape(size // m, m, -1) for x in rows[:-1]]
            yield TrainRows(*batch, weight.reshape(size // m, m))
