"""What remedies store of an edit: gradients of its texts at the model after it, and inputs."""

import jax
import numpy as np

from seal_jax.continual.edits import fresh_adapters
from seal_jax.continual.remedies.remedy import Edit, Learner, Work
from seal_jax.inner import packing
from seal_jax.inner.texts import Job
from seal_jax.sharding import batch_sharding, leading, num_shards, to_device
from seal_jax.types import InnerBatch, Params


def text_batches(work: Work, edit: Edit) -> list[InnerBatch]:
    """Return an edit's texts as batches: a row each, of the sequence that they belong to."""
    stages, inner = work.stages, work.stages.settings.inner
    jobs = [Job(tuple((text,) for text in texts), 0.0) for texts in edit.texts]
    batches = packing.pack(
        jobs,
        tokens_per_step=inner.tokens_per_step,
        steps_per_call=inner.steps_per_call,
        pad_id=stages.model.tokenizer.pad_id,
        num_shards=num_shards(stages.mesh, stages.model.config.rules),
        side_by_side=True,
    )
    where = batch_sharding(stages.mesh, stages.model.config.rules)
    return [to_device(batch, where) for batch in batches]


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
    where = leading(work.stages.mesh, "adapter", work.num, work.stages.model.config.rules)
    return grads, to_device(np.array([len(row) for row in texts], np.float32), where)
