"""Knowledge incorporation: the task, its passages and their questions, and its offline grader."""

from seal_jax.tasks.knowledge.task import PROMPT_STYLES, Knowledge, training_sequences

__all__ = ["PROMPT_STYLES", "TASK", "Knowledge", "training_sequences"]

TASK = Knowledge
