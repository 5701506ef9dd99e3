"""REINFORCE, with the mean reward as its baseline."""

from collections.abc import Sequence

import numpy as np

from seal_jax.objectives.objective import Objective, Past, Rewards, check, weighted


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
    check(0 <= decay < 1, f"decay={decay}: needs 0 <= it < 1")
    return Objective(advantages, weighted)


def running_mean(values: Sequence[float], decay: float) -> float:
    """Return the mean of `values` with weights that fall by `decay` a step into the past."""
    weights = decay ** np.arange(len(values))[::-1]
    return float((weights * values).sum() / weights.sum())
