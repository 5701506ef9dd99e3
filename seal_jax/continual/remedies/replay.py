"""Replay: a share of the texts that an edit trains on are those of earlier edits.

  loss = mean over the batch, of which `share` texts are drawn from the memory

Which ones the memory keeps and gives is `kind`, see continual/memory.py. By default they take the
place of new texts, so that an edit costs as much as without.

References:
  Chaudhry et al., On Tiny Episodic Memories in Continual Learning, arXiv 1902.10486.
  arXiv 2511.22367: replay of a tenth is strong, the most surprising texts first a little better.
"""

from collections.abc import Sequence

from seal_jax import keys
from seal_jax.continual.memory import choose, make_memory
from seal_jax.continual.remedies.remedy import Learner, Remedy, Texts, Work
from seal_jax.inner.texts import Text


def remedy(share: float = 0.25, kind: str = "reservoir", extra: bool = False) -> Remedy:
    """Return replay.

    Args:
      share: of the texts, above 0 and below 1.
      kind: 'reservoir', 'per_problem' or 'most_forgotten'.
      extra: beside the new texts, not in their place: an edit then costs more.
    """
    check_replay(share, kind)
    return Remedy(share=share, extra=extra, memory=kind, old=drawn_texts)


def check_replay(share: float, kind: str) -> None:
    """Raise ValueError where there is no such share or memory."""
    if not 0 < share < 1:
        raise ValueError(f"share is {share}: expected more than 0 and less than 1")
    make_memory(kind, 1)


def drawn_texts(work: Work, learner: Learner, number: int, counts: Sequence[int]) -> Texts:
    """Return so many texts of each sequence's memory."""
    seed = work.stages.settings.seed
    return [
        [
            Text(entry.tokens, entry.loss_mask)
            for entry in choose(
                learner.memories[s], (seed, keys.REFERENCE, number, s, 1), num_texts=count
            )
        ]
        if count
        else []
        for s, count in enumerate(counts)
    ]
