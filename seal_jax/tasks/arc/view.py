"""A task as a picture: its grids, their augmentations, and the predictions for its tests.

seal-jax view arc 5582e5ca
seal-jax view arc 5582e5ca --augmentations basic size --out task.svg
seal-jax view arc small-40 --run runs/arc_tiny
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seal_jax.hosts.json_text import read_value
from seal_jax.tasks.arc import voting
from seal_jax.tasks.arc.augmentations import AUGMENTATIONS, GROUPS, check_groups
from seal_jax.tasks.arc.grids import ArcTask, as_grid
from seal_jax.tasks.arc.sources import load_tasks

# One color for each of 0 to 9, told apart by lightness too.
COLORS = (
    *("#101010", "#1f6fd1", "#e2403a", "#3aa845", "#f4cf1d"),
    *("#9a9a9a", "#d63aa6", "#f08030", "#7fd3ea", "#7d1f2b"),
)
PICTURES = (".png", ".svg")


class Panel(NamedTuple):
    """Grids side by side, each under its caption."""

    title: str
    grids: tuple[tuple[str, np.ndarray], ...]


def find_task(name: str, source: str) -> ArcTask:
    """Return a task by its name.

    Raises:
      ValueError: it is in no split of the source.
    """
    splits = load_tasks(source)
    found = [task for tasks in splits.values() for task in tasks if task.id == name]
    if not found:
        count = sum(map(len, splits.values()))
        raise ValueError(f"{source}: no task {name!r} among {count}")
    return found[0]


def make_panels(
    task: ArcTask,
    groups: Sequence[str] = (),
    predictions: Sequence[Sequence[dict]] | None = None,
) -> list[Panel]:
    """Return what there is to see of a task.

    Args:
      task: its examples, its tests, and their solutions where they are known.
      groups: augmentations to show, on the first example's input.
      predictions: for each test what `voting.vote` takes; the most voted are shown.

    Raises:
      ValueError: a group is unknown, or there is not one list of predictions for each test.
    """
    panels = [
        Panel(f"example {i}", (("input", e.input), ("output", e.output)))
        for i, e in enumerate(task.examples)
    ]
    for i, grid in enumerate(task.tests):
        solution = [("solution", task.solutions[i])] if task.solutions else []
        panels.append(Panel(f"test {i}", (("input", grid), *solution)))
    check_groups(groups)
    first = task.examples[0].input
    for group in groups:
        shown = tuple((name, AUGMENTATIONS[name](first)) for name in GROUPS[group])
        panels.append(Panel(f"{group} augmentations of input 0", shown))
    if predictions is not None:
        if len(predictions) != len(task.tests):
            raise ValueError(
                f"{len(predictions)} lists of predictions for {len(task.tests)} test grids"
            )
        panels += [_voted(task, i, made) for i, made in enumerate(predictions)]
    return panels


def read_predictions(path: str) -> list[list[dict]]:
    """Read a JSON list with a list of {grid, inverse} for each test grid.

    Raises:
      ValueError: the file is not of that form.
    """
    content = read_value(path)
    form = "expected a list of {grid, inverse} for each test grid"
    if not isinstance(content, list) or not all(isinstance(made, list) for made in content):
        raise ValueError(f"{path}: {form}")
    for test, made in enumerate(content):
        for index, prediction in enumerate(made):
            where = f"{path}: [{test}][{index}]"
            if not isinstance(prediction, dict) or not {"grid", "inverse"} <= prediction.keys():
                raise ValueError(f"{where}: {form}")
            if not isinstance(prediction["inverse"], str | None):
                raise ValueError(f"{where}: inverse: expected a name or null")
            as_grid(prediction["grid"], where)
    return content


def to_terminal(panels: Sequence[Panel], color: bool) -> str:
    """Return the panels as text: a digit a cell, on its color if `color`. Grids go downward."""
    blocks = []
    for panel in panels:
        lines = [panel.title]
        for caption, grid in panel.grids:
            lines.append(f"  {caption}  {grid.shape[0]} x {grid.shape[1]}")
            lines += ["  " + "".join(_cell(int(c), color) for c in row) for row in grid]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def save_picture(panels: Sequence[Panel], path: str, title: str) -> None:
    """Write the panels as a PNG or SVG, by the file's ending.

    Raises:
      ValueError: another ending.
    """
    if Path(path).suffix not in PICTURES:
        raise ValueError(f"{path}: expected a file ending in {' or '.join(PICTURES)}")
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    columns = max(len(panel.grids) for panel in panels)
    figure = Figure(figsize=(1.8 * columns, 2.1 * len(panels) + 0.5), layout="constrained")
    figure.suptitle(title)
    for row, panel in enumerate(panels):
        for column, (caption, grid) in enumerate(panel.grids):
            axes = figure.add_subplot(len(panels), columns, row * columns + column + 1)
            axes.pcolormesh(
                grid, cmap=ListedColormap(COLORS), vmin=0, vmax=9, edgecolors="#555", linewidth=0.4
            )
            axes.invert_yaxis()
            axes.set_aspect("equal")
            axes.set_axis_off()
            head = f"{panel.title}\n" if column == 0 else "\n"
            axes.set_title(head + caption, fontsize=7, loc="left")
    figure.savefig(path)


def _voted(task: ArcTask, test: int, made: Sequence[dict]) -> Panel:
    votes = [tally.votes for tally in voting.overall_tally(made)]
    shown = []
    for rank, attempt in enumerate(voting.vote(made)):
        count = votes[rank] if rank < len(votes) else 0
        caption = f"attempt {rank + 1}: {count} of {len(made)} votes"
        if task.solutions:
            right = voting.is_solved([attempt], task.solutions[test])
            caption += ", right" if right else ", wrong"
        shown.append((caption, np.array(attempt, np.int8)))
    return Panel(f"predictions for test {test}" + ("" if shown else ": none"), tuple(shown))


def _cell(value: int, color: bool) -> str:
    if not color:
        return f"{value} "
    red, green, blue = (int(COLORS[value][i : i + 2], 16) for i in (1, 3, 5))
    ink = 16 if red + 2 * green + blue > 400 else 231  # black on light, white on dark
    return f"\x1b[48;2;{red};{green};{blue}m\x1b[38;5;{ink}m{value} \x1b[0m"
