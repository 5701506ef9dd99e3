"""Small invented tasks for a tiny model: every colored cell gets the task's own color.

    [[3, 0], [7, 3]] -> [[5, 0], [5, 5]]        0, the background, stays

Grids are 2 x 2. The examples show the color, but the model tiny:arc has learned not to take it from
them: it has to be trained on them. Augmentations keep the rule. Nothing here is an ARC task: it is
for trying out, in minutes, what the policy learns to choose.
"""

import json
from collections.abc import Collection

import numpy as np

from seal_jax.tasks.arc.augmentations import GROUPS
from seal_jax.tasks.arc.grids import NUM_COLORS, ArcTask, Example
from seal_jax.tasks.arc.self_edit import FORM

NUM_TASKS = 64
NUM_EXAMPLES, SIDE = 3, 2
# Short, for a tokenizer of bytes.
INSTRUCTION, EDIT_INSTRUCTION = "Go on:", "Choose the settings.\n"
# Of the self-edits that the tiny model is trained to write.
CHOICES = {
    "strategy": ("train_using_all_tokens", "train_using_output_tokens"),
    "learning_rate": ("1e-3", "1e-2", "2e-2"),
    "num_train_epochs": ("1", "4", "6", "20"),
}


def paint(grid: np.ndarray, color: int) -> np.ndarray:
    """Give every cell that is not 0 this color."""
    return np.where(grid > 0, color, 0).astype(np.int8)


def draw_task(name: str, rng: np.random.Generator) -> ArcTask:
    """Draw a task with one test grid. Every grid has at least one colored cell."""
    color = int(rng.integers(1, NUM_COLORS))
    pairs = []
    while len(pairs) <= NUM_EXAMPLES:
        colored = rng.random((SIDE, SIDE)) < 0.7
        grid = np.where(colored, rng.integers(1, NUM_COLORS, colored.shape), 0).astype(np.int8)
        if grid.any():
            pairs.append(Example(grid, paint(grid, color)))
    test = pairs.pop()
    return ArcTask(name, tuple(pairs), (test.input,), (test.output,))


def small_tasks(seed: int = 0) -> list[ArcTask]:
    """Return NUM_TASKS tasks: small-00, small-01, ..."""
    rng = np.random.default_rng(seed)
    return [draw_task(f"small-{i:02}", rng) for i in range(NUM_TASKS)]


def self_edit_text(groups: Collection[str], strategy: str, learning_rate: str, epochs: str) -> str:
    """Return a self-edit as JSON."""
    switches = [json.dumps(group in groups) for group in GROUPS]
    return FORM % (*switches, json.dumps(strategy), learning_rate, epochs)
