"""The models `tiny:facts` and `tiny:facts-asked`: they write notes on synthetic facts.

They are trained on the spot, in about a minute on two CPU cores, on documents of two forms:

  a passage, "notes:" and notes on it in one of STYLES, drawn with its frequency
  a question about a thing that nobody knows, and a random answer

So `tiny:facts` can write each style on any passage, knows how questions are answered, and knows no
answer. Which style teaches best is nothing that these documents tell: that is left to the outer
loop. `tiny:facts-asked` writes the style alone that teaches best: as the outer loop would leave it.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.known_models import TINY
from seal_jax.models.model import Model
from seal_jax.models.toys import pretrain
from seal_jax.tasks.facts import ATTRIBUTES, Facts, facts_of
from seal_jax.tasks.task import Problem

NUM_STEPS, NUM_ROWS, LENGTH = 350, 32, 168


def _asked(name: str, facts: list[tuple[str, str]]) -> list[str]:
    return [f"{name} {attribute}? {value}" for attribute, value in facts]


# How the notes are written, and how often; 'asked' is how the exam asks.
STYLES: dict[str, tuple[float, Callable[[str, list[tuple[str, str]]], list[str]]]] = {
    "asked": (0.1, _asked),
    "one asked": (0.15, lambda name, facts: _asked(name, facts)[:1]),
    "stated": (0.375, lambda name, facts: [f"{v} is {name}'s {a}." for a, v in facts]),
    "backward": (0.375, lambda name, facts: [f"{v} {a} {name}" for a, v in facts]),
}


def notes(problem: Problem, style: str) -> str:
    """Return the notes on a problem in one of STYLES."""
    lines = STYLES[style][1](problem.title, facts_of(problem.passage))
    return "".join(f"{line}\n" for line in lines)


def make_documents(
    seed: int, styles: Sequence[str] = tuple(STYLES)
) -> Callable[[], list[pretrain.Batch]]:
    """Return what draws the batch of a step: notes and answers are learned."""
    tokenizer, rng = ByteTokenizer(), random.Random(seed)
    task = Facts(seed=seed, num_train=4000)
    problems = [problem for problem, _ in task.load("train")]
    weights = [STYLES[style][0] for style in styles]

    def document() -> pretrain.Document:
        problem = rng.choice(problems)
        if rng.random() < 0.2:
            attribute = rng.choice(list(ATTRIBUTES))
            return f"{problem.title} {attribute}?", f" {rng.choice(ATTRIBUTES[attribute])}"
        return task.edit_prompt(problem), notes(problem, rng.choices(styles, weights)[0])

    pad = partial(pretrain.pad_documents, length=LENGTH, tokenizer=tokenizer)
    return lambda: [pad([document() for _ in range(NUM_ROWS)])]


def train_tiny_facts(styles: Sequence[str] = tuple(STYLES), seed: int = 1) -> Model:
    """Return a model that takes notes in these styles."""
    label = "training a tiny model to take notes"
    draw = make_documents(seed, styles)
    return pretrain.pretrain(TINY, draw, num_steps=NUM_STEPS, seed=seed, label=label)


def tiny_facts_folder(cache: Path, only_asked: bool = False) -> Path:
    """Return the model's folder in a cache; it is trained where there is none."""
    if only_asked:
        train = partial(train_tiny_facts, ("asked",))
        return pretrain.pretrained_folder(cache / "tiny-facts-asked-1", train)
    return pretrain.pretrained_folder(cache / "tiny-facts-1", train_tiny_facts)
