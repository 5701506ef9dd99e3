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

from seal_jax import checkpoint
from seal_jax.metrics import write_json
from seal_jax.models import Model
from seal_jax.models.config import ModelConfig, ParamRules, config_from_hf, config_to_hf
from seal_jax.models.transformer import init_params
from seal_jax.processes import is_first
from seal_jax.sharding import param_shardings
from seal_jax.tokenizer import load_tokenizer
from seal_jax.types import Params


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


def save_config(folder: str | os.PathLike, model: Model, dtype: str) -> None:
    """Write what a model is, without its parameters: config, tokenizer, and where texts end."""
    tokenizer = model.tokenizer
    ids = {
        "bos_token_id": tokenizer.bos,
        # transformers would take Llama's ids where the config has none.
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    tokenizer.save(folder)
    hf = {**config_to_hf(model.config), "torch_dtype": dtype, **ids}
    write_json(Path(folder, "config.json"), hf)
    write_json(Path(folder, "generation_config.json"), ids)


def claim_model(folder: str | os.PathLike, model: Model, dtype: str) -> None:
    """Write RUN/model once."""
    path = Path(folder, "model")
    if is_first() and not path.exists():
        with whole_folder(path) as temporary:
            save_config(temporary, model, dtype)


def load_run(run: RunFolder, dtype: Any, mesh: Any, rules: ParamRules = ()) -> Model:
    """Return the policy of a run's newest good checkpoint; see `models.load_model`."""
    kept = run.root / "model"
    if not kept.is_dir():
        raise FileNotFoundError(
            f"{run.root} has no folder model/, which newer versions write: name its checkpoints and"
            " the model that it was trained from"
        )
    config = dataclasses.replace(config_from_hf(kept / "config.json"), rules=rules)
    _, params = load_policy(run, config, mesh)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return Model(config, params, load_tokenizer(kept))


def load_policy(run: RunFolder, config: ModelConfig, mesh: Any = None) -> tuple[int, Params]:
    """Return how many outer steps the newest good checkpoint has seen, and its policy.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointError: none is good, or they are of another model.
    """
    folder, dtype = run.folder / "checkpoints", run.config["model"]["dtype"]
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    if mesh is not None:
        shardings = param_shardings(mesh, shapes, config.rules)
        shapes = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)
    restored = checkpoint.restore(folder, {"policy": shapes}) if folder.is_dir() else None
    if restored is None:
        raise FileNotFoundError(f"{folder}: no checkpoint; the run has not ended an outer step yet")
    _, trees, position = restored
    return position["next_step"], trees["policy"]


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its name at the end: whole, or absent.

    `path` may be an empty folder.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if temporary.exists():  # of a killed process with the same number, as in a container
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
