"""A scaled merge: each edit is merged at a fixed part of its size.

  kernel += factor * scale * a.T @ b

The simplest way to break less, and the control of all others, beside a lower learning rate.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Work
from seal_jax.models.own_kernels import merge_each


def remedy(factor: float = 0.5) -> Remedy:
    """Return the scaled merge."""
    if not 0 < factor <= 1:
        raise ValueError(f"factor is {factor}: expected more than 0 and at most 1")
    return Remedy(keep=partial(keep_scaled, lambda number: factor))


def keep_scaled(
    factor: Callable[[int], float], work: Work, learner: Learner, edit: Edit
) -> Learner:
    """Merge each edit times factor(number of the edit, from 0)."""
    assert edit.adapters is not None  # they are trained
    factors = work.placed(np.full(work.num, factor(edit.number), np.float32))
    return learner._replace(params=merge_each(learner.params, edit.adapters, factors))
