"""Drawing a token: against sorting, against the distribution, against transformers' warpers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from seal_jax.sampling.draw import Settings, draw, make_settings

pytestmark = pytest.mark.usefixtures("strict")

LOGITS = [1.0, -0.5, 2.0, 0.0, 1.5, -2.0, 0.5, -1.0]
CHI_SQUARE = {0: 0.0, 1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}  # 1 in 1000


# Of so many rows that the compiler's work is less than what it saves.
many_draws = jax.jit(draw, compiler_options={"xla_backend_optimization_level": 1})


def draws(logits, num_draws, seed=0, **options):
    """Return tokens drawn from the same logits with different keys, and how often each came."""
    options, tables = dict(options), {}
    for name in ("seen", "allowed"):
        if name in options:
            tables[name] = np.tile(np.array(options.pop(name), bool), (num_draws, 1))
    tiled = np.tile(np.array(logits, np.float32), (num_draws, 1))
    keys = jax.random.split(jax.random.key(seed), num_draws)
    drawn, _ = many_draws(tiled, keys, make_settings(num_draws, **options), **tables)
    drawn = np.asarray(drawn)
    assert drawn.dtype == np.int32
    return drawn, np.bincount(drawn, minlength=len(logits))


def slow_distribution(
    logits,
    *,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    seen=None,
    allowed=None,
):
    """Return the probabilities by sorting, one filter after the other; ties stay together."""
    x = np.array(logits, np.float64)
    if seen is not None:
        x = np.where(seen, np.where(x > 0, x / repetition_penalty, x * repetition_penalty), x)
    x = np.where(True if allowed is None else allowed, x / temperature, -np.inf)
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    if top_k:
        probs[probs < np.sort(probs)[::-1][min(top_k, len(probs)) - 1]] = 0
        probs /= probs.sum()
    likelier = np.array([probs[probs > p].sum() for p in probs])
    probs = np.where((likelier < top_p) | (likelier == 0), probs, 0)
    probs = np.where(probs >= min_p * probs.max(), probs, 0)
    return probs / probs.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 2.0, "top_p": 0.3},
        {"top_k": 3},
        {"top_k": 1},
        {"min_p": 0.2},
        {"top_p": 0.01},
        {"temperature": 5.0, "top_k": 6, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 2.0, "seen": [1, 0, 1, 0, 0, 1, 0, 0], "top_p": 0.9},
        {"allowed": [0, 1, 0, 1, 1, 0, 0, 1], "top_k": 3},
    ],
)
def test_draws_follow_their_distribution(options):
    num_draws = 20_000
    expected = num_draws * slow_distribution(LOGITS, **options)
    _, counts = draws(LOGITS, num_draws, **options)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square <= CHI_SQUARE[kept.sum() - 1]


def test_draws_follow_a_distribution_over_many_blocks():
    """The running sum is made of blocks: 1,000 tokens, with long runs that have no chance."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 1000)
    logits[100:800] = -np.inf
    logits[-1] = 3
    drawn, counts = draws(logits, 20_000, top_p=0.9)
    probs = slow_distribution(logits, top_p=0.9)
    assert counts[probs == 0].sum() == 0 and counts[-1] > 0
    likely = probs > 5 / 20_000
    expected = 20_000 * probs[likely]
    chi_square = ((counts[likely] - expected) ** 2 / expected).sum()
    degrees = likely.sum()
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


HALVES = st.lists(st.integers(-6, 6).map(lambda x: x / 2), min_size=8, max_size=8)


@given(HALVES, st.integers(0, 9), st.floats(0.01, 1.0), st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_what_can_be_drawn_is_what_sorting_keeps(logits, top_k, top_p, min_p):
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": 4.0}
    probs = slow_distribution(logits, **options)
    for other in (top_p - 1e-5, top_p + 1e-5):  # else rounding decides
        if 0 < other <= 1:
            same = slow_distribution(logits, **options | {"top_p": other})
            assume(((same > 0) == (probs > 0)).all())
    drawn, _ = draws(logits, 1024, **options)
    assert set(drawn) <= set(np.flatnonzero(probs))
    assert set(np.flatnonzero(probs > 0.05)) <= set(drawn)  # missed with probability 1e-22


def test_the_warpers_of_transformers_keep_the_same():
    torch = pytest.importorskip("torch")
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rng = np.random.default_rng(0)
    for options in (
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 5},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.5},
    ):
        logits = rng.normal(0, 2, 64).astype(np.float32)
        seen = [3, 17, 40]
        scores, ids = torch.tensor(logits)[None], torch.tensor([seen])
        scores = RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))(
            ids, scores
        )
        scores = TemperatureLogitsWarper(2.0)(ids, scores)
        scores = TopKLogitsWarper(options.get("top_k", 64))(ids, scores)
        scores = TopPLogitsWarper(options.get("top_p", 1.0))(ids, scores)
        scores = MinPLogitsWarper(options.get("min_p", 0.0))(ids, scores)
        expected = np.flatnonzero(np.isfinite(scores[0].numpy()))
        drawn, _ = draws(
            logits, 20_000, temperature=2.0, seen=np.isin(np.arange(64), seen), **options
        )
        assert set(drawn) == set(expected)


def test_temperature_zero_takes_the_likeliest():
    logits = np.array([[0.0, 3.0, 1.0], [5.0, 4.9, 5.0]], np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    for temperature in (0.0, 1e-9):
        settings = make_settings(2, temperature=temperature, top_p=0.5)
        drawn, _ = draw(jnp.asarray(logits), keys, settings)
        assert drawn.dtype == jnp.int32 and drawn[0] == 1 and drawn[1] in (0, 2)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_the_likeliest_is_the_first_of_equals(size):
    rng = np.random.default_rng(size)
    x = rng.integers(0, 4, (50, size)).astype(np.float32)  # hardly a row without equals
    x[0], x[1, -1] = -np.inf, 9.0
    keys = jax.random.split(jax.random.key(0), 50)
    greedy = make_settings(50, temperature=0.0)
    np.testing.assert_array_equal(draw(jnp.asarray(x), keys, greedy)[0], x.argmax(axis=1))
    x[0], x[1, -1] = np.nan, np.nan
    assert (draw(jnp.asarray(x), keys, greedy)[0] < size).all()


def test_a_row_draws_by_itself():
    """To the bit, whatever passes over the vocabulary its neighbours' settings ask for."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (8, 1000)), jnp.float32)
    seen = jnp.asarray(rng.random((8, 1000)) < 0.1)
    settings = make_settings(
        8,
        temperature=[1, 0, 2, 0.5, 1, 1, 1, 1],
        top_p=[1, 1, 0.1, 0.9, 0.5, 1, 1, 1],
        top_k=[0, 0, 0, 9, 0, 2, 0, 0],
        min_p=[0, 0, 0.1, 0, 0, 0, 0.2, 0],
        repetition_penalty=[1, 1, 1, 2, 1, 1, 1, 1.5],
    )
    draw_some = jax.jit(draw)
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), 8)
        together = [np.asarray(x) for x in draw_some(logits, keys, settings, seen)]
        for i in range(8):
            one = slice(i, i + 1)
            own = Settings(*(x[one] for x in settings))
            alone = draw_some(logits[one], keys[one], own, seen[one])
            assert [x[0] for x in alone] == [x[i] for x in together]


def test_the_log_probability_is_the_models_own():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (4, 1000)), jnp.float32)
    seen, allowed = (jnp.asarray(rng.random((4, 1000)) < share) for share in (0.5, 0.1))
    settings = make_settings(
        4, temperature=[1, 0, 2, 1], top_p=0.9, repetition_penalty=[1, 2, 2, 1.5]
    )
    keys = jax.random.split(jax.random.key(0), 4)
    every = jax.nn.log_softmax(logits)
    for tables in ({}, {"seen": seen}, {"seen": seen, "allowed": allowed}):
        token, logp = draw(logits, keys, settings, **tables)
        np.testing.assert_allclose(logp, every[jnp.arange(4), token], rtol=1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_row_that_diverged_ends_and_harms_nobody(broken):
    logits = np.random.default_rng(0).normal(0, 3, (3, 300)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 3)
    settings = make_settings(3, temperature=1.0, top_p=0.5, min_p=0.1, top_k=7)
    expected = np.asarray(draw(jnp.asarray(logits), keys, settings)[0])
    logits[1] = broken
    found = np.asarray(draw(jnp.asarray(logits), keys, settings)[0])
    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert 0 <= found[1] < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", np.nan),
        ("temperature", -1),
        ("temperature", np.inf),
        ("top_k", 1.5),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", [0.1, 2.0]),
        ("repetition_penalty", 0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*expected a number"):
        make_settings(2, **{name: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [np.nan, -np.inf])
def test_what_is_allowed_is_drawn_whatever_the_logits(temperature, broken):
    logits = np.random.default_rng(0).normal(0, 3, (3, 300)).astype(np.float32)
    logits[1] = broken
    allowed = np.stack([np.isin(np.arange(300), some) for some in ([7], [8, 299], [9, 10])])
    keys = jax.random.split(jax.random.key(1), 3)
    found, _ = draw(
        jnp.asarray(logits), keys, make_settings(3, temperature=temperature), None, allowed
    )
    assert found[0] == 7 and found[1] in (8, 299) and found[2] in (9, 10)
