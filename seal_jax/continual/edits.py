"""One edit of all sequences: a self-edit of each model, its training, and what is kept of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from seal_jax import keys
from seal_jax.continual.asking import text_scores
from seal_jax.continual.memory import Memory, mix, remember, replay_counts, rescore
from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Work
from seal_jax.inner import packing
from seal_jax.inner.texts import PADDED, Job, Text, make_job
from seal_jax.models.own_kernels import merge_each
from seal_jax.outer.stages import parse, write
from seal_jax.outer.waves import chosen_by, on_devices
from seal_jax.sharding import num_shards, to_host
from seal_jax.tasks.task import Rejected
from seal_jax.types import Adapters, InnerBatch


class Trained(NamedTuple):
    """What became of an edit."""

    losses: list[list[float]]  # of each sequence's steps
    num_tokens: int  # that were trained on, of all sequences
    replayed: int  # texts among them that came from a memory


def write_edits(work: Work, learner: Learner, number: int) -> tuple[Edit, list[Any]]:
    """Let each model write a self-edit on its next problem; return it, and it as parsed [S]."""
    stages = work.stages
    batch = [sequence[number] for sequence in work.sequences]
    prompts = [stages.task.edit_prompt(problem) for problem, _ in batch]
    paths = [
        (*_path(work, keys.SAMPLE, number), keys.number_of(problem.id), s)
        for s, (problem, _) in enumerate(batch)
    ]
    label = f"edit {number + 1}: self-edits"
    _, written = write(stages, learner.params, prompts, paths, label, stages.constrain)
    parsed = [one for (one,) in parse(stages, batch, written)]
    edits = [None if isinstance(one, Rejected) else one for one in parsed]
    pairs = [
        [(str(text), stages.encode(text, edit.outputs_only)) for text in edit.training_texts]
        if edit
        else []
        for edit in edits
    ]
    # Without a token to be predicted there is nothing to learn.
    pairs = [[pair for pair in row if len(pair[1].tokens) > 1] for row in pairs]
    texts = [[text for _, text in row] for row in pairs]
    sources = [[shown for shown, _ in row] for row in pairs]
    inner = stages.settings.inner
    chosen = [chosen_by(edit, inner) if edit else inner for edit in edits]
    return Edit(number, batch, texts, sources, chosen), parsed


def train(work: Work, learner: Learner, edit: Edit) -> tuple[Edit, Trained]:
    """Train an adapter for each sequence's edit, with what the remedies add."""
    stages, texts = work.stages, edit.texts
    for teach in _each(work, "teach"):
        texts = teach(work, learner, edit)
    jobs, replayed = make_jobs(work, learner, edit._replace(texts=texts))
    batches = pack(work, jobs)
    adapters, context = fresh_adapters(work, learner, edit.number), {}
    for name, remedy in work.remedies.items():
        if remedy.context is not None:
            context |= remedy.context(learner.stores.get(name), adapters)
    adapters, losses = stages.inner_update(
        learner.params, adapters, on_devices(stages, batches), context=context or None
    )
    found = packing.job_losses(batches, to_host(losses), work.num)
    useful, _ = packing.useful_tokens(batches)
    return edit._replace(adapters=adapters), Trained(found, useful, replayed)


def pack(work: Work, jobs: Sequence[Job]) -> list[InnerBatch]:
    """Return the batches (numpy) of jobs, one of each sequence, side by side."""
    stages, inner = work.stages, work.stages.settings.inner
    return packing.pack(
        jobs,
        tokens_per_step=inner.tokens_per_step,
        steps_per_call=inner.steps_per_call,
        pad_id=stages.model.tokenizer.pad_id,
        num_shards=num_shards(stages.mesh, stages.model.config.rules),
        side_by_side=True,
    )


def fresh_adapters(work: Work, learner: Learner, number: int) -> Adapters:
    """Return a new adapter for each sequence, as the remedies let it begin."""
    stages = work.stages
    fixed = any(remedy.frame == "fixed" for remedy in work.remedies.values())
    step = _path(work, keys.ADAPTER, 0 if fixed else number)
    paths = keys.fold([(*step, s) for s in range(work.num)])
    adapters = work.placed(stages.init_adapters(paths))
    for name, remedy in work.remedies.items():
        if remedy.start is not None:
            adapters = remedy.start(learner.stores.get(name), adapters)
    return adapters


def make_jobs(work: Work, learner: Learner, edit: Edit) -> tuple[list[Job], int]:
    """Return the inner run of each sequence, and how many of all texts come from memories."""
    jobs = [_job_of(work, edit, s) for s in range(work.num)]
    num_old = 0
    for remedy in work.remedies.values():
        if remedy.old is not None:
            jobs, num_old = _with_old(work, learner, edit.number, remedy, jobs)
    if any(remedy.reference for remedy in work.remedies.values()):
        jobs = [_with_references(work, learner, edit.number, s, job) for s, job in enumerate(jobs)]
    return jobs, num_old


def _job_of(work: Work, edit: Edit, s: int) -> Job:
    inner = edit.inner[s]
    if not edit.texts[s]:
        return Job((), inner.learning_rate)
    return make_job(
        edit.texts[s],
        num_epochs=inner.num_epochs,
        batch_size=inner.batch_size,
        learning_rate=inner.learning_rate,
        key=(*_path(work, keys.SHUFFLE, edit.number), s),
        pad_loss=inner.pad_loss,
        padded=min(PADDED, work.stages.model.config.max_length),
    )


def _with_old(
    work: Work, learner: Learner, number: int, remedy: Remedy, jobs: Sequence[Job]
) -> tuple[list[Job], int]:
    """Let a share of the texts of every job come from the memory of its sequence."""
    assert remedy.old is not None
    counts = [
        replay_counts(job.rows, remedy.share, remedy.extra) if memory.entries else []
        for job, memory in zip(jobs, learner.memories, strict=True)
    ]
    totals = [sum(row) for row in counts]
    if not any(totals):
        return [*jobs], 0
    old = remedy.old(work, learner, number, totals)
    mixed = [
        job._replace(rows=mix(job.rows, row, texts, remedy.extra)) if row else job
        for job, row, texts in zip(jobs, counts, old, strict=True)
    ]
    return mixed, sum(totals)


def _with_references(work: Work, learner: Learner, number: int, s: int, job: Job) -> Job:
    """Give each step of a job a batch of the sequence's memory, if there is any."""
    entries = learner.memories[s].entries
    if not entries:  # the program is the same: a gradient of nothing is 0
        return job._replace(references=((),) * len(job.rows))
    rng = np.random.default_rng([*_path(work, keys.REFERENCE, number), s])
    size = min(work.stages.settings.inner.batch_size, len(entries))
    chosen = [rng.choice(len(entries), size=size, replace=False) for _ in job.rows]
    texts = [Text(entry.tokens, entry.loss_mask) for entry in entries]
    return job._replace(references=tuple(tuple(texts[i] for i in row) for row in chosen))


def keep(work: Work, learner: Learner, edit: Edit) -> Learner:
    """Return the models with the edit as a remedy keeps it: merged, unless one says otherwise."""
    (rule,) = _each(work, "keep") or [merge]
    return rule(work, learner, edit)


def merge(work: Work, learner: Learner, edit: Edit) -> Learner:
    """Add what the adapters have learned to each model's kernels, in float32."""
    del work
    assert edit.adapters is not None  # they are trained
    return learner._replace(params=merge_each(learner.params, edit.adapters))


def learn(work: Work, learner: Learner, edit: Edit) -> Learner:
    """Let memories and the remedies' stores take up an edit."""
    stores = dict(learner.stores)
    for name, remedy in work.remedies.items():
        if remedy.learn is not None:
            stores[name] = work.placed(remedy.learn(work, learner, edit, stores.get(name)))
    learner = learner._replace(stores=stores)
    if not any(remedy.memory for remedy in work.remedies.values()):
        return learner
    return learner._replace(memories=_remembered(work, learner, edit))


def _remembered(work: Work, learner: Learner, edit: Edit) -> tuple[Memory, ...]:
    new = [
        [*zip(shown, texts, strict=True)]
        for shown, texts in zip(edit.sources, edit.texts, strict=True)
    ]
    for recall in _each(work, "remember"):
        new = recall(work, learner, edit)
    memories = [
        remember(one, edit.number, new[s], (*_path(work, keys.REFERENCE, edit.number), s, 3))
        for s, one in enumerate(learner.memories)
    ]
    if memories[0].kind == "most_forgotten":
        texts = [[Text(x.tokens, x.loss_mask) for x in one.entries] for one in memories]
        scores = text_scores(work, learner.params, texts)
        memories = [rescore(one, row) for one, row in zip(memories, scores, strict=True)]
    return tuple(memories)


def _each(work: Work, place: str) -> list[Callable]:
    found = [getattr(remedy, place) for remedy in work.remedies.values()]
    return [one for one in found if one is not None]


def _path(work: Work, purpose: int, number: int) -> tuple[int, ...]:
    """Return how a path of a key begins; see keys.py."""
    return work.stages.settings.seed, purpose, keys.CONTINUAL_STEP + number
