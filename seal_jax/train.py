"""The outer loop of SEAL.

  for step in range(num_steps):
    problems   = take_problems(training, step)               # host    P problems
    rollout    = sample(params, prompts(problems), R)        # device  [P R T]
    edits      = parse(problems, rollout)                    # host    malformed ones are rejected
    batches    = pack(edits)                                 # host    fixed shapes, little padding
    adapters   = inner_update(params, adapters0, batches)    # device  A adapters at once
    answers    = answer(params, adapters, questions)         # device  greedy
    rewards    = reward(grade(problems, answers))            # host    f32[P R]
    advantages = objective(rewards)                          # host    f32[P R]
    state      = policy_update(state, rollout, advantages)   # device  the objective's loss
    checkpoint(step, state, rewards)                         # disk    Orbax

From pack to grade the loop goes wave by wave, in `evaluate`: a wave is as many inner runs as train
side by side. The control that the paper lacks, a policy trained on randomly chosen self-edits, is
the same loop with another objective, in WORKDIR/random. So is every objective of eval.objectives,
in WORKDIR/NAME.
"""

import os
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from seal_jax import keys
from seal_jax.config.setup import (
    configured_objective,
    further_objectives,
    make_stages,
    make_update,
    settings_of,
)
from seal_jax.config.workdir import check_workdir, claim_workdir, refuse_other_kind
from seal_jax.hosts import manifest
from seal_jax.hosts.console import say
from seal_jax.hosts.exchange import ask_first
from seal_jax.hosts.files import read_jsonl
from seal_jax.hosts.folder_lock import hold
from seal_jax.hosts.preemption import stop_if_told
from seal_jax.models import lora
from seal_jax.objectives.objective import Objective
from seal_jax.objectives.random_em import random_em
from seal_jax.outer.answers import answer, gold_logp, grade
from seal_jax.outer.comparison import compare
from seal_jax.outer.examination import (
    Attempts,
    Evaluated,
    check_rewards,
    drop_pending,
    examination_of,
    gather,
    look_up,
    reward,
)
from seal_jax.outer.external import parse_texts, read_texts
from seal_jax.outer.ledger import Outcomes, append_outcome, outcomes_of_wave, read_ledger
from seal_jax.outer.problems import Batch, OuterStep, split_problems, take_problems
from seal_jax.outer.stages import Edits, Stages, check_prompts, inner_base, parse, sample
from seal_jax.outer.step_log import Clock, describe_step, held_out_metrics
from seal_jax.outer.summary_text import mean_reliability
from seal_jax.outer.teaching import teach
from seal_jax.outer.waves import Examination, fresh_adapters, on_devices, pack, waves
from seal_jax.planning.run_estimate import describe
from seal_jax.runs import checkpoint as checkpoints
from seal_jax.runs.folder import claim_model
from seal_jax.runs.kept_adapters import Keep, keep_for
from seal_jax.runs.train_state import checkpoint, extend, record, refuse_skipped, restore_state
from seal_jax.sharding import to_host
from seal_jax.tasks import make_task
from seal_jax.tasks.task import asks_once
from seal_jax.types import Params, Rollout, TrainState


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Train the policy, and its control, and compare them on held-out problems.

    The same call resumes what was interrupted, and returns at once where everything is done.

    Args:
      config: see config/table.py.
      workdir: the run's folder; it holds everything the run writes.

    Returns:
      What summary.json holds.

    Raises:
      ValueError: the folder belongs to another config, another run writes there, or the data do not
        fit the config.
    """
    ask_first("workdir", lambda: check_workdir(config, workdir))
    ask_first("workdir", lambda: refuse_other_kind(workdir, "train"))
    with hold(workdir):
        return train_alone(config, workdir)


def train_alone(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Do as `train` does, in a folder into which no other run writes."""
    settings = settings_of(config)
    objective, further = configured_objective(settings), further_objectives(settings)
    # What is wrong with the data is said before the model is loaded.
    task = make_task(**settings.task)
    training, held_out = split_problems(settings, task)
    texts = read_texts(settings, task)
    stages = make_stages(settings)
    check_rewards(stages)
    check_prompts(stages, training, golds="log_likelihood" in settings.reward.weights)
    check_prompts(stages, held_out, golds=asks_once(stages.task))
    external = parse_texts(stages, held_out, texts)
    say(describe(stages, training, held_out))  # what does not fit is refused
    claim_workdir(config, workdir, {name: one.digest for name, one in texts.items()})
    claim_model(workdir, stages.model, settings.model.dtype)
    manifest.update(workdir)
    with jax.transfer_guard("disallow"):
        policies = {"base": stages.model.params}
        loop = partial(outer_loop, stages, training=training, held_out=held_out)
        policies["seal"] = loop(objective, folder=workdir, label="SEAL").params
        if settings.eval.random_control:
            further["random"] = random_em()  # the last one
        for name, other in further.items():
            folder = os.path.join(workdir, name)
            manifest.begin(folder)
            manifest.update(workdir)
            label = "random control" if name == "random" else name
            policies[name] = loop(other, folder=folder, label=label).params
        rows = ask_first("metrics", lambda: read_jsonl(os.path.join(workdir, "metrics.jsonl")))
        reliability = mean_reliability(rows)
        return compare(stages, evaluate, policies, held_out, workdir, reliability, external)


def outer_loop(
    stages: Stages,
    objective: Objective,
    training: Batch,
    held_out: Batch = (),
    *,
    folder: str,
    label: str,
) -> TrainState:
    """Run the outer loop from its last good checkpoint in `folder` on; returns the final state.

    Training starts from the stages' model, which is the reference of the KL penalty, too.

    Args:
      held_out: problems that the policy is examined on every `eval.every` steps.

    Raises:
      FloatingPointError: more than `outer.max_skipped` updates were not finite.
      Stopped: a process was told to end; what is saved is on disk.
    """
    settings, outer, base = stages.settings, stages.settings.outer, stages.model.params
    policy_update, state = make_update(stages, objective)
    keeps, path = settings.checkpoint, os.path.join(folder, "checkpoints")
    manifest.begin(folder)
    with checkpoints.make_manager(path, keeps.keep, keeps.best) as manager:
        state, past = restore_state(manager, state, folder)
        for number in range(int(to_host(state.step)), outer.num_steps):
            stop_if_told()
            clock = Clock()
            step = take_problems(training, number, outer.problems_per_step, label, folder)
            rollout, texts = sample(stages, state.params, step, settings.sample.num_edits)
            edits = parse(stages, step.batch, texts)
            clock.lap("sample")
            evaluated = None
            if objective.needs_rewards:
                keep = keep_for(settings, step)
                evaluated = evaluate_edits(stages, state.params, step, rollout, edits, keep)
            clock.lap("inner")
            rewards = reward(edits, evaluated, settings.reward)
            rng = np.random.default_rng([settings.seed, keys.SELECT, number])
            advantages = objective.advantages(rewards, past, rng)
            state, metrics = policy_update(
                state, rollout, advantages.reshape(-1), step.label, past, base
            )
            clock.lap("policy")
            past = extend(past, rewards, metrics)
            attempts = Attempts(edits, evaluated, rewards, advantages)
            metrics |= describe_step(stages, rollout, attempts)
            if held_out and settings.eval.every and (number + 1) % settings.eval.every == 0:
                metrics |= examine(stages, state.params, held_out, folder, step.label)
                clock.lap("eval")
            record(settings, step, attempts, state.adapters, metrics | clock.laps)
            checkpoint(manager, number, state, rewards, past, metrics.get("eval/reward"))
            drop_pending(folder, number - 1)
            refuse_skipped(past, outer.max_skipped, step.label)
        checkpoints.wait(manager)
        drop_pending(folder, outer.num_steps - 1)
    manifest.update(folder, settled=True)
    return state


def evaluate_edits(
    stages: Stages,
    params: Params,
    step: OuterStep,
    rollout: Rollout,
    edits: Edits,
    keep: Keep | None = None,
) -> Evaluated:
    """Apply and examine every self-edit of an outer step, under its seeds.

    Args:
      params: the policy; it writes questions too, where the reward asks for them.
      keep: see `evaluate`.
    """
    known = look_up(stages, params, step, rollout, edits)
    examination = examination_of(stages.settings, step, edits, known)
    outcomes = evaluate(stages, inner_base(stages, params), examination, keep)
    return Evaluated(gather(step, edits, known, outcomes), outcomes, known.baseline)


def evaluate(
    stages: Stages,
    params: Params,
    examination: Examination,
    keep: Keep | None = None,
) -> Outcomes:
    """Apply self-edits and examine what becomes of the model, wave by wave.

    Args:
      params: the frozen base of inner loop and answers.
      keep: takes each trained adapter (A = 1, numpy) before the ledger has its outcome, so that no
        outcome is without its adapter after a kill.

    Returns:
      The outcome of every inner run, by its name.

    Raises:
      Stopped: a process was told to end; the ledger has what is finished.
    """
    outcomes: Outcomes = {}
    while runs := examination.runs_to_make(outcomes):
        outcomes |= read_ledger(examination.ledger, runs)
        for wave in waves(stages, runs, outcomes, examination.label):
            wave = teach(stages, params, wave)  # only where inner.objective is 'distill'
            batches = pack(stages, wave)
            fresh, placed = fresh_adapters(stages, wave), on_devices(stages, batches)
            with jax.set_mesh(stages.mesh):  # for the attention kernels
                adapters, losses = stages.inner_update(params, fresh, placed, wave.show)
            answers = answer(stages, params, adapters, wave)
            logps = [None] * len(wave.places)
            if examination.golds:
                logps = gold_logp(stages, params, adapters, wave)
            marks = grade(stages, wave, answers)
            inner = stages.settings.inner
            found = outcomes_of_wave(wave, batches, to_host(losses), answers, marks, logps, inner)
            kept = adapters if keep is None else to_host(adapters)
            for i, place in enumerate(wave.places):
                if place is None or place.run.name in outcomes:
                    continue
                if keep is not None:
                    keep(place.run, lora.take(kept, slice(i, i + 1)))
                outcomes[place.run.name] = found[place.run.name]  # what was noted before stays
                append_outcome(examination.ledger, place.run, found[place.run.name])
            manifest.update(os.path.dirname(examination.ledger))
            stop_if_told()
    return outcomes


def examine(
    stages: Stages, params: Params, problems: Batch, folder: str, label: str
) -> dict[str, float]:
    """Return the policy's mean reward on held-out problems, one self-edit each, as metrics.

    The randomness is that of the final comparison, the same in every step.
    """
    settings = stages.settings
    step = OuterStep(keys.EVAL_STEP, f"{label}: held-out", folder, problems)
    rollout, texts = sample(stages, params, step, settings.eval.num_edits)
    edits = parse(stages, problems, texts)
    evaluated = evaluate_edits(stages, params, step, rollout, edits)
    drop_pending(folder, step.number)
    return held_out_metrics(reward(edits, evaluated, settings.reward).values)
