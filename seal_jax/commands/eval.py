"""`seal-jax eval`."""

import argparse

from seal_jax.commands import add_config, read_config, start
from seal_jax.commands.train import print_summary

HELP = "Compare a policy with the base model on held-out problems."
EXAMPLES = """\
examples:
  seal-jax eval --config configs/quickstart.py --workdir runs/again \\
      --policy runs/quickstart/checkpoints
  seal-jax eval --config configs/quickstart.py --workdir runs/other --policy path/to/model
  seal-jax eval --config configs/quickstart.py --workdir runs/peft --policy path/to/adapter

Prints the table of the base model, the passage, its own self-edit, and the policy's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--workdir", required=True, help="where the table is written")
    parser.add_argument(
        "--policy", required=True, help="a run, its checkpoints, a model or a PEFT adapter"
    )


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    start()
    from seal_jax.hosts.processes import is_first
    from seal_jax.train import evaluate_policy

    evaluate_policy(config, arguments.workdir, arguments.policy)
    if is_first():
        print_summary(arguments.workdir)
    return 0
