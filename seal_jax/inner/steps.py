"""Which rows of which jobs a step takes, and where they lie in it.

Rows differ in length by a factor of 20. If each adapter had a row of an array, padded to the
longest, most of the work would be padding. Instead, a step is a budget of tokens in which the rows
of several adapters lie behind one another, and it takes the adapters whose next rows fill it. An
adapter that finds no place waits. It still takes its own rows in its own order, so what it becomes
does not depend on its neighbors.

Where each adapter has kernels of its own, array rows cannot be shared: `lockstep`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from seal_jax.inner.texts import Job, row_length
from seal_jax.sharding import platform


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
# Of an array row that a job has to itself, where jobs have reference rows: so many chunks.
_REFERENCE_PARTS = 4


class Place(NamedTuple):
    """Where one row of a job lies in a step."""

    job: int
    row: int  # its reference row, where it has one, lies behind it
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
    rows = [_lengths(job) for job in jobs]
    left = [sum(map(sum, x)) for x in rows]
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
        longest = max(sum(rows[j][at[j]]) for js in ready for j in js)
        for shape in step_shapes(longest, tokens_per_step, layout):
            shards = tuple(_fill(shape, [(j, at[j], rows[j][at[j]]) for j in js]) for js in ready)
            text = sum(sum(rows[p.job][p.row]) for places in shards for p in places)
            cost = shape.num_tokens * (1 + shape.length * _ATTENTION_COST) + STEP_COST
            options.append((text / cost, shape, shards))
        _, shape, shards = max(options, key=lambda option: option[0])
        if not any(shards):
            raise ValueError(f"no step of {layout} has chunks for a row and its reference row")
        yield Step(shape, shards)
        for places in shards:
            for place in places:
                left[place.job] -= sum(rows[place.job][place.row])
                at[place.job] += 1


def _lengths(job: Job) -> list[tuple[int, int]]:
    """Return the tokens of each row of a job, and those of its reference row.

    Raises:
      ValueError: there are other than as many reference rows as rows, or none.
    """
    references = job.references or ((),) * len(job.rows)
    if len(references) != len(job.rows):
        raise ValueError(
            f"a job has {len(references)} reference rows for {len(job.rows)} rows: expected one for"
            " each row, or none"
        )
    pairs = zip(job.rows, references, strict=True)
    return [(row_length(row), row_length(reference)) for row, reference in pairs]


def lockstep(
    jobs: Sequence[Job], *, num_shards: int = 1, layout: Layout | None = None
) -> Iterator[Step]:
    """Yield steps in which each job has an array row to itself, until all have taken all rows.

    Every step has an array row for every job, in their order, whether the job takes part or not. A
    step is as long as the job needs that has the most left, and others whose rows are longer wait:
    so nobody holds up the last one, and rows of about a length meet. There are lengths of a quarter
    and half of the layout's shortest, too: no array row has a second text to fill it.

    Args:
      layout: this platform's by default; its chunks count for nothing here.

    Raises:
      ValueError: the shards cannot have equally many of the jobs; a row is too long.
    """
    if len(jobs) % num_shards:
        raise ValueError(f"{len(jobs)} jobs side by side do not divide over {num_shards} shards")
    size, first = len(jobs) // num_shards, _layout(layout).lengths[0]
    lengths = sorted({max(1, first // 4), max(1, first // 2), *_layout(layout).lengths})
    rows = [[sum(row) for row in _lengths(job)] for job in jobs]
    _refuse_longer(max((row for job in rows for row in job), default=0), lengths)
    spans = [[next(T for T in lengths if T >= row) for row in job] for job in rows]
    parts = _REFERENCE_PARTS if any(job.references for job in jobs) else 1
    left, at = [sum(x) for x in spans], [0] * len(jobs)
    while any(left):
        T = spans[(last := left.index(max(left)))][at[last]]
        takes = [j for j in range(len(jobs)) if left[j] and spans[j][at[j]] <= T]
        # A row alone is one chunk. With a reference row one chunk more holds what both leave over.
        shape = Shape(size, T, size * (parts + (parts > 1)), -(-T // parts))
        by_shard = [[j for j in takes if j // size == s] for s in range(num_shards)]
        yield Step(shape, tuple(tuple(Place(j, at[j], j % size, 0) for j in js) for js in by_shard))
        for j in takes:
            left[j] -= spans[j][at[j]]
            at[j] += 1


def step_shapes(longest: int, tokens_per_step: int, layout: Layout | None = None) -> list[Shape]:
    """Return the shapes that a step may have: few, because each is a program."""
    layout = _layout(layout)
    lengths = layout.lengths
    _refuse_longer(longest, lengths)
    sizes = [(1, max(lengths[0], tokens_per_step) // _PART)]
    for T in lengths:
        sizes.append((max(1, tokens_per_step // T), T))
        if T >= longest:
            break
    return [Shape(W, T, *_chunks(layout, W * T, T)) for W, T in sizes]


def _layout(layout: Layout | None) -> Layout:
    return layout or (CPU_LAYOUT if platform() == "cpu" else TPU_LAYOUT)


def _refuse_longer(longest: int, lengths: Sequence[int]) -> None:
    """Refuse a row that no step has room for."""
    if longest > lengths[-1]:
        raise ValueError(
            f"a row of {longest} tokens: at most {lengths[-1]} fit into one step, those of the"
            " reference row that is shown beside it among them"
        )


def _chunks(layout: Layout, num_tokens: int, length: int) -> tuple[int, int]:
    """Return how many chunks there are, and of how many slots."""
    num_slots = int(layout.slots * num_tokens)
    num_chunks = max(2, num_slots // max(layout.chunk, length // _CHUNK_PART))
    return num_chunks, num_slots // num_chunks


def _fill(shape: Shape, rows: Sequence[tuple[int, int, tuple[int, int]]]) -> tuple[Place, ...]:
    """Place rows (job, row, `_lengths` of it), in their order, each where the least space stays."""
    used, places, num_chunks = [0] * shape.num_rows, [], 0
    for job, row, parts in rows:
        tokens, chunks = sum(parts), sum(-(-part // shape.chunk_size) for part in parts)
        fits = [w for w in range(shape.num_rows) if used[w] + tokens <= shape.length]
        if fits and num_chunks + chunks <= shape.num_chunks:
            w = max(fits, key=lambda w: used[w])
            places.append(Place(job, row, w, used[w]))
            used[w] += tokens
            num_chunks += chunks
    return tuple(places)
