"""Every way to compute attention against a slow reference: one query at a time, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from seal_jax.inner.update import lane_losses, make_inner_update
from seal_jax.models import lora
from seal_jax.models.attention import _choose, attend, attend_apart, flat_heads, is_finite
from seal_jax.models.config import REMATS, ModelConfig
from seal_jax.models.kv_cache import attend_cached, seen_slots
from seal_jax.models.transformer import forward, init_params
from seal_jax.optim import make_optimizer
from seal_jax.sharding import make_mesh
from seal_jax.types import Adapters, InnerBatch

ON_GPU = jax.default_backend() == "gpu"


def config_of(way, *, H=64, N=4, K=2, window=None, softcap=None, scale=None):
    return ModelConfig(
        vocab_size=8,
        num_layers=1,
        embed_dim=8,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        mlp_dim=8,
        attention=way,
        attn_softcap=softcap,
        query_scale=scale,
        sliding_window=window,
        local_layers=(True,) if window else (),
    )


def arrays(config, rows, length, seed=0, dtype=np.float32):
    """Return q, k, v, what the output is weighed with, and segments: two texts and padding."""
    rng = np.random.default_rng(seed)
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v, w = (rng.normal(size=(rows, n, length, H)).astype(dtype) for n in (N, K, K, N))
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        first, end = sorted(rng.integers(1, length + 1, 2))
        segments[row, :end], segments[row, :first] = 2, 1
    return q, k, v, w, segments


def slow_attention(config, q, k, v, segments, window):
    """Return what every query gathers, in float64, looking at its keys one by one."""
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, t in np.ndindex(q.shape[:3]):
        head = n * k.shape[1] // q.shape[1]
        seen = [
            s
            for s in range(t + 1)
            if segments[b, s] == segments[b, t] and (window is None or t - s < window)
        ]
        scores = k[b, head, seen] @ q[b, n, t] * scale
        if config.attn_softcap is not None:
            scores = config.attn_softcap * np.tanh(scores / config.attn_softcap)
        weights = np.exp(scores - scores.max())
        out[b, n, t] = weights @ v[b, head, seen] / weights.sum()
    return out


def attend_and_grads(config, q, k, v, w, segments):
    """Return the output, and the gradients of its sum weighed by w."""
    local = config.sliding_window is not None

    @jax.jit
    def both(q, k, v):
        def weighed(q, k, v):
            out = attend(config, q, k, v, segments, segments, local=local)
            return (out * w).sum(), out

        grads, out = jax.grad(weighed, (0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    return both(q, k, v)


CASES = {
    "plain": {},
    "multi-head, H 128": {"K": 4, "H": 128},
    "one kv head, query scale": {"K": 1, "scale": 0.2},
    "window": {"window": 20},
    "soft cap": {"softcap": 2.0, "scale": 0.5},
    "window and soft cap": {"window": 33, "softcap": 2.0, "scale": 0.5},
}


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def _platform(request, monkeypatch):
    """Run here what is written for a platform."""
    monkeypatch.setattr("seal_jax.models.attention.platform", lambda: request.param)


@pytest.mark.usefixtures("_platform")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_xla_is_the_slow_reference(case):
    config = config_of("xla", **{"H": 8, **case})
    q, k, v, _, segments = arrays(config, 2, 40)
    out = attend(config, q, k, v, segments, segments, local=bool(case.get("window")))
    expected = slow_attention(config, q, k, v, segments, case.get("window"))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_platform")
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_row_with_a_cache_sees_its_prompt_and_what_it_wrote(case, copies):
    """As if each row's text stood in one piece: prompts of 5, 40 and 1 tokens, rows of any age."""
    config = config_of("xla", **{"H": 8, **case})
    lengths, slots = np.repeat([5, 40, 1], copies), np.arange(3 * copies) * 5 % 13
    rng = np.random.default_rng(0)
    N, K, H, B = config.num_heads, config.num_kv_heads, config.head_dim, len(lengths)
    q = rng.normal(size=(B, N, 1, H)).astype(np.float32)
    prompts = rng.normal(size=(2, 3, K, 40, H)).astype(np.float32)
    own = rng.normal(size=(2, B, K, 16, H)).astype(np.float32)
    cached = [(k.swapaxes(2, 3), v) for k, v in (prompts, own)]
    seen = seen_slots(40, 16, lengths, slots, case.get("window"))
    found = attend_cached(config, q, *cached, seen)
    for row, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        k, v = (
            np.concatenate([p[row // copies, :, :length], x[row, :, : slot + 1]], axis=1)[None]
            for p, x in zip(prompts, own, strict=True)
        )
        queries = np.zeros((1, N, k.shape[2], H), np.float32)
        queries[:, :, -1] = q[row, :, 0]
        segments = np.ones((1, k.shape[2]), np.int32)
        expected = slow_attention(config, queries, k, v, segments, case.get("window"))
        np.testing.assert_allclose(found[row, :, 0], expected[0, :, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [128, 150])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_splash_is_xla_forward_and_backward(case, length):
    config = config_of("splash", **case)
    given = arrays(config, 1, length)
    found = attend_and_grads(config, *given)
    expected = attend_and_grads(dataclasses.replace(config, attention="xla"), *given)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.abs(y).max() + 1e-6),
        found,
        expected,
    )


@pytest.mark.skipif(not ON_GPU, reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("case", ["plain", "multi-head, H 128", "one kv head, query scale"])
def test_cudnn_is_xla_forward_and_backward(case):
    config = config_of("cudnn", **CASES[case])
    *given, segments = arrays(config, 2, 256)
    given = [jnp.asarray(x, jnp.bfloat16) for x in given]
    found = attend_and_grads(config, *given, segments)
    expected = attend_and_grads(dataclasses.replace(config, attention="xla"), *given, segments)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.linalg.norm(x - y) < 0.02 * np.linalg.norm(y)


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"softcap": 2.0}, jnp.bfloat16, "no soft cap"),
        ({}, jnp.float32, "needs bfloat16 or float16, found float32"),
    ],
)
def test_what_cudnn_cannot_do_is_refused(settings, dtype, message):
    config = config_of("cudnn", **settings)
    *given, segments = arrays(config, 1, 16)
    q, k, v, _ = (jnp.asarray(x, dtype) for x in given)
    with pytest.raises(ValueError, match=message):
        attend(config, q, k, v, segments, segments, local=False)


@pytest.mark.parametrize(
    ("sizes", "heads", "rows"),
    [
        ({"data": 4, "tensor": 2}, (4, 2), 4),
        # Rows and heads that the mesh does not divide are whole.
        ({"data": 2, "fsdp": 2, "tensor": 2}, (3, 3), 1),
    ],
    ids=str,
)
def test_splash_on_eight_devices_is_xla_on_one(sizes, heads, rows):
    config = config_of("splash", N=heads[0], K=heads[1])
    given = arrays(config, rows, 128)
    expected = attend_and_grads(dataclasses.replace(config, attention="xla"), *given)
    with jax.set_mesh(make_mesh(**sizes)):
        found = attend_and_grads(config, *given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), found, expected)


def test_auto_is_xla_here_and_follows_the_platform_and_length(monkeypatch):
    auto = config_of("auto", H=128)

    def chosen(platform, length, dtype=jnp.bfloat16, **settings):
        monkeypatch.setattr("seal_jax.models.attention.platform", lambda: platform)
        config = dataclasses.replace(auto, **settings)
        return _choose(config, jax.ShapeDtypeStruct((1, 4, length, 128), dtype))

    assert chosen("cpu", 4096) == "xla"
    assert (chosen("tpu", 512), chosen("tpu", 1024)) == ("xla", "splash")
    assert (chosen("gpu", 128), chosen("gpu", 256)) == ("xla", "cudnn")
    assert chosen("gpu", 256, jnp.float32) == "xla"
    assert chosen("gpu", 256, attn_softcap=50.0) == "xla"
    assert chosen("cpu", 16, attention="splash") == "splash"


WIDE = dataclasses.replace(TINY, head_dim=64, sliding_window=40, local_layers=(True, False))


@pytest.fixture(scope="module")
def model():
    params = init_params(WIDE, jax.random.key(0))
    return jax.tree.map(lambda x: 8.0 * x if x.ndim == 2 else x, params)


def packed_batch(num_lanes, length):
    """Return one inner step of rows that hold two texts and padding each."""
    rng = np.random.default_rng(0)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [50, length - 60, 10]), (num_lanes, length))
    positions = np.concatenate([np.arange(50), np.arange(length - 60), np.zeros(10, int)])
    return InnerBatch(
        lanes=np.arange(num_lanes),
        chunk_lanes=np.arange(num_lanes),
        chunk_tokens=np.arange(num_lanes * length).reshape(num_lanes, length),
        tokens=rng.integers(1, WIDE.vocab_size, (num_lanes, length)),
        segments=segments,
        positions=np.broadcast_to(positions, (num_lanes, length)),
        loss_weight=(segments > 0).astype(jnp.float32),
        learning_rate=np.full(num_lanes, 1e-2, np.float32),
        num_steps=np.full(num_lanes, 2),
        seed=np.zeros(num_lanes, np.int32),
    )


def make_adapters(config, num_adapters):
    keys = jax.random.split(jax.random.key(1), num_adapters)
    return lora.init_adapters(config, keys, rank=4, alpha=8.0, targets=("q_proj", "v_proj"))


def test_a_model_with_splash_is_that_with_xla(model):
    splash, xla = (dataclasses.replace(WIDE, attention=way) for way in ("splash", "xla"))
    batch = packed_batch(2, 130)
    logits = [
        jax.jit(forward, static_argnums=0)(
            config, model, batch.tokens, batch.positions, batch.segments
        )
        for config in (splash, xla)
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)
    # And what an inner update makes of it: jit, scan, cond and gradients, on eight devices too.
    steps = batch._replace(**{k: np.stack([getattr(batch, k)] * 2) for k in batch._fields[:7]})
    trained = {}
    for name, config in {"xla": xla, "splash": splash}.items():
        update = make_inner_update(config, make_optimizer(optax_kwargs={"eps": 1e-4}), "constant")
        trained[name] = update(model, make_adapters(config, 2), [steps])
    with jax.set_mesh(make_mesh(data=4, tensor=2)):
        trained["mesh"] = update(model, make_adapters(splash, 2), [steps])
    for name in ("splash", "mesh"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4),
            trained[name],
            trained["xla"],
        )


@pytest.mark.parametrize("word", [word for word in REMATS if word != "none"])
def test_no_word_of_remat_changes_a_gradient(word):
    """What it does to memory is in test_aot.py: XLA:CPU merges what it is asked to make again."""
    params, adapters = init_params(TINY, jax.random.key(0)), make_adapters(TINY, 2)
    batch = packed_batch(2, 96)

    def grads(word):
        config = dataclasses.replace(TINY, remat=word)

        def loss(weights):
            return lane_losses(config, params, Adapters(weights, adapters.scale), batch).sum()

        return jax.jit(jax.grad(loss))(adapters.weights)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max()),
        grads(word),
        grads("none"),
    )


def test_a_gradient_that_overflows_stays_with_its_own_text():
    """0 * inf is NaN: the texts before and behind it in the array row must not get it."""
    config = config_of("xla")
    rng = np.random.default_rng(0)
    num_heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (rng.normal(size=(1, n, 24, 64)).astype(np.float32) for n in num_heads)
    segments = jnp.repeat(jnp.arange(1, 4), 8)[None]
    finite = jnp.ones(segments.shape, bool)
    _, pull = jax.vjp(
        lambda *qkv: attend_apart(config, *qkv, segments, segments, finite, local=False), q, k, v
    )
    grads = jnp.ones((24, config.num_heads * 64))
    expected, found = pull(grads), pull(grads.at[12, 64].set(jnp.inf))
    others = np.r_[0:8, 16:24]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x[:, :, others], y[:, :, others])
    assert np.isnan(found[0][:, :, 12]).all()  # and its adapter learns of it


@pytest.mark.parametrize("size", [1e14, 1e38, np.inf])
def test_a_huge_text_stays_with_itself(size):
    """Its key times another's query may overflow: what is not seen counts for nothing."""
    config = config_of("xla")
    rng = np.random.default_rng(0)
    num_heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    qkv = [rng.normal(size=(1, n, 24, 64)).astype(np.float32) for n in num_heads]
    huge = [np.where(np.arange(24)[:, None] // 8 == 1, np.float32(size), x) for x in qkv]
    segments = jnp.repeat(jnp.arange(1, 4), 8)[None]

    def out(qkv):
        finite = is_finite(*(flat_heads(jnp.asarray(x)) for x in qkv))[None]
        return attend_apart(config, *qkv, segments, segments, finite, local=False)

    expected, found = out(qkv), out(huge)
    others = np.r_[0:8, 16:24]
    np.testing.assert_array_equal(found[others], expected[others])
    assert np.isnan(found[8:16]).all() == (size > 1e15)  # and then its adapter learns of it


def test_a_product_that_overflows_stays_with_its_own_text():
    """A gradient and another text's value may overflow together: what is not seen gets 0."""
    config = config_of("xla")
    rng = np.random.default_rng(0)
    num_heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (rng.normal(size=(1, n, 24, 64)).astype(np.float32) for n in num_heads)
    v[:, :, 8:16] *= 1e10
    segments = jnp.repeat(jnp.arange(1, 4), 8)[None]

    def attention(q, k, v):
        return attend(config, q, k, v, segments, segments, local=False)

    _, pull = jax.vjp(attention, q, k, v)
    grads = jnp.ones_like(q)
    expected, found = pull(grads), pull(grads.at[:, :, 16:].set(1e30))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x[:, :, :16], y[:, :, :16])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_products_are_not_computed_again(dtype):
    params = init_params(WIDE, jax.random.key(0), jnp.dtype(dtype))
    tokens = jnp.zeros((1, 8), jnp.int32)

    def num_products(word):
        config = dataclasses.replace(WIDE, remat=word)

        def total(params):
            return forward(config, params, tokens).sum()

        return str(jax.make_jaxpr(jax.grad(total))(params)).count("dot_general")

    full, kept = num_products("full"), num_products("dots_with_no_batch_dims_saveable")
    assert full - kept >= 5 * WIDE.num_layers  # of seven maps a layer; the last ones' nobody needs
