"""A task's own examples as training tasks.

    examples -> leave one out, leave two out -> augment -> permute colors and examples -> turns

Every example is once the query and the others its context; with two left out, one of them is the
query and the other is dropped. Each of these tasks is augmented by each augmentation of the chosen
groups, and each result comes as it is and with its colors and examples permuted. They are taken in
random order until there are enough; a task that is already there, a grid over 30 x 30 and a text
over the token limit do not count.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from seal_jax.tasks.arc.augmentations import (
    AUGMENTATIONS,
    GROUPS,
    augment_examples,
    check_groups,
    color_permutation,
    permute_examples,
    translation,
)
from seal_jax.tasks.arc.format import INSTRUCTION, make_turn
from seal_jax.tasks.arc.grids import MAX_SIDE, ArcTask, Example, task_key
from seal_jax.tasks.task import Turn

MAX_TURNS = 250  # these two limits are the paper's
MAX_TOKENS = 8192
_TRANSLATION = "translation"

Examples = tuple[Example, ...]  # the context, then the query


class TrainingData(NamedTuple):
    """The training texts of a self-edit, and what did not become one."""

    turns: tuple[Turn, ...]
    too_large: int  # tasks with a grid over 30 x 30
    too_long: int  # texts over the token limit
    duplicates: int


def task_rng(seed: int, task_id: str) -> np.random.Generator:
    """Return a generator that depends on the seed and the task's name alone."""
    return np.random.default_rng([seed, zlib.crc32(task_id.encode())])


def leave_out(examples: Sequence[Example], count: int) -> list[Examples]:
    """Return every task of these examples with `count` (1 or 2) taken from the context.

    The last example of each is the query. Tasks without context are not made: 2 examples give 2
    tasks with one left out and none with two.
    """
    if count not in (1, 2):
        raise ValueError(f"count is {count}, expected 1 or 2")
    indices = range(len(examples))
    return [
        (*(examples[i] for i in indices if i not in out), examples[out[0]])
        for out in itertools.permutations(indices, count)
        if count < len(examples)
    ]


def make_training_data(
    task: ArcTask,
    groups: Sequence[str],
    *,
    seed: int,
    count_tokens: Callable[[Turn], int],
    max_turns: int = MAX_TURNS,
    max_tokens: int = MAX_TOKENS,
    num_permuted: int = 1,
    instruction: str = INSTRUCTION,
) -> TrainingData:
    """Return the training texts of a task: a function of the task, the groups and the seed.

    Args:
      task: its test grids are not looked at.
      groups: names in `augmentations.GROUPS`, or nothing.
      seed: decides order, colors and translations.
      count_tokens: the tokens of a training text, template included.
      max_turns: at most so many texts.
      max_tokens: of one text.
      num_permuted: copies of each task with colors and examples permuted, beside itself.
      instruction: what every text begins with.

    Raises:
      ValueError: there is no such group.
    """
    check_groups(groups)
    rng = task_rng(seed, task.id)
    plain = leave_out(task.examples, 1) + leave_out(task.examples, 2)
    names = [None, *(name for group in groups for name in GROUPS[group])]
    names += [_TRANSLATION] * ("basic" in groups)
    plans = list(itertools.product(plain, names, range(1 + num_permuted)))
    turns: list[Turn] = []
    seen: set[tuple] = set()
    too_large = too_long = duplicates = 0
    for index in rng.permutation(len(plans)):
        if len(turns) == max_turns:
            break
        examples = _apply(*plans[index], rng)
        if max(side for example in examples for grid in example for side in grid.shape) > MAX_SIDE:
            too_large += 1
        elif task_key(examples) in seen:
            duplicates += 1
        else:
            seen.add(task_key(examples))
            turn = make_turn(examples[:-1], examples[-1], instruction)
            if count_tokens(turn) <= max_tokens:
                turns.append(turn)
            else:
                too_long += 1
    return TrainingData(tuple(turns), too_large, too_long, duplicates)


def _apply(
    examples: Examples, name: str | None, permuted: int, rng: np.random.Generator
) -> Examples:
    if name == _TRANSLATION:
        examples = augment_examples(examples, translation(rng)[0])
    elif name is not None:
        examples = augment_examples(examples, AUGMENTATIONS[name])
    if permuted:
        colored = augment_examples(examples, color_permutation(rng)[0])
        examples = (*permute_examples(colored[:-1], rng), colored[-1])
    return examples
