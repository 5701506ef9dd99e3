"""A gate: one edit is tried at several scales, and merged at the one that gains most for its harm.

  value(g) = new(g) - new(0) - weight * (old(0) - old(g))

`new` is the mean log-likelihood of the edit's own texts, `old` of the memory's. Where no scale is
worth more than 0 the edit is refused, and counted.

References:
  STABLE, arXiv 2510.16089, gates merges by what they would break.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import keys
from seal_jax.continual.asking import text_scores
from seal_jax.continual.keeping import choose_scales
from seal_jax.continual.memory import choose
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Work
from seal_jax.inner.texts import Text
from seal_jax.models.own_kernels import merge_each
from seal_jax.types import Adapters


def remedy(
    scales: Sequence[float] = (0.0, 0.25, 0.5, 1.0), weight: float = 1.0, num_texts: int = 16
) -> Remedy:
    """Return the gate.

    Args:
      scales: to try, 0 among them.
      weight: of what is lost on the memory.
      num_texts: of the memory, that are scored.
    """
    scales = tuple(map(float, scales))
    choose_scales(np.zeros((1, len(scales))), np.zeros((1, len(scales))), scales, weight)
    if num_texts < 1:
        raise ValueError(f"num_texts is {num_texts}: expected 1 or more")
    return Remedy(memory="reservoir", keep=partial(_keep, scales, weight, num_texts))


def _keep(
    scales: tuple[float, ...],
    weight: float,
    num_texts: int,
    work: Work,
    learner: Learner,
    edit: Edit,
) -> Learner:
    assert edit.adapters is not None  # they are trained
    seed = work.stages.settings.seed
    old = [
        [
            Text(entry.tokens, entry.loss_mask)
            for entry in choose(one, (seed, keys.REFERENCE, edit.number, s, 2), num_texts=num_texts)
        ]
        for s, one in enumerate(learner.memories)
    ]
    tried = at_scales(edit.adapters, scales)
    texts = [[*edit.texts[s], *old[s]] for s in range(work.num) for _ in scales]
    scores = text_scores(work, learner.params, texts, tried)
    shape = work.num, len(scales)
    sizes = [len(row) for row in edit.texts for _ in scales]
    new = np.reshape([_mean(x[:n]) for x, n in zip(scores, sizes, strict=True)], shape)
    before = np.reshape([_mean(x[n:]) for x, n in zip(scores, sizes, strict=True)], shape)
    gate = choose_scales(new, before, scales, weight)
    # A rejected self-edit has trained nothing: the gate has refused nothing.
    refused = sum(bool(no) for no, row in zip(gate.refused, edit.texts, strict=True) if row)
    return learner._replace(
        params=merge_each(learner.params, edit.adapters, work.placed(gate.scales)),
        refused=learner.refused + refused,
    )


@partial(jax.jit, static_argnums=1)
def at_scales(adapters: Adapters, scales: tuple[float, ...]) -> Adapters:
    """Return each adapter G times in a row, at G scales."""
    repeated = jax.tree.map(lambda x: jnp.repeat(x, len(scales), axis=0), adapters)
    factors = jnp.tile(jnp.asarray(scales, jnp.float32), len(adapters.scale))
    return repeated._replace(scale=repeated.scale * factors)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
