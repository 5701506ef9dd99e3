"""Few-shot ARC: the policy chooses augmentations and training settings for each task."""

from seal_jax.tasks.arc.task import Arc

__all__ = ["TASK", "Arc"]

TASK = Arc
