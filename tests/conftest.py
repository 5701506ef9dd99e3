"""Eight CPU devices, explicit broadcasts, reproducible property tests, one tiny model for all."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other at full speed
# Most of the tests' time is the compiler's: LLVM's optimizations and, of each fusion, a passage
# through MLIR would be most of that. XLA's older emitters of the same fusions do without MLIR. And
# a program is so small that to split it for several cores costs more than it saves.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    + os.environ.get("XLA_FLAGS", "")  # the last one of a kind counts
)

import gc
import socket
from pathlib import Path

import hypothesis
import jax
import pytest

from seal_jax.models.config import ModelConfig
from seal_jax.models.transformer import init_params

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("seal_jax", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("seal_jax")

# Tracing makes many objects that live on, and the garbage collector would look at all of them, and
# at what the imports made, again and again.
gc.set_threshold(10_000, 20, 20)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_length=256,
)


# A worker that begins with the longest test at the end keeps the other waiting.
FIRST = ("test_learning.py", "test_processes.py", "test_train.py", "test_sharding.py")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest; the others keep their order."""
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish():
    """Leave what the imports made out of every garbage collection: it lives to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def few_maps():
    """Drop compiled programs before they are too many.

    Each is some memory maps, of which Linux gives a process 65,530; XLA crashes where it gets none.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def strict():
    """Refuse implicit casts. Not for everybody: optax's Adam itself raises a float to an int32."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def port():
    """Return a free one on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def tiny():
    """Return (config, params) of a decoder, random but with attention far from uniform."""
    params = init_params(TINY, jax.random.key(0))
    return TINY, jax.tree.map(lambda x: 8.0 * x if x.ndim == 2 else x, params)


@pytest.fixture(scope="session")
def shared_data():
    """Return the folder of published data that lies beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}")
    return SHARED_DATA
