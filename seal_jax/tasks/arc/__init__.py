"""Few-shot ARC: the policy chooses augmentations and training settings for each task."""

from seal_jax.tasks.arc.task import Arc

TASK = Arc
