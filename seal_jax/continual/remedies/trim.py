"""A trimmed merge: of each matrix of an edit, only the largest entries are merged.

References:
  Yadav et al., TIES-Merging, arXiv 2306.01708, section 4.
"""

from functools import partial

import jax

from seal_jax.continual.keeping import trim
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Work
from seal_jax.models.own_kernels import add_each, deltas_of
from seal_jax.types import Adapters, Params


def remedy(density: float = 0.2) -> Remedy:
    """Return the trimmed merge.

    Args:
      density: the share of entries that stays.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: expected more than 0 and at most 1")
    return Remedy(keep=partial(_keep, density))


def _keep(density: float, work: Work, learner: Learner, edit: Edit) -> Learner:
    del work
    assert edit.adapters is not None  # they are trained
    return learner._replace(params=_trimmed(learner.params, edit.adapters, density))


@partial(jax.jit, static_argnums=2)
def _trimmed(params: Params, adapters: Adapters, density: float) -> Params:
    return add_each(params, trim(deltas_of(adapters), density))
