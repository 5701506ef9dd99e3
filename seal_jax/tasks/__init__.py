"""The tasks, one a file or folder, whose TASK makes it. Nothing below here imports jax."""

import difflib
import inspect
from typing import Any

from seal_jax.extensions import Found
from seal_jax.tasks.task import Exam, Problem, Question, Rejected, SelfEdit, Task

__all__ = [
    "GIVEN",
    "TASKS",
    "Exam",
    "Problem",
    "Question",
    "Rejected",
    "SelfEdit",
    "Task",
    "field_names",
    "make_task",
]

# Dataclasses, or functions with keyword arguments, that make a task.
TASKS = Found("tasks", base="task", attribute="TASK")
# Fields of tasks that the run gives: the inner loop's batch size, and what counts a text's tokens.
GIVEN = ("batch_size", "count_tokens")


def make_task(name: str, **fields: Any) -> Task:
    """Make a task by its name in `TASKS`; fields that are not given keep their defaults.

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
    """Return what a task may be made with."""
    return list(inspect.signature(TASKS[name]).parameters)


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {matches[0]!r}?" if matches else ""
    return f"{hint} (known: {', '.join(known)})"
