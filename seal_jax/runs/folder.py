"""A run's folder as a model: its config and tokenizer are in RUN/model, its policy in checkpoints.

  RUN/config.json   model/   checkpoints/   adapters/   random/checkpoints/   random/adapters/

So a policy can be loaded where the base model that it came from is not at hand.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
import jax
from seal_jax.runs import checkpoint
from seal_jax.hosts.files import write_json
from seal_jax.models.model import Model
from seal_jax.models.config import ModelConfig, config_from_hf, config_to_hf
from seal_jax.types import ParamRules
from seal_jax.models.transformer import init_params
from seal_jax.hosts.processes import is_first
from seal_jax.sharding import param_shardings
from seal_jax.models.tokenizer import load_tokenizer
from seal_jax.types import Params
from seal_jax.models.model import save_config
from seal_jax.hosts.files import whole_folder


class RunFolder(NamedTuple):
    """Where a run keeps its things."""

    folder: Path  # has checkpoints/ and adapters/: the run's own, or that of its random control
    root: Path  # has config.json and model/
    config: dict[str, Any]  # what config.json holds


def find_run(path: str | os.PathLike) -> RunFolder | None:
    """Return the run of RUN, RUN/random or the checkpoints of either; None if it is none."""
    folder = Path(path).expanduser().absolute()
    if folder.name == "checkpoints":
        folder = folder.parent
    for root in (folder, folder.parent if folder.name == "random" else folder):
        try:
            config = json.loads((root / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # no config at all, or none of ours: the caller says what it looked for
        if isinstance(config, dict) and {"model", "outer", "checkpoint"} <= config.keys():
            return RunFolder(folder, root, config)
    return None


def claim_model(folder: str | os.PathLike, model: Model, dtype: str) -> None:
    """Write RUN/model once."""
    path = Path(folder, "model")
    if is_first() and not path.exists():
        with whole_folder(path) as temporary:
            save_config(temporary, model, dtype)
