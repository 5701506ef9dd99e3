"""The commands of `seal-jax`, one a file or folder; its name is the command's.

  main.py      finds the command, runs it, and says an error in a line
  train.py     a whole run
  eval.py      the final table for a policy at hand
  continual.py one self-edit after another, and what it forgets
  tune.py      the inner loop's settings that suit a model
  generate/    self-edits for passages, by a model here or behind an endpoint
  export/      adapters for PEFT, models for transformers
  doctor/      what would stop a run later
  plan.py      does a run fit a slice
  verify.py    is what a run wrote undamaged
  view.py      ARC tasks and predictions as a picture
  bench.py     the benchmarks of seal_jax/bench

A command has HELP (a line), EXAMPLES (shown below its arguments), add_arguments(parser) and
run(arguments) -> exit code. It imports jax in `run` alone: help and complaints come at once.
"""

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what takes a while comes in functions: SIGTERM is heard before
    from ml_collections import ConfigDict


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a config."""
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a key of the config; may be repeated",
    )


def read_config(arguments: argparse.Namespace) -> "ConfigDict":
    """Return the config that the arguments name."""
    from seal_jax.config.load import load_config

    return load_config(arguments.config, arguments.overrides)


def start(only_cpu: bool = False) -> None:
    """Start JAX: after everything that can be refused without it."""
    if only_cpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    from seal_jax.hosts.start_jax import start_jax

    start_jax()
