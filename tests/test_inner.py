"""The inner loop against a slow loop over one adapter, one text and one optax step at a time."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seal_jax.bench.timing import count_compiles
from seal_jax.inner.packing import pack
from seal_jax.inner.steps import Layout
from seal_jax.inner.texts import PAD_SAMPLES, Job, make_job, row_length, text_of
from seal_jax.inner.update import InnerSetup, make_inner_loop, make_inner_update
from seal_jax.models import lora
from seal_jax.models.logits import token_logp, unembed
from seal_jax.models.transformer import Packed, forward, hidden_states, init_params
from seal_jax.optim import make_optimizer, scheduled_rate
from seal_jax.types import Adapters

A = 4
T = 32  # the longest row
PACKING = {"tokens_per_step": A * T, "layout": Layout((T, 2 * T, 4 * T)), "steps_per_call": 4}
# Adam divides by the gradient's size: with its own epsilon, where a gradient is nothing but
# rounding, the two paths would differ by whole steps.
ADAMW = {"weight_decay": 0.0, "eps": 1e-4}


def make_texts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [text_of(rng.integers(1, 64, n).tolist(), prompt) for n, prompt in lengths]


def varied_jobs():
    """Return jobs of other lengths, epochs, batch sizes and learning rates each; one is empty."""
    options = [
        ([(9, 0), (20, 4), (14, 0)], 2, 1, 1e-2),
        ([(16, 0)], 4, 1, 3e-3),
        ([(11, 0), (8, 2), (1, 0), (13, 0)], 2, 2, 2e-2),
        ([], 3, 1, 1e-2),
    ]
    return [
        make_job(
            make_texts(seed, lengths),
            num_epochs=num_epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            key=(0, seed),
        )
        for seed, (lengths, num_epochs, batch_size, learning_rate) in enumerate(options)
    ]


def init(config, num_adapters=A, targets=("q_proj", "v_proj")):
    """Return fresh adapters (numpy), each from its own key."""
    rngs = jax.random.split(jax.random.key(1), max(A, num_adapters))[:num_adapters]
    start = jax.jit(lambda k: lora.init_adapters(config, k, rank=4, alpha=8.0, targets=targets))
    return jax.tree.map(np.asarray, start(rngs))


@pytest.fixture(scope="module")
def adapters(tiny):
    return init(tiny[0])


@pytest.fixture(scope="module")
def update(tiny):
    """Return AdamW's inner_update with the model, so that all tests share its programs."""
    return make_inner_update(tiny[0], make_optimizer(optax_kwargs=ADAMW))


@pytest.fixture(scope="module")
def trained(tiny, adapters, update):
    """Return what the population of `varied_jobs` becomes, and its losses by (job, row)."""
    return run(tiny[1], adapters, varied_jobs(), update)


def run(params, adapters, jobs, update, **packing):
    batches = pack(jobs, **{**PACKING, **packing})
    new, losses = update(params, adapters, batches)
    by_job = {j: [] for j in range(len(jobs))}
    for batch, loss in zip(batches, losses, strict=True):
        for lanes, values in zip(batch.lanes, np.asarray(loss), strict=True):
            for lane, value in zip(lanes, values, strict=True):
                if lane >= 0:
                    by_job[int(lane)].append(value)
                else:
                    assert value == 0.0
    return jax.tree.map(np.asarray, new), by_job


def take(adapters, index):
    return lora.take(adapters, slice(index, index + 1))


def relative_error(found, expected):
    errors = jax.tree.map(
        lambda x, y: np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30), found, expected
    )
    return max(jax.tree.leaves(errors))


def divide(tree, number):
    return jax.tree.map(lambda x: x / number, tree)


def slow_inner_loop(config, params, adapter, job):
    """Train one adapter (A = 1) on its job as the textbook would, and return it with its losses."""

    def text_nll(weights, tokens, counts):
        merged = lora.merge(params, Adapters(weights, adapter.scale))
        logits = forward(config, merged, tokens[None])
        logp = jax.nn.log_softmax(logits[0, :-1])
        chosen = jnp.take_along_axis(logp, tokens[1:, None], axis=-1)[:, 0]
        return -jnp.where(counts[1:], chosen, 0.0).sum()

    grad_of_text = jax.jit(jax.value_and_grad(text_nll))
    rate = optax.linear_schedule(job.learning_rate, 0.0, len(job.rows))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, **ADAMW))
    weights, opt_state, losses = adapter.weights, tx.init(adapter.weights), []
    tx_update = jax.jit(tx.update)
    for row in job.rows:
        loss, grads = 0.0, jax.tree.map(np.zeros_like, weights)
        for text in row:
            padding = T - len(text.tokens)
            tokens = np.pad(np.array(text.tokens, np.int32), (0, padding))
            counts = np.pad(np.array(text.loss_mask, bool), (0, padding))
            text_loss, text_grads = grad_of_text(weights, tokens, counts)
            loss += float(text_loss)
            grads = jax.tree.map(np.add, grads, text_grads)
        num_counted = np.float32(max(sum(sum(text.loss_mask) for text in row), 1))
        updates, opt_state = tx_update(divide(grads, num_counted), opt_state, weights)
        weights = jax.tree.map(lambda w, u: np.asarray(w) + np.asarray(u), weights, updates)
        losses.append(loss / num_counted)
    return Adapters(weights, adapter.scale), losses


def test_a_population_equals_the_slow_loop(tiny, adapters, trained):
    config, params = tiny
    new, losses = trained
    for j, job in enumerate(varied_jobs()):
        if not job.rows:
            continue
        slow, slow_losses = slow_inner_loop(config, params, take(adapters, j), job)
        np.testing.assert_allclose(losses[j], slow_losses, rtol=1e-5)
        change = jax.tree.map(np.subtract, take(new, j).weights, take(adapters, j).weights)
        slow_change = jax.tree.map(np.subtract, slow.weights, take(adapters, j).weights)
        assert min(np.abs(x).max() for x in jax.tree.leaves(slow_change)) > 1e-4
        assert relative_error(take(new, j).weights, slow.weights) < 1e-5
        assert relative_error(change, slow_change) < 1e-4


def test_a_job_without_rows_leaves_its_adapter(adapters, trained):
    jax.tree.map(np.testing.assert_array_equal, take(trained[0], 3), take(adapters, 3))
    assert trained[1][3] == []


def test_alone_as_in_a_population(tiny, adapters, update, trained):
    jobs = varied_jobs()
    for j in range(3):
        only = [job if i == j else Job((), 0.0) for i, job in enumerate(jobs)]
        new, losses = run(tiny[1], adapters, only, update)
        assert relative_error(take(new, j), take(trained[0], j)) < 1e-5
        np.testing.assert_allclose(losses[j], trained[1][j], rtol=1e-5)


def test_alone_in_programs_of_other_shapes(tiny, adapters, update, trained):
    for j in range(3):
        new, losses = run(
            tiny[1], take(adapters, j), [varied_jobs()[j]], update, layout=Layout((T,))
        )
        assert relative_error(new, take(trained[0], j)) < 1e-5
        np.testing.assert_allclose(losses[0], trained[1][j], rtol=1e-5)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 0, 3, 1)])
def test_the_order_of_the_population_does_not_matter(tiny, adapters, update, trained, order):
    jobs = [varied_jobs()[j] for j in order]
    new, losses = run(tiny[1], lora.take(adapters, np.array(order)), jobs, update)
    assert relative_error(new, lora.take(trained[0], np.array(order))) < 1e-5
    for i, j in enumerate(order):
        np.testing.assert_allclose(losses[i], trained[1][j], rtol=1e-5)


def test_the_same_call_gives_the_same_bits(tiny, adapters, update, trained):
    again = run(tiny[1], adapters, varied_jobs(), update)
    jax.tree.map(np.testing.assert_array_equal, again, trained)


@pytest.mark.parametrize("learning_rate", [np.inf, 1e30, np.nan])
@pytest.mark.parametrize("sick", [0, 2])
def test_a_diverging_adapter_harms_nobody(tiny, adapters, update, trained, sick, learning_rate):
    jobs = varied_jobs()
    jobs[sick] = jobs[sick]._replace(learning_rate=learning_rate)
    new, losses = run(tiny[1], adapters, jobs, update)
    for j in set(range(A)) - {sick}:
        jax.tree.map(np.testing.assert_array_equal, take(new, j), take(trained[0], j))
        np.testing.assert_array_equal(losses[j], trained[1][j])
    if learning_rate != 1e30:  # whose steps are finite: it ends far away, with a uniform prediction
        jax.tree.map(np.testing.assert_array_equal, take(new, sick), take(adapters, sick))
        assert np.isnan(losses[sick]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))


@pytest.mark.parametrize("size", [np.nan, 1e12, 1e30])
@pytest.mark.parametrize("sick", [0, 2])
def test_a_sick_adapter_shares_array_rows_and_harms_nobody(tiny, adapters, update, sick, size):
    """What overflows forward or backward stays away from the texts behind and before it."""
    jobs = varied_jobs()
    packing = {"tokens_per_step": 2 * T, "layout": Layout((2 * T,))}  # one array row for all
    weights = jax.tree.map(np.copy, adapters.weights)
    for ab in weights["attn"].values():
        ab["a"][sick] *= size
        ab["b"][sick] += 1.0
    start = adapters._replace(weights=weights)
    healthy, expected = run(tiny[1], adapters, jobs, update, **packing)
    new, losses = run(tiny[1], start, jobs, update, **packing)
    for j in set(range(A)) - {sick}:
        jax.tree.map(np.testing.assert_array_equal, take(new, j), take(healthy, j))
        np.testing.assert_array_equal(losses[j], expected[j])
    if not np.isfinite(losses[sick]).any():  # frozen, and flagged
        jax.tree.map(np.testing.assert_array_equal, take(new, sick), take(start, sick))
    if np.isnan(size):
        assert np.isnan(losses[sick]).all()


def padded_loss(config, params, adapter, text, padded):
    """Return the loss of the authors' code: `padded` tokens, all of which count.

    Padding is 0; it sees the text before it, and no padding.
    """
    n = len(text.tokens)
    tokens = np.array([[*text.tokens, *[0] * (padded - n)]], np.int32)
    positions = np.arange(padded, dtype=np.int32)[None]
    hidden, _ = hidden_states(
        config,
        lora.merge(params, adapter),
        tokens,
        positions,
        np.ones_like(tokens),
        packed=Packed(key_segments=np.where(positions < n, 1, 2)),
    )
    logits = unembed(config, params, hidden[0, :-1])
    logp = jax.nn.log_softmax(logits)[np.arange(padded - 1), tokens[0, 1:]]
    return -logp.mean()


def test_the_exact_pad_loss_is_that_of_padded_texts(tiny, adapters, update):
    texts = make_texts(0, [(9, 0), (31, 0), (20, 0), (32, 0)])
    options = {"num_epochs": 1, "batch_size": 1, "learning_rate": 0.0}
    jobs = [make_job([t], key=(0,), pad_loss="exact", padded=32, **options) for t in texts]
    _, losses = run(tiny[1], adapters, jobs, update)
    for j, text in enumerate(texts):
        expected = padded_loss(*tiny, take(adapters, j), text, 32)
        np.testing.assert_allclose(losses[j], [expected], rtol=1e-5)
    # In one row the two paddings keep to their own texts; the mean is over both.
    job = make_job(texts[:2], key=(0,), pad_loss="exact", padded=32, **options | {"batch_size": 2})
    _, losses = run(tiny[1], take(adapters, 0), [job], update)
    pair = [padded_loss(*tiny, take(adapters, 0), text, 32) for text in texts[:2]]
    np.testing.assert_allclose(losses[0], [np.mean(pair)], rtol=1e-5)


def test_the_sampled_pad_loss_is_unbiased(tiny, adapters, update):
    (text,) = make_texts(0, [(9, 0)])
    options = {"num_epochs": 200, "batch_size": 1, "learning_rate": 0.0, "padded": 128}
    job = make_job([text], key=(0,), pad_loss="sampled", **options)
    assert all(len(row[0].pads) == PAD_SAMPLES + 1 for row in job.rows)
    assert len(set(job.rows)) > 190
    new, losses = run(tiny[1], take(adapters, 0), [job], update)
    jax.tree.map(np.testing.assert_array_equal, new, take(adapters, 0))
    expected = float(padded_loss(*tiny, take(adapters, 0), text, 128))
    error = np.std(losses[0]) / np.sqrt(len(losses[0]))
    assert 0 < error < 0.01 * expected
    assert abs(np.mean(losses[0]) - expected) < 4 * error
    # With as many samples as there is padding, it is exact.
    exact, sampled = (
        make_job([text], key=(0,), pad_loss=word, **options | {"padded": 9 + PAD_SAMPLES})
        for word in ("exact", "sampled")
    )
    assert exact == sampled


def test_padding_stays_with_its_text(tiny, adapters, update):
    texts = make_texts(0, [(9, 0), (14, 0)])
    options = {"num_epochs": 2, "batch_size": 1, "learning_rate": 1e-2, "key": (0,)}
    job = make_job(texts, pad_loss="exact", padded=32, **options)
    others = [make_job(make_texts(3, [(20, 0)] * 4), **options), job]
    alone, losses = run(tiny[1], take(adapters, 1), [job], update)
    together, both = run(tiny[1], lora.take(adapters, np.array([0, 1])), others, update)
    assert relative_error(take(together, 1), alone) < 1e-5
    np.testing.assert_allclose(both[1], losses[0], rtol=1e-5)


def test_arguments_stay_as_they_were(tiny, adapters, update):
    params, population = jax.tree.map(jnp.array, (tiny[1], adapters))
    batches = jax.tree.map(jnp.array, pack(varied_jobs(), **PACKING))
    first, _ = update(params, population, batches)
    second, _ = update(params, population, batches)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, params, tiny[1])
    jax.tree.map(np.testing.assert_array_equal, population, adapters)


def test_no_batches_no_change(tiny, adapters, update):
    new, losses = update(tiny[1], adapters, [])
    jax.tree.map(np.testing.assert_array_equal, new, adapters)
    assert losses == []


# Below, a single layer: each test compiles programs of its own.


@pytest.fixture(scope="module")
def small(tiny):
    config, params = tiny
    return dataclasses.replace(config, num_layers=1), params


def varied_self_edits(num_jobs):
    """Return jobs that differ in all that a self-edit chooses: texts, masks, epochs, rates."""
    rng = np.random.default_rng(0)
    jobs = []
    for i in range(num_jobs):
        lengths = np.minimum(rng.lognormal(3.4, 0.8, rng.integers(1, 6)) + 2, 500).astype(int)
        job = make_job(
            make_texts(i, [(int(n), int(rng.integers(0, n))) for n in lengths]),
            num_epochs=int(rng.integers(1, 3)),
            batch_size=1,
            learning_rate=float(rng.uniform(1e-4, 1e-1)),
            key=(i,),
        )
        jobs.append(job)
    return jobs


def test_500_self_edits_compile_6_programs_at_most(small, strict):
    config, params = small
    jobs = varied_self_edits(500)
    assert max(row_length(row) for job in jobs for row in job.rows) > 256
    adapters = init(config, 16)
    update = make_inner_update(config, make_optimizer(optax_name="sgd"))

    def train(jobs):
        for i in range(0, len(jobs), 16):
            wave = [*jobs[i : i + 16], *[Job((), 0.0)] * 16][:16]
            jax.block_until_ready(update(params, adapters, pack(wave)))
        return len(compiled)

    with count_compiles() as compiled:
        num_programs = train(jobs)
        again = train([job._replace(learning_rate=0.1) for job in jobs])
    assert 2 <= num_programs == again <= 6  # one of them starts the optimizer


class SteadyState(NamedTuple):
    count: jax.Array  # i32[]
    seen: tuple  # (largest gradient norm f32[], momentum like the parameters)


def steady(learning_rate):
    """A user's own: momentum, divided by the largest gradient norm so far."""

    def init(params):
        return SteadyState(jnp.int32(0), (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)))

    def update(updates, state, params=None):
        assert params is not None
        largest, momentum = state.seen
        largest = jnp.maximum(largest, optax.tree.norm(updates))
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, updates)
        updates = jax.tree.map(lambda m: -learning_rate * m / largest, momentum)
        return updates, SteadyState(state.count + 1, (largest, momentum))

    return optax.GradientTransformation(init, update)


OPTIMIZERS = {
    "adamw": ({"optax_name": "adamw"}, 3e-2),
    "sgd": ({"optax_name": "sgd", "optax_kwargs": {"momentum": 0.9}}, 3e-1),
    "lion": ({"optax_name": "lion"}, 3e-2),
    "adafactor": ({"optax_name": "adafactor", "optax_kwargs": {"factored": True}}, 1.0),
    "rmsprop": ({"optax_name": "rmsprop"}, 1e-2),
    "lamb": ({"optax_name": "lamb"}, 3e-1),
    "muon": ({"optax_name": "contrib.muon"}, 2e-1),
    "own": ({"optimizer": steady}, 1e-1),
    "keeps its rate": ({"optimizer": optax.inject_hyperparams(optax.adamw)}, 3e-2),
    "asks for the loss": ({"optax_name": "contrib.momo_adam"}, 3e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_memorizes(small, name):
    config, params = small
    options, learning_rate = OPTIMIZERS[name]
    update = make_inner_update(config, make_optimizer(**options))
    text = make_texts(0, [(16, 0)])[0]
    jobs = [Job(((text,),) * 30, rate) for rate in (learning_rate, 0.0)]
    adapters = init(config, 2, targets=("o_proj",))
    new, losses = run(params, adapters, jobs, update, steps_per_call=30)
    assert losses[0][-1] < 0.6 * losses[0][0], losses[0]
    assert len(losses[0]) == 30
    np.testing.assert_array_equal(losses[1], losses[1][0])
    jax.tree.map(np.testing.assert_array_equal, take(new, 1), take(adapters, 1))


def test_over_a_bfloat16_base_the_adapter_stays_float32(small):
    config, params = small
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    update = make_inner_update(config, make_optimizer(optax_name="sgd"))
    text = make_texts(0, [(16, 0)])[0]
    jobs = [Job(((text,),) * 30, 0.5), Job(((text,),) * 30, 1e-4)]
    adapters = init(config, 2, targets=("o_proj",))
    new, losses = run(half, adapters, jobs, update, steps_per_call=30)
    assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype(np.float32)}
    assert np.array(losses[0]).dtype == np.float32
    assert losses[0][-1] < 0.9 * losses[0][0]
    # Steps far below bfloat16's resolution are not lost.
    after, before = (x.weights["attn"]["o_proj"]["a"][1] for x in (new, adapters))
    change = np.abs(after - before)
    assert 0 < change.max() < 1e-4


@pytest.mark.parametrize("num_tokens", [5, 8, 19])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_log_probabilities_in_tiles(small, num_tokens, share):
    config, params = small
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((num_tokens, config.embed_dim)), jnp.float32)
    targets = jnp.asarray(rng.integers(config.vocab_size, size=num_tokens), jnp.int32)
    wanted = jnp.asarray(rng.random(num_tokens) < share)

    def plain(hidden):
        logp = jax.nn.log_softmax(unembed(config, params, hidden))
        return jnp.where(wanted, jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0], 0)

    def tiled(hidden):
        return token_logp(config, params, hidden, targets, wanted, tile=8)

    for function in (lambda f: f, lambda f: jax.grad(lambda h: (f(h) ** 2).sum())):
        expected = np.asarray(jax.jit(function(plain))(hidden))
        found = np.asarray(jax.jit(function(tiled))(hidden))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_no_logits_where_nobody_wants_any(small):
    """Tiles without a loss are not computed: hidden states that would give NaN there give 0."""
    config, params = small
    hidden = jnp.full((40, config.embed_dim), jnp.nan).at[30:35].set(0.5)
    wanted = (jnp.arange(40) >= 30) & (jnp.arange(40) < 34)  # with token 0, one tile of 5

    def total(hidden):
        targets = jnp.zeros(40, jnp.int32)
        return token_logp(config, params, hidden, targets, wanted, tile=5).sum()

    value, grads = jax.jit(jax.value_and_grad(total))(hidden)
    assert np.isfinite(value)
    assert np.isfinite(grads[1:]).all()


@pytest.mark.parametrize("of_head", [False, True])
def test_tiles_keep_no_copy_of_the_head(small, of_head):
    """A head kept for each of 16 tiles would be 16 of them; it is read once a tile instead."""
    config = dataclasses.replace(small[0], vocab_size=4096)
    table = jax.ShapeDtypeStruct((config.vocab_size, config.embed_dim), jnp.float32)
    hidden = jax.ShapeDtypeStruct((64, config.embed_dim), jnp.float32)
    tokens = jax.ShapeDtypeStruct((64,), jnp.int32)

    def total(hidden, table, targets):
        params = {"embed": {"embedding": table}}
        return token_logp(config, params, hidden, targets, targets > 0, tile=4).sum()

    grads = jax.jit(jax.grad(total, int(of_head)))
    memory = grads.lower(hidden, table, tokens).compile().memory_analysis()
    head = 4 * table.size
    assert memory.temp_size_in_bytes < (3 if of_head else 0.5) * head


def test_of_the_activation_only_its_inputs_are_kept(tiny):
    """Gate and up of every layer: with their products and sigmoid it would be twice as much."""
    config = dataclasses.replace(tiny[0], num_layers=6, mlp_dim=2048)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    job = make_job(make_texts(0, [(120, 0)]), num_epochs=1, batch_size=1, learning_rate=1, key=(0,))
    batch = pack([job], tokens_per_step=128, layout=Layout((128,)), steps_per_call=1)[0]
    loop = make_inner_loop(InnerSetup(config, make_optimizer(optax_kwargs=ADAMW)))
    memory = loop.trace(params, init(config, 1), batch).lower().compile().memory_analysis()
    kept = 2 * config.num_layers * batch.tokens.size * config.mlp_dim * 4
    assert memory.temp_size_in_bytes < 2 * kept


@pytest.mark.parametrize("num_tokens", [5, 19])
def test_gradient_of_the_head_in_tiles(small, num_tokens):
    config, params = small
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((num_tokens, config.embed_dim)), jnp.float32)
    targets = jnp.asarray(rng.integers(config.vocab_size, size=num_tokens), jnp.int32)
    wanted = jnp.asarray(rng.random(num_tokens) < 0.5)

    def plain(params):
        logp = jax.nn.log_softmax(unembed(config, params, hidden))
        logp = jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
        return (jnp.where(wanted, logp, 0) ** 2).sum()

    def tiled(params):
        return (token_logp(config, params, hidden, targets, wanted, tile=8) ** 2).sum()

    expected, found = (
        np.asarray(jax.jit(jax.grad(f))(params)["embed"]["embedding"]) for f in (plain, tiled)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_dropout_is_an_adapters_own(tiny, adapters):
    """It drops the same in every company, other things in every step, and 0 on average."""
    config, params = tiny
    update = make_inner_update(config, make_optimizer(optax_name="sgd"), dropout=0.3)
    jobs = varied_jobs()
    fill = jax.tree.map(lambda x: x + np.float32(0.02), adapters.weights)
    start = adapters._replace(weights=fill)
    trained, losses = run(params, start, jobs, update)
    for j in range(3):
        alone, own = run(params, take(start, j), [jobs[j]], update, layout=Layout((2 * T,)))
        assert relative_error(alone, take(trained, j)) < 1e-5
        np.testing.assert_allclose(own[0], losses[j], rtol=1e-5)
    (text,) = make_texts(0, [(16, 0)])
    still = Job(((text,),) * 100, 0.0, seed=3)
    _, varied = run(params, take(start, 0), [still], update)
    _, other = run(params, take(start, 0), [still._replace(seed=4)], update)
    none = make_inner_update(config, make_optimizer(optax_name="sgd"))
    _, without = run(params, take(start, 0), [still], none)
    assert len(set(varied[0])) > 90 and varied[0] != other[0]
    error = np.std(varied[0]) / 10
    assert abs(np.mean(varied[0]) - without[0][0]) < 5 * error + 0.01 * without[0][0]


@pytest.mark.parametrize("num_rows", [4, 5])
def test_accumulated_steps_are_one_of_a_larger_batch(small, num_rows):
    config, params = small
    texts = make_texts(0, [(12, 0)] * num_rows)
    apart = Job(tuple((text,) for text in texts), 1e-2)
    joined = Job(tuple(tuple(texts[i : i + 2]) for i in range(0, num_rows, 2)), 1e-2)
    optimizer = make_optimizer(optax_kwargs=ADAMW)
    adapters = init(config, 1)
    slow, _ = run(params, adapters, [joined], make_inner_update(config, optimizer))
    update = make_inner_update(config, optimizer, accumulation=2)
    found, losses = run(params, adapters, [apart], update)
    assert len(losses[0]) == num_rows
    assert relative_error(found, slow) < 1e-5


def test_schedules():
    steps, rate = np.arange(6, dtype=np.int32), np.float32(0.5)

    def values(name, num_steps=5):
        return np.array([scheduled_rate(name, rate, jnp.asarray(s), num_steps) for s in steps])

    np.testing.assert_allclose(values("constant"), [0.5] * 6)
    np.testing.assert_allclose(values("linear"), [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], atol=1e-7)
    cosine = [optax.cosine_decay_schedule(0.5, 5)(s) for s in steps]
    np.testing.assert_allclose(values("cosine"), cosine, atol=1e-7)
    assert values("linear", num_steps=2)[-1] == 0.0
    with pytest.raises(ValueError, match="schedule='liner': expected one of constant, linear"):
        values("liner")


def test_muon_orthogonalizes_every_matrix_of_the_stack():
    """Muon on [L r in] does to each layer what optax's does to that layer's matrix [in r]."""
    rng = np.random.default_rng(0)
    stacked = {"a": jnp.asarray(rng.standard_normal((3, 8, 4)), jnp.float32)}
    grads = {"a": jnp.asarray(rng.standard_normal((3, 8, 4)), jnp.float32)}
    tx = make_optimizer(optax_name="contrib.muon", grad_clip=None)(jnp.float32(1e-2))
    updates, _ = tx.update(grads, tx.init(stacked), stacked)
    for layer in range(3):
        weights, grad = stacked["a"][layer].T, grads["a"][layer].T
        alone = optax.contrib.muon(jnp.float32(1e-2))
        expected, _ = alone.update(grad, alone.init(weights), weights)
        np.testing.assert_allclose(updates["a"][layer].T, expected, rtol=1e-4, atol=1e-6)
    adam = make_optimizer(optax_name="nadamw", grad_clip=None)(jnp.float32(1e-2))
    other, _ = adam.update(grads, adam.init(stacked), stacked)
    assert not np.allclose(updates["a"], other["a"], rtol=1e-2)
