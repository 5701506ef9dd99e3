"""Objectives: what the outer loop makes of rewards.

An objective is a pair of pure functions: rewards to advantages, and log-probabilities to a loss.
Rewards are host numbers, one per self-edit, so advantages are made with numpy; the loss runs on
the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np


class Objective(NamedTuple):
    """A policy objective."""

    # (rewards f32[P R], valid bool[P R], rng) -> advantages f32[P R]; 0 where not valid
    advantages: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
    # (logp f32[B T], old_logp f32[B T], advantages f32[B 1]) -> loss of each token f32[B T]
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    needs_rewards: bool = True  # False where advantages ignore them: then nothing is evaluated


def rest_em(select: str = "best", threshold: float = 0.0) -> Objective:
    """Return ReST-EM: filter the self-edits by reward, then fit the policy to what is left.

    loss = -sum_t log p(token_t | before) over the kept self-edits.

    Args:
      select: 'best' keeps the best self-edit of each problem (the first of equals); 'threshold'
        all with a reward above `threshold`; 'random' one of each problem, whatever its reward: the
        control.

    References:
      Singh et al., Beyond Human Data, arXiv 2312.06585; SEAL, arXiv 2506.10943, section 3.1.
    """

    def advantages(rewards: np.ndarray, valid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        draw = rng.random(rewards.shape)  # drawn always, so that `select` alone decides
        if select == "threshold":
            return (valid & (rewards > threshold)).astype(np.float32)
        value = np.where(valid, rewards if select == "best" else draw, -np.inf)
        best = np.arange(rewards.shape[1])[None] == value.argmax(axis=1)[:, None]
        return (best & valid).astype(np.float32)

    def loss(logp: jax.Array, old_logp: jax.Array, advantages: jax.Array) -> jax.Array:
        del old_logp  # on-policy up to the filter: no ratio
        return -advantages * logp

    if select not in ("best", "threshold", "random"):
        raise ValueError(f"select={select!r}: expected 'best', 'threshold' or 'random'")
    return Objective(advantages, loss, needs_rewards=select != "random")


OBJECTIVES = {"rest_em": rest_em}
