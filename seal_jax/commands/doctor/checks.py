"""The first seconds of every run: what would spoil it later, said now.

Every process looks at its own devices, folder and versions, tells the others, and then all stop or
none: with one message that has both sides in it.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import seal_jax
from seal_jax.config.check_optimizers import check_optimizers
from seal_jax.config.load import flatten, to_json
from seal_jax.config.setup import settings_of
from seal_jax.config.workdir import check_workdir
from seal_jax.hosts.exchange import exchange
from seal_jax.hosts.group import timeout_seconds
from seal_jax.hosts.start_jax import lost_devices
from seal_jax.models.config import ModelConfig
from seal_jax.models.mesh_fit import check_divides
from seal_jax.sharding import make_mesh
from seal_jax.sources import config_of

PACKAGES = ("seal_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")
# Less than this fails within minutes: logs, and checkpoints of the smallest models.
LEAST_FREE = 64e6  # bytes


def check(config: ConfigDict, workdir: str) -> list[str]:
    """Return lines about this run, or raise for what is wrong with it on any process.

    Raises:
      ValueError: on every process the same, except where one of them is silent.
    """
    facts, problems = look(config, workdir)
    mine = json.dumps({"host": socket.gethostname(), "facts": facts, "problems": problems})
    everybody = list(map(json.loads, exchange("doctor", mine, timeout_seconds())))
    if complaints := complain(everybody):
        raise ValueError("\n".join(complaints))
    kept_in = jax.config.jax_compilation_cache_dir  # ty: ignore[missing-attribute]  # JAX sets it
    return [
        f"{len(everybody)} process(es), {jax.device_count()} x {facts['device']}",
        ", ".join(f"{name} {facts[name]}" for name in ("python", *PACKAGES) if facts[name]),
        f"commit {facts['commit']}",
        f"{workdir}: {_say_folder(workdir)}",
        f"compiled programs are kept in {kept_in}",
    ]


def look(config: ConfigDict, workdir: str) -> tuple[dict[str, Any], list[str]]:
    """Return what must be the same on every process, by name, and what is wrong with this one."""
    problems = [*_device_problems(config), *_folder_problems(config, workdir)]
    found = not lost_devices()
    if found:
        problems += _optimizer_problems(config)
    facts = {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "workdir": workdir,
        "device": jax.devices()[0].device_kind if found else "",
        "devices of a process": jax.local_device_count() if found else 0,
        **dict(flatten(json.loads(to_json(config)), whole=())),
    }
    return facts, problems


def complain(everybody: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with any process, and in what they differ: [{host, facts, problems}]."""
    alone = len(everybody) == 1
    complaints = [
        problem if alone else f"process {i} on {one['host']}: {problem}"
        for i, one in enumerate(everybody)
        for problem in one["problems"]
    ]
    for name in dict.fromkeys(name for one in everybody for name in one["facts"]):
        sides: dict[str, list[str]] = {}
        for i, one in enumerate(everybody):
            value = json.dumps(one["facts"].get(name, "(absent)"))
            sides.setdefault(value, []).append(f"{i} ({one['host']})")
        if len(sides) > 1:
            shown = "; ".join(f"{value} on process {', '.join(on)}" for value, on in sides.items())
            complaints.append(f"processes differ in {name}: {shown}")
    return complaints


def _device_problems(config: ConfigDict) -> list[str]:
    if problem := lost_devices():
        return [problem]
    try:
        mesh = make_mesh(**config.mesh)
        if mesh.size > mesh.shape["data"] and (sizes := _known_sizes(config)):
            check_divides(mesh, sizes)
    except ValueError as error:
        return [str(error)]
    return []


def _optimizer_problems(config: ConfigDict) -> list[str]:
    try:
        check_optimizers(settings_of(config))
    except ValueError as error:
        return [str(error)]
    return []


def _known_sizes(config: ConfigDict) -> ModelConfig | None:
    """Return the sizes of the config's model, None where they are known only when it is loaded."""
    try:
        sizes = config_of(config.model.source)
    except (ValueError, OSError):
        return None
    return dataclasses.replace(sizes, rules=tuple(config.sharding.items()))


def _folder_problems(config: ConfigDict, workdir: str) -> list[str]:
    if "://" in workdir:
        return [
            f"--workdir {workdir}: a run is written as plain files. Mount the bucket (gcsfuse"
            " --implicit-dirs --rename-dir-limit=100000) and give the path; launch/tpu_worker.sh"
            " does it"
        ]
    try:
        check_workdir(config, workdir)
        folder = _nearest_folder(workdir)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (ValueError, OSError) as error:
        return [str(error)]
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        return [f"{folder}: {free / 1e6:.0f} MB free; a run needs {LEAST_FREE / 1e6:.0f} at least"]
    return []


def _nearest_folder(path: str) -> Path:
    """Return the folder, or the one in which it would be made."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _say_folder(workdir: str) -> str:
    free = shutil.disk_usage(_nearest_folder(workdir)).free
    state = "a run to resume" if os.path.exists(os.path.join(workdir, "config.json")) else "new"
    return f"{state}, {free / 1e9:.1f} GB free"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return $SEAL_JAX_COMMIT, or the commit of this clone, with '+changes', or 'unknown'."""
    if named := os.environ.get("SEAL_JAX_COMMIT"):
        return named
    root = Path(seal_jax.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(
            [*git, "--dirty=+changes"], capture_output=True, text=True, check=True
        )
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or another user's clone
        return "unknown"
