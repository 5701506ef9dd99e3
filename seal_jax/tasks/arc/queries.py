"""Many ways to ask for one test grid, each with the way back.

    transform x context -> prompt -> the model answers greedily -> decode -> undo -> vote

The transforms are those of the published predictions: none, transpose, both flips, and rotations by
90 and 180 degrees. The contexts are the examples in their order and permuted, all of them or with
some left out.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from seal_jax.tasks.arc.augmentations import (
    AUGMENTATIONS,
    INVERSES,
    RIGID,
    augment_examples,
    permute_examples,
)
from seal_jax.tasks.arc.format import INSTRUCTION, Undecodable, decode_grid, make_prompt, text_of
from seal_jax.tasks.arc.grids import ArcTask, Example
from seal_jax.tasks.arc.training_data import task_rng

TRANSFORMS = (None, "transpose", "flip_rows", "flip_columns", "rotate_90", "rotate_180")


class Query(NamedTuple):
    """One prompt for one test grid."""

    test: int  # which of the task's test grids
    transform: str | None  # what was done to all grids, to be undone on the answer
    prompt: str


class Predictions(NamedTuple):
    """The decoded answers to a task's queries."""

    by_test: tuple[list[dict[str, Any]], ...]  # what voting.vote takes, for each test grid
    undecodable: tuple[str, ...]  # the reasons of those that were no grids


def make_queries(
    task: ArcTask,
    *,
    seed: int = 0,
    transforms: Sequence[str | None] = TRANSFORMS,
    left_out: Sequence[int] = (0,),
    num_permuted: int = 1,
    instruction: str = INSTRUCTION,
) -> tuple[Query, ...]:
    """Return the prompts for every test grid, without repeats.

    Args:
      task: its solutions are not looked at.
      seed: of the permutations.
      transforms: None, or names in `augmentations.RIGID`; each asks once per context.
      left_out: how many examples to leave out, in every way there is: (0, 1) asks with all and with
        each one missing. At least one example is always kept.
      num_permuted: contexts in a random order, beside each in its own.
      instruction: what every prompt begins with.

    Raises:
      ValueError: a transform is unknown, or no context is left to ask with.
    """
    unknown = [name for name in transforms if name is not None and name not in RIGID]
    if unknown:
        raise ValueError(f"unknown transform {unknown[0]!r}: expected None or one of {RIGID}")
    rng = task_rng(seed, task.id)
    contexts: list[Sequence[Example]] = []
    for count in left_out:
        if 0 <= count < len(task.examples):
            for kept in itertools.combinations(task.examples, len(task.examples) - count):
                contexts += [kept, *(permute_examples(kept, rng) for _ in range(num_permuted))]
    if not contexts or not transforms:
        raise ValueError(f"task {task.id}: nothing to ask with: left_out {tuple(left_out)}")
    queries = []
    for test, name, context in itertools.product(range(len(task.tests)), transforms, contexts):
        change = AUGMENTATIONS[name] if name is not None else np.asarray
        examples, test_input = augment_examples(context, change), change(task.tests[test])
        prompt = text_of(make_prompt(examples, test_input, instruction))
        queries.append(Query(test, name, prompt))
    return tuple(dict.fromkeys(queries))


def read_answers(queries: Sequence[Query], answers: Sequence[str]) -> Predictions:
    """Decode the answers to a task's queries, and undo their transforms.

    Raises:
      ValueError: there is not one answer for each query.
    """
    if len(queries) != len(answers):
        raise ValueError(f"{len(answers)} answers to {len(queries)} queries")
    by_test = tuple([] for _ in range(1 + max((query.test for query in queries), default=-1)))
    undecodable = []
    for query, answer in zip(queries, answers, strict=True):
        grid = decode_grid(answer)
        if isinstance(grid, Undecodable):
            undecodable.append(grid.reason)
        else:
            back = INVERSES[query.transform](grid) if query.transform is not None else grid
            by_test[query.test].append({"grid": back.tolist(), "inverse": query.transform})
    return Predictions(by_test, tuple(undecodable))
