"""Parsed self-edits to fixed-shape arrays (numpy): order, pack, bucket, schedule.

A `Job` is one inner run: a self-edit's token texts with one seed. Each of its optimizer steps is
one row of tokens (its batch of texts, packed behind one another). Jobs differ in length, and rows
differ more: padding every row of a step to the longest one wastes 4.6 times the text at 16
adapters (simulated on the published self-edits). So an adapter waits until others have a row of
like length: a step takes only the lanes whose next rows share a bucket, at about the same number
of tokens for each bucket. Every adapter still takes its own rows in its own order, so what it
becomes does not depend on its neighbors.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from seal_jax.types import InnerBatch

BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
STEP_COST = 64  # of taking a step at all, in tokens: keeps steps from becoming small to be full


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


class Step(NamedTuple):
    """One step of the schedule: which job's which row goes into which lane."""

    bucket: int  # T
    num_lanes: int  # W; lanes beyond len(lanes) stay empty
    lanes: tuple[tuple[int, int], ...]  # (job, row)


def schedule(
    jobs: Sequence[Job], *, tokens_per_step: int, buckets: Sequence[int] = BUCKETS
) -> Iterator[Step]:
    """Yield steps until every job has taken all its rows, in order.

    A step has a bucket T and a width W, all or a quarter of the lanes that `tokens_per_step` has
    room for; each pair is a program. Of those that could run now, take the one with the most text
    per cost. Its lanes go to the jobs with the most text left, then to shorter rows.
    """
    lengths = [[row_length(row) for row in job.rows] for job in jobs]
    left = [sum(x) for x in lengths]
    at = [0] * len(jobs)

    def widths(bucket: int) -> set[int]:
        most = min(max(1, tokens_per_step // bucket), len(jobs))
        return {most, -(-most // 4)}

    def lanes(bucket: int, waiting: dict[int, list[int]]) -> list[int]:
        own = sorted(waiting[bucket], key=lambda j: -left[j])
        shorter = [j for b in waiting if b < bucket for j in waiting[b]]
        return own + sorted(shorter, key=lambda j: -lengths[j][at[j]])

    while True:
        waiting: dict[int, list[int]] = {}
        for j, row in enumerate(at):
            if row < len(lengths[j]):
                waiting.setdefault(bucket_of(lengths[j][row], buckets), []).append(j)
        if not waiting:
            return
        options = []
        for bucket in sorted(waiting):
            ready = lanes(bucket, waiting)
            for width in sorted(widths(bucket)):
                text = sum(lengths[j][at[j]] for j in ready[:width])
                value = text / (width * bucket + STEP_COST)
                options.append((value, bucket, width, ready[:width]))
        _, bucket, width, chosen = max(options, key=lambda option: option[0])
        yield Step(bucket, width, tuple((j, at[j]) for j in chosen))
        for j in chosen:
            left[j] -= lengths[j][at[j]]
            at[j] += 1


def pack(
    jobs: Sequence[Job],
    *,
    tokens_per_step: int = 256,
    steps_per_call: int = 8,
    pad_id: int = 0,
    buckets: Sequence[int] = BUCKETS,
) -> list[InnerBatch]:
    """Return the inner batches (numpy) that train adapter i on jobs[i].

    Args:
      tokens_per_step: the tokens that one step has room for, over all its lanes.
      steps_per_call: I, the steps of one device call; missing ones are empty, and cost no compute.
    """
    learning_rate = np.array([job.learning_rate for job in jobs], np.float32)
    num_steps = np.array([len(job.rows) for job in jobs], np.int32)
    batches: list[InnerBatch] = []
    run: list[Step] = []

    def close() -> None:
        if run:
            shape = (steps_per_call, run[0].num_lanes, run[0].bucket)
            arrays = _fill(jobs, run, shape, pad_id)
            batches.append(InnerBatch(*arrays, learning_rate, num_steps))
            run.clear()

    for step in schedule(jobs, tokens_per_step=tokens_per_step, buckets=buckets):
        if run and (run[0][:2] != step[:2] or len(run) == steps_per_call):
            close()
        run.append(step)
    close()
    return batches


def _fill(
    jobs: Sequence[Job], run: Sequence[Step], shape: tuple[int, int, int], pad_id: int
) -> tuple[np.ndarray, ...]:
    lanes = np.full(shape[:2], -1, np.int32)
    tokens = np.full(shape, pad_id, np.int32)
    segments = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, bool)
    for i, step in enumerate(run):
        for w, (job, row) in enumerate(step.lanes):
            lanes[i, w] = job
            t = 0
            for segment, text in enumerate(jobs[job].rows[row], start=1):
                span = slice(t, t + len(text.tokens))
                tokens[i, w, span] = text.tokens
                segments[i, w, span] = segment
                positions[i, w, span] = np.arange(len(text.tokens))
                loss_mask[i, w, span] = text.loss_mask
                t = span.stop
    return lanes, tokens, segments, positions, loss_mask


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
    """Return the losses (on the host, [I W] for each batch) of every job's rows, in their order."""
    rows: list[list[float]] = [[] for _ in range(num_jobs)]
    for batch, loss in zip(batches, losses, strict=True):
        for i, w in np.argwhere(np.asarray(batch.lanes) >= 0):
            rows[batch.lanes[i, w]].append(float(loss[i, w]))
    return rows


def text_of(tokens: Sequence[int], prompt_length: int = 0) -> Text:
    """Return a training text whose loss counts each token after the first `prompt_length`."""
    first = max(prompt_length, 1)
    return Text(tuple(tokens), tuple(i >= first for i in range(len(tokens))))
