"""The outer loop of SEAL.

  for step in range(num_steps):
    problems = next(task_iter)                               # host    P problems
    rollout  = sample(params, prompts(problems), R)          # device  [P R T]
    edits    = parse(problems, rollout)                      # host    malformed ones are rejected
    batches  = pack(edits)                                   # host    fixed shapes, little padding
    adapters = inner_update(params, adapters0, batches)      # device  A adapters at once
    answers  = answer(params, adapters, questions)           # device  greedy
    rewards  = reward(grade(problems, answers))              # host    f32[P R]
    state    = policy_update(state, rollout, rewards)        # device  ReST-EM
    checkpoint(step, state, adapters, rewards)               # disk    Orbax

The four lines from pack to grade run wave by wave, in `evaluate`. The control that the paper
lacks, a policy trained on randomly chosen self-edits, is the same loop with another objective, in
WORKDIR/random.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from seal_jax import checkpoint, keys
from seal_jax.adapters import delete_adapters, inner_id, policy_id, policy_parents, save_adapter
from seal_jax.compare import compare
from seal_jax.config import diff, to_json
from seal_jax.evaluate import Run
from seal_jax.lora import merge
from seal_jax.metrics import append_json, append_metrics, truncate_after, write_json, write_text
from seal_jax.objectives import OBJECTIVES, Objective
from seal_jax.optim import make_optimizer
from seal_jax.peft import is_peft, load_peft
from seal_jax.plan import describe
from seal_jax.policy import init_train_state, make_policy_update
from seal_jax.record import Clock, log_edits, summarize, tabulate, written_lengths
from seal_jax.rewards import Outcome
from seal_jax.runs import claim_model
from seal_jax.sharding import param_shardings, replicated, to_device, to_host
from seal_jax.stages import (
    Stages,
    baseline_accuracy,
    check_prompts,
    inner_base,
    inner_runs,
    make_stages,
    optimizer_arguments,
    parse,
    place_model,
    write_edits,
)
from seal_jax.tasks.task import Exam, Problem
from seal_jax.types import Adapters, Params, TrainState


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Train the policy, and its control, and compare them on held-out problems.

    The same call resumes what was interrupted, and returns at once where everything is done.

    Args:
      config: see config_table.py.
      workdir: the run's folder; it holds everything the run writes.

    Returns:
      What summary.json holds.

    Raises:
      ValueError: the folder belongs to another config, or the data do not fit the config.
    """
    check_workdir(config, workdir)
    stages = make_stages(config)
    train_problems, eval_problems = split_problems(stages)
    check_prompts(stages, [*train_problems, *eval_problems])
    claim_workdir(config, workdir)
    claim_model(workdir, stages.model, config.model.dtype)
    print(describe(stages, train_problems, eval_problems), flush=True)
    with jax.transfer_guard("disallow"):
        base = stages.model.params
        objective = OBJECTIVES[config.outer.objective]
        arms = {"base": base}
        arms["seal"] = run_outer_loop(
            stages,
            objective(config.outer.select, config.outer.threshold),
            base,
            train_problems,
            folder=workdir,
            label="SEAL",
        ).params
        if config.eval.random_control:
            arms["random"] = run_outer_loop(
                stages,
                objective("random"),
                base,
                train_problems,
                folder=os.path.join(workdir, "random"),
                label="random control",
            ).params
        return compare(stages, arms, eval_problems, workdir)


def is_done(config: ConfigDict, workdir: str) -> bool:
    """Return whether `workdir` holds the finished run of this config; no device is touched.

    Raises:
      ValueError: the folder belongs to another config.
    """
    check_workdir(config, workdir)
    return os.path.exists(os.path.join(workdir, "summary.json"))


def evaluate_policy(config: ConfigDict, workdir: str, policy: str) -> dict[str, Any]:
    """Compare a policy with the base model; see `compare` for what is written.

    Args:
      policy: a folder of checkpoints, a PEFT adapter of the config's model, or any model source.
    """
    check_workdir(config, workdir)
    stages = make_stages(config)
    _, held_out = split_problems(stages)
    with jax.transfer_guard("disallow"):
        base = stages.model.params
        policies = {"base": base, "seal": load_policy(stages, base, policy)}
        claim_workdir(config, workdir)
        claim_policy(workdir, policy, checkpoint.tree_hash(policies["seal"]))
        return compare(stages, policies, held_out, workdir)


def claim_policy(workdir: str, policy: str, policy_hash: str) -> None:
    """Write policy.json into a new folder; refuse one whose results are another policy's."""
    path, claim = os.path.join(workdir, "policy.json"), {"policy": policy, "hash": policy_hash}
    if os.path.exists(path):
        with open(path) as file:
            found = json.load(file)
        if found["hash"] != policy_hash:
            raise ValueError(
                f"{workdir} holds the evaluation of another policy: found {found}, asked for"
                f" {claim}. Choose another --workdir."
            )
    write_json(path, claim)


def load_policy(stages: Stages, base: Params, policy: str) -> Params:
    """Return the params of checkpoints, a PEFT adapter, or a model of the same architecture."""
    if is_checkpoints(policy):
        return checkpoint.restore(policy, {"policy": base})[1]["policy"]
    if is_peft(policy):
        adapters = to_device(load_peft(policy, stages.model.config), replicated(stages.mesh))
        return jax.jit(merge, out_shardings=param_shardings(stages.mesh, base))(base, adapters)
    model = place_model(stages.config, policy, stages.mesh)
    if model.config != stages.model.config:
        raise ValueError(
            f"{policy} is another architecture than {stages.config.model.source}:"
            f" found {model.config}, expected {stages.model.config}"
        )
    return model.params


def is_checkpoints(folder: str) -> bool:
    return os.path.isdir(folder) and any(name.isdigit() for name in os.listdir(folder))


def generate_edits(
    config: ConfigDict, problems: Sequence[Problem], *, adapter: str | None, out: str | None
) -> None:
    """Write `sample.num_edits` self-edits for each problem, to `out` as JSON lines or to stdout."""
    if out is not None and os.path.exists(out):
        raise ValueError(f"{out} exists: choose another --out")
    stages = make_stages(config)
    params = stages.model.params
    if adapter is not None:
        # Of checkpoints it is not the adapter in them, which is what the last outer step added.
        params = load_policy(stages, params, adapter)
    batch = [(problem, None) for problem in problems]
    num_edits = config.sample.num_edits
    _, texts = write_edits(stages, params, batch, 0, num_edits, "generate")
    for (problem, _), edits in zip(batch, parse(stages, batch, texts), strict=True):
        for r, edit in enumerate(edits):
            entry = {"title": problem.title, "problem": problem.id, "edit": r, "text": edit.text}
            entry["rejected"] = getattr(edit, "reason", None)
            entry["training_texts"] = list(getattr(edit, "training_texts", ()))
            if out is not None:
                append_json(out, entry)
            else:
                print(f"=== {problem.title}, self-edit {r + 1}\n{edit.text.strip()}\n")


def run_outer_loop(
    stages: Stages,
    objective: Objective,
    base: Params,
    problems: Sequence[tuple[Problem, Exam]],
    *,
    folder: str,
    label: str,
) -> TrainState:
    """Run the outer loop from its last good checkpoint in `folder` on; returns the final state."""
    config, outer = stages.config, stages.config.outer
    update = outer["update"]  # outer.update would be ConfigDict's method of that name
    optimizer = make_optimizer(**optimizer_arguments(outer.to_dict()))
    lora = {"rank": outer.rank, "alpha": outer.alpha, "targets": outer.targets}
    policy_update = make_policy_update(
        dataclasses.replace(stages.model.config, remat=outer.remat),
        objective,
        optimizer,
        mesh=stages.mesh,
        seed=config.seed,
        update=update,
        schedule=outer.schedule,
        learning_rate=outer.learning_rate,
        num_epochs=outer.num_epochs,
        batch_size=outer.batch_size,
        microbatch_size=outer.microbatch_size,
        **lora,
    )
    os.makedirs(folder, exist_ok=True)
    manager = checkpoint.make_manager(os.path.join(folder, "checkpoints"), config.checkpoint.keep)
    state = init_train_state(
        stages.model.config, base, optimizer, mesh=stages.mesh, update=update, **lora
    )
    state = restore_state(manager, state, folder)
    for step in range(int(to_host(state.step)), outer.num_steps):
        clock = Clock()
        batch = take_problems(problems, step, outer.problems_per_step)
        rollout, texts = write_edits(
            stages, state.params, batch, step, config.sample.num_edits, f"{label} step {step}"
        )
        edits = parse(stages, batch, texts)
        clock.lap("sample")
        outcomes: dict[tuple, Outcome] = {}
        if objective.needs_rewards:
            frozen = inner_base(stages, state.params)
            baseline = baseline_accuracy(stages, frozen, batch)
            runs = inner_runs(batch, edits, step, config.inner.num_seeds)
            ledger = pending(folder, step)
            keep = partial(keep_adapter, folder, policy_parents(step, update))
            if config.checkpoint.adapters == "none":
                keep = None
            outcomes = stages.evaluate(frozen, runs, ledger, f"{label} step {step}", keep)
            del frozen  # the policy update needs the room
        clock.lap("inner")
        rewards, valid = tabulate(edits, outcomes, **config.reward)
        rng = np.random.default_rng([config.seed, keys.SELECT, step])
        advantages = objective.advantages(rewards, valid, rng)
        state, metrics = policy_update(
            state, rollout, advantages.reshape(-1), f"{label} step {step}"
        )
        clock.lap("policy")
        metrics |= summarize(edits, outcomes, rewards, valid, advantages) | clock.laps
        metrics |= written_lengths(rollout, stages.model.tokenizer.stop_ids)
        if objective.needs_rewards:
            metrics["reward/baseline_accuracy"] = float(np.mean(baseline))
        append_metrics(os.path.join(folder, "metrics.jsonl"), step, metrics)
        log_edits(folder, step, batch, edits, outcomes, rewards, advantages)
        if config.checkpoint.adapters == "kept" and objective.needs_rewards:
            drop_unkept(folder, batch, runs, advantages)
        if state.adapters is not None:
            save_adapter(folder, policy_id(step), state.adapters, policy_parents(step, update))
        save_state(manager, state, step, rewards)  # returns before it is on disk ...
        drop_pending(folder, step - 1)  # ... but the one before it is
    checkpoint.wait(manager)
    drop_pending(folder, outer.num_steps - 1)
    manager.close()
    return state


def keep_adapter(folder: str, parents: list[str] | None, run: Run, adapter: Adapters) -> None:
    """Save what an inner run made."""
    save_adapter(folder, inner_id(run.step, run.name), adapter, parents)


def drop_unkept(folder: str, batch: Sequence, runs: Sequence[Run], advantages: np.ndarray) -> None:
    """Delete the adapters of the self-edits that the policy was not trained on."""
    kept = {(batch[p][0].id, r) for p, r in np.argwhere(advantages).tolist()}
    unkept = [run for run in runs if run.name[:2] not in kept]
    delete_adapters(folder, [inner_id(run.step, run.name) for run in unkept])


def pending(folder: str, step: int) -> str:
    """Return the ledger of a step's finished inner runs, kept until its checkpoint is on disk."""
    return os.path.join(folder, f"pending_{step}.jsonl")


def drop_pending(folder: str, step: int) -> None:
    if os.path.exists(pending(folder, step)):
        os.remove(pending(folder, step))


def check_workdir(config: ConfigDict, workdir: str) -> None:
    """Refuse a folder that belongs to another config, or to something else."""
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        with open(path) as file:
            difference = diff(file.read(), config)
        if difference:
            raise ValueError(
                f"{workdir} belongs to another config; this one differs in\n{difference}\n"
                "Choose another --workdir, or go back to that config."
            )
    elif os.path.exists(workdir) and os.listdir(workdir):
        raise ValueError(f"{workdir} is not empty and has no config.json: choose another --workdir")


def claim_workdir(config: ConfigDict, workdir: str) -> None:
    """Write config.json into the folder, once model and data are known to be good."""
    os.makedirs(workdir, exist_ok=True)
    write_text(os.path.join(workdir, "config.json"), to_json(config))


def split_problems(stages: Stages) -> tuple[list, list]:
    """Return train and evaluation problems, as many as the config asks for.

    Raises:
      ValueError: the source has fewer.
    """
    config = stages.config
    training, held_out = stages.task.load("train"), stages.task.load("eval")
    wanted = config.outer.problems_per_step * config.outer.num_steps
    if len(training) < wanted:
        raise ValueError(
            f"outer.num_steps x outer.problems_per_step asks for {wanted} training problems;"
            f" the task has {len(training)}"
        )
    if len(held_out) < config.eval.num_problems:
        raise ValueError(
            f"eval.num_problems = {config.eval.num_problems}; the task has {len(held_out)}"
        )
    return training[:wanted], held_out[: config.eval.num_problems]


def take_problems(problems: Sequence, step: int, count: int) -> Sequence:
    """Return the problems of an outer step: fresh ones in each."""
    return problems[step * count : (step + 1) * count]


def save_state(manager, state: TrainState, step: int, rewards: np.ndarray) -> None:
    """Save the state after `step`; `adapters` is what this step merged into `policy`."""
    trees = {"policy": state.params, "opt_state": state.opt_state}
    if state.adapters is not None:
        trees["adapters"] = state.adapters
    position = {"next_step": step + 1, "rewards": rewards.tolist()}
    checkpoint.save(manager, step + 1, trees, position)


def restore_state(manager, state: TrainState, folder: str) -> TrainState:
    """Return the newest good checkpoint's state, or `state`; drop the log of steps to be redone."""
    templates = {"policy": state.params, "opt_state": state.opt_state}
    if state.adapters is not None:
        templates["adapters"] = state.adapters
    restored = checkpoint.restore(manager, templates)
    next_step = restored[2]["next_step"] if restored else 0
    for name in ("metrics.jsonl", "edits.jsonl"):
        truncate_after(os.path.join(folder, name), next_step - 1)
    if restored is None:
        return state
    trees = restored[1]
    return TrainState(
        jax.device_put(np.int32(next_step)),
        trees["policy"],
        trees.get("adapters"),
        trees["opt_state"],
    )
