"""What the keys `eval.*` say of the final table's arms, checked before jax is imported."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from seal_jax.outer.differences import read_pair
from seal_jax.tasks import TASKS
from seal_jax.tasks.task import asks_once

# Of arms, and of what else a run's folder has.
_TAKEN = (
    *("base", "passage", "own", "seal", "random", "external", "objective"),
    *("problems", "questions"),  # titles, too
    *("adapters", "checkpoints", "model"),
)


def arm_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the arms of the final table."""
    objectives = values["eval.objectives"]
    taken = {values["outer.objective"]: "that is outer.objective, which trains the arm 'seal'"}
    if values["eval.random_control"]:
        taken["random_em"] = "eval.random_control trains the arm 'random' by it already"
    taken |= dict.fromkeys(_TAKEN, "a run has another arm or folder of that name")
    for name in objectives:
        if name in taken:
            yield f"eval.objectives has {name!r}: {taken[name]}"
    for name in values["eval.texts"]:
        if name in (*_TAKEN, *objectives):
            yield f"eval.texts has {name!r}: a run has another arm or folder of that name"
    for name, options in values["eval.objective_kwargs"].items():
        if name not in objectives:
            yield f"eval.objective_kwargs has {name!r}: eval.objectives is {objectives!r}"
        elif not isinstance(options, Mapping | ConfigDict):
            yield f"eval.objective_kwargs.{name} = {options!r}: needs a dict of its options"
    arms = ["base", "passage", "own", "seal", *objectives, *values["eval.texts"]]
    arms += ["random"] if values["eval.random_control"] else []
    for text in values["eval.primary"]:
        if read_pair(text, arms) is None:
            yield (
                f"eval.primary has {text!r}: needs ARM-ARM, two different ones of {', '.join(arms)}"
            )
    task = values["task.name"]
    if values["eval.primary_score"] == "log_likelihood" and not asks_once(TASKS[task]):
        yield (
            f"eval.primary_score = 'log_likelihood': task {task!r} asks each question in several"
            " ways, and its gold answers are not scored"
        )
