"""Grades to rewards: f32[P R] from what each inner run achieved."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Outcome(NamedTuple):
    """What one inner run, a self-edit with one seed, achieved."""

    accuracy: float  # share of the exam's questions answered rightly, without the passage
    log_likelihood: float | None  # mean over questions of the gold answer's mean log p per token
    loss_before: float  # mean training loss of the first epoch
    loss_after: float  # and of the last
    answers: tuple[str, ...]
    useful_tokens: int  # text tokens that the run trained on
    trained_tokens: float = 0.0  # its share of its wave's tokens, padding and idle lanes included

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss_before) and np.isfinite(self.loss_after))


def reward_of(outcomes: Sequence[Outcome], kind: str, rejected: float) -> float:
    """Return a self-edit's reward: the mean over its seeds of accuracy or log-likelihood.

    No outcome (the self-edit was rejected), or one whose training was not finite, earns `rejected`.
    """
    if not outcomes or not all(outcome.finite for outcome in outcomes):
        return rejected
    return float(np.mean([getattr(outcome, kind) for outcome in outcomes]))
