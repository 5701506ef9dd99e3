"""Compare a policy with the base model on held-out problems."""

from typing import Any

import jax
from ml_collections import ConfigDict

from seal_jax.config.setup import make_stages, settings_of
from seal_jax.config.workdir import check_workdir, claim_workdir
from seal_jax.hosts.files import read_json, write_json
from seal_jax.hosts.processes import ask_first
from seal_jax.outer.comparison import compare
from seal_jax.outer.problems import split_problems
from seal_jax.outer.stages import Stages
from seal_jax.runs.checkpoint import tree_hash
from seal_jax.sources import load_policy
from seal_jax.train import evaluate
from seal_jax.types import Params


def evaluate_policy(config: ConfigDict, workdir: str, policy: str) -> dict[str, Any]:
    """Compare a policy with the base model; see `compare` for what is written.

    Args:
      policy: a folder of checkpoints, a PEFT adapter of the config's model, or any model source.
    """
    ask_first("workdir", lambda: check_workdir(config, workdir))
    stages = make_stages(settings_of(config))
    _, held_out = split_problems(stages.settings, stages.task)
    with jax.transfer_guard("disallow"):
        policies = {"base": stages.model.params, "seal": policy_params(stages, policy)}
        claim_workdir(config, workdir)
        _claim_policy(workdir, policy, tree_hash(policies["seal"]))
        return compare(stages, evaluate, policies, held_out, workdir)


def policy_params(stages: Stages, source: str) -> Params:
    """Return a policy's parameters, of the architecture of the stages' model."""
    model = stages.settings.model
    return load_policy(source, stages.model, model.source, model.dtype, stages.mesh)


def _claim_policy(workdir: str, policy: str, policy_hash: str) -> None:
    """Write policy.json into a new folder; refuse one whose results are another policy's."""
    path, claim = f"{workdir}/policy.json", {"policy": policy, "hash": policy_hash}
    found = ask_first("policy", lambda: read_json(path))
    if found is not None and found["hash"] != policy_hash:
        raise ValueError(
            f"{workdir} holds the evaluation of another policy: found {found}, asked for"
            f" {claim}. Choose another --workdir."
        )
    write_json(path, claim)
