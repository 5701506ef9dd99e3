"""`seal-jax generate`."""

import argparse
import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from seal_jax.commands import add_config, read_config, start
from seal_jax.hosts.outputs import check_output
from seal_jax.tasks.task import Exam, Problem, Task

HELP = "Write self-edits for the passages of a file, or of the config."
EXAMPLES = """\
examples:
  seal-jax generate --config configs/quickstart.py --passages my_passages.json
  seal-jax generate --config configs/quickstart.py --passages my_passages.json \\
      --adapter runs/quickstart/checkpoints --out edits.jsonl
  seal-jax generate --config configs/quickstart.py --split eval --out gpt.jsonl \\
      --url https://api.openai.com/v1 --model gpt-4.1     # the key: $OPENAI_API_KEY

A passage file is a JSON list of {"title": ..., "context": ...}, or a .txt file.
With --url no model is loaded here; the same command goes on where it was ended."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    passages = parser.add_mutually_exclusive_group(required=True)
    passages.add_argument("--passages", help="a .json or .txt file")
    passages.add_argument(
        "--split", choices=("train", "eval"), help="those that a run of the config would take"
    )
    parser.add_argument(
        "--adapter", help="who writes: a run, its checkpoints, a model or a PEFT adapter"
    )
    parser.add_argument("--out", help="a JSON-lines file; without it they are printed")
    parser.add_argument("--url", help="an OpenAI-compatible endpoint that writes, up to /v1")
    parser.add_argument("--model", help="of the endpoint")
    parser.add_argument("--tries", type=int, default=4, help="of the endpoint, for each text")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds, for one try")


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    if arguments.url or arguments.model:
        ask_endpoint(config, arguments)
        return 0
    if arguments.passages:
        problems = read_passages(config, arguments)
        start()
    else:
        start()
        problems = read_passages(config, arguments)
    write_edits(config, problems, arguments.adapter, arguments.out)
    return 0


def read_passages(config: ConfigDict, arguments: argparse.Namespace) -> list[Problem]:
    """Return the passages of the file, or those of the config's split that a run takes."""
    from seal_jax.tasks.knowledge.passages import load_passages

    if arguments.passages:
        return load_passages(arguments.passages)
    from seal_jax.config.setup import settings_of
    from seal_jax.outer.problems import split_problems

    training, held_out = split_problems(settings_of(config), configured_task(config))
    return [problem for problem, _ in (training if arguments.split == "train" else held_out)]


def configured_task(config: ConfigDict) -> Task:
    """Return the config's task, for prompts alone: what a run gives it beside is not there."""
    from seal_jax.config.load import task_arguments
    from seal_jax.tasks import make_task

    return make_task(**task_arguments(config))


def ask_endpoint(config: ConfigDict, arguments: argparse.Namespace) -> None:
    """Let an endpoint write; see by_endpoint.py."""
    from seal_jax.commands.generate.by_endpoint import Request, write_texts
    from seal_jax.hosts.endpoint import Endpoint
    from seal_jax.types import SampleSettings

    given = vars(arguments)
    if missing := [f"--{name}" for name in ("url", "model", "out") if not given[name]]:
        raise ValueError(
            f"an endpoint that writes needs --url, --model and --out: add {missing[0]}"
        )
    if not arguments.out.endswith(".jsonl"):
        raise ValueError(
            f"--out {arguments.out}: expected a name that ends in .jsonl, by which eval.texts knows"
            " a file of lines"
        )
    if arguments.adapter:
        raise ValueError("--adapter and --url are two writers: leave one of them out")
    if not (arguments.tries >= 1 and 0 < arguments.timeout < float("inf")):
        raise ValueError("--tries needs at least 1, and --timeout a number of seconds above 0")
    endpoint = Endpoint(arguments.url, "OPENAI_API_KEY", arguments.timeout, arguments.tries)
    request = Request(endpoint, arguments.model, SampleSettings(**config.sample.to_dict()))
    problems = read_passages(config, arguments)
    write_texts(configured_task(config), problems, request, arguments.out)


def check_new(out: str) -> None:
    """Raise ValueError now where there is such a file, or it could not be written later."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: choose another --out")
    check_output(out, "--out")


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

    if out is not None:
        ask_first("out", lambda: check_new(out))
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
