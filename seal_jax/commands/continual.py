"""`seal-jax continual`."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from seal_jax.commands import add_config, read_config, start

if TYPE_CHECKING:
    from ml_collections import ConfigDict

HELP = "Let a model learn one self-edit after another, and measure what it forgets."
EXAMPLES = """\
examples:
  seal-jax continual --config configs/continual_tiny.py --workdir runs/plain
  seal-jax continual --config configs/continual_tiny.py --workdir runs/replay \\
      --set continual.remedies=replay,gate --against runs/plain

Writes what is known after each edit (continual.jsonl), transfer and forgetting with intervals
(summary.md, summary.json) and a heat map (summary.png). The same command resumes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--workdir", required=True, help="where the results are written")
    parser.add_argument(
        "--policy", help="what starts: a run, its checkpoints, a model or a PEFT adapter"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="RUN",
        help="finished runs of the same sequences; a table compares them (comparison.md)",
    )


def run(arguments: argparse.Namespace) -> int:
    from seal_jax.continual.remedies import make_remedies

    config = read_config(arguments)
    check_task(config)
    make_remedies(config.continual.remedies, config.continual.remedy_kwargs)
    start()
    from seal_jax.continual.report import compare
    from seal_jax.hosts.exchange import is_first
    from seal_jax.hosts.files import write_json, write_text

    learn_in_sequence(config, arguments.workdir, arguments.policy)
    if is_first():
        with open(os.path.join(arguments.workdir, "summary.md"), encoding="utf-8") as file:
            print("\n" + file.read())
        if arguments.against:
            runs = [*arguments.against, arguments.workdir]
            text, found = compare(runs, arguments.against[0])
            print(text)
            write_text(os.path.join(arguments.workdir, "comparison.md"), text)
            write_json(os.path.join(arguments.workdir, "comparison.json"), found)
    return 0


def check_task(config: "ConfigDict") -> None:
    """Refuse a task whose questions are not asked once each.

    Raises:
      ValueError: it is such a task.
    """
    from seal_jax.tasks import TASKS
    from seal_jax.tasks.task import asks_once

    if not asks_once(TASKS[config.task.name]):
        raise ValueError(
            f"task {config.task.name!r} asks each question in several ways: `continual` needs one"
            " that asks once, as 'knowledge' and 'facts' do"
        )


def learn_in_sequence(config: "ConfigDict", workdir: str, policy: str | None) -> dict[str, Any]:
    """Make all edits, or what is left of them, and return what summary.json holds."""
    from seal_jax.config.workdir import check_workdir, refuse_other_kind
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.folder_lock import hold

    ask_first("workdir", lambda: check_workdir(config, workdir))
    ask_first("workdir", lambda: refuse_other_kind(workdir, "continual"))
    with hold(workdir):
        return _learn_alone(config, workdir, policy)


def _learn_alone(config: "ConfigDict", workdir: str, policy: str | None) -> dict[str, Any]:
    import jax

    from seal_jax.commands.eval import claim_policy
    from seal_jax.config.setup import make_work, policy_params, settings_of
    from seal_jax.config.workdir import SEQUENCES, claim_workdir
    from seal_jax.continual.experiment import report, run_sequences
    from seal_jax.continual.sequences import make_sequences
    from seal_jax.hosts.console import say
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.files import read_json, write_json
    from seal_jax.outer.problems import read_problems
    from seal_jax.outer.stages import check_prompts
    from seal_jax.planning.run_estimate import describe_sequences
    from seal_jax.runs.checkpoint import tree_hash
    from seal_jax.tasks import make_task

    settings = settings_of(config)
    asked = settings.continual
    drawn = make_sequences(
        read_problems(make_task(**settings.task), "eval"),
        num_sequences=asked.num_sequences,
        length=asked.num_edits,
        num_control=asked.num_control,
        seed=settings.seed,
    )
    done = ask_first("is done", lambda: read_json(os.path.join(workdir, "summary.json")))
    if done is not None:
        say(f"{workdir} is done already; nothing was run. Another --workdir runs again.")
        return done
    work = make_work(settings, drawn.problems)
    stages = work.stages
    everything = [pair for sequence in drawn.problems for pair in sequence]
    check_prompts(stages, [*everything, *drawn.control], golds=True)
    say(describe_sequences(stages, drawn.problems, drawn.control))
    if drawn.num_shared:
        say(f"  {drawn.num_shared} problems are in more than one sequence")
    with jax.transfer_guard("disallow"):
        if policy is not None:
            model = stages.model._replace(params=policy_params(stages, policy))
            work = work._replace(stages=stages._replace(model=model))
        claim_workdir(config, workdir)
        ids = [[problem.id for problem, _ in one] for one in (*drawn.problems, drawn.control)]
        write_json(os.path.join(workdir, SEQUENCES), {"sequences": ids[:-1], "control": ids[-1]})
        if policy is not None:
            claim_policy(workdir, policy, tree_hash(work.stages.model.params))
        ledger = run_sequences(work, drawn.control, workdir)
    return report(work, ledger, workdir)
