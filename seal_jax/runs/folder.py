"""A run's folder as a model: its config and tokenizer are in RUN/model, its policy in checkpoints.

  RUN/config.json   model/   checkpoints/   adapters/   random/checkpoints/   random/adapters/

So a policy can be loaded where the base model that it came from is not at hand.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from seal_jax.hosts.exchange import is_first
from seal_jax.hosts.files import read_object
from seal_jax.hosts.manifest import arm_names
from seal_jax.hosts.replacing import whole_folder
from seal_jax.models.model import Model, save_config


class RunFolder(NamedTuple):
    """Where a run keeps its things."""

    folder: Path  # has checkpoints/ and adapters/: the run's own, or that of another arm
    root: Path  # has config.json and model/
    config: dict[str, Any]  # what config.json holds


def find_run(path: str | os.PathLike) -> RunFolder | None:
    """Return the run of RUN, of RUN/ARM or of the checkpoints of either; None if it is none."""
    folder = Path(path).expanduser().absolute()
    if folder.name == "checkpoints":
        folder = folder.parent
    is_arm = folder.name in arm_names(folder.parent)
    for root in (folder, folder.parent if is_arm else folder):
        try:
            config = read_object(root / "config.json")
        except (OSError, ValueError):
            continue  # no config at all, or none of ours: the caller says what it looked for
        if {"model", "outer", "checkpoint"} <= config.keys():
            return RunFolder(folder, root, config)
    return None


def claim_model(folder: str | os.PathLike, model: Model, dtype: str) -> None:
    """Write RUN/model once."""
    path = Path(folder, "model")
    if is_first() and not path.exists():
        with whole_folder(path) as temporary:
            save_config(temporary, model, dtype)
