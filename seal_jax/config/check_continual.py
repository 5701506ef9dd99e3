"""What a config says of self-edits one after another, checked before a model is loaded.

`remedy_conflicts` is part of every config's check, and imports no jax. `run_conflicts` is of the
command alone: what it refuses, other commands can do.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from seal_jax.continual.remedies import REMEDIES
from seal_jax.tasks import TASKS
from seal_jax.tasks.task import asks_once, teacher_prompt_of

if TYPE_CHECKING:
    from seal_jax.continual.remedies.remedy import Remedy


def remedy_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the names of remedies."""
    names = values["continual.remedies"]
    for name in dict.fromkeys(names):
        if name not in REMEDIES:
            nearest = difflib.get_close_matches(name, REMEDIES, 1, 0.0)[0]
            yield (
                f"continual.remedies has {name!r}; did you mean {nearest!r}? (There are:"
                f" {', '.join(REMEDIES)})"
            )
        elif names.count(name) > 1:
            yield f"continual.remedies has {name!r} {names.count(name)} times"
    for name, options in values["continual.remedy_kwargs"].items():
        if name not in names:
            yield f"continual.remedy_kwargs has {name!r}: continual.remedies is {names!r}"
        elif not isinstance(options, Mapping | ConfigDict):
            yield f"continual.remedy_kwargs.{name} = {options!r}: needs a dict of its options"


def run_conflicts(values: Mapping[str, Any], remedies: "Mapping[str, Remedy]") -> Iterator[str]:
    """Yield what edits one after another cannot be made with."""
    task = values["task.name"]
    if not asks_once(TASKS[task]):
        yield (
            f"task.name = {task!r}: it asks each question in several ways; `continual` needs a task"
            " that asks once, as 'knowledge' and 'facts' do"
        )
    if (quantize := values["inner.quantize"]) != "none":
        yield (
            f"inner.quantize = {quantize!r}: `continual` merges edits into kernels of float32,"
            " expected 'none'"
        )
    if values["inner.objective"] != "sft":
        yield (
            "inner.objective = 'distill': in `continual` a remedy says who teaches; expected"
            " continual.remedies = ('distill',) and inner.objective = 'sft'"
        )
    for name, remedy in remedies.items():
        if remedy.teach is not None and teacher_prompt_of(TASKS[task]) is None:
            yield (
                f"continual.remedies has {name!r}: task {task!r} does not say what a teacher reads"
                " before a training text (a method teacher_prompt, see tasks/task.py)"
            )
        if (pads := values["inner.pad_loss"]) != "off" and _reads_texts(remedy):
            yield f"inner.pad_loss = {pads!r}: texts as {name!r} takes them have no padding"
        if (groups := values["inner.accumulation"]) > 1 and remedy.reference:
            yield (
                f"inner.accumulation = {groups}: {name!r} needs the memory's gradient at every"
                " step, expected 1"
            )


def _reads_texts(remedy: "Remedy") -> bool:
    return bool(remedy.memory or remedy.teach or remedy.context)
