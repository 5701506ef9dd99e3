"""Grids, examples and tasks of ARC, and what is checked once, when they are read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NUM_COLORS = 10
MAX_SIDE = 30


class Example(NamedTuple):
    """One pair of grids, each i8[height width] with colors 0 to 9."""

    input: np.ndarray
    output: np.ndarray


class ArcTask(NamedTuple):
    """A task: the examples that show the rule, and the test grids to which it is applied."""

    id: str
    examples: tuple[Example, ...]
    tests: tuple[np.ndarray, ...]  # inputs
    solutions: tuple[np.ndarray, ...] | None = None  # one per test; None where they are not known


def as_grid(value: Any, where: str) -> np.ndarray:
    """Return a list of rows as a grid, i8[height width].

    Args:
      value: a list of lists of integers, or an array of integers.
      where: what the grid is, for the message.

    Raises:
      ValueError: not a rectangle of integers 0 to 9, of 1 to 30 rows and columns.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{where}: expected a list of rows, found {_describe(value)}")
    for index, row in enumerate(value):
        if not isinstance(row, list | tuple) or not row:
            raise ValueError(f"{where}: row {index} is {_describe(row)}, expected a list of colors")
        if len(row) != len(value[0]):
            raise ValueError(
                f"{where}: ragged: row {index} has {len(row)} cells, row 0 has {len(value[0])}"
            )
        for color in row:
            if type(color) is not int or not 0 <= color < NUM_COLORS:
                raise ValueError(
                    f"{where}: row {index} has {_describe(color)}, expected colors 0 to 9"
                )
    if len(value) > MAX_SIDE or len(value[0]) > MAX_SIDE:
        raise ValueError(
            f"{where}: {len(value)} x {len(value[0])}, at most {MAX_SIDE} x {MAX_SIDE}"
        )
    return np.array(value, np.int8)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two grids are equal, shape included."""
    return np.array_equal(a, b)


def grid_key(grid: np.ndarray) -> tuple:
    """Return what two grids share exactly where they are equal, to count and compare by."""
    return grid.shape, grid.astype(np.int8).tobytes()


def task_key(examples: Sequence[Example]) -> tuple:
    """Return what two lists of examples share exactly where they are equal, order included."""
    return tuple(grid_key(grid) for example in examples for grid in example)


def _describe(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"{type(value).__name__} {str(value)[:20]!r}"
