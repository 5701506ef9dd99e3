"""`seal-jax eval`."""

import argparse

from ml_collections import ConfigDict

from seal_jax.commands import add_config, read_config, start
from seal_jax.commands.train import print_summary

HELP = "Compare a policy with the base model on held-out problems."
EXAMPLES = """\
examples:
  seal-jax eval --config configs/quickstart.py --workdir runs/again \\
      --policy runs/quickstart/checkpoints
  seal-jax eval --config configs/quickstart.py --workdir runs/other --policy path/to/model
  seal-jax eval --config configs/quickstart.py --workdir runs/peft --policy path/to/adapter

Prints the table of the base model, the passage, its own self-edit, and the policy's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--workdir", required=True, help="where the table is written")
    parser.add_argument(
        "--policy", required=True, help="a run, its checkpoints, a model or a PEFT adapter"
    )


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    start()
    from seal_jax.hosts.exchange import is_first

    evaluate_policy(config, arguments.workdir, arguments.policy)
    if is_first():
        print_summary(arguments.workdir)
    return 0


def evaluate_policy(config: ConfigDict, workdir: str, policy: str) -> None:
    """Compare a policy with the base model; see `compare` for what is written."""
    import jax

    from seal_jax.config.setup import make_stages, policy_params, settings_of
    from seal_jax.config.workdir import check_workdir, claim_workdir, refuse_other_kind
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.folder_lock import hold
    from seal_jax.outer.comparison import compare
    from seal_jax.outer.external import parse_texts, read_texts
    from seal_jax.outer.problems import split_problems
    from seal_jax.outer.stages import check_prompts
    from seal_jax.runs.checkpoint import tree_hash
    from seal_jax.tasks import make_task
    from seal_jax.tasks.task import asks_once
    from seal_jax.train import evaluate

    ask_first("workdir", lambda: check_workdir(config, workdir))
    ask_first("workdir", lambda: refuse_other_kind(workdir, "eval"))
    with hold(workdir):
        settings = settings_of(config)
        task = make_task(**settings.task)
        _, held_out = split_problems(settings, task)
        texts = read_texts(settings, task)
        stages = make_stages(settings)
        check_prompts(stages, held_out, golds=asks_once(stages.task))
        external = parse_texts(stages, held_out, texts)
        with jax.transfer_guard("disallow"):
            policies = {"base": stages.model.params, "seal": policy_params(stages, policy)}
            claim_workdir(config, workdir, {name: one.digest for name, one in texts.items()})
            claim_policy(workdir, policy, tree_hash(policies["seal"]))
            compare(stages, evaluate, policies, held_out, workdir, external=external)


def claim_policy(workdir: str, policy: str, policy_hash: str) -> None:
    """Write policy.json into a new folder; refuse one whose results are another policy's."""
    from seal_jax.hosts.exchange import ask_first
    from seal_jax.hosts.files import read_json, write_json

    path, claim = f"{workdir}/policy.json", {"policy": policy, "hash": policy_hash}
    found = ask_first("policy", lambda: read_json(path))
    if found is not None and found.get("hash") != policy_hash:
        raise ValueError(
            f"{workdir} holds the evaluation of another policy: found {found}, asked for"
            f" {claim}. Choose another --workdir."
        )
    write_json(path, claim)
