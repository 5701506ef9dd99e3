"""`seal-jax generate`."""

import argparse
import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from seal_jax.commands import add_config, read_config, start
from seal_jax.tasks.task import Exam, Problem

HELP = "Write self-edits for the passages of a file."
EXAMPLES = """\
examples:
  seal-jax generate --config configs/quickstart.py --passages my_passages.json
  seal-jax generate --config configs/quickstart.py --passages my_passages.json \\
      --adapter runs/quickstart/checkpoints --out edits.jsonl

A passage file is a JSON list of {"title": ..., "context": ...}, or a .txt file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--passages", required=True, help="a .json or .txt file")
    parser.add_argument(
        "--adapter", help="who writes: a run, its checkpoints, a model or a PEFT adapter"
    )
    parser.add_argument("--out", help="a JSON-lines file; without it they are printed")


def run(arguments: argparse.Namespace) -> int:
    from seal_jax.tasks.knowledge.passages import load_passages

    config = read_config(arguments)
    problems = load_passages(arguments.passages)
    start()
    write_edits(config, problems, arguments.adapter, arguments.out)
    return 0


def write_edits(
    config: ConfigDict, problems: Sequence[Problem], adapter: str | None, out: str | None
) -> None:
    """Write `sample.num_edits` self-edits for each problem, to `out` as JSON lines or to stdout."""
    from seal_jax.config.setup import make_stages, policy_params, settings_of
    from seal_jax.hosts.console import say
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.files import append_json
    from seal_jax.outer.problems import OuterStep
    from seal_jax.outer.stages import parse, sample
    from seal_jax.outer.step_log import logged_texts

    if out is not None and ask_first("out", lambda: os.path.exists(out)):
        raise ValueError(f"{out} exists: choose another --out")
    stages = make_stages(settings_of(config))
    # Of checkpoints it is not the adapter in them, which is what the last outer step added.
    params = stages.model.params if adapter is None else policy_params(stages, adapter)
    batch = [(problem, Exam(problem.id, ())) for problem in problems]
    step = OuterStep(0, "generate", "", batch)
    _, texts = sample(stages, params, step, config.sample.num_edits)
    for problem, edits in zip(problems, parse(stages, batch, texts), strict=True):
        for r, edit in enumerate(edits):
            entry = {"title": problem.title, "problem": problem.id, "edit": r, "text": edit.text}
            entry["thoughts"] = edit.thoughts
            entry["rejected"] = getattr(edit, "reason", None)
            entry |= logged_texts(edit)
            if out is not None:
                append_json(out, entry)
            else:
                say(f"=== {problem.title}, self-edit {r + 1}\n{edit.text.strip()}\n")
