"""The adapters that a run keeps, in RUN/adapters, one verified Orbax folder each.

  policy-<step>                                the LoRA that an outer step merged into the policy
  <step>-<problem>-<self-edit>-<seed>          an inner run's, on top of the policy that wrote it

Steps count from 0, as in edits.jsonl. Each adapter knows its parents, the adapters that were merged
into the policy before it: base model + parents + adapter is the adapted model.
"""

import os
import re
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from seal_jax.hosts import manifest
from seal_jax.hosts.exchange import is_first
from seal_jax.hosts.files import read_jsonl
from seal_jax.hosts.replacing import remove_folder
from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.runs import checkpoint
from seal_jax.sharding import to_host
from seal_jax.types import Adapters

_LOGGED = ("step", "problem", "edit", "accuracy")  # what of edits.jsonl is read here


class Kept(NamedTuple):
    """An inner run's adapter on disk."""

    adapter_id: str
    accuracy: float | None  # None: no grader could tell
    num_bytes: int


def policy_id(step: int) -> str:
    return f"policy-{step}"


def inner_id(step: int, name: tuple[str, int, int]) -> str:
    """Return the id of an inner run's adapter.

    Args:
      name: problem id, self-edit, seed; as `waves.InnerRun.name`.
    """
    problem, edit, seed = name
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", problem)[:80]
    if safe != problem:  # two problems must not become one
        safe += f"_{zlib.crc32(problem.encode()):08x}"
    return f"{step}-{safe}-{edit}-{seed}"


def policy_parents(step: int, update: str) -> list[str] | None:
    """Return the ids of what was merged into the policy before a step; None if it was no LoRA."""
    if update == "full" and step > 0:
        return None
    return [policy_id(i) for i in range(step)]


def save_adapter(
    folder: str, adapter_id: str, adapters: Adapters, parents: Sequence[str] | None
) -> None:
    """Save one adapter (A = 1) in `folder`/adapters; return when it is on disk.

    Args:
      folder: a run's, or that of its control.
      parents: the ids below which it was trained; None if no adapters make up that policy.
    """
    pairs = {target: ab for block in adapters.weights.values() for target, ab in block.items()}
    (rank,) = {ab["a"].shape[-2] for ab in pairs.values()}
    position = {"rank": rank, "targets": sorted(pairs), "parents": parents}
    path = os.path.join(folder, "adapters", adapter_id)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    delete_adapters(folder, [adapter_id])  # of a step that is made again
    checkpoint.save_alone(path, {"adapters": to_host(adapters)}, position)


def load_adapter(
    folder: str, adapter_id: str, config: ModelConfig
) -> tuple[Adapters, list[str] | None]:
    """Return an adapter (numpy) and the ids of its parents.

    Raises:
      FileNotFoundError: there is none of that id; the message lists those there are.
      CheckpointError: it is damaged, or of another model.
    """
    found = list_adapters(folder)
    if adapter_id not in found:
        listed = ", ".join(found[:40]) + (f" and {len(found) - 40} more" if len(found) > 40 else "")
        raise FileNotFoundError(
            f"{folder} has no adapter {adapter_id!r}; it has {listed or 'none'}"
        )
    path = os.path.join(folder, "adapters", adapter_id)
    trees, position = checkpoint.restore_alone(path, partial(_template, config))
    return trees["adapters"], position["parents"]


def _template(config: ModelConfig, position: checkpoint.Position) -> dict[str, Adapters]:
    kind: dict[str, Any] = {"rank": position["rank"], "alpha": 1.0, "targets": position["targets"]}
    shapes = jax.eval_shape(lambda: lora.init_adapter(config, jax.random.key(0), **kind))
    return {"adapters": jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)}


def list_adapters(folder: str) -> list[str]:
    """Return the ids of a run's adapters, those of the policy first, in the order of the steps."""
    names = [path.name for path in Path(folder, "adapters").glob("[!.]*") if path.is_dir()]

    def order(name: str) -> tuple[bool, int, str]:
        step = re.search(r"\d+", name)
        return not name.startswith("policy-"), int(step[0]) if step else 0, name

    # A kill leaves unfinished folders, which Orbax names so.
    return sorted((name for name in names if ".orbax-checkpoint-tmp" not in name), key=order)


def list_kept(folder: str) -> list[Kept]:
    """Return the adapters of the inner runs in `folder`/edits.jsonl, the best ones first."""
    log, found = Path(folder, "edits.jsonl"), []
    for entry in read_jsonl(log, _LOGGED) if log.exists() else ():
        for seed, accuracy in enumerate(entry["accuracy"]):
            name = inner_id(entry["step"], (entry["problem"], entry["edit"], seed))
            path = Path(folder, "adapters", name)
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                found.append(Kept(name, accuracy, size))
    return sorted(found, key=lambda kept: -1.0 if kept.accuracy is None else kept.accuracy)[::-1]


def drop_beyond(folder: str, max_bytes: float) -> list[str]:
    """Delete the worst adapters of inner runs, the oldest first, until the others fit; return them.

    What is not in edits.jsonl yet, and what belongs to the policy, stays. On several processes the
    first one does it, and the others return nothing.
    """
    kept = list_kept(folder) if is_first() else []
    total, dropped = sum(one.num_bytes for one in kept), []
    while kept and total > max_bytes:
        worst = kept.pop()
        total -= worst.num_bytes
        dropped.append(worst.adapter_id)
    delete_adapters(folder, dropped)
    return dropped


def delete_adapters(folder: str, adapter_ids: Sequence[str]) -> None:
    """Delete those of the adapters that are there; on several processes the first one does."""
    manifest.forget(folder, [f"adapters/{adapter_id}" for adapter_id in adapter_ids])
    for adapter_id in adapter_ids if is_first() else ():
        remove_folder(os.path.join(folder, "adapters", adapter_id))
