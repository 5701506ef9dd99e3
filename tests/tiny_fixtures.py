"""A pytest plugin: a finished run of the tiny config, runs in this process, and a small disk."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tarfile

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_run import TESTS, run_process, train_arguments

from seal_jax.config import setup
from seal_jax.hosts.start_jax import start_jax


def _shared_folder(tmp_path_factory):
    """Return a folder that all of pytest's workers have."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Let all runs of a session, in whatever process, share compiled programs."""
    folder = _shared_folder(tmp_path_factory) / "compiled"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        yield


@contextlib.contextmanager
def _one_at_a_time(folder):
    """Let one worker after another in."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


@pytest.fixture(scope="session")
def finished(compiled, tmp_path_factory):
    """Return the folder of a finished, uninterrupted run. Only read it: all workers do."""
    folder = _shared_folder(tmp_path_factory) / "finished"
    with _one_at_a_time(folder):
        if not (folder / "run" / "summary.json").exists():
            run_process(*train_arguments(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="session")
def facts_model(compiled, tmp_path_factory):
    """Return the folder of `tiny:facts`, which one process trains, with XLA's optimizations."""
    folder = _shared_folder(tmp_path_factory) / "models"
    script = (
        "import sys, pathlib; from seal_jax.models.toys.tiny_facts import tiny_facts_folder;"
        "print(tiny_facts_folder(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, str(folder)]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(TESTS.parent)}
    with _one_at_a_time(folder):
        made = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return made.stdout.decode().strip()


@pytest.fixture
def old_run(tmp_path):
    """Return the folder of the run that test_old_runs.py is about."""
    name = "run_cb29795"
    with tarfile.open(TESTS / "data" / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / name


@contextlib.contextmanager
def on_one_device():
    """Let runs in this process use one of its eight devices, and the compiled programs."""
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((1, 1, 1), axes, (jax.sharding.AxisType.Auto,) * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda *sizes: mesh)
        start_jax()
        yield mesh
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def one_device(compiled):
    """See `on_one_device`."""
    with on_one_device() as mesh:
        yield mesh


@pytest.fixture
def small_disk(tmp_path, request):
    """Return a folder on a disk of 80 MB, or as many as the test's parameter says."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={getattr(request, 'param', 80)}m"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a disk of its own")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
