"""A time-weighted merge: the k-th edit counts 1 / sqrt(k), and begins where the last one was.

  kernel += 1 / sqrt(k) * scale * a.T @ b,     a begins as an orthonormal basis of the last a

References:
  Qiao and Mahdavi, Merge before Forget, arXiv 2512.23017.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.continual.keeping import init_from_last, time_scale
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Store, Work
from seal_jax.continual.remedies.scale import keep_scaled
from seal_jax.types import Adapters, Params


def remedy() -> Remedy:
    """Return the time-weighted merge."""
    keep = partial(keep_scaled, lambda number: time_scale(number + 1))
    return Remedy(keep=keep, begin=_begin, start=_start, learn=_learn, frame="own")


def _begin(work: Work, params: Params, adapters: Adapters) -> Store:
    del work, params
    return _store(adapters, True)


@partial(jax.jit, static_argnums=1)
def _store(adapters: Adapters, is_first: bool) -> dict[str, Any]:
    return {"adapters": adapters, "is_first": jnp.bool_(is_first)}


@jax.jit
def _start(store: Any, adapters: Adapters) -> Adapters:
    again = init_from_last(store["adapters"])
    return jax.tree.map(lambda new, old: jnp.where(store["is_first"], new, old), adapters, again)


def _learn(work: Work, learner: Learner, edit: Edit, store: Store) -> Store:
    del work, learner, store
    assert edit.adapters is not None  # they are trained
    return _store(edit.adapters, False)
