"""The schedule and the packing of self-edits, against what each job says."""

import collections
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.self_edit import (
    BUCKETS,
    Job,
    Text,
    bucket_of,
    make_job,
    pack,
    row_length,
    schedule,
    text_of,
    useful_tokens,
)

SMALL = (4, 8, 16, 40)
PAD = 99


@st.composite
def text_lists(draw):
    lengths = draw(st.lists(st.integers(1, 13), max_size=5))
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    return [text_of(rng.integers(1, 90, n).tolist(), int(rng.integers(0, 3))) for n in lengths]


@st.composite
def populations(draw):
    """Return jobs of all sorts: no texts or many, one epoch or more, one text a row or more."""
    jobs = []
    for i in range(draw(st.integers(1, 5))):
        jobs.append(
            make_job(
                draw(text_lists()),
                num_epochs=draw(st.integers(0, 4)),
                batch_size=draw(st.integers(1, 3)),
                learning_rate=draw(st.sampled_from([1e-4, 1e-3])),
                key=(draw(st.integers(0, 5)), i),
            )
        )
    return jobs


def rows_from(batches, job):
    """Read a job's rows back out of the arrays, one token at a time: [(tokens, mask) per text]."""
    rows = []
    for b in batches:
        for i in range(b.lanes.shape[0]):
            for w in range(b.lanes.shape[1]):
                if b.lanes[i, w] != job:
                    continue
                texts = collections.defaultdict(list)
                for t in range(b.tokens.shape[2]):
                    if b.segments[i, w, t]:
                        texts[int(b.segments[i, w, t])].append(
                            (b.tokens[i, w, t], b.loss_mask[i, w, t], b.positions[i, w, t])
                        )
                assert list(texts) == list(range(1, len(texts) + 1))  # each text in one piece
                for text in texts.values():
                    assert [p for _, _, p in text] == list(range(len(text)))
                rows.append(
                    tuple(
                        Text(tuple(int(x) for x, _, _ in text), tuple(bool(m) for _, m, _ in text))
                        for text in texts.values()
                    )
                )
    return tuple(rows)


@given(populations(), st.sampled_from([1, 16, 40, 64]), st.integers(1, 4))
@settings(max_examples=60)
def test_every_job_reads_its_own_rows_in_order_once(jobs, tokens_per_step, steps_per_call):
    batches = pack(
        jobs,
        tokens_per_step=tokens_per_step,
        steps_per_call=steps_per_call,
        pad_id=PAD,
        buckets=SMALL,
    )
    for j, job in enumerate(jobs):
        assert rows_from(batches, j) == job.rows
    for b in batches:
        assert b.tokens.shape == (steps_per_call, *b.lanes.shape[1:], b.tokens.shape[2])
        assert b.tokens.shape == b.segments.shape == b.positions.shape == b.loss_mask.shape
        assert [x.dtype for x in b[:5]] == [np.int32] * 4 + [bool]
        assert set(b.lanes.ravel()) <= {-1, *range(len(jobs))}
        # Padding carries nothing, and an empty lane is padding.
        padding = b.segments == 0
        assert (b.tokens[padding] == PAD).all()
        assert not b.positions[padding].any() and not b.loss_mask[padding].any()
        assert padding[b.lanes < 0].all()
        # No adapter takes two lanes of one step; empty steps come last.
        for lanes in b.lanes:
            used = lanes[lanes >= 0]
            assert len(set(used)) == len(used)
        active = (b.lanes >= 0).any(axis=1)
        assert active[0] and not (~active[:-1] & active[1:]).any()
        np.testing.assert_array_equal(
            b.learning_rate, np.array([job.learning_rate for job in jobs], np.float32)
        )
        np.testing.assert_array_equal(b.num_steps, [len(job.rows) for job in jobs])


@given(populations(), st.sampled_from([1, 16, 40, 64]))
@settings(max_examples=60)
def test_steps_have_few_shapes_and_hold_their_rows(jobs, tokens_per_step):
    for step in schedule(jobs, tokens_per_step=tokens_per_step, buckets=SMALL):
        assert step.bucket in SMALL
        # Two widths per bucket, whatever the jobs: few programs.
        most = min(max(1, tokens_per_step // step.bucket), len(jobs))
        assert step.num_lanes in (most, -(-most // 4))
        assert 1 <= len(step.lanes) <= step.num_lanes
        lengths = [row_length(jobs[j].rows[row]) for j, row in step.lanes]
        assert bucket_of(max(lengths), SMALL) == step.bucket


@given(populations(), st.sampled_from([16, 64]), st.integers(1, 3))
@settings(max_examples=30)
def test_useful_tokens_are_counted_exactly(jobs, tokens_per_step, steps_per_call):
    options = {"tokens_per_step": tokens_per_step, "buckets": SMALL}
    useful, trained = useful_tokens(pack(jobs, steps_per_call=steps_per_call, **options))
    assert useful == sum(len(text.tokens) for job in jobs for row in job.rows for text in row)
    assert trained == sum(s.bucket * s.num_lanes for s in schedule(jobs, **options))
    assert useful <= trained


@given(populations())
@settings(max_examples=30)
def test_neighbors_do_not_change_a_job(jobs):
    alone = [pack([job], tokens_per_step=64, buckets=SMALL) for job in jobs]
    together = pack(jobs[::-1], tokens_per_step=64, buckets=SMALL)
    for j, batches in enumerate(alone):
        assert rows_from(batches, 0) == rows_from(together, len(jobs) - 1 - j)


@given(text_lists(), st.integers(0, 4), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=60)
def test_each_epoch_is_a_permutation_cut_into_batches(texts, num_epochs, batch_size, seed):
    options = {"num_epochs": num_epochs, "batch_size": batch_size, "learning_rate": 0.1}
    job = make_job(texts, key=(seed, 1), **options)
    steps = -(-len(texts) // batch_size)
    assert len(job.rows) == num_epochs * steps
    for epoch in range(num_epochs):
        rows = job.rows[epoch * steps : (epoch + 1) * steps]
        assert [len(row) for row in rows[:-1]] == [batch_size] * (len(rows) - 1)
        assert collections.Counter(t for row in rows for t in row) == collections.Counter(texts)
    assert make_job(texts, key=(seed, 1), **options) == job


def test_the_key_decides_the_order():
    texts = [text_of([i, i]) for i in range(10)]
    options = {"num_epochs": 3, "batch_size": 2, "learning_rate": 0.1}
    keys = [(s, i, j) for s in range(3) for i in range(3) for j in range(3)]
    jobs = [make_job(texts, key=key, **options) for key in keys]
    assert len(set(jobs)) == len(keys)
    assert len({job.rows[:5] for job in jobs} | {job.rows[5:10] for job in jobs}) == 2 * len(keys)


@given(st.integers(0, BUCKETS[-1]), st.integers(0, BUCKETS[-1]))
def test_bucket_of_is_the_smallest_that_fits(length, other):
    bucket = bucket_of(length)
    assert bucket == min(b for b in BUCKETS if b >= length)
    assert (bucket <= bucket_of(other)) or length > other


def test_a_row_too_long_is_refused():
    with pytest.raises(ValueError, match="a row of 41 tokens: at most 40 fit into one step"):
        pack([Job(((text_of(range(20)), text_of(range(21))),), 0.1)], buckets=SMALL)


def test_jobs_without_rows_pack_to_nothing():
    assert pack([]) == []
    assert pack([Job((), 0.1), Job((), 0.2)]) == []


def test_text_of_counts_what_follows_the_prompt():
    assert text_of([7, 8, 9]) == Text((7, 8, 9), (False, True, True))
    assert text_of([7, 8, 9], 2) == Text((7, 8, 9), (False, False, True))
    assert text_of([7], 5) == Text((7,), (False,))


def test_a_population_of_two_as_arrays():
    first = Job(((text_of([1, 2, 3]), text_of([4, 5])), (text_of([6]),)), 0.1)
    second = Job(((text_of([7, 8, 9, 10], 2),),), 0.2)
    one, two = pack([first, second], tokens_per_step=16, steps_per_call=2, buckets=(4, 8))
    assert one.lanes.tolist() == [[0, 1], [-1, -1]]
    assert one.tokens[0].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [7, 8, 9, 10, 0, 0, 0, 0]]
    assert one.segments[0].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert one.positions[0].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert one.loss_mask[0].astype(int).tolist() == [
        [0, 1, 1, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
    ]
    assert two.lanes[:, 0].tolist() == [0, -1] and (two.lanes[:, 1:] == -1).all()
    assert two.tokens[0, 0].tolist() == [6, 0, 0, 0]
    assert two.num_steps.tolist() == [2, 1]


def published_jobs(path, num_problems, num_epochs=10):
    """Return a job for each published self-edit, its tokens counted by a regular expression."""
    jobs = []
    problems = json.loads(path.read_text(encoding="utf-8"))[:num_problems]
    for p, problem in enumerate(problems):
        for r, self_edit in enumerate(problem["completions"]):
            lines = [problem["context"], *(line for line in self_edit.split("\n") if line.strip())]
            texts = [text_of(range(len(re.findall(r"\w+|[^\w\s]", line)))) for line in lines]
            jobs.append(
                make_job(
                    [text for text in texts if text.tokens],
                    num_epochs=num_epochs,
                    batch_size=1,
                    learning_rate=1e-3,
                    key=(0, p, r),
                )
            )
    return jobs


def test_published_self_edits_waste_little(shared_data):
    path = shared_data / "self_edits" / "implications_train_round0.json"
    jobs = published_jobs(path, num_problems=20)
    useful = trained = 0
    for i in range(0, len(jobs), 16):
        counts = useful_tokens(pack(jobs[i : i + 16], tokens_per_step=256))
        useful, trained = useful + counts[0], trained + counts[1]
    print(
        f"{len(jobs)} self-edits, 16 at a time: {useful / trained:.1%} of {trained} tokens useful"
    )
    assert useful / trained >= 0.68
