"""The schedule and the packing of self-edits, against what each job says."""

import collections
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.inner import steps
from seal_jax.inner.packing import pack, useful_tokens
from seal_jax.inner.steps import LONGEST, Layout, schedule
from seal_jax.inner.texts import Job, Text, make_job, row_length, text_of
from seal_jax.models.padded_lengths import BUCKETS, bucket_of
from seal_jax.tasks.knowledge.task import training_sequences

LAYOUT = Layout((16, 32, 64))  # array rows as short as the tests' texts
SMALL_CHUNKS = LAYOUT._replace(chunk=5, slots=1.5)
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


def rows_from(batches, job, num_shards=1):
    """Read a job's rows back out of the arrays, one token at a time: [(tokens, mask) per text]."""
    rows = []
    for b in batches:
        U, (num_steps, W, T) = b.lanes.shape[1], b.tokens.shape
        for i in range(num_steps):
            if job not in b.lanes[i]:
                continue
            (u,) = np.flatnonzero(b.lanes[i] == job)
            shard, lane = divmod(int(u), U // num_shards)
            texts = collections.defaultdict(list)
            n = b.chunk_lanes.shape[1] // num_shards
            for k in range(shard * n, (shard + 1) * n):
                if b.chunk_lanes[i, k] == lane:
                    for at in b.chunk_tokens[i, k][b.chunk_tokens[i, k] < W // num_shards * T]:
                        w, t = shard * W // num_shards + at // T, at % T
                        token = (b.tokens[i, w, t], b.loss_weight[i, w, t], b.positions[i, w, t])
                        texts[w, int(b.segments[i, w, t])].append(token)
            for text in texts.values():
                assert [p for _, _, p in text] == list(range(len(text)))
            rows.append(
                tuple(
                    Text(tuple(int(x) for x, _, _ in text), tuple(bool(m) for _, m, _ in text))
                    for text in texts.values()
                )
            )
    return tuple(rows)


def check_chunks(b, num_shards):
    """Every token of text is in one chunk of its shard; a chunk's empty slots come last."""
    (num_steps, W, T), n = b.tokens.shape, b.chunk_lanes.shape[1] // num_shards
    covered = np.zeros(b.tokens.shape, int).reshape(num_steps, num_shards, -1)
    for i in range(num_steps):
        for k, tokens in enumerate(b.chunk_tokens[i]):
            used = tokens[tokens < W // num_shards * T]
            assert used.tolist() == tokens[: len(used)].tolist()
            covered[i, k // n, used] += 1
    np.testing.assert_array_equal(covered.reshape(b.tokens.shape), b.segments > 0)


@given(
    populations(),
    st.sampled_from([1, 16, 64, 128]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([LAYOUT, SMALL_CHUNKS]),
)
@settings(max_examples=60)
def test_every_job_reads_its_own_rows_in_order_once(
    jobs, tokens_per_step, steps_per_call, shards, layout
):
    batches = pack(
        jobs,
        tokens_per_step=tokens_per_step,
        steps_per_call=steps_per_call,
        pad_id=PAD,
        num_shards=shards,
        layout=layout,
    )
    for j, job in enumerate(jobs):
        assert rows_from(batches, j, shards) == job.rows
    size = -(-len(jobs) // shards)
    for b in batches:
        assert b.tokens.shape[0] == b.lanes.shape[0] == b.chunk_lanes.shape[0] == steps_per_call
        assert b.tokens.shape == b.segments.shape == b.positions.shape == b.loss_weight.shape
        check_chunks(b, shards)
        assert [x.dtype for x in b[:7]] == [np.int32] * 6 + [np.float32]
        assert set(b.lanes.ravel()) <= {-1, *range(len(jobs))}
        # Padding carries nothing.
        padding = b.segments == 0
        assert (b.tokens[padding] == PAD).all()
        assert not b.positions[padding].any() and not b.loss_weight[padding].any()
        # No adapter takes two lanes of one step, nor one of another shard; empty steps come last.
        for lanes in b.lanes.reshape(-1, b.lanes.shape[1]):
            used = lanes[lanes >= 0]
            assert len(set(used)) == len(used)
            shard_of_lane = np.arange(len(lanes)) // (len(lanes) // shards)
            assert (lanes[lanes >= 0] // size == shard_of_lane[lanes >= 0]).all()
        active = (b.lanes >= 0).any(axis=1)
        assert active[0] and not (~active[:-1] & active[1:]).any()
        np.testing.assert_array_equal(
            b.learning_rate, np.array([job.learning_rate for job in jobs], np.float32)
        )
        np.testing.assert_array_equal(b.num_steps, [len(job.rows) for job in jobs])


@given(populations(), st.sampled_from([1, 16, 64, 128]), st.integers(1, 3))
@settings(max_examples=60)
def test_steps_have_few_shapes(jobs, tokens_per_step, shards):
    """Array rows are of the given lengths, as many as the budget holds, or one of a part of it."""
    options = {"tokens_per_step": tokens_per_step, "num_shards": shards, "layout": LAYOUT}
    for step in schedule(jobs, **options):
        part = 1, max(LAYOUT.lengths[0], tokens_per_step) // 4
        whole = [(max(1, tokens_per_step // T), T) for T in LAYOUT.lengths]
        assert step.shape[:2] in [part, *whole]
        assert len(step.shards) == shards and any(step.shards)
        assert all(len(places) <= step.shape.num_chunks for places in step.shards)


@given(populations(), st.sampled_from([16, 64]), st.integers(1, 3))
@settings(max_examples=30)
def test_useful_tokens_are_counted_exactly(jobs, tokens_per_step, steps_per_call):
    options = {"tokens_per_step": tokens_per_step, "layout": LAYOUT}
    useful, trained = useful_tokens(pack(jobs, steps_per_call=steps_per_call, **options))
    assert useful == sum(len(text.tokens) for job in jobs for row in job.rows for text in row)
    assert trained == sum(s.shape.num_tokens for s in schedule(jobs, **options))
    assert useful <= trained


@given(populations())
@settings(max_examples=30)
def test_neighbors_do_not_change_a_job(jobs):
    alone = [pack([job], tokens_per_step=64, layout=LAYOUT) for job in jobs]
    together = pack(jobs[::-1], tokens_per_step=64, layout=LAYOUT)
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


def test_an_unknown_pad_loss_is_refused():
    with pytest.raises(ValueError, match="pad_loss='of': expected one of off, sampled, exact"):
        make_job([], num_epochs=1, batch_size=1, learning_rate=0.1, key=(0,), pad_loss="of")


def test_padding_in_the_loss_as_arrays():
    options = {"num_epochs": 1, "batch_size": 1, "learning_rate": 0.1, "key": (0,)}
    exact = make_job([text_of([7, 8])], pad_loss="exact", padded=6, **options)
    places = {"tokens_per_step": 64, "steps_per_call": 1, "layout": Layout((64,))}
    (batch,) = pack([exact], pad_id=PAD, **places)
    assert batch.tokens[0, 0, :7].tolist() == [7, 8, PAD, PAD, PAD, PAD, PAD]
    assert batch.segments[0, 0, :7].tolist() == [1, 1, -1, -1, -1, -1, 0]
    assert batch.positions[0, 0, :7].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert batch.loss_weight[0, 0, :7].tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert useful_tokens([batch])[0] == 2
    # Eight samples stand for all of the padding; the text's last token predicts the first.
    sampled = make_job([text_of([7, 8])], pad_loss="sampled", padded=2048, **options)
    (text,) = sampled.rows[0]
    assert len(text.pads) == 9 and text.pads[-1] == 2047 and min(text.pads) >= 2
    (batch,) = pack([sampled], pad_id=PAD, **places)
    assert batch.positions[0, 0, 2:11].tolist() == list(text.pads)
    weights = batch.loss_weight[0, 0]
    assert weights[1:3].tolist() == [1, 1] and set(weights[3:11]) == {np.float32(2045 / 8)}
    assert weights.sum() == 2047


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
    half = text_of(range(LONGEST // 2 + 1))
    message = f"a row of {LONGEST + 2} tokens: at most {LONGEST} fit into one step"
    with pytest.raises(ValueError, match=message):
        pack([Job(((half, half),), 0.1)])


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
    one, two = pack([first, second], tokens_per_step=32, steps_per_call=2, layout=Layout((32,)))
    # Both lie in one array row, job 0's two texts before job 1's, in one chunk each.
    assert one.lanes.tolist() == [[0, 1], [-1, -1]]
    assert one.chunk_lanes.tolist() == [[0, 1], [0, 0]]
    tokens = [[range(5), range(5, 9)], [(), ()]]
    filled = [[[*x, *[32] * (32 - len(x))] for x in step] for step in tokens]
    assert one.chunk_tokens.tolist() == filled
    assert one.tokens.shape == (2, 1, 32) and not one.segments[0, 0, 9:].any()
    assert one.tokens[0, 0, :10].tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10, 0]
    assert one.segments[0, 0, :10].tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 3, 0]
    assert one.positions[0, 0, :10].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert np.flatnonzero(one.loss_weight[0]).tolist() == [1, 2, 4, 7, 8]
    # What is left is one short row: a small step.
    assert two.lanes.tolist() == [[0, -1], [-1, -1]] and two.tokens[0, 0, :2].tolist() == [6, 0]
    assert two.num_steps.tolist() == [2, 1]


def published_jobs(path):
    """Return 3 jobs for each of the first 50 x 5 published self-edits, the paper's settings.

    Tokens are counted by a regular expression: the tests need no tokenizer of a real model.
    """
    jobs = []
    for p, problem in enumerate(json.loads(path.read_text(encoding="utf-8"))[:50]):
        for r, edit in enumerate(problem["completions"][:5]):
            texts = training_sequences(
                edit, title=problem["title"], passage=problem["context"], split_newlines=True
            )
            texts = [text_of(range(len(re.findall(r"\w+|[^\w\s]", text)))) for text in texts]
            options = {"num_epochs": 10, "batch_size": 1, "learning_rate": 1e-3}
            jobs += [make_job(texts, key=(0, p, r, seed), **options) for seed in range(3)]
    return sorted(jobs, key=lambda job: -sum(map(row_length, job.rows)))


@pytest.mark.parametrize("num_adapters", [16, 128])
@pytest.mark.parametrize("layout", [steps.TPU_LAYOUT, steps.CPU_LAYOUT])
def test_published_self_edits_waste_little(shared_data, layout, num_adapters):
    jobs = published_jobs(shared_data / "self_edits" / "implications_train_round0.json")
    assert len(jobs) == 750
    text = sum(row_length(row) for job in jobs for row in job.rows)
    computed, shapes = 0, set()
    for i in range(0, len(jobs), num_adapters):
        wave = jobs[i : i + num_adapters]
        for step in schedule(wave, tokens_per_step=512, layout=layout):
            computed += step.shape.num_tokens
            shapes.add(step.shape)
    print(f"{num_adapters} adapters: {computed / text:.3f} tokens computed per token of text")
    assert computed / text <= 1.15
    assert len(shapes) <= 4
