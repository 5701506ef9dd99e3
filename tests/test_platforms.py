"""What the decoder writes differently for CPUs, GPUs and TPUs computes the same; it is run here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from one_device import one_device_mesh

from seal_jax.inner.packing import pack
from seal_jax.inner.steps import TPU_LAYOUT
from seal_jax.inner.texts import Job, text_of
from seal_jax.inner.update import make_inner_update
from seal_jax.models import lora
from seal_jax.models.rope import apply_rope, rope_tables
from seal_jax.models.transformer import init_params
from seal_jax.optim import make_optimizer
from seal_jax.sampling.draw import make_settings
from seal_jax.sampling.generate import generate

PLATFORMS = ("cpu", "gpu", "tpu")
PROMPTS = [list(range(3, 12)), list(range(20, 40))]
CONFIG = dataclasses.replace(
    TINY, sliding_window=12, local_layers=(True, False), attn_softcap=20.0, qk_norm=True
)


@pytest.fixture(scope="module")
def params():
    params = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: 8.0 * x if x.ndim == 2 else x, params)


@pytest.fixture
def on(monkeypatch):
    """Return a function that chooses the code of a platform, for a config of its own.

    A layer is traced once for a config: a number of it that nothing here computes with keeps the
    platforms apart.
    """

    def choose(platform):
        for module in ("attention", "rope", "transformer"):
            monkeypatch.setattr(f"seal_jax.models.{module}.platform", lambda: platform)
        return dataclasses.replace(CONFIG, max_length=1000 + PLATFORMS.index(platform))

    return choose


def assert_near(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_rotation_is_that_of_pairs_and_its_gradient_turns_back(on, platform, dtype):
    """Against complex numbers, in float64: halves are real and imaginary parts."""
    on(platform)
    rng, half = np.random.default_rng(0), TINY.head_dim // 2
    x, grads = (jnp.asarray(rng.normal(size=(2, 3, 5, 2 * half)), dtype) for _ in range(2))
    positions = np.array([[0, 1, 2, 7, 100], [3, 4, 50, 6, 7]], np.int32)
    table = rope_tables(TINY, positions)[0]
    found, pull_back = jax.vjp(lambda x: apply_rope(x, table), x)
    frequency = TINY.rope_theta ** (-np.arange(half) / half)
    turn = np.exp(1j * positions[:, None, :, None] * frequency)

    def rotated(x, turn):
        x = np.asarray(x, np.float64)
        y = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([y.real, y.imag], axis=-1)

    tolerance = 1e-4 if dtype == jnp.float32 else 0.03
    for y, expected in ((found, rotated(x, turn)), (pull_back(grads)[0], rotated(grads, 1 / turn))):
        assert y.dtype == dtype
        assert_near(np.asarray(y, np.float64), expected, tolerance)


def make_adapters(config):
    keys = jax.random.split(jax.random.key(1), 2)
    return lora.init_adapters(config, keys, rank=4, alpha=8.0, targets=("q_proj", "up_proj"))


def test_adapters_are_trained_alike(on, params):
    """Three steps of two adapters, which share array rows."""
    texts = [text_of(range(1, 40)), text_of(range(20, 60))]
    jobs = [Job(((text,),) * 3, learning_rate=1e-2) for text in texts]
    (batch,) = pack(jobs, tokens_per_step=128, steps_per_call=3, layout=TPU_LAYOUT)
    # A large epsilon: Adam would make a whole step of what rounding leaves of a gradient of 0.
    optimizer = make_optimizer(optax_kwargs={"eps": 1e-4})

    def train(config):
        update = make_inner_update(config, optimizer, "constant")
        return update(params, make_adapters(config), [batch])

    trained, *others = (train(on(platform)) for platform in PLATFORMS)
    for before, after in zip(
        jax.tree.leaves(make_adapters(CONFIG).weights),
        jax.tree.leaves(trained[0].weights),
        strict=True,
    ):
        assert (np.abs(after - before).max(axis=(1, 2, 3)) > 0.01).all()
    for other in others:
        jax.tree.map(lambda x, y: assert_near(x, y, 1e-4), other, trained)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_rows_write_alike(on, params, num_groups):
    """Two rows for each prompt; of the base model, or of an adapter for each prompt."""
    adapters = None
    if num_groups == 2:
        adapters = make_adapters(CONFIG)
        adapters = adapters._replace(weights=jax.tree.map(lambda x: x + 0.1, adapters.weights))
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]

    def write(config):
        return generate(
            config,
            params,
            adapters,
            [prompts] if num_groups == 1 else [prompts[:2], prompts[2:]],
            jax.random.split(jax.random.key(0), 4),
            make_settings(4, temperature=[0.0, 1.0, 0.0, 1.0]),
            mesh=one_device_mesh(),
            stop_ids=[-1],
            max_tokens=24,
            max_rows=4,
            pad_id=0,
        )

    written, *others = (write(on(platform)) for platform in PLATFORMS)
    assert len({tuple(row) for row in written.tokens.tolist()}) == 4
    for other in others:
        assert other.tokens.tolist() == written.tokens.tolist()
        assert_near(other.logp, written.logp, 1e-3)
