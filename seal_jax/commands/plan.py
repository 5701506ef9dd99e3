"""`seal-jax plan`."""

import argparse

from seal_jax.commands import add_config, read_config, start

HELP = "Say whether a run fits a TPU slice, and what it costs."
EXAMPLES = """\
examples:
  seal-jax plan --config configs/squad_smollm2.py --topology v5e:2x4
  seal-jax plan --config configs/squad_smollm2.py --topology v5p:2x2x1 \\
      --set model.source=Qwen/Qwen2.5-7B --set model.dtype=bfloat16 --set mesh.fsdp=4
  seal-jax plan --config configs/quickstart.py --topology here

Compiles the run's programs for that slice and runs none of them: bytes on a device, operations,
collectives, time at full speed, what fits. Ends with code 2 if something does not fit. No TPU and
no weights are needed, only libtpu (pip install libtpu) and the model's sizes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--topology", required=True, help="KIND:SHAPE, as v5e:4x4, or 'here'")
    parser.add_argument("--passage-tokens", type=int, default=256, help="of a passage, on average")
    parser.add_argument(
        "--longest-passage", type=int, help="in tokens; default: 768, or as many as the model takes"
    )


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    start(only_cpu=arguments.topology != "here")  # a program for another machine does not run
    from seal_jax.config.setup import settings_of
    from seal_jax.planning.slice_plan import plan_slice
    from seal_jax.planning.stage_programs import Lengths
    from seal_jax.sources import config_of

    settings, average, longest = (
        settings_of(config),
        arguments.passage_tokens,
        arguments.longest_passage,
    )
    if longest is None:
        room = config_of(settings.model.source).max_length - settings.sample.max_tokens
        longest = max(average, min(Lengths().longest_passage, room))
    if not 0 < average <= longest:
        raise ValueError("needs 0 < --passage-tokens <= --longest-passage")
    lines, complaints = plan_slice(settings, arguments.topology, Lengths(average, longest))
    print("\n".join(lines))
    if complaints:
        raise ValueError("\n".join(complaints))
    return 0
