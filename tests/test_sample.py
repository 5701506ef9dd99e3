"""Generation against one full forward pass per token, and its draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_device import one_device_mesh

from seal_jax import lora, sample
from seal_jax.bench.timing import count_compiles
from seal_jax.draw import make_settings
from seal_jax.models.transformer import forward
from seal_jax.sample import check_lengths, generate

pytestmark = pytest.mark.usefixtures("strict")

PAD = 0
MAX_TOKENS = 8
T = 48  # the slow reference's length
NOBODY = -1  # a stop id that no token has
PROMPTS = [
    [int(x) for x in np.random.default_rng(i).integers(1, 64, size=n)]
    for i, n in enumerate((5, 1, 32, 9, 17, 2))
]


def keys_of(num_rows, seed=0):
    return jax.random.split(jax.random.key(seed), 16)[:num_rows]


def write(model, prompts=PROMPTS, *, adapters=None, keys=None, stop=(), max_rows=64, **settings):
    num_groups = 1 if adapters is None else len(adapters.scale)
    size = len(prompts) // num_groups
    groups = [prompts[i * size : (i + 1) * size] for i in range(num_groups)]
    return generate_groups(
        model, adapters, groups, keys=keys, stop=stop, max_rows=max_rows, **settings
    )


def generate_groups(model, adapters, groups, *, keys=None, stop=(), max_rows=64, **settings):
    config, params = model
    num_rows = sum(map(len, groups))
    return generate(
        config,
        params,
        adapters,
        groups,
        keys_of(num_rows) if keys is None else keys,
        make_settings(num_rows, **{"temperature": 0.0} | settings),
        mesh=one_device_mesh(),
        stop_ids=[*stop, NOBODY, NOBODY][:2],
        max_tokens=MAX_TOKENS,
        max_rows=max_rows,
        pad_id=PAD,
    )


def logits_of(model, tokens):
    """Return the logits [len(tokens), V] of one text, by a full forward pass."""
    config, params = model
    padded = jnp.asarray(np.pad(np.array(tokens, np.int32), (0, T - len(tokens))))[None]
    logits = jax.jit(forward, static_argnums=0)(config, params, padded)
    return np.asarray(logits)[0, : len(tokens)]


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def slow_greedy(model, prompt, num_tokens=MAX_TOKENS):
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(logits_of(model, text)[-1].argmax()))
    return text[len(prompt) :]


def random_adapters(config, num_adapters):
    rng = np.random.default_rng(0)
    weights = {}
    for target, shape in lora.target_shapes(config, ("q_proj", "v_proj", "down_proj")).items():
        a, b = (
            rng.normal(0.0, 0.3, (num_adapters, config.num_layers, *matrix)).astype(np.float32)
            for matrix in ((shape[0], 4), (4, shape[1]))
        )
        weights.setdefault(lora.TARGETS[target], {})[target] = {"a": a, "b": b}
    return lora.Adapters(weights, np.ones((num_adapters,), np.float32))


@pytest.fixture(scope="module")
def greedy(tiny):
    return write(tiny)


def test_greedy_equals_a_forward_pass_per_token(tiny, greedy):
    for row, prompt in enumerate(PROMPTS):
        assert greedy.tokens[row].tolist() == slow_greedy(tiny, prompt)
    assert greedy.mask.all()
    assert not greedy.finished.any()  # all ended by max_tokens


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_logp_is_the_model_s_own(tiny, temperature, top_p):
    samples = write(tiny, temperature=temperature, top_p=top_p)
    for row, prompt in enumerate(PROMPTS):
        written = samples.tokens[row].tolist()
        logp = log_softmax(logits_of(tiny, prompt + written)[len(prompt) - 1 : -1])
        expected = logp[np.arange(MAX_TOKENS), written]
        np.testing.assert_allclose(samples.logp[row], expected, rtol=1e-5, atol=1e-5)


def test_draws_stay_within_top_p(tiny):
    samples = write(tiny, temperature=1.5, top_p=0.3)
    assert len(np.unique(samples.tokens)) > 10
    for row, prompt in enumerate(PROMPTS):
        written = samples.tokens[row].tolist()
        logits = logits_of(tiny, prompt + written)[len(prompt) - 1 : -1] / 1.5
        probs = np.exp(log_softmax(logits))
        likelier = np.where(probs > probs[np.arange(MAX_TOKENS), written][:, None], probs, 0)
        assert (likelier.sum(axis=1) < 0.3 + 1e-5).all()


def test_a_row_depends_on_its_prompt_and_key_alone(tiny):
    options = {"temperature": 1.0, "top_p": 0.95}
    keys = keys_of(6)
    samples = write(tiny, **options)
    order = np.array([4, 2, 0, 5, 1, 3])
    moved = write(tiny, [PROMPTS[i] for i in order], keys=keys[order], **options)
    np.testing.assert_array_equal(moved.tokens, samples.tokens[order])
    np.testing.assert_allclose(moved.logp, samples.logp[order], rtol=1e-5, atol=1e-5)
    others = write(tiny, [PROMPTS[2], *[[7, 8, 9]] * 5], keys=keys[np.array([2, 0, 0, 1, 1, 1])])
    np.testing.assert_array_equal(others.tokens[0], write(tiny).tokens[2])
    alone = write(tiny, [PROMPTS[2]], keys=keys[2:3], **options)
    np.testing.assert_array_equal(alone.tokens[0], samples.tokens[2])
    # Other keys, other texts; rows of one prompt differ by their keys.
    assert (write(tiny, keys=keys_of(6, seed=1), **options).tokens != samples.tokens).any(1).all()
    same = write(tiny, [PROMPTS[0]] * 5 + [PROMPTS[2]], keys=keys, **options).tokens[:5]
    assert len({tuple(row) for row in same.tolist()}) == 5


def test_each_row_is_written_by_the_adapter_of_its_group(tiny, greedy):
    config, params = tiny
    adapters = random_adapters(config, 3)
    samples = write(tiny, adapters=adapters)
    for i in range(3):
        merged = write((config, jax.jit(lora.merge)(params, adapters, i)))
        group = slice(2 * i, 2 * i + 2)
        np.testing.assert_array_equal(samples.tokens[group], merged.tokens[group])
        np.testing.assert_allclose(samples.logp[group], merged.logp[group], rtol=0, atol=1e-4)
        assert (samples.tokens[group] != greedy.tokens[group]).any()


@pytest.mark.parametrize("max_rows", [1, 4, 5])
def test_rows_that_wait_are_as_those_that_do_not(tiny, max_rows, monkeypatch):
    """Rows come and go in the middle of others, and the last ones move together."""
    monkeypatch.setattr(sample, "_CHUNK", 3)
    prompts = [PROMPTS[i % 6] for i in (0, 0, 0, 3, 1, 4, 4, 2, 5, 0, 1)]
    keys = jax.random.split(jax.random.key(3), 11)
    options = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
    stop = tuple(range(1, 9))  # rows end at different times
    at_once = write(tiny, prompts, keys=keys, stop=stop, **options)
    waited = write(tiny, prompts, keys=keys, stop=stop, max_rows=max_rows, **options)
    assert 3 <= len(set(at_once.mask.sum(axis=1)))
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(waited, name), getattr(at_once, name))
    np.testing.assert_allclose(waited.logp, at_once.logp, rtol=1e-5, atol=1e-5)


def test_groups_wait_for_themselves(tiny, monkeypatch):
    monkeypatch.setattr(sample, "_CHUNK", 3)
    config, params = tiny
    adapters = random_adapters(config, 3)
    groups = [PROMPTS[:5], [], [PROMPTS[5], [], PROMPTS[0], PROMPTS[0]]]
    prompts = [p for group in groups for p in group]
    found = generate_groups(tiny, adapters, groups, max_rows=6)
    for i, group in enumerate(groups):
        if group:
            merged = config, jax.jit(lora.merge)(params, adapters, i)
            expected = write(merged, group)
            first = sum(map(len, groups[:i]))
            rows = slice(first, first + len(group))
            np.testing.assert_array_equal(found.tokens[rows], expected.tokens)
    assert found.mask.any(axis=1).tolist() == [len(p) > 0 for p in prompts]


def test_few_programs_for_many_prompts(tiny):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 64, rng.integers(1, 33)).tolist() for _ in range(200)]
    prompts[7] = rng.integers(1, 64, 32).tolist()
    keys = jax.random.split(jax.random.key(0), 200)
    reversed_keys = keys[::-1]
    jax.block_until_ready(jax.random.key_data(keys))
    options = {"stop": (5, 9), "max_rows": 20, "temperature": 1.0}
    with count_compiles() as compiled:
        found = write(tiny, prompts, keys=keys, **options)
    assert len(compiled) <= 6, compiled
    assert found.mask.any(axis=1).all()
    with count_compiles() as compiled:
        again = write(tiny, prompts[::-1], keys=reversed_keys, **options)
    assert not compiled
    np.testing.assert_array_equal(again.tokens[::-1], found.tokens)


def test_the_cache_is_donated(tiny):
    config, params = tiny
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    rows = sample._no_rows(config, jnp.dtype("float32"), 8, 64, 8, PAD, where)
    stop_ids = jnp.array([NOBODY], jnp.int32)
    compiled = sample._decode.lower(config, params, None, rows, stop_ids, num_steps=4).compile()
    cache = sum(x.nbytes for x in jax.tree.leaves(rows.cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache


def test_rows_have_settings_of_their_own(tiny, greedy):
    temperature = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    mixed = write(tiny, temperature=temperature, top_k=[0, 0, 3, 1, 0, 5])
    drawn = write(tiny, temperature=1.0, top_k=[0, 0, 0, 0, 0, 5])
    for row in (0, 2, 4, 3):  # greedy, or the one likeliest
        np.testing.assert_array_equal(mixed.tokens[row], greedy.tokens[row])
    for row in (1, 5):
        np.testing.assert_array_equal(mixed.tokens[row], drawn.tokens[row])


def test_a_penalty_is_for_what_was_read_and_written(tiny):
    samples = write(tiny, repetition_penalty=1e6)
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for token in samples.tokens[row].tolist():
            logits = logits_of(tiny, text)[-1]
            seen = np.isin(np.arange(len(logits)), text)
            punished = np.where(seen, np.where(logits > 0, logits / 1e6, logits * 1e6), logits)
            assert token == punished.argmax()
            text.append(token)


def test_stop_tokens_end_rows(tiny, greedy):
    stop = (int(greedy.tokens[0, 2]), int(greedy.tokens[3, 5]))
    samples = write(tiny, stop=stop)
    ended = 0
    for row, free in enumerate(greedy.tokens.tolist()):
        ends = [t for t, token in enumerate(free) if token in stop]
        length = ends[0] + 1 if ends else MAX_TOKENS
        ended += bool(ends)
        assert samples.finished[row] == bool(ends)
        assert samples.mask[row].tolist() == [t < length for t in range(MAX_TOKENS)]
        assert samples.tokens[row].tolist() == free[:length] + [PAD] * (MAX_TOKENS - length)
        np.testing.assert_allclose(
            samples.logp[row],
            np.where(samples.mask[row], greedy.logp[row], 0.0),
            rtol=1e-5,
            atol=1e-6,
        )
    assert 2 <= ended < 6


def test_an_empty_prompt_writes_nothing(tiny, greedy):
    samples = write(tiny, [PROMPTS[0], [], *PROMPTS[2:]])
    assert not samples.mask[1].any() and not samples.finished[1]
    assert (samples.tokens[1] == PAD).all() and (samples.logp[1] == 0).all()
    np.testing.assert_array_equal(np.delete(samples.tokens, 1, 0), np.delete(greedy.tokens, 1, 0))


def test_texts_that_exceed_the_context_are_refused(tiny):
    config, _ = tiny
    check_lengths(config, [[1] * 200, []], config.max_length - 200)
    with pytest.raises(ValueError, match="a prompt of 200 tokens and up to 57 written ones"):
        check_lengths(config, [[1] * 200, []], config.max_length - 199)
