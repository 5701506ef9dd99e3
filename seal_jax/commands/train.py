"""`seal-jax train`."""

import argparse
import os

from seal_jax.commands import add_config, read_config, start

HELP = "Train a policy with SEAL and compare it with its controls."
EXAMPLES = """\
example:
  seal-jax train --config configs/quickstart.py --workdir runs/quickstart
  seal-jax train --config configs/quickstart.py --workdir runs/lion --set inner.optax_name=lion

The same command resumes an interrupted run, or says that it is done."""
FILES = """\
Files in {workdir}: summary.md, summary.json, edits.jsonl (every self-edit),
metrics.jsonl, config.json, checkpoints/ (the policy), adapters/ and model/ (what `export`
and others need of it), random/ (the control's run), manifest.json (what `verify` compares with)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--workdir", required=True, help="the run's folder")


def run(arguments: argparse.Namespace) -> int:
    config, workdir = read_config(arguments), arguments.workdir
    start()
    from seal_jax.commands.doctor.checks import check
    from seal_jax.config.workdir import is_done
    from seal_jax.hosts.exchange import is_first
    from seal_jax.train import train

    check(config, workdir)
    done = is_done(config, workdir)
    if not done:
        train(config, workdir)
    if is_first():
        print_summary(workdir)
        if done:
            print(f"{workdir} is done already; nothing was run. Another --workdir runs again.")
        print(FILES.format(workdir=workdir))
    return 0


def print_summary(workdir: str) -> None:
    """Print the table that a run has written."""
    with open(os.path.join(workdir, "summary.md"), encoding="utf-8") as file:
        print("\n" + file.read())
