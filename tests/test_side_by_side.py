"""Array rows of one job each, reference rows, and what optimizers are given by keyword."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.inner.packing import job_losses, pack
from seal_jax.inner.steps import Layout
from seal_jax.inner.texts import Job, row_length, text_of
from seal_jax.inner.update import make_inner_update
from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.models.transformer import forward, init_params
from seal_jax.optim import accumulate, make_optimizer, scheduled_rate, update
from seal_jax.sharding import batch_sharding, leading, make_mesh, on_shards, replicated, to_device
from seal_jax.types import Adapters, InnerState
from tests.test_packing import LAYOUT, PAD, SMALL_CHUNKS, check_chunks, populations, rows_from

CONFIG = ModelConfig(
    vocab_size=32,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    max_length=64,
    tie_embeddings=False,
)
A, T = 4, 16
PACKING = {"tokens_per_step": T, "layout": Layout((T,)), "steps_per_call": 4}
FACTORS = np.array([1.0, -0.5, 2.0, 3.0], np.float32)
SICK = 31  # a token of no other test


@pytest.fixture(scope="module")
def params():
    params = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: np.asarray(8 * x if x.ndim == 2 else x), params)


@pytest.fixture(scope="module")
def adapters():
    keys = jax.random.split(jax.random.key(1), A)
    made = lora.init_adapters(CONFIG, keys, rank=2, alpha=4.0, targets=("q_proj", "up_proj"))
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), made)


def texts_of(rng, *lengths):
    return tuple(text_of(rng.integers(0, SICK, n).tolist(), n // 3) for n in lengths)


def make_jobs(with_references):
    """Return four jobs: of three steps, of none, of two, and of one; with reference rows or not.

    The rows take more than half of T, so all steps are of one shape.
    """
    rng = np.random.default_rng(0)
    rows = [[(9,), (6, 4), (11,)], [], [(10,), (5, 4)], [(5, 4)]]
    references = [[(6,), (), (3, 2)], [], [(2, 4), (7,)], [(5,)]]
    jobs = []
    for of_job, other in zip(rows, references, strict=True):
        job = Job(tuple(texts_of(rng, *row) for row in of_job), 0.1)
        shown = tuple(texts_of(rng, *row) for row in other)
        jobs.append(job._replace(references=shown if with_references else ()))
    return jobs


def with_memory(learning_rate):
    """A user's own: a descent on the memory's gradient, too, times the adapter's own factor.

    It trains on where the memory's gradient is not finite.
    """

    def step(updates, state, params=None, *, memory_grads, factor, **_):
        del params
        memory = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), memory_grads)
        return jax.tree.map(lambda g, m: -learning_rate * (g + factor * m), updates, memory), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), step)


@pytest.fixture(scope="module")
def train():
    """Return one inner_update for the tests that share its programs."""
    return make_inner_update(CONFIG, make_optimizer(optimizer=with_memory, grad_clip=None))


@jax.jit
@partial(jax.value_and_grad, argnums=1)
def slow_loss(params, weights, scale, tokens, counts):
    """Return a row's loss, and its gradient: texts apart [N T], by a model with merged adapter."""
    logits = forward(CONFIG, lora.merge(params, Adapters(weights, scale)), tokens)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -jnp.where(counts[:, 1:], logp[..., 0], 0).sum() / jnp.maximum(counts.sum(), 1)


def slow_loop(params, adapter, job, factor):
    """Train one adapter as the textbook would; return its weights and its losses."""
    weights, losses = adapter.weights, []
    for i, rows in enumerate(zip(job.rows, job.references, strict=True)):
        found = []
        for row in rows:
            tokens, counts = np.zeros((2, 2, T), np.int32)
            for n, text in enumerate(row):
                tokens[n, : len(text.tokens)] = text.tokens
                counts[n, : len(text.tokens)] = text.loss_mask
            found.append(slow_loss(params, weights, adapter.scale, tokens, counts > 0))
        (loss, grads), (_, memory) = found
        rate = scheduled_rate("linear", job.learning_rate, jnp.int32(i), len(job.rows))
        both = jax.tree.map(lambda g, m: g + factor * m, grads, memory)
        weights = jax.tree.map(lambda w, g: w - rate * g, weights, both)  # noqa: B023
        losses.append(float(loss))
    return weights, losses


def assert_near(found, expected, before):
    """The changes are the same, to rounding."""
    for x, y, w in zip(*map(jax.tree.leaves, (found, expected, before)), strict=True):
        size = np.abs(np.asarray(y - w)).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 + 1e-4 * size)


# --- what lies where ---


def references_from(batches, job, num_shards):
    """Read a job's reference rows out of the lanes behind the others."""
    behind = []
    for b in batches:
        num_lanes = b.lanes.shape[1] // num_shards
        behind.append(b._replace(lanes=b.references, chunk_lanes=b.chunk_lanes - num_lanes))
    return rows_from(behind, job, num_shards)


@given(
    populations(),
    populations(),
    st.integers(1, 3),
    st.sampled_from([LAYOUT, SMALL_CHUNKS]),
    st.booleans(),
)
@settings(max_examples=60)
def test_rows_and_their_references_lie_in_lanes_of_one_step(
    jobs, others, shards, layout, side_by_side
):
    rows = [row for job in others for row in job.rows]
    jobs *= shards if side_by_side else 1
    jobs = [
        job._replace(references=tuple(rows[i] if i < len(rows) else () for i in range(len(job[0]))))
        for job in jobs
    ]
    layout = layout._replace(lengths=(*layout.lengths, 128))
    packed = {"num_shards": shards, "layout": layout, "pad_id": PAD, "steps_per_call": 2}
    batches = pack(jobs, tokens_per_step=32, side_by_side=side_by_side, **packed)
    for j, job in enumerate(jobs):
        assert rows_from(batches, j, shards) == job.rows
        assert references_from(batches, j, shards) == tuple(filter(None, job.references))
    for b in batches:
        check_chunks(b, shards)
        assert set(b.references[b.references != b.lanes]) <= {-1}  # of the same adapter
        if not side_by_side:
            continue
        # Array row w is of job w alone, whoever else takes part in the step.
        assert b.tokens.shape[1] == len(jobs)
        num_lanes, size = b.lanes.shape[1] // shards, len(jobs) // shards
        for i, k in np.ndindex(b.chunk_lanes.shape):
            used = b.chunk_tokens[i, k][b.chunk_tokens[i, k] < size * b.tokens.shape[2]]
            shard = k // (b.chunk_lanes.shape[1] // shards)
            lane = shard * num_lanes + b.chunk_lanes[i, k] % num_lanes
            assert set(used // b.tokens.shape[2]) <= {b.lanes[i, lane] - shard * size}


def test_side_by_side_the_job_with_most_left_sets_the_length():
    """It waits for nobody, and long rows meet; nor does an ended job take part."""
    lengths = [(4, 16, 4, 4), (16, 4), ()]
    jobs = [Job(tuple((text_of(range(n)),) for n in row), 0.1) for row in lengths]
    batches = pack(jobs, side_by_side=True, layout=Layout((16, 32)), steps_per_call=4)
    steps = [
        (b.tokens.shape[2], sorted(lanes[lanes >= 0].tolist()))
        for b in batches
        for lanes in b.lanes
        if (lanes >= 0).any()
    ]
    assert steps == [(4, [0]), (16, [0, 1]), (4, [0, 1]), (4, [0])]
    assert all(b.references is None for b in batches)


def test_what_does_not_pack_is_refused():
    row = (text_of([1, 2, 3]),)
    plain, shown = Job((row,), 0.1), Job((row,), 0.1, references=(row,))
    with pytest.raises(ValueError, match="2 reference rows for 1 rows: expected one for each"):
        pack([shown._replace(references=(row, row))])
    with pytest.raises(ValueError, match="only some have reference rows"):
        pack([plain, shown])
    with pytest.raises(ValueError, match="3 jobs side by side do not divide over 2 shards"):
        pack([plain] * 3, side_by_side=True, num_shards=2)
    half = Layout((4,))
    for side_by_side in (False, True):
        with pytest.raises(ValueError, match="a row of 6 tokens: at most 4 fit into one step"):
            pack([shown], layout=half, side_by_side=side_by_side)
    assert row_length(row) == 3


# --- training ---


@pytest.mark.parametrize("side_by_side", [False, True])
def test_rows_references_and_context_as_in_a_slow_loop(params, adapters, train, side_by_side):
    jobs = make_jobs(with_references=True)
    batches = pack(jobs, side_by_side=side_by_side, **PACKING)
    new, losses = train(params, adapters, batches, context={"factor": FACTORS})
    # Only rows that are trained on are steps, and have losses.
    by_job = job_losses(batches, jax.device_get(losses), A)
    for batch, loss in zip(batches, losses, strict=True):
        assert loss.shape == batch.lanes.shape
        assert (np.asarray(loss)[batch.lanes < 0] == 0).all()
    for j, job in enumerate(jobs):
        before = lora.take(adapters, slice(j, j + 1))
        found = lora.take(new, slice(j, j + 1)).weights
        expected, slow_losses = slow_loop(params, before, job, FACTORS[j])
        assert_near(found, expected, before.weights)
        np.testing.assert_allclose(by_job[j], slow_losses, rtol=1e-5)
        moved = optax.tree.norm(optax.tree.sub(found, before.weights))
        assert (moved > 1e-3) == bool(job.rows)


def test_a_reference_row_that_is_not_finite_stops_its_own_adapter(params, adapters, train):
    jobs = make_jobs(with_references=True)
    sick = [*jobs]
    sick[2] = jobs[2]._replace(references=((text_of([1, SICK, 2]),),) * 2)
    table = np.array(params["embed"]["embedding"])
    table[SICK] = np.nan
    params = params | {"embed": {"embedding": table}}
    context = {"factor": FACTORS}
    expected, _ = train(params, adapters, pack(jobs, side_by_side=True, **PACKING), None, context)
    batches = pack(sick, side_by_side=True, **PACKING)
    new, losses = train(params, adapters, batches, None, context)
    for j in range(A):
        right = adapters if j == 2 else expected
        jax.tree.map(np.testing.assert_array_equal, lora.take(new, j), lora.take(right, j))
    losses = job_losses(batches, jax.device_get(losses), A)
    assert np.isnan(losses[2]).all() and np.isfinite([*losses[0], *losses[3]]).all()


def test_over_devices_as_on_one(params, adapters, train):
    mesh = make_mesh(devices=jax.devices()[:2])
    jobs, context = make_jobs(with_references=True), {"factor": FACTORS}
    whole = pack(jobs, side_by_side=True, **PACKING)
    expected, losses = train(params, adapters, whole, None, context)
    expected_losses = job_losses(whole, jax.device_get(losses), A)
    halves = pack(jobs, side_by_side=True, num_shards=2, **PACKING)
    where = leading(mesh, "adapter", A)
    optimizer = make_optimizer(optimizer=with_memory, grad_clip=None)
    over_two = make_inner_update(CONFIG, optimizer, mesh=mesh)
    with jax.transfer_guard("disallow"):
        new, losses = over_two(
            to_device(params, replicated(mesh)),
            to_device(adapters, where),
            [to_device(batch, batch_sharding(mesh)) for batch in halves],
            context=to_device(context, where),
        )
    assert_near(new.weights, expected.weights, adapters.weights)
    for found, right in zip(
        job_losses(halves, jax.device_get(losses), A), expected_losses, strict=True
    ):
        np.testing.assert_allclose(found, right, rtol=1e-5)


def test_each_shard_has_the_kernels_of_its_own_adapters():
    def add_kernels(params, state, batch, context):
        layer = params["layers_0"]["attn"]
        total = layer["q_proj"]["kernel"].sum((1, 2)) + layer["k_proj"]["kernel"].sum()
        return state._replace(opt_state=total + context["one"]), batch.lanes * 1.0

    mesh = make_mesh(devices=jax.devices()[:2])
    own = np.arange(A, dtype=np.float32)[:, None, None] * np.ones((A, 2, 3), np.float32)
    kernels = {"q_proj": own, "k_proj": np.ones((2, 3), np.float32)}
    params = {"layers_0": {"attn": {name: {"kernel": x} for name, x in kernels.items()}}}
    state = InnerState(Adapters({}, np.ones(A, np.float32)), FACTORS, np.zeros(A, np.int32))
    (batch,) = pack([Job(((text_of([1, 2]),),), 0.1)] * A, side_by_side=True, num_shards=2)
    one = {"one": np.ones(A, np.float32)}
    found, lanes = jax.jit(on_shards(add_kernels, mesh))(params, state, batch, one)
    np.testing.assert_array_equal(found.opt_state, 6 * np.arange(A) + 7)
    assert np.asarray(lanes)[0].tolist() == [0, 1, 0, 1]  # counted within the shard


# --- what optimizers ask for ---


def test_an_optimizer_that_gets_not_what_it_asks_for_says_so(params, adapters, train):
    plain, shown = (
        pack(make_jobs(with_references), side_by_side=True, **PACKING)
        for with_references in (False, True)
    )
    with pytest.raises(TypeError, match="memory_grads"):
        train(params, adapters, plain, context={"factor": FACTORS})
    with pytest.raises(TypeError, match="factor"):
        train(params, adapters, shown)
    with pytest.raises(ValueError, match=r"context\['factor'\] is \(3,\): .* each of 4 adapters"):
        train(params, adapters, shown, context={"factor": FACTORS[:3]})
    with pytest.raises(ValueError, match="context has memory_grads, value: the inner loop itself"):
        train(params, adapters, shown, context={"value": FACTORS, "memory_grads": FACTORS})
    by_two = make_inner_update(CONFIG, make_optimizer(), accumulation=2)
    with pytest.raises(ValueError, match="reference rows with accumulation=2"):
        by_two(params, adapters, shown)


def times(name, number):
    """A transformation that says in its state that it was there, and asks for one keyword."""

    def step(updates, state, params=None, **asked):
        del params
        return updates * number * asked[name], state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), step)


def test_before_clipping_and_after_the_optimizer():
    options = {"optax_name": "sgd", "before": [times("x", 3.0)], "after": [times("y", 5.0)]}
    tx = make_optimizer(**options, grad_clip=1.0)(0.5)
    grads, weights, loss = jnp.float32([3.0, 4.0]), jnp.zeros(2), jnp.float32(0)
    context = {"x": 1.0, "y": 2.0, "nobody": None}
    moved, _ = update(tx, grads, tx.init(weights), weights, loss, context=context)
    np.testing.assert_allclose(moved, [-3.0, -4.0], rtol=1e-6)  # 0.5 * clipped * 5 * 2
    tx = make_optimizer(**options, grad_clip=None)(0.5)
    moved, _ = update(tx, grads, tx.init(weights), weights, loss, context=context)
    np.testing.assert_allclose(moved, [-45.0, -60.0], rtol=1e-6)
    # Over groups of steps the context is the same.
    state = accumulate(tx, 2, True).init(weights)
    _, state = update(accumulate(tx, 2, False), grads, state, weights, loss, context=context)
    moved, _ = update(accumulate(tx, 2, True), 3 * grads, state, weights, loss, context=context)
    np.testing.assert_allclose(moved, [-90.0, -120.0], rtol=1e-6)


def test_nothing_comes_after_a_schedule_free_optimizer():
    options = {"optax_name": "contrib.schedule_free_adamw", "optax_kwargs": {"weight_decay": 0.0}}
    make_optimizer(**options, before=[optax.identity()])(0.5).init(jnp.zeros(2))
    with pytest.raises(TypeError, match="schedule-free and evaluates another point"):
        make_optimizer(**options, after=[optax.identity()])(0.5).init(jnp.zeros(2))
