"""`seal-jax bench`."""

import argparse
import os

from seal_jax.commands import start
from seal_jax.hosts.outputs import check_output

HELP = "Measure a part against its peers, in one run."
EXAMPLES = """\
examples:
  seal-jax bench inner
  seal-jax bench inner --quick --json inner.json
  seal-jax bench sample
  seal-jax bench learning --workdir runs/bench_learning --json learning.json
  seal-jax bench tune
  seal-jax bench continual

Prints the figures and their ratios. The comparison with torch and PEFT needs both installed:
bash launch/install.sh peers"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = (
        "inner: the inner loop; sample: generation; learning: do the objectives learn;"
        " tune: a sweep as one population; continual: sequences of self-edits side by side"
    )
    parser.add_argument("name", metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps")
    parser.add_argument("--workdir", metavar="FOLDER", help="of learning: where its runs are kept")
    parser.add_argument("--json", metavar="FILE", help="where the figures are written")
    parser.add_argument("--model", metavar="SOURCE", help="a model source in place of SmolLM2-135M")
    parser.add_argument("--profile", metavar="FOLDER", help="write a JAX profile of one call there")


def run(arguments: argparse.Namespace) -> int:
    for option, path in (("--json", arguments.json), ("--profile", arguments.profile)):
        if path is not None:
            check_output(path, option, folder=option == "--profile")
    # JAX would take three quarters of a GPU's memory at once, and the peers want some.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start()
    from seal_jax.bench import run_bench

    if arguments.workdir and arguments.name != "learning":
        raise ValueError(f"bench {arguments.name} keeps no runs: --workdir is for learning")
    options = {"workdir": arguments.workdir} if arguments.workdir else {}
    run_bench(
        arguments.name,
        **options,
        model=arguments.model,
        quick=arguments.quick,
        json_file=arguments.json,
        profile=arguments.profile,
    )
    return 0
