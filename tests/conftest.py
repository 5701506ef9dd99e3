"""Eight CPU devices, strict dtype promotion, and the tiny model that the tests share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

from pathlib import Path

import jax
import pytest

from seal_jax.models.config import ModelConfig
from seal_jax.models.transformer import init_params

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    max_length=256,
)


def pytest_configure(config):
    config.addinivalue_line("markers", "long: minutes, not seconds; run with -m long")


@pytest.fixture
def strict():
    """Refuse every implicit change of dtype. Not for all tests: optax's Adam raises floats to int32s."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def tiny():
    """Return (config, params) of a random decoder with attention far from uniform."""
    params = init_params(TINY, jax.random.key(0))
    # Larger kernels than at the start of training: random numbers that matter to the logits.
    return TINY, jax.tree.map(lambda x: 5.0 * x if x.ndim == 2 else x, params)


@pytest.fixture(scope="session")
def shared_data():
    """Return the folder of published data beside the repository; skip where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}")
    return SHARED_DATA
