"""Take what a run learned elsewhere: as a PEFT adapter, or merged, as a model of transformers.

  adapted = the checkpoint's policy, or base + parents + adapter
  write;  read back;  the logits must be those of `adapted`, and not those of the base model

An adapter that loads and does nothing is the commonest bug of all, so nothing takes its name before
it has passed.
"""

import os
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from seal_jax.hosts.manifest import refuse_damaged
from seal_jax.hosts.outputs import check_output
from seal_jax.hosts.replacing import whole_folder
from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.models.model import Model, save_config
from seal_jax.models.transformer import forward
from seal_jax.models.weights import save_safetensors
from seal_jax.runs.adapters import load_adapter, policy_id
from seal_jax.runs.folder import RunFolder, find_run
from seal_jax.runs.peft import load_peft, save_peft
from seal_jax.sharding import make_mesh, param_shardings, replicated, to_device, to_host
from seal_jax.sources import load_model, restore_policy
from seal_jax.types import Adapters, Params

# How far logits may differ, relative to their norm. In bfloat16 a merge rounds away what an adapter
# beside the base keeps.
TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2}
_SAMPLE = "What was Zorbin's color in 1987?\n"


class Exported(NamedTuple):
    """What was written, and how it compares."""

    parts: tuple[str, ...]  # ids of the adapters that were added to the base model; () if unknown
    error: float  # between the logits of what was written and of the run's own model, relative
    change: float  # between the former and the base model's, relative


def export_run(
    run: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    adapter: str = "policy",
    merged: bool = False,
) -> Exported:
    """Write one of a run's adapters, or the model that it makes, and check what was written.

    Args:
      run: a run's folder, or RUN/random, its control's.
      folder: where to; new, or empty.
      adapter: 'policy' is all that the newest good checkpoint has learned, 'policy-<step>' what the
        policy was after a step, '<step>-<problem>-<self-edit>-<seed>' what an inner run made of the
        policy; each relative to the base model.
      merged: write a model folder for transformers instead of a PEFT adapter.

    Raises:
      FileNotFoundError: no run, no checkpoint, or no such adapter; it lists those there are.
      ValueError: the folder is not empty, what was asked for is no adapter of the base model, or it
        does nothing.
      OSError: what was read back is not what was written, or computes something else.
    """
    refuse_filled(folder)
    found = find_run(run)
    if found is None:
        raise FileNotFoundError(f"{run}: no run's folder: it has no config.json of seal-jax train")
    refuse_damaged(found.root, ("config.json",))
    source, dtype = found.config["model"]["source"], found.config["model"]["dtype"]
    if adapter == "policy" and not merged and found.config["outer"]["update"] == "full":
        raise ValueError(
            f"{run} trained the whole policy (outer.update = 'full'), so there is no adapter:"
            " export it with --merged"
        )
    mesh = make_mesh(data=1, fsdp=-1)  # the parameters spread over all devices
    base = load_model(source, dtype, mesh)
    parts, adapters, params = _adapted(found, adapter, base, mesh, need_adapters=not merged)
    with whole_folder(Path(folder).resolve()) as temporary:
        if merged:
            save_safetensors(temporary, params, base.config)
            save_config(temporary, base, dtype)
            written = _logits(base.config, _read_merged(temporary, base, dtype, mesh))
        else:
            save_peft(temporary, lora.concatenate(adapters), base.config, source)
            read = to_device(load_peft(temporary, base.config), replicated(mesh))
            written = _logits(base.config, base.params, read)
        error = _difference(written, _logits(base.config, params))
        change = _difference(written, _logits(base.config, base.params))
        _check(adapter, error, change, TOLERANCE[dtype])
    return Exported(tuple(parts), error, change)


def _check(adapter: str, error: float, change: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise OSError(
            f"what was written for {adapter!r} computes other logits than the run's model:"
            f" relative difference {error:.2g}, at most {tolerance:g} is allowed."
            " Nothing was exported"
        )
    if change == 0:
        raise ValueError(f"{adapter!r} does nothing: its logits are the base model's")


def refuse_filled(folder: str | os.PathLike) -> None:
    """Raise ValueError unless a folder is new or empty, and can be written."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another --to")
    check_output(path, "--to", folder=True)
    check_output(path.resolve().parent, "--to", folder=True)  # it is written beside, and renamed


def _adapted(
    run: RunFolder, adapter: str, base: Model, mesh: Mesh, need_adapters: bool
) -> tuple[list[str], list[Adapters], Params]:
    """Return the ids of the adapters that make up a model, the adapters, and the model's params."""
    load = partial(load_adapter, str(run.folder), config=base.config)
    ids, params = [], None
    if adapter == "policy":
        num_steps, params = restore_policy(run, base.config, mesh)
        if need_adapters:
            ids = [policy_id(step) for step in range(num_steps)]
    else:
        _, parents = load(adapter)
        if parents is None:
            raise ValueError(
                f"{adapter!r} was trained on a policy that was trained as a whole (outer.update ="
                " 'full'): it is no adapter of the base model"
            )
        ids = [*parents, adapter]
    adapters = to_device([load(adapter_id)[0] for adapter_id in ids], replicated(mesh))
    if params is None:
        where = param_shardings(mesh, base.params, base.config.rules)
        params = reduce(jax.jit(lora.merge, out_shardings=where), adapters, base.params)
    return ids, adapters, params


def _read_merged(folder: Path, base: Model, dtype: str, mesh: Mesh) -> Params:
    """Return the parameters of a written model; raise OSError if it is another kind of model."""
    model = load_model(str(folder), dtype, mesh)
    tokens = [m.tokenizer.encode(_SAMPLE) + list(m.tokenizer.stop_ids) for m in (model, base)]
    if model.config != base.config or tokens[0] != tokens[1]:
        raise OSError(f"the config or the tokenizer that was written reads as {model.config}")
    return model.params


def _logits(config: ModelConfig, params: Params, adapters: Adapters | None = None) -> np.ndarray:
    """Return the logits of two fixed rows of tokens, f32[2 T V]."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 32), dtype=np.int32)
    run = jax.jit(forward, static_argnums=0)
    with jax.default_matmul_precision("highest"):
        return to_host(run(config, params, tokens, adapters=adapters))


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
