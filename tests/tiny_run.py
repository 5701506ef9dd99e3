"""Whole runs of the tiny config: in a process of its own, which may be killed, or in this one.

As a pytest plugin it has the fixtures; as a program, `python tests/tiny_run.py train ...`, it is
`seal-jax` without torch and TensorFlow, which kills itself where $KILL says.
"""

import importlib.machinery
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CONFIG = str(TESTS / "tiny_config.py")


class WithoutTorch(importlib.machinery.PathFinder):
    """Find every installed package but torch and TensorFlow, which seal_jax does without."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ("torch", "tensorflow"):
            return None
        return super().find_spec(fullname, path, target)


def hide_torch() -> None:
    finders = sys.meta_path
    finders[finders.index(importlib.machinery.PathFinder)] = WithoutTorch


def kill_before(file: str, line: int) -> None:
    """Kill this process, as kill -9 does, before that line (counted from 1) enters the file."""
    from seal_jax import evaluate, metrics, record

    def append_json(path, entry):
        num_lines = len(metrics.read_jsonl(path)) if os.path.exists(path) else 0
        if os.path.abspath(path) == file and num_lines + 1 == line:
            os.kill(os.getpid(), signal.SIGKILL)
        metrics.append_json(path, entry)

    evaluate.append_json = record.append_json = append_json


def main() -> int:
    hide_torch()
    from seal_jax.cli import main as seal_jax

    if "KILL" in os.environ:
        file, _, line = os.environ["KILL"].rpartition(":")
        kill_before(file, int(line))
    return seal_jax()


def run_process(*arguments, kill: str = "", check: bool = True) -> subprocess.CompletedProcess:
    """Run `seal-jax ARGUMENTS` on one CPU device, in a process of its own."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "xla_force_host_platform_device_count" not in flag]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        **({"KILL": kill} if kill else {}),
    }
    command = [sys.executable, str(TESTS / "tiny_run.py"), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, result.stderr
    return result


def train_arguments(folder, *overrides: str) -> list[str]:
    settings = [argument for override in overrides for argument in ("--set", override)]
    return ["train", "--config", CONFIG, "--workdir", str(folder), *settings]


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Let all runs of a session, in whatever process, share compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="session")
def finished(compiled, tmp_path_factory):
    """Return the folder of a finished, uninterrupted run. Only read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_process(*train_arguments(folder))
    return folder


@pytest.fixture
def one_device(compiled, monkeypatch):
    """Let runs in this process use one of its eight devices, and the compiled programs."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from seal_jax import stages
    from seal_jax.start import start_jax

    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((1, 1, 1), axes, (jax.sharding.AxisType.Auto,) * 3)
    monkeypatch.setattr(stages, "make_mesh", lambda **sizes: mesh)
    start_jax()
    yield mesh
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


if __name__ == "__main__":
    sys.exit(main())
