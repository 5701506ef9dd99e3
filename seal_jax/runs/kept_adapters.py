"""Which adapters of inner runs a run keeps: `checkpoint.adapters` and `adapters_gb`."""

from collections.abc import Callable
from functools import partial

import numpy as np

from seal_jax.hosts.console import say
from seal_jax.outer.examination import Attempts
from seal_jax.outer.problems import OuterStep
from seal_jax.outer.waves import InnerRun, RunName
from seal_jax.runs.adapters import (
    delete_adapters,
    drop_beyond,
    inner_id,
    policy_parents,
    save_adapter,
)
from seal_jax.types import Adapters, CheckpointSettings, Settings

# Saves what an inner run made.
Keep = Callable[[InnerRun, Adapters], None]


def keep_for(settings: Settings, step: OuterStep) -> Keep | None:
    """Return what keeps the adapters of a step's inner runs; None where none are wanted."""
    if settings.checkpoint.adapters == "none":
        return None
    return partial(_keep, step.folder, policy_parents(step.number, settings.outer.update))


def _keep(folder: str, parents: list[str] | None, run: InnerRun, adapter: Adapters) -> None:
    save_adapter(folder, inner_id(run.step, run.name), adapter, parents)


def drop_adapters(settings: CheckpointSettings, step: OuterStep, attempts: Attempts) -> None:
    """Delete the adapters of a step's inner runs that the settings do not want."""
    evaluated, advantages = attempts.evaluated, attempts.advantages
    if settings.adapters == "none" or evaluated is None:
        return
    names = list(evaluated.outcomes)

    def accuracy(name: RunName) -> float:
        return float(np.nan_to_num(evaluated.outcomes[name].accuracy, nan=-1.0))

    wanted = set(names)
    if settings.adapters == "kept":  # of the self-edits that were reinforced
        kept = {(step.batch[p][0].id, r) for p, r in np.argwhere(advantages > 0).tolist()}
        wanted = {name for name in names if name[:2] in kept}
    if settings.adapters == "best":  # of each problem
        of_problem = [
            [name for name in names if name[0] == problem.id] for problem, _ in step.batch
        ]
        wanted = {max(found, key=accuracy) for found in of_problem if found}
    delete_adapters(step.folder, [inner_id(step.number, n) for n in names if n not in wanted])
    if dropped := drop_beyond(step.folder, 1e9 * settings.adapters_gb):
        say(
            f"checkpoint.adapters_gb = {settings.adapters_gb:g}: dropped the {len(dropped)} worst"
            " adapters"
        )
