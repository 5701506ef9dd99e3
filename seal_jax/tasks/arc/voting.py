"""From many predictions of one test grid to a few attempts.

Each prediction was made from some transformed version of the task and inverted, so all are in the
frame of the original grid; `inverse` names what was undone. A grid's votes are its predictions.
Equal votes go to the grid that more transforms agree on, then to the one predicted first.

Where fewer than `num_attempts` different grids were predicted, rows and columns vote for the rest:
the grid whose every row (then: every column) is the most frequent one at its place, among all
predictions, then among each transform's own.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seal_jax.tasks.arc.grids import as_grid, grid_key, same

Grid = list[list[int]]
Named = Sequence[tuple[Hashable, np.ndarray]]  # what was undone, and the grid after it


class Tally(NamedTuple):
    """The votes for one grid."""

    grid: np.ndarray
    votes: int  # predictions
    transforms: int  # that predicted it at least once


def vote(predictions: Sequence[Mapping[str, Any]], num_attempts: int = 2) -> list[Grid]:
    """Return the attempts, best first: at most `num_attempts`, all different.

    Args:
      predictions: each with `grid`, a list of rows, and `inverse`, any name of the transform
        that was undone (None for none). Grids may differ in shape.
      num_attempts: how many grids to return; fewer come back where no more can be made.

    Raises:
      ValueError: num_attempts is below 1, or a prediction is not a grid.
    """
    if num_attempts < 1:
        raise ValueError(f"num_attempts is {num_attempts}, expected at least 1")
    named = _named(predictions)
    attempts = [tally.grid for tally in _tally(named)[:num_attempts]]
    everything = [grid for _, grid in named]
    for grids in [everything, *_by_transform(named).values()]:
        for grid in _majorities(grids):
            if len(attempts) < num_attempts and not any(same(grid, a) for a in attempts):
                attempts.append(grid)
    return [grid.tolist() for grid in attempts]


def overall_tally(predictions: Sequence[Mapping[str, Any]]) -> list[Tally]:
    """Return the votes of every predicted grid, best first."""
    return _tally(_named(predictions))


def transform_tallies(predictions: Sequence[Mapping[str, Any]]) -> dict[Hashable, list[Tally]]:
    """Return the votes within each transform, best first."""
    groups = _by_transform(_named(predictions))
    return {name: _tally([(name, grid) for grid in grids]) for name, grids in groups.items()}


def is_solved(attempts: Sequence[Grid], solution: np.ndarray) -> bool:
    """Return whether one of the attempts is the solution, shape included."""
    return any(same(np.array(attempt), solution) for attempt in attempts)


def pass_at(attempts: Sequence[Sequence[Grid]], solutions: Sequence[np.ndarray]) -> float:
    """Return the share of a task's test grids that are solved, given the attempts at each.

    Raises:
      ValueError: there are no test grids, or not one list of attempts for each.
    """
    if not solutions or len(attempts) != len(solutions):
        raise ValueError(f"{len(attempts)} lists of attempts for {len(solutions)} test grids")
    solved = [is_solved(a, s) for a, s in zip(attempts, solutions, strict=True)]
    return sum(solved) / len(solved)


def _named(predictions: Sequence[Mapping[str, Any]]) -> list[tuple[Hashable, np.ndarray]]:
    return [
        (prediction["inverse"], as_grid(prediction["grid"], f"prediction {index}"))
        for index, prediction in enumerate(predictions)
    ]


def _by_transform(named: Named) -> dict[Hashable, list[np.ndarray]]:
    groups: dict[Hashable, list[np.ndarray]] = {}
    for name, grid in named:
        groups.setdefault(name, []).append(grid)
    return groups


def _tally(named: Named) -> list[Tally]:
    found: dict[tuple, tuple[np.ndarray, list[Hashable]]] = {}
    for name, grid in named:
        found.setdefault(grid_key(grid), (grid, []))[1].append(name)
    tallies = [Tally(grid, len(names), len(set(names))) for grid, names in found.values()]
    return sorted(tallies, key=lambda tally: (-tally.votes, -tally.transforms))


def _majorities(grids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the grid of the most frequent rows, and that of the most frequent columns.

    Only grids of the most frequent shape take part.
    """
    if not grids:
        return []
    shape = Counter(grid.shape for grid in grids).most_common(1)[0][0]
    stack = [grid for grid in grids if grid.shape == shape]
    rows = [_most_frequent([grid[i] for grid in stack]) for i in range(shape[0])]
    columns = [_most_frequent([grid[:, j] for grid in stack]) for j in range(shape[1])]
    return [np.stack(rows), np.stack(columns, axis=1)]


def _most_frequent(lines: Sequence[np.ndarray]) -> np.ndarray:
    best = Counter(line.tobytes() for line in lines).most_common(1)[0][0]
    return np.frombuffer(best, lines[0].dtype)
