"""Whole runs of the tiny config, in a process of their own, which may be killed.

As a program, `python tests/tiny_run.py train ...`, it is `seal-jax` without torch and TensorFlow,
which kills itself where $KILL says, is told to end where $TELL says, hangs where $HALT says, or
finds its disk full where $FILL says. The fixtures are in tiny_fixtures.py.
"""

import functools
import gc
import importlib.machinery
import os
import signal
import subprocess
import sys
from pathlib import Path

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


def before_line(file: str, line: int, happens) -> None:
    """Let something happen before that line (counted from 1) enters the file."""
    from seal_jax.commands.generate import by_endpoint
    from seal_jax.continual import experiment
    from seal_jax.hosts import files as metrics
    from seal_jax.outer import ledger, step_log

    num_lines = 0  # of those that this process has; of several, the first alone writes

    def append_json(path, entry):
        nonlocal num_lines
        if os.path.abspath(path) == file:
            num_lines = max(num_lines, _count_lines(path)) if metrics.is_first() else num_lines
            num_lines += 1
            if num_lines == line:
                happens()
        metrics.append_json(path, entry)

    for writer in (ledger, step_log, by_endpoint, experiment):
        writer.append_json = append_json


def _count_lines(path) -> int:
    from seal_jax.hosts import files as metrics

    return len(metrics.read_jsonl(path)) if os.path.exists(path) else 0


def fill_disk(file: str, left: int = 100_000) -> None:
    """Leave so many bytes on the disk of a file."""
    room = os.statvfs(os.path.dirname(file))
    with open(os.path.join(os.path.dirname(file), "..", "filler"), "wb") as filler:
        filler.write(bytes(room.f_bavail * room.f_frsize - left))


def main() -> int:
    gc.set_threshold(50_000, 50, 50)  # of what tracing makes, little is garbage
    hide_torch()
    from seal_jax.commands.main import main as seal_jax

    for name, happens in {
        "KILL": lambda file: os.kill(os.getpid(), signal.SIGKILL),
        "TELL": lambda file: os.kill(os.getpid(), signal.SIGTERM),
        "HALT": lambda file: os.kill(os.getpid(), signal.SIGSTOP),
        "FILL": fill_disk,
    }.items():
        if name in os.environ:
            file, _, line = os.environ[name].rpartition(":")
            before_line(file, int(line), functools.partial(happens, file))
    return seal_jax()


def run_process(
    *arguments,
    kill: str = "",
    tell: str = "",
    fill: str = "",
    check: bool = True,
    num_devices: int = 1,
    flags: str | None = None,
) -> subprocess.CompletedProcess:
    """Run `seal-jax ARGUMENTS` on CPU devices, in a process of its own.

    Args:
      flags: for XLA; those of this process by default.
    """
    flags = (os.environ.get("XLA_FLAGS", "") if flags is None else flags).split()
    flags = [flag for flag in flags if "xla_force_host_platform_device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={num_devices}")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        **{name: at for name, at in (("KILL", kill), ("TELL", tell), ("FILL", fill)) if at},
    }
    command = [sys.executable, str(TESTS / "tiny_run.py"), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, result.stderr
    return result


def run_loop(config, folder):
    """Run the outer loop in this process, without the final comparison; returns its stages."""
    import jax

    from seal_jax.config.setup import configured_objective, make_stages, settings_of
    from seal_jax.outer.problems import split_problems
    from seal_jax.train import outer_loop

    stages = make_stages(settings_of(config))
    problems, held_out = split_problems(stages.settings, stages.task)
    with jax.transfer_guard("disallow"):
        objective = configured_objective(stages.settings)
        outer_loop(stages, objective, problems, held_out, folder=folder, label="SEAL")
    return stages


def train_arguments(folder, *overrides: str) -> list[str]:
    settings = [argument for override in overrides for argument in ("--set", override)]
    return ["train", "--config", CONFIG, "--workdir", str(folder), *settings]


if __name__ == "__main__":
    sys.exit(main())
