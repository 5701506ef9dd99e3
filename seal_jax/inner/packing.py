"""Parsed self-edits to fixed-shape arrays (numpy): order, schedule, pack.

A `Job` is one inner run: a self-edit's token texts with one seed. Each of its optimizer steps is
one row of tokens (its batch of texts, packed behind one another). Rows differ in length by a factor
of 20, so a lane per adapter, padded to the longest, would compute 4.6 times the text at 16 adapters
(simulated on the published self-edits). Instead, a step is a budget of tokens in which the rows of
several adapters lie behind one another, and it takes the adapters whose next rows fill it. An
adapter that finds no place waits. It still takes its own rows in its own order, so what it becomes
does not depend on its neighbors.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from seal_jax.inner.texts import Job, Text, row_length
from seal_jax.sharding import platform
from seal_jax.types import InnerBatch


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


# TPUs compute 128 numbers side by side. On CPUs attention is up to a third of a step, and most
# passages, the longest texts of a self-edit, fit into 192 tokens; LoRA's products cost as much for
# an empty slot as for another, where a TPU rather copies fewer adapters.
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
    """
    learning_rate = np.array([job.learning_rate for job in jobs], np.float32)
    num_steps = np.array([len(job.rows) for job in jobs], np.int32)
    seed = np.array([job.seed for job in jobs], np.int32)
    batches: list[InnerBatch] = []
    run: list[Step] = []

    def close() -> None:
        if run:
            arrays = to_arrays(jobs, run, steps_per_call, pad_id)
            batches.append(InnerBatch(*arrays, learning_rate, num_steps, seed))
            run.clear()

    for step in schedule(
        jobs, tokens_per_step=tokens_per_step, num_shards=num_shards, layout=layout
    ):
        if run and (run[0].shape != step.shape or len(run) == steps_per_call):
            close()
        run.append(step)
    close()
    return batches


def to_arrays(
    jobs: Sequence[Job], run: Sequence[Step], steps_per_call: int, pad_id: int
) -> tuple[np.ndarray, ...]:
    shape, num_shards = run[0].shape, len(run[0].shards)
    W, T, n, c = shape
    num_lanes = min(n, -(-len(jobs) // num_shards))
    lanes = np.full((steps_per_call, num_shards * num_lanes), -1, np.int32)
    chunk_lanes = np.zeros((steps_per_call, num_shards * n), np.int32)
    chunk_tokens = np.full((*chunk_lanes.shape, c), W * T, np.int32)
    tokens = np.full((steps_per_call, num_shards * W, T), pad_id, np.int32)
    segments = np.zeros(tokens.shape, np.int32)
    positions = np.zeros(tokens.shape, np.int32)
    loss_weight = np.zeros(tokens.shape, np.float32)
    for i, step in enumerate(run):
        for s, places in enumerate(step.shards):
            num_texts, chunk = [0] * W, s * n
            for lane, (job, row, w, t) in enumerate(places):
                lanes[i, s * num_lanes + lane] = job
                end = t + row_length(jobs[job].rows[row])
                for start in range(t, end, c):
                    chunk_lanes[i, chunk] = lane
                    count = min(c, end - start)
                    chunk_tokens[i, chunk, :count] = w * T + start + np.arange(count)
                    chunk += 1
                for text in jobs[job].rows[row]:
                    num_texts[w] += 1
                    at, span = s * W + w, slice(t, t + len(text.tokens))
                    tokens[i, at, span] = text.tokens
                    segments[i, at, span] = num_texts[w]
                    positions[i, at, span] = np.arange(len(text.tokens))
                    loss_weight[i, at, span] = text.loss_mask
                    t = span.stop
                    if text.pads:  # tokens are pad_id already
                        span = slice(t, t + len(text.pads))
                        segments[i, at, span] = -num_texts[w]
                        positions[i, at, span] = text.pads
                        loss_weight[i, at, span] = _pad_weights(text)
                        t = span.stop
    return lanes, chunk_lanes, chunk_tokens, tokens, segments, positions, loss_weight


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
