"""The outer loop of SEAL.

  for step in range(num_steps):
    problems = next(task_iter)                               # host    P problems
    rollout  = sample(params, prompts(problems), R)          # device  [P R T]
    edits    = parse(problems, rollout)                      # host    malformed ones are rejected
    batches  = pack(edits)                                   # host    fixed shapes, little padding
    adapters = inner_update(params, adapters0, batches)      # device  A adapters at once
    answers  = answer(params, adapters, questions)           # device  greedy
    rewards  = reward(grade(problems, answers))              # host    f32[P R]
    state    = policy_update(state, rollout, rewards)        # device  an objective's
    checkpoint(step, state, adapters, rewards)               # disk    Orbax

The four lines from pack to grade run wave by wave, in `evaluate`. The control that the paper
lacks, a policy trained on randomly chosen self-edits, is the same loop with another objective, in
WORKDIR/random.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from seal_jax import keys, sources
from seal_jax.config.load import diff, to_json
from seal_jax.config.setup import settings_of
from seal_jax.hosts.console import say
from seal_jax.hosts.exchange import ask_first, exchange
from seal_jax.hosts.files import (
    append_json,
    append_metrics,
    read_json,
    read_jsonl,
    truncate_after,
    write_json,
    write_text,
)
from seal_jax.hosts.group import timeout_seconds
from seal_jax.hosts.preemption import stop_if_told
from seal_jax.objectives.objective import Objective, Past, Rewards, make_objective, random_em
from seal_jax.outer.comparison import compare, mean_reliability
from seal_jax.outer.evaluate import Run
from seal_jax.outer.evidence import Evaluated, check_rewards, drop_pending, evaluate_edits
from seal_jax.outer.policy import init_train_state, make_policy_update
from seal_jax.outer.problems import split_problems, take_problems
from seal_jax.outer.record import (
    Clock,
    held_out_metrics,
    log_edits,
    logged_texts,
    number,
    summarize,
    tabulate,
    trust,
    written_lengths,
)
from seal_jax.outer.stages import (
    Stages,
    check_prompts,
    make_stages,
    optimizer_of,
    parse,
    write_edits,
)
from seal_jax.planning.run_estimate import describe
from seal_jax.runs import checkpoint
from seal_jax.runs.adapters import (
    delete_adapters,
    drop_beyond,
    inner_id,
    policy_id,
    policy_parents,
    save_adapter,
)
from seal_jax.runs.folder import claim_model
from seal_jax.sharding import to_host
from seal_jax.tasks.task import Exam, Problem
from seal_jax.types import Adapters, Params, Settings, TrainState


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
    ask_first("workdir", lambda: check_workdir(config, workdir))
    settings = settings_of(config)
    objective = configured_objective(settings)
    stages = make_stages(settings)
    check_rewards(stages)
    train_problems, eval_problems = split_problems(settings, stages.task)
    check_prompts(stages, [*train_problems, *eval_problems])
    claim_workdir(config, workdir)
    claim_model(workdir, stages.model, config.model.dtype)
    say(describe(stages, train_problems, eval_problems))
    with jax.transfer_guard("disallow"):
        base = stages.model.params
        arms = {"base": base}
        given = {"base": base, "problems": train_problems, "held_out": eval_problems}
        run_loop = partial(run_outer_loop, stages, **given)
        arms["seal"] = run_loop(objective, folder=workdir, label="SEAL").params
        if config.eval.random_control:
            arms["random"] = run_loop(
                random_em(), folder=os.path.join(workdir, "random"), label="random control"
            ).params
        rows = ask_first("metrics", lambda: read_jsonl(os.path.join(workdir, "metrics.jsonl")))
        return compare(stages, arms, eval_problems, workdir, mean_reliability(rows))


def configured_objective(settings: Settings) -> Objective:
    """Return the config's objective.

    Raises:
      ValueError: its options are wrong, or there are too few self-edits per problem for it.
    """
    name = settings.outer.objective
    objective = make_objective(name, **settings.outer.objective_kwargs)
    if settings.sample.num_edits < objective.min_edits:
        raise ValueError(
            f"sample.num_edits = {settings.sample.num_edits}: {name} compares the self-edits of a"
            f" problem with each other and needs at least {objective.min_edits}"
        )
    return objective


def is_done(config: ConfigDict, workdir: str) -> bool:
    """Return whether `workdir` holds the finished run of this config; no device is touched.

    Raises:
      ValueError: the folder belongs to another config.
    """
    ask_first("workdir", lambda: check_workdir(config, workdir))
    return ask_first("is done", lambda: os.path.exists(os.path.join(workdir, "summary.json")))


def evaluate_policy(config: ConfigDict, workdir: str, policy: str) -> dict[str, Any]:
    """Compare a policy with the base model; see `compare` for what is written.

    Args:
      policy: a folder of checkpoints, a PEFT adapter of the config's model, or any model source.
    """
    ask_first("workdir", lambda: check_workdir(config, workdir))
    stages = make_stages(settings_of(config))
    _, held_out = split_problems(stages.settings, stages.task)
    with jax.transfer_guard("disallow"):
        base = stages.model.params
        policies = {"base": base, "seal": load_policy(stages, policy)}
        claim_workdir(config, workdir)
        claim_policy(workdir, policy, checkpoint.tree_hash(policies["seal"]))
        return compare(stages, policies, held_out, workdir)


def claim_policy(workdir: str, policy: str, policy_hash: str) -> None:
    """Write policy.json into a new folder; refuse one whose results are another policy's."""
    path, claim = os.path.join(workdir, "policy.json"), {"policy": policy, "hash": policy_hash}
    found = ask_first("policy", lambda: read_json(path))
    if found is not None and found["hash"] != policy_hash:
        raise ValueError(
            f"{workdir} holds the evaluation of another policy: found {found}, asked for"
            f" {claim}. Choose another --workdir."
        )
    write_json(path, claim)


def load_policy(stages: Stages, policy: str) -> Params:
    """Return the params of checkpoints or one of them, a PEFT adapter, or a model of the same
    architecture."""
    config = stages.settings
    return sources.load_policy(
        policy, stages.model, config.model.source, config.model.dtype, stages.mesh
    )


def generate_edits(
    config: ConfigDict, problems: Sequence[Problem], *, adapter: str | None, out: str | None
) -> None:
    """Write `sample.num_edits` self-edits for each problem, to `out` as JSON lines or to stdout."""
    if out is not None and ask_first("out", lambda: os.path.exists(out)):
        raise ValueError(f"{out} exists: choose another --out")
    stages = make_stages(settings_of(config))
    params = stages.model.params
    if adapter is not None:
        # Of checkpoints it is not the adapter in them, which is what the last outer step added.
        params = load_policy(stages, adapter)
    batch = [(problem, None) for problem in problems]
    num_edits = config.sample.num_edits
    _, texts = write_edits(stages, params, batch, 0, num_edits, "generate")
    for (problem, _), edits in zip(batch, parse(stages, batch, texts), strict=True):
        for r, edit in enumerate(edits):
            entry = {"title": problem.title, "problem": problem.id, "edit": r, "text": edit.text}
            entry["rejected"] = getattr(edit, "reason", None)
            entry |= logged_texts(edit)
            if out is not None:
                append_json(out, entry)
            else:
                say(f"=== {problem.title}, self-edit {r + 1}\n{edit.text.strip()}\n")


def run_outer_loop(
    stages: Stages,
    objective: Objective,
    base: Params,
    problems: Sequence[tuple[Problem, Exam]],
    *,
    folder: str,
    label: str,
    held_out: Sequence[tuple[Problem, Exam]] = (),
) -> TrainState:
    """Run the outer loop from its last good checkpoint in `folder` on; returns the final state.

    Args:
      base: the policy that training starts from, and the reference of the KL penalty.
      held_out: problems that the policy is examined on every `eval.every` steps.

    Raises:
      FloatingPointError: more than `outer.max_skipped` updates were not finite.
      Stopped: a process was told to end; what is saved is on disk.
    """
    config, outer = stages.settings, stages.settings.outer
    update = outer.update
    policy_update, state = make_update(stages, objective, base)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "checkpoints")
    keep, best = config.checkpoint.keep, config.checkpoint.best
    with checkpoint.make_manager(path, keep, best) as manager:
        state, past = restore_state(manager, state, folder)
        for step in range(int(to_host(state.step)), outer.num_steps):
            stop_if_told()
            clock, name = Clock(), f"{label} step {step}"
            batch = take_problems(problems, step, outer.problems_per_step)
            rollout, texts = write_edits(
                stages, state.params, batch, step, config.sample.num_edits, name
            )
            edits = parse(stages, batch, texts)
            clock.lap("sample")
            evaluated = None
            if objective.needs_rewards:
                earlier = problems[: step * outer.problems_per_step]
                keep = partial(keep_adapter, folder, policy_parents(step, update))
                evaluated = evaluate_edits(
                    stages,
                    state.params,
                    batch,
                    earlier,
                    rollout,
                    edits,
                    step,
                    folder=folder,
                    label=name,
                    keep=None if config.checkpoint.adapters == "none" else keep,
                )
            clock.lap("inner")
            rewards = tabulate(edits, evaluated, config.reward)
            rng = np.random.default_rng([config.seed, keys.SELECT, step])
            advantages = objective.advantages(rewards, past, rng)
            state, metrics = policy_update(state, rollout, advantages.reshape(-1), name, past, base)
            clock.lap("policy")
            past = extend(past, rewards, metrics)
            metrics |= summarize(edits, evaluated, rewards, advantages)
            metrics |= written_lengths(rollout, stages.model.tokenizer.stop_ids)
            if evaluated is not None:
                metrics |= trust(evaluated, config.reward)
            if held_out and config.eval.every and (step + 1) % config.eval.every == 0:
                metrics |= examine(stages, state.params, held_out, folder, f"{name}: held-out")
                clock.lap("eval")
            append_metrics(os.path.join(folder, "metrics.jsonl"), step, metrics | clock.laps)
            log_edits(folder, step, batch, edits, evaluated, rewards, advantages)
            if config.checkpoint.adapters != "none" and evaluated is not None:
                drop_adapters(config, folder, batch, evaluated, advantages)
            if state.adapters is not None:
                save_adapter(folder, policy_id(step), state.adapters, policy_parents(step, update))
            # Returns before it is on disk ...
            save_state(manager, state, step, rewards, past, metrics.get("eval/reward"))
            drop_pending(folder, step - 1)  # ... but the one before it is
            if past.num_skipped > outer.max_skipped:
                raise FloatingPointError(
                    f"{name}: {past.num_skipped} updates were not finite and were skipped; at most"
                    f" outer.max_skipped = {outer.max_skipped} may be: lower outer.learning_rate"
                )
        checkpoint.wait(manager)
        drop_pending(folder, outer.num_steps - 1)
    return state


def make_update(stages: Stages, objective: Objective, base: Params) -> tuple[Callable, TrainState]:
    """Return the policy update that the config asks for, and the state before the first step."""
    config, outer = stages.settings, stages.settings.outer._asdict()
    optimizer = optimizer_of(config.outer)
    lora = {name: outer[name] for name in ("update", "rank", "alpha", "targets")}
    names = ("schedule", "learning_rate", "num_epochs", "batch_size", "microbatch_size")
    penalties = ("kl_coef", "kl_target", "entropy_coef")
    policy_update = make_policy_update(
        dataclasses.replace(stages.model.config, remat=outer["remat"]),
        objective,
        optimizer,
        mesh=stages.mesh,
        seed=config.seed,
        **{name: outer[name] for name in (*names, *penalties)},
        **lora,
    )
    value_head = objective.gae is not None
    state = init_train_state(
        stages.model.config, base, optimizer, mesh=stages.mesh, value_head=value_head, **lora
    )
    return policy_update, state


def extend(past: Past, rewards: Rewards, metrics: Mapping[str, float]) -> Past:
    """Return the past with one step more."""
    known = rewards.values[~np.isnan(rewards.values)]
    return Past(
        (*past.mean_rewards, float(known.mean())) if len(known) else past.mean_rewards,
        (*past.kls, metrics["policy/kl"]) if "policy/kl" in metrics else past.kls,
        past.num_skipped + metrics["policy/skipped"],
    )


def examine(
    stages: Stages, params: Params, problems: Sequence, folder: str, label: str
) -> dict[str, float]:
    """Return the policy's mean reward on held-out problems, one self-edit each, as metrics.

    The randomness is that of the final comparison, the same in every step.
    """
    step, num_edits = keys.EVAL_STEP, stages.settings.eval.num_edits
    rollout, texts = write_edits(stages, params, problems, step, num_edits, label)
    edits = parse(stages, problems, texts)
    evaluated = evaluate_edits(
        stages, params, problems, (), rollout, edits, step, folder=folder, label=label
    )
    drop_pending(folder, step)
    values = tabulate(edits, evaluated, stages.settings.reward).values
    return held_out_metrics(values)


def keep_adapter(folder: str, parents: list[str] | None, run: Run, adapter: Adapters) -> None:
    """Save what an inner run made."""
    save_adapter(folder, inner_id(run.step, run.name), adapter, parents)


def drop_adapters(
    config: Settings, folder: str, batch: Sequence, evaluated: Evaluated, advantages: np.ndarray
) -> None:
    """Delete the adapters of inner runs that checkpoint.adapters and adapters_gb do not want."""
    what, runs = config.checkpoint.adapters, evaluated.runs

    def accuracy(run: Run) -> float:
        return float(np.nan_to_num(evaluated.outcomes[run.name].accuracy, nan=-1.0))

    wanted = {run.name for run in runs}
    if what == "kept":  # of the self-edits that were reinforced
        kept = {(batch[p][0].id, r) for p, r in np.argwhere(advantages > 0).tolist()}
        wanted = {run.name for run in runs if run.name[:2] in kept}
    if what == "best":  # of each problem
        of_problem = [[run for run in runs if run.name[0] == problem.id] for problem, _ in batch]
        wanted = {max(found, key=accuracy).name for found in of_problem if found}
    delete_adapters(folder, [inner_id(r.step, r.name) for r in runs if r.name not in wanted])
    limit = config.checkpoint.adapters_gb
    if dropped := drop_beyond(folder, 1e9 * limit):
        say(f"checkpoint.adapters_gb = {limit:g}: dropped the {len(dropped)} worst adapters")


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
    """Write config.json into the folder, once model and data are known to be good.

    Raises:
      ValueError: not every process sees it there.
    """
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "config.json")
    patience = time.monotonic() + timeout_seconds() / 10
    write_text(path, to_json(config))
    ask_first("config.json", lambda: None)  # it is written
    while not os.path.exists(path) and time.monotonic() < patience:  # a bucket is seen late
        time.sleep(0.2)
    seen = exchange("workdir", "yes" if os.path.exists(path) else "no")
    if apart := [str(i) for i, word in enumerate(seen) if word == "no"]:
        raise ValueError(
            f"--workdir {workdir}: process {', '.join(apart)} does not see what process 0 writes"
            " there; all need the same folder (NFS, or a mounted bucket)"
        )


def save_state(
    manager, state: TrainState, step: int, rewards: Rewards, past: Past, value: float | None
) -> None:
    """Save the state after `step`; `adapters` is what this step merged into `policy`."""
    position = {"next_step": step + 1, "past": past._asdict()}
    position["rewards"] = [[number(value) for value in row] for row in rewards.values]
    checkpoint.save(manager, step + 1, _trees(state), position, value)


def restore_state(manager, state: TrainState, folder: str) -> tuple[TrainState, Past]:
    """Return the newest good checkpoint's state, or `state`; drop the log of steps to be redone."""
    restored = checkpoint.restore(manager, _trees(state))
    next_step = restored[2]["next_step"] if restored else 0
    for name in ("metrics.jsonl", "edits.jsonl"):
        truncate_after(os.path.join(folder, name), next_step - 1)
    if restored is None:
        return state, Past()
    _, trees, position = restored
    past = {k: tuple(v) if isinstance(v, list) else v for k, v in position["past"].items()}
    state = TrainState(
        jax.device_put(np.int32(next_step)),
        trees["policy"],
        trees.get("adapters"),
        trees["opt_state"],
        trees.get("value_head"),
    )
    return state, Past(**past)


def _trees(state: TrainState) -> dict[str, Any]:
    trees = {"policy": state.params, "opt_state": state.opt_state}
    optional = {"adapters": state.adapters, "value_head": state.value_head}
    return trees | {name: tree for name, tree in optional.items() if tree is not None}
