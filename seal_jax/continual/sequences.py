"""Which problems come one after another, in each of several sequences. Imports no JAX."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from seal_jax.tasks.task import Exam, Problem

Pair = tuple[Problem, Exam]


class Sequences(NamedTuple):
    """S sequences of N problems, and a control set that is in none of them."""

    problems: tuple[tuple[Pair, ...], ...]  # [S][N]
    control: tuple[Pair, ...]
    num_shared: int  # problems that are in more than one sequence

    @property
    def ids(self) -> list[list[str]]:
        """Return the problems by their ids, [S][N]."""
        return [[problem.id for problem, _ in sequence] for sequence in self.problems]


def make_sequences(
    problems: Sequence[Pair], *, num_sequences: int, length: int, num_control: int, seed: int
) -> Sequences:
    """Draw sequences from a task's problems; the same ones for the same arguments.

    The control set is drawn first: it is the same for every number and length of sequences. Each
    sequence then takes those problems that the fewest earlier ones have. So sequences are disjoint
    if there are enough problems, and else every problem is in as many as every other, or one more.
    Problems of one passage are one problem: the first of them counts.

    Raises:
      ValueError: a number is not positive (`num_control` may be 0), or a sequence and the control
        set need more problems than there are.
    """
    counts = {"num_sequences": (num_sequences, 1), "length": (length, 1)}
    for name, (found, least) in (counts | {"num_control": (num_control, 0)}).items():
        if found < least:
            raise ValueError(f"{name} is {found}, expected {least} or more")
    distinct: dict[str, Pair] = {}
    for pair in problems:
        distinct.setdefault(pair[0].passage, pair)
    pool = [*distinct.values()]
    if length + num_control > len(pool):
        twice = len(problems) - len(pool)
        also = f", and {twice} more whose passage one of these has" if twice else ""
        raise ValueError(
            f"a sequence of {length} problems beside a control set of {num_control} needs"
            f" {length + num_control} problems; the task has {len(pool)}{also}"
        )
    rng = np.random.default_rng([seed, num_control])
    order = rng.permutation(len(pool))
    control, rest = order[:num_control], order[num_control:]
    times = np.zeros(len(rest), int)
    drawn = []
    for number in range(num_sequences):
        rng = np.random.default_rng([seed, num_control, number + 1])
        shuffled = rng.permutation(len(rest))
        taken = shuffled[np.argsort(times[shuffled], kind="stable")[:length]]
        times[taken] += 1
        drawn.append(rest[rng.permutation(taken)])

    def pairs(indices: np.ndarray) -> tuple[Pair, ...]:
        return tuple(pool[i] for i in indices)

    return Sequences(tuple(map(pairs, drawn)), pairs(control), int((times > 1).sum()))
