"""A bank: no edit is merged; a question goes to the adapter of the passage that it is about.

Nothing is overwritten, so this is the upper bound of the others. Its price grows with every edit:
all adapters stay in memory, and a router looks for each question's passage, see retrieval.py.
A question about none of the passages is answered by the unedited model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.continual.asking import Asked
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Store, Work
from seal_jax.continual.retrieval import make_index, route
from seal_jax.outer.problems import Batch
from seal_jax.sharding import to_host
from seal_jax.tasks.task import prompts_of
from seal_jax.types import Adapters, Params


def remedy() -> Remedy:
    """Return the bank."""
    return Remedy(begin=_begin, keep=_keep, learn=_learn, route=_route, alone=True)


def _begin(work: Work, params: Params, adapters: Adapters) -> Store:
    """Return empty places [S N + 1 ...] of adapters; the last one stays empty."""
    del params
    return _empty(adapters, work.settings.num_edits + 1)


@partial(jax.jit, static_argnums=1)
def _empty(adapters: Adapters, places: int) -> dict[str, Any]:
    weights = jax.tree.map(
        lambda x: jnp.zeros((len(x), places, *x.shape[1:]), x.dtype), adapters.weights
    )
    return {"weights": weights, "scale": adapters.scale, "edits": jnp.zeros((), jnp.int32)}


def _keep(work: Work, learner: Learner, edit: Edit) -> Learner:
    del work, edit
    return learner


def _learn(work: Work, learner: Learner, edit: Edit, store: Any) -> Store:
    del work, learner
    assert edit.adapters is not None  # they are trained
    return _put(store, edit.adapters.weights)


@jax.jit
def _put(store: Any, new: Params) -> dict[str, Any]:
    def put(old: jax.Array, one: jax.Array) -> jax.Array:
        return old.at[:, store["edits"]].set(one)

    weights = jax.tree.map(put, store["weights"], new)
    return store | {"weights": weights, "edits": store["edits"] + 1}


def _route(work: Work, learner: Learner, store: Any, posed: Sequence[Batch]) -> Asked:
    places, edits = work.settings.num_edits + 1, int(to_host(store["edits"]))
    groups = []
    for s, batch in enumerate(posed):
        passages = [f"{p.title} {p.passage}" for p, _ in work.sequences[s][:edits]]
        asked = [prompt for pair in batch for prompt in prompts_of(work.stages.task, *pair)]
        found = route(make_index(passages), asked)
        chosen = [places - 1 if one.passage is None else one.passage for one in found]
        groups.append([s * places + i for i in chosen])
    return Asked(learner.params, _in_a_row(store), groups, work.num * places)


@jax.jit
def _in_a_row(store: Any) -> Adapters:
    """Return the adapters [S N + 1 ...] as one stack."""
    weights = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), store["weights"])
    places = jax.tree.leaves(store["weights"])[0].shape[1]
    return Adapters(weights, jnp.repeat(store["scale"], places))
