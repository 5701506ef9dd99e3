"""A moving average: edits are merged into one model, and its slow average is what answers.

  slow = decay * slow + (1 - decay) * fast

References:
  Tarvainen and Valpola, Mean teachers, arXiv 1703.01780.
"""

from functools import partial

from seal_jax.continual.keeping import ema
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Work
from seal_jax.models.own_kernels import merge_each


def remedy(decay: float = 0.5) -> Remedy:
    """Return the moving average."""
    if not 0 < decay < 1:
        raise ValueError(f"decay is {decay}: expected more than 0 and less than 1")
    return Remedy(keep=partial(_keep, decay), splits=True)


def _keep(decay: float, work: Work, learner: Learner, edit: Edit) -> Learner:
    del work
    assert edit.adapters is not None  # they are trained
    fast = merge_each(learner.params, edit.adapters)
    # Outside of the program: what the two share stays one array.
    return learner._replace(params=fast, answers=ema(learner.answering, fast, decay))
