"""What all objectives are made of.

An objective is a pair of pure functions: rewards to advantages, and log-probabilities to a loss.
Rewards are host numbers, one per self-edit, so advantages are made with numpy; the loss runs on
the device, token by token. Rewards and advantages carry no gradient.

Left to the policy update, for every objective alike: the KL penalty, the entropy bonus, epochs and
minibatches.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.types import Array


class Past(NamedTuple):
    """What an outer step knows of the steps before it; saved with the policy."""

    mean_rewards: tuple[float, ...] = ()
    kls: tuple[float, ...] = ()  # to the reference policy, per token, before each update
    num_skipped: int = 0  # updates that were not finite


class Rewards(NamedTuple):
    """The rewards of an outer step."""

    values: np.ndarray  # f32[P R]; nan where no grader could tell: dropped, never zero
    # bool[P R] False for what was rejected or did not train: rest_em and random_em leave it out.
    keepable: np.ndarray


class Tokens(NamedTuple):
    """What a loss sees of the written tokens, f32[B T] each."""

    logp: jax.Array  # under the policy that is trained
    old_logp: Array  # under the policy that wrote them
    advantages: Array
    values: jax.Array  # of the value head; 0 without one, as the next two
    old_values: Array
    returns: Array


class Gae(NamedTuple):
    """Generalized advantage estimation over a self-edit's tokens, the reward at its end.

    A_t = sum_l (discount * decay)^l (r_{t+l} + discount * V_{t+l+1} - V_{t+l})

    References:
      Schulman et al., High-Dimensional Continuous Control Using GAE, arXiv 1506.02438, equation 16.
    """

    discount: float = 1.0
    decay: float = 0.95  # lambda
    normalize: bool = True  # advantages to mean 0 and deviation 1 over the outer step's tokens


class Objective(NamedTuple):
    """A policy objective."""

    # (rewards, past, rng) -> f32[P R]: the self-edits' advantages; with `gae`, their rewards, from
    # which the tokens' advantages are made. nan leaves a self-edit out of the update.
    advantages: Callable[[Rewards, Past, np.random.Generator], np.ndarray]
    loss: Callable[[Tokens], jax.Array]  # f32[B T], of each token
    average: str = "token"  # of a batch's losses: a key of AVERAGES
    needs_rewards: bool = True  # False where advantages ignore them: then nothing is evaluated
    min_edits: int = 1  # per problem; below it no advantage can be told
    gae: Gae | None = None  # not None: a value head is trained


# What a row's token losses are multiplied with, given the lengths of the batch's rows, i64[B], and
# the longest that a self-edit may be.
AVERAGES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "token": lambda lengths, longest: np.full(len(lengths), 1 / lengths.sum()),
    "sequence": lambda lengths, longest: 1 / (lengths * len(lengths)),
    "constant": lambda lengths, longest: np.full(len(lengths), 1 / (longest * len(lengths))),
}


def token_advantages(
    gae: Gae, rewards: np.ndarray, values: np.ndarray, loss_mask: Array
) -> tuple[np.ndarray, np.ndarray]:
    """Return advantages and returns of the written tokens, f32[B T] each; 0 elsewhere.

    Args:
      rewards: f32[B], each at its row's last written token.
      values: f32[B T], of the text before each token.
      loss_mask: bool[B T], one run of True per row.
    """
    B, T = values.shape
    advantages = np.zeros((B, T), np.float32)
    last = T - 1 - loss_mask[:, ::-1].argmax(axis=1)
    after, next_value = np.zeros(B, np.float32), np.zeros(B, np.float32)
    for t in reversed(range(T)):
        reward = np.where(last == t, rewards, 0)
        delta = reward + gae.discount * next_value - values[:, t]
        after = np.where(loss_mask[:, t], delta + gae.discount * gae.decay * after, 0)
        next_value = np.where(loss_mask[:, t], values[:, t], 0)
        advantages[:, t] = after
    returns = np.where(loss_mask, advantages + values, 0).astype(np.float32)
    if gae.normalize:
        written = advantages[loss_mask]
        advantages = (advantages - written.mean()) / (written.std() + 1e-8)
    return np.where(loss_mask, advantages, 0).astype(np.float32), returns


def kl_penalty(logp: jax.Array, ref_logp: Array) -> jax.Array:
    """Return an estimate of KL(policy | reference) per token that is never negative, f32[B T].

    r - 1 - log r with r = p_ref / p; unbiased for tokens that the policy wrote.

    References:
      Schulman, Approximating KL Divergence, 2020 (its k3); arXiv 2402.03300, equation 4.
    """
    log_ratio = jnp.subtract(ref_logp, logp)
    return jnp.expm1(log_ratio) - log_ratio


def kl_coefficient(initial: float, target: float, kls: Sequence[float]) -> float:
    """Return the KL penalty's coefficient after steps with these KLs; `target` 0 keeps it.

    Each step multiplies it by 1 + 0.1 clip(kl / target - 1, -0.2, 0.2).

    References:
      Ziegler et al., Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593, 2.2.
    """
    if not target:
        return initial
    factors = [1 + 0.1 * float(np.clip(kl / target - 1, -0.2, 0.2)) for kl in kls]
    return initial * float(np.prod(factors))


def imitate(tokens: Tokens) -> jax.Array:
    """Return the loss of tokens that are all as good, f32[B T]."""
    return -tokens.logp


def weighted(tokens: Tokens) -> jax.Array:
    """Return the loss whose gradient is the policy gradient, f32[B T]."""
    return tokens.logp * -tokens.advantages


def clipped(tokens: Tokens, low: float, high: float) -> jax.Array:
    """Return PPO's loss with the ratio in [1 - low, 1 + high], f32[B T]."""
    ratio = jnp.exp(tokens.logp - tokens.old_logp)
    bounded = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * tokens.advantages, bounded * tokens.advantages)


def top(value: np.ndarray, k: int) -> np.ndarray:
    """Return which of each row are its k largest, bool[P R]; the first of equals."""
    order = np.argsort(-value, axis=1, kind="stable")
    chosen = np.zeros(value.shape, bool)
    np.put_along_axis(chosen, order[:, :k], True, axis=1)
    return chosen


def check(holds: bool, message: str) -> None:
    """Raise ValueError with the message where an option is out of its bounds."""
    if not holds:
        raise ValueError(message)
