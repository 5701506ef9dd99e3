"""`seal-jax continual`."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seal_jax.commands import add_config, read_config, start

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from seal_jax.continual.sequences import Sequences

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
    config = read_config(arguments)
    check(config)
    start()
    from seal_jax.continual.report import compare
    from seal_jax.hosts.exchange import is_first
    from seal_jax.hosts.files import write_json, write_text

    workdir, against = arguments.workdir, arguments.against
    learn_in_sequence(config, workdir, arguments.policy, against)
    if is_first():
        with open(os.path.join(workdir, "summary.md"), encoding="utf-8") as file:
            print("\n" + file.read())
        if against:
            text, found = compare([*against, workdir], against[0])
            print(text)
            write_text(os.path.join(workdir, "comparison.md"), text)
            write_json(os.path.join(workdir, "comparison.json"), found)
    return 0


def check(config: "ConfigDict") -> None:
    """Refuse what edits one after another cannot be made with.

    Raises:
      ConfigError: the config says such a thing; ValueError: of an option of a remedy.
    """
    from seal_jax.config.check_continual import run_conflicts
    from seal_jax.config.load import ConfigError, flatten
    from seal_jax.continual.remedies import make_remedies

    remedies = make_remedies(config.continual.remedies, config.continual.remedy_kwargs)
    if complaints := [*run_conflicts(dict(flatten(config)), remedies)]:
        raise ConfigError("\n".join(complaints))


def learn_in_sequence(
    config: "ConfigDict", workdir: str, policy: str | None = None, against: Sequence[str] = ()
) -> dict[str, Any]:
    """Make all edits, or what is left of them, and return what summary.json holds.

    Args:
      against: finished runs, which have to be of the same sequences.
    """
    from seal_jax.config.workdir import check_workdir, refuse_other_kind
    from seal_jax.continual.report import check_against
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.folder_lock import hold

    ask_first("workdir", lambda: check_workdir(config, workdir))
    ask_first("workdir", lambda: refuse_other_kind(workdir, "continual"))
    drawn = draw(config)
    ask_first("against", lambda: check_against(against, workdir, drawn.ids))
    ask_first("policy", lambda: _refuse_other_policy(workdir, policy))
    with hold(workdir):
        return _learn_alone(config, drawn, workdir, policy)


def draw(config: "ConfigDict") -> "Sequences":
    from seal_jax.config.setup import settings_of
    from seal_jax.continual.sequences import make_sequences
    from seal_jax.outer.problems import read_problems
    from seal_jax.tasks import make_task

    settings = settings_of(config)
    asked = settings.continual
    return make_sequences(
        read_problems(make_task(**settings.task), "eval"),
        num_sequences=asked.num_sequences,
        length=asked.num_edits,
        num_control=asked.num_control,
        seed=settings.seed,
    )


def _refuse_other_policy(workdir: str, policy: str | None) -> None:
    """Refuse to go on from another start than the folder's results have.

    Of two policies of different names the hashes decide, once the model is there.
    """
    from seal_jax.continual.experiment import LEDGER
    from seal_jax.hosts.files import read_json

    if not os.path.exists(os.path.join(workdir, LEDGER)):
        return
    found = (read_json(os.path.join(workdir, "policy.json")) or {}).get("policy")
    is_done = os.path.exists(os.path.join(workdir, "summary.json"))
    if (found is None) != (policy is None) or (is_done and found != policy):
        began, asked = (f"--policy {one}" if one else "no --policy" for one in (found, policy))
        raise ValueError(
            f"{workdir} began with {began}, and {asked} is asked for: choose another --workdir, or"
            " go on as it began"
        )


def _learn_alone(
    config: "ConfigDict", drawn: "Sequences", workdir: str, policy: str | None
) -> dict[str, Any]:
    import jax

    from seal_jax.commands.eval import claim_policy
    from seal_jax.config.setup import make_work, policy_params, settings_of
    from seal_jax.config.workdir import SEQUENCES, claim_workdir
    from seal_jax.continual.experiment import report, run_sequences
    from seal_jax.hosts.console import say
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.files import read_json, write_json
    from seal_jax.outer.stages import check_prompts
    from seal_jax.planning.run_estimate import describe_sequences
    from seal_jax.runs.checkpoint import tree_hash

    done = ask_first("is done", lambda: read_json(os.path.join(workdir, "summary.json")))
    if done is not None:
        say(f"{workdir} is done already; nothing was run. Another --workdir runs again.")
        return done
    work = make_work(settings_of(config), drawn.problems)
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
        control = [problem.id for problem, _ in drawn.control]
        ids = {"sequences": drawn.ids, "control": control}
        write_json(os.path.join(workdir, SEQUENCES), ids)
        if policy is not None:
            claim_policy(workdir, policy, tree_hash(work.stages.model.params))
        ledger = run_sequences(work, drawn.control, workdir)
    return report(work, ledger, workdir)
