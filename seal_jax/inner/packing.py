"""Parsed self-edits to fixed-shape arrays (numpy): the steps of steps.py, written out.

A `Job` is one inner run: a self-edit's texts, as tokens, with one seed. It is a list of rows. A row
is one batch of texts, written one behind the other, and the adapter takes one inner step on each
row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from seal_jax.inner.steps import Layout, Place, Shape, Step, lockstep, schedule
from seal_jax.inner.texts import Job, Text, row_length
from seal_jax.optim import SCHEDULES
from seal_jax.types import InnerBatch, Teacher


def pack(
    jobs: Sequence[Job],
    *,
    tokens_per_step: int = 512,
    steps_per_call: int = 8,
    pad_id: int = 0,
    num_shards: int = 1,
    layout: Layout | None = None,
    side_by_side: bool = False,
) -> list[InnerBatch]:
    """Return the inner batches (numpy) that train adapter i on jobs[i].

    Args:
      tokens_per_step: the tokens that one step has room for, on each shard.
      steps_per_call: I, the steps of one device call; missing ones are empty, and cost no compute.
      num_shards: over how many parts of the mesh the population is divided.
      layout: this platform's by default.
      side_by_side: array row i of every step is of jobs[i] alone, as each adapter's own kernels
        need it. A step is then as large as the longest row in it asks for, for every job, whatever
        tokens_per_step is: each of them takes one row at most.

    Raises:
      ValueError: a row is too long; of the jobs some have a schedule, or reference rows, and others
        none; texts have teachers of which different numbers of tokens are known; side by side,
        they do not divide over the shards.
    """
    calls: list[list[Step]] = []
    if side_by_side:
        steps = lockstep(jobs, num_shards=num_shards, layout=layout)
    else:
        steps = schedule(
            jobs, tokens_per_step=tokens_per_step, num_shards=num_shards, layout=layout
        )
    for step in steps:
        if not calls or calls[-1][0].shape != step.shape or len(calls[-1]) == steps_per_call:
            calls.append([])
        calls[-1].append(step)
    of_jobs: dict[str, Any] = {
        "learning_rate": np.array([job.learning_rate for job in jobs], np.float32),
        "num_steps": np.array([len(job.rows) for job in jobs], np.int32),
        "seed": np.array([job.seed for job in jobs], np.int32),
        "schedule": _schedules(jobs),
    }
    has_references, more = _have_references(jobs), _of_texts(jobs)
    batches = []
    for call in calls:
        empty = empty_batch(call[0].shape, len(jobs), steps_per_call, num_shards, pad_id, **more)
        batches.append(empty._replace(**of_jobs))
        if has_references:
            batches[-1] = batches[-1]._replace(references=np.copy(empty.lanes))
        for i, step in enumerate(call):
            for s, places in enumerate(step.shards):
                _place_rows(_shard_of(batches[-1], i, s, num_shards), jobs, places)
    return batches


def _schedules(jobs: Sequence[Job]) -> np.ndarray | None:
    """Return the schedule of each job, i32[A]; None where all have the loop's.

    Raises:
      ValueError: some have one of their own and others none.
    """
    names = {job.schedule for job in jobs if job.rows}
    if names <= {""}:
        return None
    if "" in names:
        raise ValueError("of the jobs that train side by side only some have a schedule")
    return np.array([SCHEDULES.index(job.schedule or SCHEDULES[0]) for job in jobs], np.int32)


def _have_references(jobs: Sequence[Job]) -> bool:
    """Return whether the jobs have reference rows.

    Raises:
      ValueError: some have and others have none.
    """
    found = {bool(job.references) for job in jobs if job.rows}
    if len(found) > 1:
        raise ValueError(
            "of the jobs that train side by side only some have reference rows; a job can have some"
            " without texts"
        )
    return found == {True}


def _of_texts(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return which arrays the jobs' texts need beside those that every batch has."""
    texts = [text for job in jobs for row in (*job.rows, *job.references) for text in row]
    known = {text.teacher.ids.shape[-1] for text in texts if text.teacher is not None}
    if len(known) > 1:
        numbers = ", ".join(map(str, sorted(known)))
        raise ValueError(f"texts have teachers of {numbers} tokens: expected one number for all")
    return {
        "num_taught": max(known, default=0),
        "weighted": any(text.weight != 1 for text in texts),
    }


def empty_batch(
    shape: Shape,
    num_jobs: int,
    steps_per_call: int,
    num_shards: int,
    pad_id: int = 0,
    *,
    num_taught: int = 0,
    weighted: bool = False,
) -> InnerBatch:
    """Return a batch (numpy) of steps of that shape, in which nobody trains.

    Args:
      num_taught: K of the texts' teachers; 0 where there are none.
      weighted: whether texts have weights.
    """
    W, T, n, c = shape
    num_lanes = num_shards * min(n, -(-num_jobs // num_shards))
    rows, chunks = (steps_per_call, num_shards * W, T), (steps_per_call, num_shards * n)
    teacher = None
    if num_taught:
        teacher = Teacher(
            np.full((*rows, num_taught), -1, np.int32),
            np.zeros((*rows, num_taught + 1), np.float32),
        )
    return InnerBatch(
        lanes=np.full((steps_per_call, num_lanes), -1, np.int32),
        chunk_lanes=np.zeros(chunks, np.int32),
        chunk_tokens=np.full((*chunks, c), W * T, np.int32),
        tokens=np.full(rows, pad_id, np.int32),
        segments=np.zeros(rows, np.int32),
        positions=np.zeros(rows, np.int32),
        loss_weight=np.zeros(rows, np.float32),
        learning_rate=np.zeros(num_jobs, np.float32),
        num_steps=np.zeros(num_jobs, np.int32),
        seed=np.zeros(num_jobs, np.int32),
        teacher=teacher,
        text_weight=np.ones(rows, np.float32) if weighted else None,
    )


def _shard_of(batch: InnerBatch, i: int, s: int, num_shards: int) -> InnerBatch:
    """Return views of what shard s has of step i."""
    return batch.map_steps(lambda x: x[i].reshape(num_shards, -1, *x.shape[2:])[s])


def _place_rows(step: InnerBatch, jobs: Sequence[Job], places: Sequence[Place]) -> None:
    """Write rows into the arrays of one step, a lane for each, and their reference rows."""
    num_lanes, num_texts, chunk = len(step.lanes), [0] * len(step.tokens), 0
    for lane, (job, row, w, t) in enumerate(places):
        step.lanes[lane] = job
        parts = [(lane, jobs[job].rows[row])]
        if step.references is not None and (reference := jobs[job].references[row]):
            step.references[lane] = job
            parts.append((num_lanes + lane, reference))
        for of_lane, texts in parts:
            first = w * step.tokens.shape[1] + t
            chunk = _place_chunks(step, chunk, of_lane, first, row_length(texts))
            for text in texts:
                num_texts[w] += 1
                t = _place_text(step, text, w, t, num_texts[w])


def _place_chunks(step: InnerBatch, chunk: int, lane: int, first: int, num_tokens: int) -> int:
    """Give a lane the chunks from `chunk` on for its tokens from `first` on; return the next."""
    size = step.chunk_tokens.shape[1]
    for start in range(0, num_tokens, size):
        count = min(size, num_tokens - start)
        step.chunk_lanes[chunk] = lane
        step.chunk_tokens[chunk, :count] = first + start + np.arange(count)
        chunk += 1
    return chunk


def _place_text(step: InnerBatch, text: Text, w: int, t: int, segment: int) -> int:
    """Write a text, and its padding, into array row w from t on; return where it ends."""
    at = w, slice(t, t + len(text.tokens))
    step.tokens[at] = text.tokens
    step.segments[at] = segment
    step.positions[at] = np.arange(len(text.tokens))
    step.loss_weight[at] = text.loss_mask
    if step.text_weight is not None:
        step.text_weight[w, t : t + len(text.tokens) + len(text.pads)] = text.weight
    if text.teacher is not None:
        assert step.teacher is not None  # see `_of_texts`
        step.teacher.ids[at] = text.teacher.ids
        step.teacher.logp[at] = text.teacher.logp
    if not text.pads:
        return at[1].stop
    at = w, slice(at[1].stop, at[1].stop + len(text.pads))  # its tokens are pad_id already
    step.segments[at] = -segment
    step.positions[at] = text.pads
    step.loss_weight[at] = _pad_weights(text)
    return at[1].stop


def _pad_weights(text: Text) -> np.ndarray:
    """Return how much predicting each of the text's pads counts, f32.

    The first is predicted by the text's last token, the others by the pad before, which stands for
    its share of all the padding.
    """
    num_all, num_taken = text.pads[-1] - len(text.tokens), len(text.pads) - 1
    weights = np.full(len(text.pads), num_all / max(num_taken, 1), np.float32)
    weights[0] = 1
    return weights


def useful_tokens(batches: Sequence[InnerBatch]) -> tuple[int, int]:
    """Return (text tokens, tokens that the device trains on, with idle lanes) of the batches."""
    useful = sum(int((np.asarray(b.segments) > 0).sum()) for b in batches)
    trained = 0
    for b in batches:
        num_active = int((np.asarray(b.lanes) >= 0).any(axis=1).sum())
        trained += num_active * b.tokens.shape[1] * b.tokens.shape[2]
    return useful, trained


def job_losses(
    batches: Sequence[InnerBatch], losses: Sequence[np.ndarray], num_jobs: int
) -> list[list[float]]:
    """Return the losses (on the host, [I U] for each batch) of every job's rows, in their order."""
    rows: list[list[float]] = [[] for _ in range(num_jobs)]
    for batch, loss in zip(batches, losses, strict=True):
        for i, u in np.argwhere(np.asarray(batch.lanes) >= 0):
            rows[batch.lanes[i, u]].append(float(loss[i, u]))
    return rows
