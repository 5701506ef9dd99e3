"""`seal-jax export`."""

import argparse

from seal_jax.commands import start

HELP = "Write what a run learned for PEFT or transformers."
EXAMPLES = """\
examples:
  seal-jax export runs/quickstart --to my_adapter
  seal-jax export runs/quickstart --to my_model --merged
  seal-jax export runs/quickstart --list
  seal-jax export runs/quickstart --to one_edit --adapter 0-passage-3-2-0

The first writes adapter_config.json and adapter_model.safetensors for PEFT, the second a model
folder with its tokenizer for transformers. Both are read back and compared with the run's own
model. Adapters: policy (all that was learned), policy-STEP (up to a step, from 0), and, where
checkpoint.adapters was not 'none', STEP-PROBLEM-EDIT-SEED (an inner run's, from edits.jsonl)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder, or RUN/random")
    parser.add_argument("--to", metavar="FOLDER", help="where to: new, or empty")
    parser.add_argument("--list", action="store_true", help="only say which adapters there are")
    parser.add_argument("--adapter", default="policy", metavar="ID", help="default: policy")
    parser.add_argument("--merged", action="store_true", help="a whole model, not an adapter")


def run(arguments: argparse.Namespace) -> int:
    if arguments.list == (arguments.to is not None):
        raise ValueError("export needs one of --to FOLDER and --list")
    start()
    if arguments.list:
        print_adapters(arguments.run)
        return 0
    from seal_jax.commands.export.export_run import export_run

    exported = export_run(
        arguments.run, arguments.to, adapter=arguments.adapter, merged=arguments.merged
    )
    what = "a model folder for transformers" if arguments.merged else "a PEFT adapter"
    parts = f" = {' + '.join(exported.parts)}" if len(exported.parts) > 1 else ""
    print(f"{arguments.to}: {arguments.adapter}{parts} of {arguments.run}, as {what}")
    print(
        f"read back and checked: its logits differ from the run's model by {exported.error:.1e},"
        f" from the base model by {exported.change:.1e} (relative)"
    )
    return 0


def print_adapters(run: str) -> None:
    """Print the names of a run's adapters."""
    from seal_jax.hosts.manifest import refuse_damaged
    from seal_jax.runs.adapters import list_adapters, list_kept
    from seal_jax.runs.folder import find_run

    found = find_run(run)
    if found is None:
        raise FileNotFoundError(f"{run}: not the folder of a run")
    refuse_damaged(found.folder, ("edits.jsonl",))
    names, kept = list_adapters(str(found.folder)), list_kept(str(found.folder))
    print(f"{len(names)} adapters in {found.folder}; those of inner runs are best first")
    for name in sorted(set(names) - {one.adapter_id for one in kept}):
        print(f"  {name}")
    for one in kept:
        accuracy = "?" if one.accuracy is None else f"{100 * one.accuracy:.1f}"
        print(f"  {one.adapter_id}   accuracy {accuracy} %, {one.num_bytes / 1e6:.1f} MB")
