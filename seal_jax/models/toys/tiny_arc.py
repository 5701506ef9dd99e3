"""The model `tiny:arc`: writes ARC self-edits and answers the small tasks of tasks/arc/small.py.

It is trained on the spot, in 80 seconds on two CPU cores, on documents of two forms:

  a task, and a self-edit with settings drawn at random from CHOICES
  a task and a test grid, and the grid painted in a random color that the examples do not show

So it can write any settings, can paint, and does not take the color from the examples: that it
learns only where it is trained on them, with settings that work.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.known_models import TINY
from seal_jax.models.model import Model
from seal_jax.models.toys.pretrain import (
    Batch,
    Document,
    pad_documents,
    pretrain,
    pretrained_folder,
)
from seal_jax.tasks.arc.augmentations import GROUPS
from seal_jax.tasks.arc.format import FOOTER, encode_grid, make_prompt
from seal_jax.tasks.arc.grids import NUM_COLORS, ArcTask
from seal_jax.tasks.arc.self_edit import edit_prompt
from seal_jax.tasks.arc.small import (
    CHOICES,
    EDIT_INSTRUCTION,
    INSTRUCTION,
    draw_task,
    paint,
    self_edit_text,
)

NUM_STEPS = 300
EDIT_ROWS, EDIT_LENGTH = 3, 480
GRID_ROWS, GRID_LENGTH = 20, 184


def make_documents(seed: int) -> Callable[[], list[Batch]]:
    """Return what draws the two batches of a step."""
    tokenizer, rng, grids = ByteTokenizer(), random.Random(seed), np.random.default_rng(seed)

    def draw() -> ArcTask:
        return draw_task("x", grids)

    def settings() -> Document:
        chosen = {group for group in GROUPS if rng.random() < 0.5}
        text = self_edit_text(chosen, *(rng.choice(words) for words in CHOICES.values()))
        return edit_prompt(draw(), instruction=EDIT_INSTRUCTION), text

    def answered() -> Document:
        task = draw()
        examples = task.examples[: rng.randint(1, len(task.examples))]
        prompt = make_prompt(examples, task.tests[0], INSTRUCTION)
        shown = examples[0].output.max()
        color = rng.choice([color for color in range(1, NUM_COLORS) if color != shown])
        answer = encode_grid(paint(task.tests[0], color)) + FOOTER
        return "".join(part.text for part in prompt), answer

    return lambda: [
        pad_documents([settings() for _ in range(EDIT_ROWS)], EDIT_LENGTH, tokenizer),
        pad_documents([answered() for _ in range(GRID_ROWS)], GRID_LENGTH, tokenizer),
    ]


def train_tiny_arc(seed: int = 0, num_steps: int = NUM_STEPS) -> Model:
    """Return the model."""
    label = "training a tiny model for small ARC tasks"
    return pretrain(TINY, make_documents(seed), num_steps=num_steps, seed=seed, label=label)


def tiny_arc_folder(cache: Path) -> Path:
    """Return the model's folder in a cache; it is trained where there is none."""
    return pretrained_folder(cache / "tiny-arc-1", train_tiny_arc)
