"""The control: imitate self-edits drawn at random."""

import numpy as np

from seal_jax.objectives.objective import Objective, Past, Rewards, check, imitate, top


def random_em(k: int = 1) -> Objective:
    """Return the control: as `rest_em`, over `k` self-edits of each problem drawn at random."""

    def advantages(rewards: Rewards, past: Past, rng: np.random.Generator) -> np.ndarray:
        del past
        value = np.where(rewards.keepable, rng.random(rewards.keepable.shape), -np.inf)
        return np.where(top(value, k) & rewards.keepable, 1.0, np.nan).astype(np.float32)

    check(k >= 1, f"k={k}: needs k >= 1")
    return Objective(advantages, imitate, needs_rewards=False)
