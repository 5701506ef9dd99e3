"""GRPO: rewards relative to those of the same problem."""

from functools import partial

import numpy as np

from seal_jax.objectives.objective import AVERAGES, Objective, Past, Rewards, check, clipped


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
    check(0 < clip < 1 and high > 0, f"clip={clip}, clip_high={clip_high}: needs 0 < clip < 1")
    if average not in AVERAGES:
        raise ValueError(f"average={average!r}: expected one of {', '.join(AVERAGES)}")
    loss = partial(clipped, low=clip, high=high)
    return Objective(advantages, loss, average=average, min_edits=2)
