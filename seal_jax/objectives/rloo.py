"""REINFORCE, leave-one-out: the baseline is the mean of the problem's other rewards."""

import numpy as np

from seal_jax.objectives.objective import Objective, Past, Rewards, weighted


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

    return Objective(advantages, weighted, min_edits=2)
