"""A KL term on memory texts: the model goes on saying of them what it said before the edit.

  loss(old text) = KL(p || q),  p the model before the edit, q the one that trains

Like replay, but it holds the model to what it said, and not to the texts. Of each distribution the
likeliest tokens are told apart, see models/divergence.py.

References:
  Li and Hoiem, Learning without Forgetting, arXiv 1606.09282.
"""

from collections.abc import Sequence
from functools import partial

from seal_jax.continual.remedies.remedy import Learner, Remedy, Texts, Work
from seal_jax.continual.remedies.replay import check_replay, drawn_texts
from seal_jax.inner.teachers import Lesson, with_teachers


def remedy(
    share: float = 0.25, kind: str = "reservoir", extra: bool = False, top: int = 16
) -> Remedy:
    """Return the KL term.

    Args:
      share, kind, extra: as of replay.
      top: how many tokens of each distribution are told apart.
    """
    check_replay(share, kind)
    if top < 1:
        raise ValueError(f"top is {top}: expected 1 or more")
    return Remedy(share=share, extra=extra, memory=kind, old=partial(_held, top), top=top)


def _held(top: int, work: Work, learner: Learner, number: int, counts: Sequence[int]) -> Texts:
    stages, texts = work.stages, drawn_texts(work, learner, number, counts)
    return with_teachers(
        stages.model,
        learner.params,
        [[Lesson(text) for text in row] for row in texts],
        top=top,
        mesh=stages.mesh,
        max_rows=stages.settings.answer.max_rows,
    )
