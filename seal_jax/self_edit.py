"""Parsed self-edits to fixed-shape arrays (numpy): order, schedule, pack.

A `Job` is one inner run: a self-edit's token texts with one seed. Each of its optimizer steps is
one row of tokens (its batch of texts, packed behind one another). Rows differ in length by a factor
of 20, so a lane per adapter, padded to the longest, would compute 4.6 times the text at 16 adapters
(simulated on the published self-edits). Instead, a step is a budget of tokens, cut into small
blocks, and each row takes the blocks it needs: rows of several adapters lie behind one another, and
a step takes the adapters whose next rows fill it. An adapter that finds no place waits. It still
takes its own rows in its own order, so what it becomes does not depend on its neighbors. Adapters
too large to be copied for every block have array rows of their own, in buckets of like length.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from seal_jax.types import InnerBatch

BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
# A row takes whole blocks; a block belongs to one adapter, whose matrices are copied for each of
# its blocks: the smallest block wastes the fewest tokens, and copies the most.
BLOCK = 8
# The tokens that a CPU multiplies through a model while it copies, forward and backward, an
# adapter as large as that model: roughly 16 bytes a parameter at 10 GB/s, against 4 products a
# token at 180 GFLOP/s.
_COPY_COST = 72
# Tokens that attend to one another lie in one array row of T; attention's cost grows with T, so it
# is no longer than the texts ask for.
SHORTEST, LONGEST = 256, 8192
# A step has a lane, a place for one adapter, for each so many of its tokens.
_TOKENS_PER_LANE = 32
# What a step costs beside its tokens, in tokens, and by how much a token of a long row is dearer:
# rough figures, which only decide between steps of about the same worth.
STEP_COST = 64
_ATTENTION_COST = 1 / 4096


class Text(NamedTuple):
    """One training text."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # whether predicting this token counts; the first never does


class Job(NamedTuple):
    """One inner run."""

    rows: tuple[tuple[Text, ...], ...]  # the texts of each optimizer step, in order
    learning_rate: float


def make_job(
    texts: Sequence[Text],
    *,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    key: Sequence[int],
) -> Job:
    """Shuffle the texts anew in every epoch and cut them into batches.

    Args:
      key: nonnegative integers (seed, step, problem, self-edit, seed index) that alone decide the
        order.
    """
    rng = np.random.default_rng(list(key))
    rows = []
    for _ in range(num_epochs):
        order = rng.permutation(len(texts))
        for start in range(0, len(texts), batch_size):
            rows.append(tuple(texts[i] for i in order[start : start + batch_size]))
    return Job(tuple(rows), learning_rate)


def row_length(row: Sequence[Text]) -> int:
    return sum(len(text.tokens) for text in row)


def bucket_of(length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """Return the smallest bucket that holds `length`.

    Raises:
      ValueError: the row is longer than the last bucket.
    """
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError(f"a row of {length} tokens: at most {buckets[-1]} fit into one step")


def block_for(adapter_size: int, model_size: int) -> int | None:
    """Return BLOCK where copying an adapter for each block costs little beside its tokens.

    None, for large adapters, gives each an array row of its own, as long as its bucket.

    Args:
      adapter_size, model_size: numbers of parameters.
    """
    return BLOCK if _COPY_COST * adapter_size / model_size <= 0.15 * BLOCK else None


class Place(NamedTuple):
    """Where one row of a job lies in a step."""

    job: int
    row: int
    w: int  # which array row
    t: int  # its first token there, a multiple of the block


class Step(NamedTuple):
    """One step of the schedule: for each shard of the population, which rows it takes."""

    num_rows: int  # W of each shard
    length: int  # T
    num_lanes: int  # U of each shard, the adapters that it has room for
    shards: tuple[tuple[Place, ...], ...]


def schedule(
    jobs: Sequence[Job],
    *,
    tokens_per_step: int,
    num_shards: int = 1,
    shortest: int = SHORTEST,
    block: int | None = BLOCK,
) -> Iterator[Step]:
    """Yield steps until every job has taken all its rows, in order.

    Shard s has an equal part of the jobs, the s-th. Of the shapes [W T] that could run now, take
    the one with the most text per cost, filled with the rows of the jobs that have the most text
    left.
    """
    lengths = [[row_length(row) for row in job.rows] for job in jobs]
    left = [sum(x) for x in lengths]
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
        longest = max(lengths[j][at[j]] for js in ready for j in js)
        for W, T in _shapes(longest, tokens_per_step, shortest, block):
            room = W if block is None else max(1, W * T // _TOKENS_PER_LANE)
            shards = tuple(
                _fill(W, T, room, block or T, [(j, at[j], lengths[j][at[j]]) for j in js])
                for js in ready
            )
            text = sum(lengths[p.job][p.row] for places in shards for p in places)
            cost = W * T * (1 + T * _ATTENTION_COST) + STEP_COST
            options.append((text / cost, W, T, room, shards))
        _, W, T, room, shards = max(options, key=lambda option: option[0])
        yield Step(W, T, room, shards)
        for places in shards:
            for place in places:
                left[place.job] -= lengths[place.job][place.row]
                at[place.job] += 1


def _shapes(
    longest: int, tokens_per_step: int, shortest: int, block: int | None
) -> list[tuple[int, int]]:
    """Return the shapes [W T] that a step may have: few, because each is a program."""
    if longest > LONGEST:
        raise ValueError(f"a row of {longest} tokens: at most {LONGEST} fit into one step")
    if block is None:
        lengths = BUCKETS[: BUCKETS.index(bucket_of(longest)) + 1]
        widths = {T: max(1, tokens_per_step // T) for T in lengths}
        return sorted({(W, T) for T, most in widths.items() for W in (most, -(-most // 4))})
    budget, T = max(shortest, tokens_per_step), shortest
    shapes = [(1, budget // part) for part in (16, 4) if budget // part % block == 0]
    while True:
        shapes.append((max(1, tokens_per_step // T), T))
        if T >= longest:
            return shapes
        T *= 2


def _fill(
    num_rows: int, length: int, num_lanes: int, block: int, rows: Sequence[tuple[int, int, int]]
) -> tuple[Place, ...]:
    """Place rows (job, row, tokens), in their order, each where the least space stays."""
    used, places = [0] * num_rows, []
    for job, row, tokens in rows:
        space = -(-tokens // block) * block
        fits = [w for w in range(num_rows) if used[w] + space <= length]
        if fits and len(places) < num_lanes:
            w = max(fits, key=lambda w: used[w])
            places.append(Place(job, row, w, used[w]))
            used[w] += space
    return tuple(places)


def pack(
    jobs: Sequence[Job],
    *,
    tokens_per_step: int = 512,
    steps_per_call: int = 8,
    pad_id: int = 0,
    num_shards: int = 1,
    shortest: int = SHORTEST,
    block: int | None = BLOCK,
) -> list[InnerBatch]:
    """Return the inner batches (numpy) that train adapter i on jobs[i].

    Args:
      tokens_per_step: the tokens that one step has room for, on each shard.
      steps_per_call: I, the steps of one device call; missing ones are empty, and cost no compute.
      num_shards: over how many parts of the mesh the population is divided.
      shortest: the least T, a power of two times the block.
      block: b, the tokens of a block; see `block_for`.
    """
    learning_rate = np.array([job.learning_rate for job in jobs], np.float32)
    num_steps = np.array([len(job.rows) for job in jobs], np.int32)
    batches: list[InnerBatch] = []
    run: list[Step] = []

    def close() -> None:
        if run:
            arrays = _to_arrays(jobs, run, steps_per_call, pad_id, block)
            batches.append(InnerBatch(*arrays, learning_rate, num_steps))
            run.clear()

    for step in schedule(
        jobs,
        tokens_per_step=tokens_per_step,
        num_shards=num_shards,
        shortest=shortest,
        block=block,
    ):
        if run and (run[0][:2] != step[:2] or len(run) == steps_per_call):
            close()
        run.append(step)
    close()
    return batches


def _to_arrays(
    jobs: Sequence[Job], run: Sequence[Step], steps_per_call: int, pad_id: int, block: int | None
) -> tuple[np.ndarray, ...]:
    W, T, U = run[0].num_rows, run[0].length, run[0].num_lanes
    num_shards, block = len(run[0].shards), block or T
    shape = (steps_per_call, num_shards * W, T)
    lanes = np.full((steps_per_call, num_shards * U), -1, np.int32)
    blocks = np.zeros((steps_per_call, num_shards * W, T // block), np.int32)
    tokens = np.full(shape, pad_id, np.int32)
    segments = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, bool)
    for i, step in enumerate(run):
        for s, places in enumerate(step.shards):
            num_texts = [0] * W
            for lane, (job, row, w, t) in enumerate(places):
                lanes[i, s * U + lane] = job
                at = s * W + w
                length = row_length(jobs[job].rows[row])
                blocks[i, at, t // block : -(-(t + length) // block)] = lane
                for text in jobs[job].rows[row]:
                    num_texts[w] += 1
                    span = slice(t, t + len(text.tokens))
                    tokens[i, at, span] = text.tokens
                    segments[i, at, span] = num_texts[w]
                    positions[i, at, span] = np.arange(len(text.tokens))
                    loss_mask[i, at, span] = text.loss_mask
                    t = span.stop
    return lanes, blocks, tokens, segments, positions, loss_mask


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


def text_of(tokens: Sequence[int], prompt_length: int = 0) -> Text:
    """Return a training text whose loss counts each token after the first `prompt_length`."""
    first = max(prompt_length, 1)
    return Text(tuple(tokens), tuple(i >= first for i in range(len(tokens))))
