"""The tasks, by the names that a config uses. Nothing below here imports jax."""

import dataclasses
import difflib
from typing import Any

from seal_jax.tasks.arc.task import Arc
from seal_jax.tasks.facts import Facts
from seal_jax.tasks.knowledge.task import Knowledge
from seal_jax.tasks.task import Exam, Problem, Question, Rejected, SelfEdit, Task

__all__ = [
    "GIVEN",
    "TASKS",
    "Arc",
    "Exam",
    "Facts",
    "Knowledge",
    "Problem",
    "Question",
    "Rejected",
    "SelfEdit",
    "Task",
    "make_task",
]

TASKS = {"facts": Facts, "knowledge": Knowledge, "arc": Arc}
# Fields of tasks that the run gives: the inner loop's batch size, and what counts a text's tokens.
GIVEN = ("batch_size", "count_tokens")


def make_task(name: str, **fields: Any) -> Task:
    """Make a task by its name in `TASKS`.

    Args:
        name: 'facts', 'knowledge' or 'arc'.
        **fields: fields of that task's dataclass; the others keep their defaults.

    Raises:
        ValueError: there is no such task or field; the message has the nearest name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{_nearest(name, list(TASKS))}")
    known = field_names(name)
    for field in fields:
        if field not in known:
            raise ValueError(f"task {name!r} has no field {field!r}{_nearest(field, known)}")
    return TASKS[name](**fields)


def field_names(name: str) -> list[str]:
    """Return the fields of a task's dataclass."""
    return [field.name for field in dataclasses.fields(TASKS[name])]


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {matches[0]!r}?" if matches else ""
    return f"{hint} (known: {', '.join(known)})"
