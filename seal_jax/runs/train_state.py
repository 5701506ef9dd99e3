"""The outer loop's state on disk: saved after each step, and where a run goes on from."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from seal_jax.hosts.files import truncate_after
from seal_jax.objectives.objective import Past, Rewards
from seal_jax.outer.step_log import number
from seal_jax.runs import checkpoint
from seal_jax.types import TrainState


def extend(past: Past, rewards: Rewards, metrics: Mapping[str, float]) -> Past:
    """Return the past with one step more."""
    known = rewards.values[~np.isnan(rewards.values)]
    return Past(
        (*past.mean_rewards, float(known.mean())) if len(known) else past.mean_rewards,
        (*past.kls, metrics["policy/kl"]) if "policy/kl" in metrics else past.kls,
        past.num_skipped + int(metrics["policy/skipped"]),
    )


def save_state(
    manager: ocp.CheckpointManager,
    state: TrainState,
    step: int,
    rewards: Rewards,
    past: Past,
    value: float | None,
) -> None:
    """Save the state after `step`; `adapters` is what this step merged into `policy`.

    Args:
      value: by which the best checkpoints are chosen; None where nothing was measured.
    """
    position = {"next_step": step + 1, "past": past._asdict()}
    position["rewards"] = [[number(one) for one in row] for row in rewards.values]
    checkpoint.save(manager, step + 1, _trees(state), position, value)


def restore_state(
    manager: ocp.CheckpointManager, state: TrainState, folder: str
) -> tuple[TrainState, Past]:
    """Return the newest good checkpoint's state, or `state`; drop the log of steps to be redone."""
    restored = checkpoint.restore(manager, _trees(state))
    next_step = restored[2]["next_step"] if restored else 0
    for name in ("metrics.jsonl", "edits.jsonl"):
        truncate_after(os.path.join(folder, name), next_step - 1)
    if restored is None:
        return state, Past()
    _, trees, position = restored
    past: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in position["past"].items()
    }
    state = TrainState(
        jax.device_put(np.int32(next_step)),
        trees["policy"],
        trees.get("adapters"),
        trees["opt_state"],
        trees.get("value_head"),
    )
    return state, Past(**past)


def _trees(state: TrainState) -> dict[str, Any]:
    trees = {"policy": state.params, "opt_state": state.opt_state}
    optional = {"adapters": state.adapters, "value_head": state.value_head}
    return trees | {name: tree for name, tree in optional.items() if tree is not None}
