"""`seal-jax tune`."""

import argparse
import hashlib
import os
import shlex
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from seal_jax.commands import add_config, read_config, start
from seal_jax.commands.generate import check_new

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from seal_jax.config.sweeps import Candidate
    from seal_jax.outer.sweep import Sweep

HELP = "Find the inner loop's settings that suit a model, on training passages."
EXAMPLES = """\
examples:
  seal-jax tune --config configs/quickstart.py --workdir runs/tune --out configs/my_model.py
  seal-jax tune --config configs/quickstart.py --workdir runs/tune2 \\
      --over inner.learning_rate=1e-4:1e-2 --over inner.num_epochs=2,4,8 --samples 24

Lists make a grid, LOW:HIGH is drawn from; by default 8 learning rates x 4 numbers of epochs. All
are trained side by side on self-edits of the base model. The mean log-likelihood of the gold
answers decides. The same command resumes, or says that it is done."""
NUM_PASSAGES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--workdir", required=True, help="where the results are written")
    parser.add_argument("--out", metavar="FILE", help="a config file with the best settings")
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="what to try: KEY=A,B,C or KEY=LOW:HIGH; may be repeated",
    )
    parser.add_argument("--samples", type=_count, help="how many settings are drawn")
    parser.add_argument("--passages", type=_count, help="for those that last; default: 16")
    parser.add_argument("--edits", type=_count, default=1, help="self-edits for each; default: 1")
    parser.add_argument(
        "--others", type=_count, default=4, help="questions about other passages; default: 4"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected an integer >= 1")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    from seal_jax.config.sweeps import candidates, config_source

    config = read_config(arguments)
    tried = candidates(config, arguments.over, arguments.samples)
    if arguments.out is not None:
        if not os.path.exists(_result(arguments)):  # else see `_write_best`
            check_new(arguments.out)
        for one in tried:
            config_source(one.config, "")
    start()
    from seal_jax.hosts.exchange import is_first

    summary = tune(config, tried, arguments)
    if is_first():
        with open(os.path.join(arguments.workdir, "tune.md"), encoding="utf-8") as file:
            print("\n" + file.read())
        _print_best(summary, tried, arguments)
    return 0


def _result(arguments: argparse.Namespace) -> str:
    return os.path.join(arguments.workdir, "tune.json")


def tune(
    config: "ConfigDict", tried: "Sequence[Candidate]", arguments: argparse.Namespace
) -> dict[str, Any]:
    """Try the settings, or what is left of it, and return what tune.json holds."""
    from seal_jax.config.workdir import check_workdir, refuse_other_kind
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.folder_lock import hold

    workdir = arguments.workdir
    ask_first("workdir", lambda: check_workdir(config, workdir))
    ask_first("workdir", lambda: refuse_other_kind(workdir, "tune"))
    with hold(workdir):
        return _tune_alone(config, tried, arguments)


def _tune_alone(
    config: "ConfigDict", tried: "Sequence[Candidate]", arguments: argparse.Namespace
) -> dict[str, Any]:
    import jax

    from seal_jax.config.setup import make_stages, settings_of
    from seal_jax.config.sweeps import own_index
    from seal_jax.config.workdir import claim_workdir
    from seal_jax.hosts.console import say
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.files import read_json
    from seal_jax.outer.problems import fresh_problems
    from seal_jax.outer.stages import check_prompts
    from seal_jax.outer.sweep import Setting, Sweep, groups_of, run_sweep, stages_settings
    from seal_jax.outer.sweep_report import write_report
    from seal_jax.planning.run_estimate import describe_sweep
    from seal_jax.tasks import make_task
    from seal_jax.train import evaluate

    workdir = arguments.workdir
    settings = settings_of(config)
    asked = arguments.others * (arguments.passages or NUM_PASSAGES)
    task = make_task(**settings.task)
    fresh = fresh_problems(settings, task, arguments.passages, NUM_PASSAGES, asked)
    sweep = Sweep(
        [Setting(one.overrides, settings_of(one.config)) for one in tried],
        own_index(config, tried),
        fresh.problems,
        fresh.others,
        arguments.edits,
        arguments.others,
        workdir,
    )
    _refuse_other_sweep(sweep)
    done = ask_first("is done", lambda: read_json(_result(arguments)))
    if done is not None:
        say(f"{workdir} is done already; nothing was run. Another --workdir runs again.")
        return done
    own = make_stages(settings)
    say(describe_sweep(own, sweep))
    say(f"  {fresh.which}")
    groups = groups_of(sweep.settings)
    stages = [make_stages(stages_settings(sweep.settings, one), own.model) for one in groups]
    for one in stages:
        check_prompts(one, [*sweep.problems, *sweep.others], golds=True)
    claim_workdir(config, workdir)
    _claim(sweep)
    with jax.transfer_guard("disallow"):
        found = run_sweep(sweep, stages, evaluate)
    return write_report(sweep, found, fresh.which)


def _claim_of(sweep: "Sweep") -> dict[str, Any]:
    """Return what a sweep is over, as its folder says it."""
    exams = [exam for _, exam in (*sweep.problems, *sweep.others)]
    return {
        "settings": [list(one.overrides) for one in sweep.settings],
        "passages": [problem.id for problem, _ in sweep.problems],
        "other passages": [problem.id for problem, _ in sweep.others],
        "questions": hashlib.sha256(repr(exams).encode()).hexdigest(),
        "edits": sweep.num_edits,
        "others": sweep.num_others,
    }


def _refuse_other_sweep(sweep: "Sweep") -> None:
    """Refuse the folder of a sweep over something else."""
    from seal_jax.config.workdir import SWEEP
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.files import read_json

    path, claim = os.path.join(sweep.folder, SWEEP), _claim_of(sweep)
    found = ask_first("sweep", lambda: read_json(path))
    if found is None:
        return
    for name, value in claim.items():
        had = found.get(name, value)
        if had == value:
            continue
        if isinstance(value, list):  # the first that differs is enough
            pairs = enumerate(zip_longest(had, value))
            name, had, value = next((f"{name}[{i}]", a, b) for i, (a, b) in pairs if a != b)
        raise ValueError(
            f"{sweep.folder} holds another sweep: {name} = {had}, asked for {value}. Choose another"
            " --workdir"
        )


def _claim(sweep: "Sweep") -> None:
    """Write what the sweep is over into its folder."""
    from seal_jax.config.workdir import SWEEP
    from seal_jax.hosts import manifest
    from seal_jax.hosts.files import write_json

    path = os.path.join(sweep.folder, SWEEP)
    if not os.path.exists(path):
        write_json(path, _claim_of(sweep))
        manifest.update(sweep.folder)


def _print_best(
    summary: dict[str, Any], tried: "Sequence[Candidate]", arguments: argparse.Namespace
) -> None:
    """Print how the best setting is asked for, and write the config file."""
    best, workdir = summary["settings"][summary["best"]], arguments.workdir
    if best["diverged"]:
        raise ValueError(
            "no setting's training was finite on all passages: there is no best; lower rates may do"
        )
    print(f"Best: {_as_options(best)}")
    if best["forgets"]:
        unharmed = summary["best_that_forgets_nothing"]
        other = "none" if unharmed is None else _as_options(summary["settings"][unharmed])
        print(f"It lowers the score on questions about other passages; best without that: {other}")
    if arguments.out is not None:
        _write_best(summary, tried, arguments)
        print(f"{arguments.out}: a config file with it")
    print(f"Files in {workdir}: tune.md, tune.json (every setting on every passage), tune.png,")
    print("tune_runs.jsonl (every inner run), tune_texts_*.json (the self-edits)")


def _as_options(row: dict[str, Any]) -> str:
    options = " ".join(f"--set {shlex.quote(text)}" for text in row["set"])
    return options or "the config as it is"


def _write_best(
    summary: dict[str, Any], tried: "Sequence[Candidate]", arguments: argparse.Namespace
) -> None:
    """Write the config file of the best setting, unless it is there as it would be written.

    Raises:
      ValueError: another file is there.
    """
    from seal_jax.config.sweeps import config_source
    from seal_jax.hosts.replacing import replace_text

    best = summary["settings"][summary["best"]]
    before, after = (one["log_likelihood"]["mean"] for one in (summary["base"], best))
    config, out = tried[summary["best"]].config, arguments.out
    text = config_source(
        config,
        f"""Settings of the inner loop that `seal-jax tune` chose for {config.model.source}.

        command   seal-jax train --config {out} --workdir runs/NAME
        made by   seal-jax tune --config {arguments.config}: the best of {len(tried)} settings, on
                  {summary["num_problems"]} training passages x {summary["num_edits"]} self-edit(s)
        chosen    {" ".join(best["set"]) or "nothing beside the config"}
        expect    mean log-likelihood of the gold answers, on those passages: base model
                  {before:.2f}, after training {after:.2f}
        """,
    )
    if os.path.lexists(out):
        with open(out, encoding="utf-8") as file:
            if file.read() == text:
                return
        check_new(out)
    replace_text(out, text)
