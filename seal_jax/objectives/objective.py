"""Objectives: what the outer loop makes of rewards.

An objective is a pair of pure functions: rewards to advantages, and log-probabilities to a loss.
Rewards are host numbers, one per self-edit, so advantages are made with numpy; the loss runs on
the device, token by token. Rewards and advantages carry no gradient.

Left to the policy update, for every objective alike: the KL penalty, the entropy bonus, epochs and
minibatches.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Past(NamedTuple):
    """What an outer step knows of the steps before it; saved with the policy."""

    mean_rewards: tuple[float, ...] = ()
    kls: tuple[float, ...] = ()  # to the reference policy, per token, before each update
    num_skipped: int = 0  # updates that were not finite


class Rewards(NamedTuple):
    """The rewards of an outer step."""

    values: np.ndarray  # f32[P R]; nan where no grader could tell: dropped, never zero
    keepable: np.ndarray  # bool[P R] False for what was rejected or did not train: never imitated


class Tokens(NamedTuple):
    """What a loss sees of the written tokens, f32[B T] each."""

    logp: jax.Array  # under the policy that is trained
    old_logp: jax.Array  # under the policy that wrote them
    advantages: jax.Array
    values: jax.Array  # of the value head; 0 without one, as the next two
    old_values: jax.Array
    returns: jax.Array


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


def rest_em(
    select: str = "best", k: int = 1, threshold: float = 0.0, fraction: float = 0.2
) -> Objective:
    """Return ReST-EM: filter the self-edits by reward, then fit the policy to what is left.

    loss_t = -log p(token_t | before), over the kept self-edits

    Args:
      select: 'best' keeps the `k` best self-edits of each problem (the first of equals);
        'threshold' all with a reward above `threshold`; 'fraction' the best of the whole step.

    References:
      Singh et al., Beyond Human Data, arXiv 2312.06585; SEAL, arXiv 2506.10943, section 3.1.
    """

    def advantages(rewards: Rewards, past: Past, rng: np.random.Generator) -> np.ndarray:
        del past, rng
        known = rewards.keepable & ~np.isnan(rewards.values)
        value = np.where(known, rewards.values, -np.inf)
        if select == "threshold":
            chosen = value > threshold
        elif select == "fraction":
            most = max(1, round(fraction * value.size))
            chosen = _top(value.reshape(1, -1), most).reshape(value.shape)
        else:
            chosen = _top(value, k)
        return np.where(chosen & known, 1.0, np.nan).astype(np.float32)

    if select not in ("best", "threshold", "fraction"):
        raise ValueError(f"select={select!r}: expected 'best', 'threshold' or 'fraction'")
    _check(k >= 1 and 0 < fraction <= 1, f"k={k}, fraction={fraction}: needs k >= 1, 0 < it <= 1")
    return Objective(advantages, _imitate)


def random_em(k: int = 1) -> Objective:
    """Return the control: as `rest_em`, over `k` self-edits of each problem drawn at random."""

    def advantages(rewards: Rewards, past: Past, rng: np.random.Generator) -> np.ndarray:
        del past
        value = np.where(rewards.keepable, rng.random(rewards.keepable.shape), -np.inf)
        return np.where(_top(value, k) & rewards.keepable, 1.0, np.nan).astype(np.float32)

    _check(k >= 1, f"k={k}: needs k >= 1")
    return Objective(advantages, _imitate, needs_rewards=False)


def reinforce(baseline: str = "batch", decay: float = 0.9) -> Objective:
    """Return REINFORCE.

    loss_t = -(reward - baseline) log p(token_t | before)

    On-policy for one batch of one epoch only; there is no ratio to correct for more.

    Args:
      baseline: 'batch' is the mean reward of the step, 'running' the decaying mean of the steps
        before it (of this step, in the first), 'none' is 0.

    References:
      Williams, Simple Statistical Gradient-Following Algorithms, Machine Learning 8, 1992.
    """

    def advantages(rewards: Rewards, past: Past, rng: np.random.Generator) -> np.ndarray:
        del rng
        values = rewards.values
        if baseline == "none" or np.isnan(values).all():
            return values
        if baseline == "running" and past.mean_rewards:
            return values - np.float32(running_mean(past.mean_rewards, decay))
        return values - np.nanmean(values)

    if baseline not in ("batch", "running", "none"):
        raise ValueError(f"baseline={baseline!r}: expected 'batch', 'running' or 'none'")
    _check(0 <= decay < 1, f"decay={decay}: needs 0 <= it < 1")
    return Objective(advantages, _weighted)


def rloo() -> Objective:
    """Return REINFORCE with the other self-edits of the same problem as the baseline.

    loss_t = -(reward_r - mean of the problem's other rewards) log p(token_t | before)

    References:
      Ahmadian et al., Back to Basics, arXiv 2402.14740, equation 7.
    """

    def advantages(rewards: Rewards, past: Past, rng: np.random.Generator) -> np.ndarray:
        del past, rng
        values = rewards.values
        count = (~np.isnan(values)).sum(axis=1, keepdims=True)
        others = (np.nansum(values, axis=1, keepdims=True) - values) / np.maximum(count - 1, 1)
        return np.where(count > 1, values - others, 0 * values).astype(np.float32)

    return Objective(advantages, _weighted, min_edits=2)


def grpo(
    clip: float = 0.2,
    clip_high: float | None = None,
    normalize_std: bool = True,
    average: str = "sequence",
) -> Objective:
    """Return GRPO: rewards relative to their group, and PPO's clipped ratio without a value head.

    advantage = (reward - mean of its problem's) / std of its problem's
    loss_t = -min(ratio_t advantage, clip(ratio_t, 1 - clip, 1 + clip_high) advantage)

    Left out: the KL penalty within the objective; `outer.kl_coef` adds it.

    Args:
      clip_high: the upper clip where it differs (clip-higher); None is `clip`.
      normalize_std: False leaves the division out, as Dr. GRPO does.
      average: 'sequence' is GRPO's, 'token' DAPO's, 'constant' Dr. GRPO's.

    References:
      Shao et al., DeepSeekMath, arXiv 2402.03300, equation 3; Yu et al., DAPO, arXiv 2503.14476;
      Liu et al., Understanding R1-Zero-Like Training (Dr. GRPO), arXiv 2503.20783.
    """

    def advantages(rewards: Rewards, past: Past, rng: np.random.Generator) -> np.ndarray:
        del past, rng
        known = ~np.isnan(rewards.values)
        count = np.maximum(known.sum(axis=1, keepdims=True), 1)
        values = np.where(known, rewards.values, 0)
        centered = np.where(known, values - values.sum(axis=1, keepdims=True) / count, 0)
        if normalize_std:
            std = np.sqrt((centered**2).sum(axis=1, keepdims=True) / count)
            centered = np.where(std > 1e-6, centered / np.maximum(std, 1e-6), 0)
        return np.where(known, centered, np.nan).astype(np.float32)

    high = clip if clip_high is None else clip_high
    _check(0 < clip < 1 and high > 0, f"clip={clip}, clip_high={clip_high}: needs 0 < clip < 1")
    if average not in AVERAGES:
        raise ValueError(f"average={average!r}: expected one of {', '.join(AVERAGES)}")
    loss = lambda tokens: _clipped(tokens, clip, high)  # noqa: E731
    return Objective(advantages, loss, average=average, min_edits=2)


def ppo(
    clip: float = 0.2,
    value_coef: float = 0.5,
    value_clip: float = 0.2,
    discount: float = 1.0,
    gae_decay: float = 0.95,
    normalize_advantages: bool = True,
) -> Objective:
    """Return PPO: the clipped ratio, and a value head on the policy.

    loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - clip, 1 + clip) A_t)
             + value_coef / 2 max((V_t - R_t)^2, (V_old + clip(V_t - V_old) - R_t)^2)

    with A from `Gae` and R = A + V_old before the normalization of A. Entropy bonus and KL penalty:
    `outer.entropy_coef`, `outer.kl_coef` and `outer.kl_target`.

    References:
      Schulman et al., Proximal Policy Optimization, arXiv 1707.06347, equations 7 and 9.
    """

    def advantages(rewards: Rewards, past: Past, rng: np.random.Generator) -> np.ndarray:
        del past, rng
        return rewards.values

    def loss(tokens: Tokens) -> jax.Array:
        moved = jnp.clip(tokens.values - tokens.old_values, -value_clip, value_clip)
        errors = (
            tokens.values - tokens.returns,
            tokens.old_values + moved - tokens.returns,
        )
        value_loss = 0.5 * jnp.maximum(errors[0] ** 2, errors[1] ** 2)
        return _clipped(tokens, clip, clip) + value_coef * value_loss

    _check(0 < clip < 1, f"clip={clip}: needs 0 < clip < 1")
    _check(value_clip > 0 and value_coef >= 0, f"value_clip={value_clip}, value_coef={value_coef}")
    _check(0 < discount <= 1 and 0 <= gae_decay <= 1, f"discount={discount}, gae_decay={gae_decay}")
    return Objective(advantages, loss, gae=Gae(discount, gae_decay, normalize_advantages))


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "rest_em": rest_em,
    "random_em": random_em,
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "ppo": ppo,
}


def make_objective(name: str, **options: Any) -> Objective:
    """Return an objective by its name in OBJECTIVES.

    Raises:
      ValueError: no objective or no option of that name, or a value that it cannot have.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    known = list(inspect.signature(OBJECTIVES[name]).parameters)
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, 1, 0.0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{name} has no option {option!r}{hint} (it has: {', '.join(known)})")
    try:
        return OBJECTIVES[name](**options)
    except TypeError as error:  # a word where a number belongs
        raise ValueError(f"{name}: {options}: {error}") from error


def token_advantages(
    gae: Gae, rewards: np.ndarray, values: np.ndarray, loss_mask: np.ndarray
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


def kl_penalty(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
    """Return an estimate of KL(policy | reference) per token that is never negative, f32[B T].

    r - 1 - log r with r = p_ref / p; unbiased for tokens that the policy wrote.

    References:
      Schulman, Approximating KL Divergence, 2020 (its k3); arXiv 2402.03300, equation 4.
    """
    log_ratio = ref_logp - logp
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


def running_mean(values: Sequence[float], decay: float) -> float:
    """Return the mean of `values` with weights that fall by `decay` a step into the past."""
    weights = decay ** np.arange(len(values))[::-1]
    return float((weights * values).sum() / weights.sum())


def _imitate(tokens: Tokens) -> jax.Array:
    return -tokens.logp


def _weighted(tokens: Tokens) -> jax.Array:
    return -tokens.advantages * tokens.logp


def _clipped(tokens: Tokens, low: float, high: float) -> jax.Array:
    ratio = jnp.exp(tokens.logp - tokens.old_logp)
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * tokens.advantages, clipped * tokens.advantages)


def _top(value: np.ndarray, k: int) -> np.ndarray:
    """Return which of each row are its k largest, bool[P R]; the first of equals."""
    order = np.argsort(-value, axis=1, kind="stable")
    chosen = np.zeros(value.shape, bool)
    np.put_along_axis(chosen, order[:, :k], True, axis=1)
    return chosen


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
