"""`seal-jax generate`."""

import argparse

from seal_jax.commands import add_config, read_config, start

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
    from seal_jax.train import generate_edits

    generate_edits(config, problems, adapter=arguments.adapter, out=arguments.out)
    return 0
