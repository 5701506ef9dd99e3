"""The policy update: fit the policy to its rollouts under an objective, as LoRA or in full.

  for epoch:  for batch of rows:
    loss = mean over tokens of objective.loss(log p, old log p, advantage)

Rows with advantage 0 are left out on the host: ReST-EM trains on few of them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import keys, lora
from seal_jax.metrics import progress
from seal_jax.models.config import ModelConfig
from seal_jax.models.transformer import hidden_states, token_logp
from seal_jax.objectives import Objective
from seal_jax.optim import Optimizer, scheduled_rate
from seal_jax.sharding import param_shardings, replicated, to_device, to_host
from seal_jax.types import Adapters, Params, Rollout, TrainState


def rollout_logp(
    config: ModelConfig, params: Params, adapters: Adapters | None, rollout: Rollout
) -> jax.Array:
    """Return log p f32[B T] of the written tokens of a rollout [B T]; 0 elsewhere."""
    B, T = rollout.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = jnp.ones((B, T), jnp.int32)  # causal: the padding behind a row is seen by none
    hidden, _ = hidden_states(config, params, rollout.tokens, positions, segments, adapters)
    hidden, targets = hidden[:, :-1].reshape(B * (T - 1), -1), rollout.tokens[:, 1:].reshape(-1)
    logp = token_logp(config, params, hidden, targets, rollout.loss_mask[:, 1:].reshape(-1))
    return jnp.pad(logp.reshape(B, T - 1), ((0, 0), (1, 0)))


def init_train_state(
    config: ModelConfig,
    params: Params,
    optimizer: Optimizer,
    *,
    mesh,
    update: str,
    **lora_kwargs: Any,
) -> TrainState:
    """Return the state before the first outer step.

    Args:
      update: 'lora' trains a fresh adapter in each outer step and merges it; 'full' trains every
        parameter, with one optimizer state for the whole run.
      lora_kwargs: rank, alpha, targets.
    """
    key = to_device(keys.fold_one(0), replicated(mesh))
    fresh = _fresh(config, optimizer, params, update, lora_kwargs, key)
    # The optimizer's zeros depend on no argument, so jit left them on the first device.
    adapters, opt_state = to_device(fresh, param_shardings(mesh, fresh))
    return TrainState(jax.device_put(np.int32(0)), params, adapters, opt_state)


def _fresh(
    config: ModelConfig,
    optimizer: Optimizer,
    params: Params,
    update: str,
    lora_kwargs: dict[str, Any],
    key: jax.Array,
) -> tuple[Adapters | None, Any]:
    """Return a new adapter (None if full) and the optimizer's state before its first step."""

    @jax.jit
    def init(params: Params, key: jax.Array):
        tx = optimizer(jnp.float32(0))
        if update == "full":
            return None, tx.init(params)
        adapters = lora.init_adapter(config, key, **lora_kwargs)
        return adapters, tx.init(lora.take(adapters, 0).weights)

    return init(params, key)


def minibatches(
    rollout: Rollout,
    advantages: np.ndarray,
    rng: np.random.Generator,
    *,
    num_epochs: int,
    batch_size: int,
    microbatch_size: int,
) -> Iterator[tuple[Rollout, np.ndarray]]:
    """Yield batches (rows [n m T], advantages f32[n m]) of the rows whose advantage is not 0.

    Rows are shuffled in every epoch; n microbatches of m rows hold `batch_size` rows or, if there
    are fewer, all. A short batch is filled up with rows of weight 0.
    """
    rows = np.flatnonzero(advantages)
    size = -(-min(batch_size, len(rows)) // microbatch_size) * microbatch_size
    shape = (size // microbatch_size, microbatch_size)
    for _ in range(num_epochs if len(rows) else 0):
        order = rng.permutation(rows)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            index = np.resize(chosen, size)
            weight = np.where(np.arange(size) < len(chosen), advantages[index], 0)
            batch = Rollout(*(x[index].reshape(*shape, -1) for x in rollout))
            yield batch, weight.astype(np.float32).reshape(shape)


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
    **lora_kwargs: Any,
) -> Callable[[TrainState, Rollout, np.ndarray], tuple[TrainState, dict[str, float]]]:
    """Return `policy_update(state, rollout, advantages, label) -> state, metrics`.

    rollout is on the host, [B T]; advantages is f32[B]. A batch's gradient is summed over
    microbatches, so memory follows `microbatch_size` and the result `batch_size`.
    """

    batching = {
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "microbatch_size": microbatch_size,
    }

    def loss_of(trained, frozen: Params, scale, rows: Rollout, weight: jax.Array) -> jax.Array:
        if update == "full":
            logp = rollout_logp(config, trained, None, rows)
        else:
            adapters = Adapters(jax.tree.map(lambda x: x[None], trained), scale)
            logp = rollout_logp(config, frozen, adapters, rows)
        return (objective.loss(logp, rows.logp, weight[:, None]) * rows.loss_mask).sum()

    @partial(jax.jit, donate_argnums=(0, 2))
    def train_step(trained, frozen, opt_state, scale, batch, step, num_steps):
        rows, weight = batch  # [batch / microbatch, microbatch, ...]
        num_tokens = jnp.maximum((rows.loss_mask * (weight != 0)[..., None]).sum(), 1)

        def one(total, microbatch):
            loss, grads = jax.value_and_grad(loss_of)(trained, frozen, scale, *microbatch)
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        (loss, grads), _ = jax.lax.scan(one, zero, (rows, weight))
        grads = jax.tree.map(lambda g: g / num_tokens.astype(g.dtype), grads)
        rate = scheduled_rate(schedule, jnp.float32(learning_rate), step, num_steps)
        updates, opt_state = optimizer(rate).update(grads, opt_state, trained)
        trained = jax.tree.map(lambda w, u: w + u.astype(w.dtype), trained, updates)
        return trained, opt_state, loss / num_tokens

    @jax.jit
    def take_first(adapters: Adapters) -> Adapters:
        return lora.take(adapters, 0)

    @jax.jit
    def finish(trained: Params, scale: jax.Array, params: Params) -> tuple[Adapters, Params]:
        adapters = Adapters(jax.tree.map(lambda x: x[None], trained), scale)
        return adapters, lora.merge(params, adapters)

    def policy_update(
        state: TrainState, rollout: Rollout, advantages: np.ndarray, label: str = "policy"
    ) -> tuple[TrainState, dict[str, float]]:
        step = int(to_host(state.step))
        params, adapters, opt_state = state.params, state.adapters, state.opt_state
        everywhere = replicated(mesh)
        if update == "full":
            # The update donates its arguments; the caller keeps its state.
            trained, frozen, scale = jax.tree.map(jnp.copy, params), {}, ()
            opt_state = jax.tree.map(jnp.copy, opt_state)
        else:
            key = to_device(keys.fold_one(seed, keys.POLICY, step), everywhere)
            adapters, opt_state = to_device(
                _fresh(config, optimizer, params, update, lora_kwargs, key), everywhere
            )
            trained, frozen, scale = take_first(adapters).weights, params, adapters.scale
        rng = np.random.default_rng([seed, keys.POLICY, step])
        batches = list(minibatches(rollout, advantages, rng, **batching))
        losses = []
        for i, batch in enumerate(progress(batches, f"{label}: policy update", "batch")):
            counters = to_device((np.int32(i), np.int32(len(batches))), everywhere)
            placed = to_device(batch, everywhere)
            with jax.set_mesh(mesh):  # for the attention kernels
                trained, opt_state, loss = train_step(
                    trained, frozen, opt_state, scale, placed, *counters
                )
            losses.append(float(to_host(loss)))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"outer step {step}, batch {i}: the policy's loss is {losses[-1]};"
                    " lower outer.learning_rate"
                )
        if update == "full":
            params = trained
        else:
            adapters, params = finish(trained, scale, params)
        metrics = {
            "policy/num_batches": len(batches),
            "policy/num_rows": int((advantages != 0).sum()),
        }
        if losses:
            metrics |= {"policy/loss_first": losses[0], "policy/loss_last": losses[-1]}
        next_step = to_device(np.int32(step + 1), everywhere)
        return TrainState(next_step, params, adapters, opt_state), metrics

    return policy_update
