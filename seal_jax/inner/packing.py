"""Parsed self-edits to fixed-shape arrays (numpy): order, schedule, pack.

A `Job` is one inner run: a self-edit's texts, as tokens, with one seed. It is a list of rows. A row
is one batch of texts, written one behind the other, and the adapter takes one inner step on each
row. Rows differ in length by a factor of 20. If each adapter had a row of an array, padded to the
longest, most of the work would be padding. Instead, a step is a budget of tokens in which the rows
of several adapters lie behind one another, and it takes the adapters whose next rows fill it. An
adapter that finds no place waits. It still takes its own rows in its own order, so what it becomes
does not depend on its neighbors.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from seal_jax.inner.texts import Job, Text, row_length
from seal_jax.optim import SCHEDULES
from seal_jax.sharding import platform
from seal_jax.types import InnerBatch, Teacher


class Layout(NamedTuple):
    """How the tokens of a step lie in array rows, and in chunks, where LoRA is computed.

    Tokens that attend to one another lie in one array row of T; attention's cost grows with T, so
    it is no longer than the texts ask for: one of a few lengths, because each is a program.
    A row of a job takes whole chunks. The smaller a chunk, the fewer of its slots are empty, and
    the more often an adapter is copied.
    """

    lengths: tuple[int, ...]  # what T may be, ascending
    chunk: int = 64  # tokens of a chunk, or a part of a long array row
    slots: float = 2.0  # in chunks, for each token of a step


# TPUs compute 128 numbers side by side, and would rather copy fewer adapters than fill every slot.
# On CPUs attention and empty slots cost more, and most passages fit into 192 tokens.
TPU_LAYOUT = Layout((128, 256, 512, 1024, 2048, 4096, 8192, 16384))
CPU_LAYOUT = Layout((192, *TPU_LAYOUT.lengths[1:]), chunk=40, slots=1.5)
LONGEST = TPU_LAYOUT.lengths[-1]
_CHUNK_PART = 8  # a chunk is no less than this part of a long array row
# What a step costs beside its tokens, in tokens, and by how much a token of a long row is dearer:
# rough figures, which only decide between steps of about the same worth.
STEP_COST = 64
_ATTENTION_COST = 1 / 2048
# A small step, for what the last adapters of a population have left: this part of the budget.
_PART = 4


class Place(NamedTuple):
    """Where one row of a job lies in a step."""

    job: int
    row: int
    w: int  # which array row
    t: int  # its first token there


class Shape(NamedTuple):
    """The static shape of a step, on each shard of the population."""

    num_rows: int  # W
    length: int  # T
    num_chunks: int  # n; and no more lanes
    chunk_size: int  # c

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.length


class Step(NamedTuple):
    """One step of the schedule: for each shard of the population, which rows it takes."""

    shape: Shape
    shards: tuple[tuple[Place, ...], ...]


def schedule(
    jobs: Sequence[Job],
    *,
    tokens_per_step: int,
    num_shards: int = 1,
    layout: Layout | None = None,
) -> Iterator[Step]:
    """Yield steps until every job has taken all its rows, in order.

    Shard s has an equal part of the jobs, the s-th. Of the shapes that could run now, take the one
    with the most text per cost, filled with the rows of the jobs that have the most text left.

    Args:
      layout: this platform's by default.
    """
    row_lengths = [[row_length(row) for row in job.rows] for job in jobs]
    left = [sum(x) for x in row_lengths]
    at = [0] * len(jobs)
    size = -(-len(jobs) // num_shards)
    while any(left):
        ready = [
            sorted(
                (j for j in range(s * size, min((s + 1) * size, len(jobs))) if left[j]),
                key=lambda j: -left[j],
            )
            for s in range(num_shards)
        ]
        options = []
        longest = max(row_lengths[j][at[j]] for js in ready for j in js)
        for shape in step_shapes(longest, tokens_per_step, layout):
            shards = tuple(
                _fill(shape, [(j, at[j], row_lengths[j][at[j]]) for j in js]) for js in ready
            )
            text = sum(row_lengths[p.job][p.row] for places in shards for p in places)
            cost = shape.num_tokens * (1 + shape.length * _ATTENTION_COST) + STEP_COST
            options.append((text / cost, shape, shards))
        _, shape, shards = max(options, key=lambda option: option[0])
        yield Step(shape, shards)
        for places in shards:
            for place in places:
                left[place.job] -= row_lengths[place.job][place.row]
                at[place.job] += 1


def step_shapes(longest: int, tokens_per_step: int, layout: Layout | None = None) -> list[Shape]:
    """Return the shapes that a step may have: few, because each is a program."""
    layout = layout or (CPU_LAYOUT if platform() == "cpu" else TPU_LAYOUT)
    lengths = layout.lengths
    if longest > lengths[-1]:
        raise ValueError(f"a row of {longest} tokens: at most {lengths[-1]} fit into one step")
    sizes = [(1, max(lengths[0], tokens_per_step) // _PART)]
    for T in lengths:
        sizes.append((max(1, tokens_per_step // T), T))
        if T >= longest:
            break
    return [Shape(W, T, *_chunks(layout, W * T, T)) for W, T in sizes]


def _chunks(layout: Layout, num_tokens: int, length: int) -> tuple[int, int]:
    """Return how many chunks there are, and of how many slots."""
    num_slots = int(layout.slots * num_tokens)
    num_chunks = max(2, num_slots // max(layout.chunk, length // _CHUNK_PART))
    return num_chunks, num_slots // num_chunks


def _fill(shape: Shape, rows: Sequence[tuple[int, int, int]]) -> tuple[Place, ...]:
    """Place rows (job, row, tokens), in their order, each where the least space stays."""
    used, places, num_chunks = [0] * shape.num_rows, [], 0
    for job, row, tokens in rows:
        chunks = -(-tokens // shape.chunk_size)
        fits = [w for w in range(shape.num_rows) if used[w] + tokens <= shape.length]
        if fits and num_chunks + chunks <= shape.num_chunks:
            w = max(fits, key=lambda w: used[w])
            places.append(Place(job, row, w, used[w]))
            used[w] += tokens
            num_chunks += chunks
    return tuple(places)


def pack(
    jobs: Sequence[Job],
    *,
    tokens_per_step: int = 512,
    steps_per_call: int = 8,
    pad_id: int = 0,
    num_shards: int = 1,
    layout: Layout | None = None,
) -> list[InnerBatch]:
    """Return the inner batches (numpy) that train adapter i on jobs[i].

    Args:
      tokens_per_step: the tokens that one step has room for, on each shard.
      steps_per_call: I, the steps of one device call; missing ones are empty, and cost no compute.
      num_shards: over how many parts of the mesh the population is divided.
      layout: this platform's by default.

    Raises:
      ValueError: texts have teachers of which different numbers of tokens are known.
    """
    calls: list[list[Step]] = []
    for step in schedule(
        jobs, tokens_per_step=tokens_per_step, num_shards=num_shards, layout=layout
    ):
        if not calls or calls[-1][0].shape != step.shape or len(calls[-1]) == steps_per_call:
            calls.append([])
        calls[-1].append(step)
    of_jobs: dict[str, Any] = {
        "learning_rate": np.array([job.learning_rate for job in jobs], np.float32),
        "num_steps": np.array([len(job.rows) for job in jobs], np.int32),
        "seed": np.array([job.seed for job in jobs], np.int32),
        "schedule": _schedules(jobs),
    }
    batches, more = [], _of_texts(jobs)
    for steps in calls:
        empty = empty_batch(steps[0].shape, len(jobs), steps_per_call, num_shards, pad_id, **more)
        batches.append(empty._replace(**of_jobs))
        for i, step in enumerate(steps):
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


def _of_texts(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return which arrays the jobs' texts need beside those that every batch has."""
    texts = [text for job in jobs for row in job.rows for text in row]
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
    """Write rows into the arrays of one step, a lane for each."""
    num_texts, chunk = [0] * len(step.tokens), 0
    for lane, (job, row, w, t) in enumerate(places):
        texts = jobs[job].rows[row]
        step.lanes[lane] = job
        chunk = _place_chunks(step, chunk, lane, w * step.tokens.shape[1] + t, row_length(texts))
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
    if text.teacher is not None and step.teacher is not None:
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
