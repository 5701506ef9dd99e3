"""`seal-jax verify`."""

import argparse

from seal_jax.commands import start

HELP = "Read all that a run has written; say what is damaged or lost."
EXAMPLES = """\
example:
  seal-jax verify runs/quickstart

Files are compared with the run's manifest.json, checkpoints and adapters with their hashes. Ends
with code 2 if something is damaged or lost; `train` goes on from the newest checkpoint that is not,
and refuses other damaged files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder")


def run(arguments: argparse.Namespace) -> int:
    start(only_cpu=True)  # what is read need not fit into a device
    from seal_jax.runs.verify import unfinished, unknown, verify_run

    good, damaged = verify_run(arguments.run)
    for name in good:
        print(f"good     {name}")
    for name in unfinished(arguments.run):
        print(f"unfinished  {name}")
    for complaint in damaged:
        print(f"DAMAGED  {complaint}")
    print(unknown(arguments.run))
    if damaged:
        raise ValueError(f"{arguments.run}: {len(damaged)} of {len(good) + len(damaged)} damaged")
    return 0
