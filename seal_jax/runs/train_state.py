"""The outer loop's state on disk: saved after each step, and where a run goes on from."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from seal_jax.hosts import manifest
from seal_jax.hosts.files import append_metrics, truncate_after
from seal_jax.objectives.objective import Past, Rewards
from seal_jax.outer.examination import Attempts
from seal_jax.outer.problems import OuterStep
from seal_jax.outer.step_log import log_edits, number
from seal_jax.runs import checkpoint as checkpoints
from seal_jax.runs.adapters import policy_id, policy_parents, save_adapter
from seal_jax.runs.kept_adapters import drop_adapters
from seal_jax.types import Adapters, Settings, TrainState


def extend(past: Past, rewards: Rewards, metrics: Mapping[str, float]) -> Past:
    """Return the past with one step more."""
    known = rewards.values[~np.isnan(rewards.values)]
    return Past(
        (*past.mean_rewards, float(known.mean())) if len(known) else past.mean_rewards,
        (*past.kls, metrics["policy/kl"]) if "policy/kl" in metrics else past.kls,
        past.num_skipped + int(metrics["policy/skipped"]),
    )


def refuse_skipped(past: Past, most: int, label: str) -> None:
    """Raise FloatingPointError where more updates were skipped than `outer.max_skipped` allows."""
    if past.num_skipped > most:
        raise FloatingPointError(
            f"{label}: {past.num_skipped} updates were not finite and were skipped; at most"
            f" outer.max_skipped = {most} may be: lower outer.learning_rate"
        )


def record(
    settings: Settings,
    step: OuterStep,
    attempts: Attempts,
    adapters: Adapters | None,
    metrics: Mapping[str, float],
) -> None:
    """Write down what a step has found: its metrics, its self-edits, its adapters.

    Args:
      adapters: the LoRA that the step merged into the policy; None if it was no LoRA.
    """
    append_metrics(os.path.join(step.folder, "metrics.jsonl"), step.number, metrics)
    log_edits(step, attempts)
    drop_adapters(settings.checkpoint, step, attempts)
    if adapters is not None:
        parents = policy_parents(step.number, settings.outer.update)
        save_adapter(step.folder, policy_id(step.number), adapters, parents)
    manifest.update(step.folder)


def checkpoint(
    manager: ocp.CheckpointManager,
    step: int,
    state: TrainState,
    rewards: Rewards,
    past: Past,
    value: float | None,
) -> None:
    """Save the state after `step`; `state.adapters` is what this step merged into `state.params`.

    It returns before all is on disk; what the step before has saved is.

    Args:
      rewards: those of this step; they are noted beside the state.
      past: all steps until now, see `extend`.
      value: by which the best checkpoints are chosen; None where nothing was measured.
    """
    position = {"next_step": step + 1, "past": past._asdict()}
    position["rewards"] = [[number(one) for one in row] for row in rewards.values]
    checkpoints.save(manager, step + 1, _trees(state), position, value)


def restore_state(
    manager: ocp.CheckpointManager, state: TrainState, folder: str
) -> tuple[TrainState, Past]:
    """Return the newest good checkpoint's state and past; without one, `state` and no past.

    Lines of metrics.jsonl and edits.jsonl on steps that are to be made again are dropped.
    """
    restored = checkpoints.restore(manager, _trees(state))
    next_step = restored[2]["next_step"] if restored else 0
    for name in ("metrics.jsonl", "edits.jsonl"):
        truncate_after(os.path.join(folder, name), next_step - 1)
    manifest.forget_checkpoints(folder, above=next_step)
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
        with_keys(trees["opt_state"], state.opt_state),
        trees.get("value_head"),
    )
    return state, Past(**past)


def without_keys(opt_state: Any) -> Any:
    """Return an optimizer's state with the numbers of its PRNG keys, which can be saved."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, opt_state)


def with_keys(opt_state: Any, like: Any) -> Any:
    """Return what `without_keys` made of a state like another."""

    def one(x: Any, old: Any) -> Any:
        impl = jax.random.key_impl(old) if _is_key(old) else None
        return x if impl is None else jax.random.wrap_key_data(x, impl=impl)

    return jax.tree.map(one, opt_state, like)


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _trees(state: TrainState) -> dict[str, Any]:
    trees = {"policy": state.params, "opt_state": without_keys(state.opt_state)}
    optional = {"adapters": state.adapters, "value_head": state.value_head}
    return trees | {name: tree for name, tree in optional.items() if tree is not None}
