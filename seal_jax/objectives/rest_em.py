"""ReST-EM: imitate the best self-edits."""

import numpy as np

from seal_jax.objectives.objective import Objective, Past, Rewards, check, imitate, top


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
            chosen = top(value.reshape(1, -1), most).reshape(value.shape)
        else:
            chosen = top(value, k)
        return np.where(chosen & known, 1.0, np.nan).astype(np.float32)

    if select not in ("best", "threshold", "fraction"):
        raise ValueError(f"select={select!r}: expected 'best', 'threshold' or 'fraction'")
    check(k >= 1 and 0 < fraction <= 1, f"k={k}, fraction={fraction}: needs k >= 1, 0 < it <= 1")
    return Objective(advantages, imitate)
