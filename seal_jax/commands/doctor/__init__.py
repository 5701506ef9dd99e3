"""`seal-jax doctor`."""

import argparse

from seal_jax.commands import add_config, read_config, start

HELP = "Say now what would stop a run later, on any process."
EXAMPLES = """\
example:
  seal-jax doctor --config configs/quickstart.py --workdir runs/quickstart

Looks at devices, folder and disk, and compares versions, commit and config of all processes. Every
`seal-jax train` begins with it. Several processes are named by JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, or found with SEAL_JAX_DISTRIBUTED=1 (TPU, GKE, Slurm);
they wait for each other for SEAL_JAX_TIMEOUT seconds (600)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--workdir", required=True, help="the run's folder")


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    start()
    from seal_jax.commands.doctor.checks import check

    print("\n".join(check(config, arguments.workdir)))
    print("nothing stands in the way of a run")
    return 0
