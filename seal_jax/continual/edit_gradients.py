"""What remedies store of an edit: gradients of its texts at the model after it, and inputs."""

import jax
import numpy as np

from seal_jax.continual.edits import fresh_adapters, pack
from seal_jax.continual.remedies.remedy import Edit, Learner, Work
from seal_jax.inner.texts import Job
from seal_jax.outer.waves import on_devices
from seal_jax.types import InnerBatch, Params


def text_batches(work: Work, edit: Edit) -> list[InnerBatch]:
    """Return an edit's texts as batches: a row each, of the sequence that they belong to."""
    jobs = [Job(tuple((text,) for text in texts), 0.0) for texts in edit.texts]
    return on_devices(work.stages, pack(work, jobs))


def text_gradients(
    work: Work, learner: Learner, edit: Edit, most: int
) -> tuple[Params, jax.Array] | None:
    """Return the gradients [S most ...] of an edit's texts by the adapters that the next edit has.

    Those behind a sequence's last text are 0. Beside them, how many texts each sequence has,
    f32[S]. None where all self-edits were rejected.

    Args:
      most: texts of each sequence that are looked at, the first ones.
    """
    texts = [list(row)[:most] for row in edit.texts]
    batches = text_batches(work, edit._replace(texts=texts))
    if not batches:
        return None
    adapters = fresh_adapters(work, learner, edit.number + 1)
    grads, _ = work.look.of_rows(learner.params, adapters, batches, most)
    return grads, work.placed(np.array([len(row) for row in texts], np.float32))
