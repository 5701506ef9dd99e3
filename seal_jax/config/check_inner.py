"""What the keys `inner.*` say of the loss, checked before jax is imported."""

from collections.abc import Iterator, Mapping
from typing import Any

from seal_jax.tasks import TASKS
from seal_jax.tasks.task import teacher_prompt_of


def inner_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the inner loop's loss."""
    if values["inner.pad_loss"] == "exact" and (size := values["inner.batch_size"]) > 8:
        yield (
            f"inner.batch_size = {size}: with inner.pad_loss = 'exact' at most 8, as {size} texts "
            f"of 2,048 tokens do not fit into a step of 16,384"
        )
    if values["inner.objective"] != "distill":
        return
    task = values["task.name"]
    if teacher_prompt_of(TASKS[task]) is None:
        yield (
            f"inner.objective = 'distill': task {task!r} does not say what a teacher reads before a"
            " training text (a method teacher_prompt, see tasks/task.py)"
        )
    if (pads := values["inner.pad_loss"]) != "off":
        yield f"inner.pad_loss = {pads!r}: with inner.objective = 'distill' padding has no teacher"
