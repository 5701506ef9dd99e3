"""What a run is going to do, and about how long it takes, said before it starts."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.config.setup import (
    configured_objective,
    further_objectives,
    longest_row,
    text_limit,
)
from seal_jax.models.mesh_fit import undivided
from seal_jax.outer.comparison import titles_of
from seal_jax.outer.problems import Batch
from seal_jax.outer.stages import Stages, exam_prompts
from seal_jax.outer.sweep import Sweep, groups_of, num_runs
from seal_jax.planning.pilot import describe_power
from seal_jax.tasks.task import Exam, Problem

EFFICIENCY = 0.37  # of the matmul rate over a whole quick start: compiling and writing included
WRITTEN = 1.0  # expected length of a self-edit, as a multiple of its passage's


class Estimate(NamedTuple):
    """What a run takes."""

    num_params: int
    num_runs: int  # inner runs that give rewards, for each policy that learns from them
    num_rewarded: int  # these policies
    num_arms: int  # ways to adapt the base model to a held-out problem, with self-edits
    num_held_out_runs: int
    num_tokens: float  # that are trained on
    at_once: int  # adapters in flight


def matmul_rate(size: int = 1024, seconds: float = 0.5) -> float:
    """Return the FLOP/s of a float32 matmul on the default device, measured now."""
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda x: x @ x / size)
    jax.block_until_ready(multiply(x))
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        jax.block_until_ready(multiply(x))
        count += 1
    return 2 * size**3 * count / (time.monotonic() - start)


def estimate_run(
    stages: Stages,
    training: Sequence[tuple[Problem, Exam]],
    held_out: Sequence[tuple[Problem, Exam]],
) -> Estimate:
    """Return what a run takes, by the lengths of its problems.

    Where the config leaves the number of adapters to the memory, it is counted and printed now.

    Raises:
      ValueError: not even one adapter fits.
    """
    settings, task, encode = stages.settings, stages.task, stages.model.tokenizer.encode
    outer, inner, held = settings.outer, settings.inner, settings.eval
    used = training[: outer.problems_per_step * outer.num_steps]
    length, added = _lengths(stages, used)
    prompt = np.mean([len(encode(task.edit_prompt(problem))) for problem, _ in used])
    trained = [configured_objective(settings), *further_objectives(settings).values()]
    rewarded = sum(objective.needs_rewards for objective in trained)
    runs = len(used) * settings.sample.num_edits * inner.num_seeds if rewarded else 0
    policies = 1 + len(trained) + held.random_control
    arms = policies + len(held.texts)
    tests = arms * len(held_out) * held.num_edits * held.num_seeds
    controls = len(held_out) * held.num_seeds
    rows = outer.num_steps * outer.problems_per_step * outer.num_epochs * (policies - 1)
    tokens = inner.num_epochs * (
        (rewarded * runs + tests) * length * (1 + added) + controls * length
    )
    return Estimate(
        num_params=_num_params(stages),
        num_runs=runs,
        num_rewarded=rewarded,
        num_arms=arms,
        num_held_out_runs=tests + controls,
        num_tokens=tokens + rows * (prompt + length * added),
        at_once=stages.at_once(longest_row(stages, [*used, *held_out])),
    )


def _lengths(stages: Stages, problems: Sequence[tuple[Problem, Exam]]) -> tuple[float, float]:
    """Return the mean tokens of a problem's own texts, and of what a self-edit adds, as a share.

    It adds nothing where its text is not what is trained on.
    """
    own = [stages.task.passage_only(problem).training_texts for problem, _ in problems]
    length = np.mean([sum(len(stages.encode(x, False).tokens) for x in texts) for texts in own])
    return float(length), WRITTEN if text_limit(stages.settings) is None else 0


def _num_params(stages: Stages) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(stages.model.params))


def _describe_time(num_params: int, num_tokens: float) -> str:
    minutes = 4 * num_params * num_tokens / (matmul_rate() * EFFICIENCY) / 60
    return (
        f"  about {num_tokens / 1e3:.0f} thousand training tokens, about {minutes:.0f} minutes here"
    )


def describe(
    stages: Stages,
    training: Sequence[tuple[Problem, Exam]],
    held_out: Sequence[tuple[Problem, Exam]],
) -> str:
    """Return a few lines: the model, the inner runs, the tokens, and an estimate of the time.

    Raises:
      ValueError: as `estimate_run`.
    """
    found = estimate_run(stages, training, held_out)
    each = f" for each of {found.num_rewarded} policies" if found.num_rewarded > 1 else ""
    settings, problems = stages.settings, titles_of(stages)["problems"]
    outer = settings.outer
    others = [*settings.eval.objectives, *["the random control"] * settings.eval.random_control]
    control = f" (and once more for {' and for '.join(others)})" if others else ""
    lines = [
        f"SEAL on {settings.model.source}: {found.num_params / 1e6:.0f}M parameters,"
        f" {settings.model.dtype}, on {jax.device_count()} x {jax.devices()[0].device_kind}",
        f"  {outer.num_steps} round(s) of {outer.objective}{control}:"
        f" {outer.problems_per_step} {problems} x {settings.sample.num_edits} self-edits x"
        f" {settings.inner.num_seeds} seed(s) = {found.num_runs} inner runs{each},"
        f" up to {found.at_once} at once",
        f"  then {len(held_out)} held-out {problems}: the base model and {found.num_arms + 1} ways"
        f" to adapt it, {found.num_held_out_runs} inner runs",
        _describe_time(found.num_params, found.num_tokens),
    ]
    lines += [f"  {line}" for line in describe_power(settings.eval, len(held_out), problems)]
    if whole := undivided(stages.mesh, stages.model.config):
        lines.append(f"  {whole}")
    return "\n".join(lines)


def describe_sweep(stages: Stages, sweep: Sweep) -> str:
    """Return a few lines: the settings, the inner runs, the tokens, and an estimate of the time."""
    epochs = np.mean([one.settings.inner.num_epochs for one in sweep.settings])
    length, added = _lengths(stages, sweep.problems)
    runs, programs = num_runs(sweep), len(groups_of(sweep.settings))
    tokens = runs * epochs * length * (1 + added)
    num_params = _num_params(stages)
    at_once = stages.at_once(longest_row(stages, sweep.problems))
    rounds = ", ".join(f"{count} to passage {seen}" for count, seen in sweep.rounds)
    return "\n".join(
        [
            f"{len(sweep.settings)} settings of the inner loop for {stages.settings.model.source}:"
            f" {num_params / 1e6:.0f}M parameters, on {jax.device_count()} x"
            f" {jax.devices()[0].device_kind}",
            f"  successive halving: {rounds}; {sweep.num_edits} self-edit(s) for each passage",
            f"  at most {runs} inner runs, up to {at_once} at once"
            + (f", in {programs} programs, one after the other" if programs > 1 else ""),
            _describe_time(num_params, tokens),
        ]
    )


def describe_sequences(stages: Stages, sequences: Sequence[Batch], control: Batch) -> str:
    """Return a few lines: the sequences, the remedies, the tokens, and an estimate of the time."""
    settings = stages.settings
    asked, inner = settings.continual, settings.inner
    problems = [pair for sequence in sequences for pair in sequence]
    length, added = _lengths(stages, problems)
    tokens = len(problems) * inner.num_epochs * length * (1 + added)
    prompts = [exam_prompts(stages, *pair) for pair in problems]
    question = np.mean([len(prompt) for group in prompts for prompt in group])
    per_problem = np.mean(list(map(len, prompts)))
    rows = 1 + -(-asked.num_edits // asked.ask_every)
    questions = asked.num_sequences * rows * (asked.num_edits + len(control)) * per_problem
    # An answer is read and written, and the gold one scored: forward alone.
    tokens += questions * (2 * question + settings.answer.max_tokens) / 2
    num_params, titles = _num_params(stages), titles_of(stages)["problems"]
    with_what = ", ".join(asked.remedies) or "none: each edit is merged"
    return "\n".join(
        [
            f"{asked.num_sequences} sequences of {asked.num_edits} self-edits by"
            f" {settings.model.source}: {num_params / 1e6:.0f}M parameters, on"
            f" {jax.device_count()} x {jax.devices()[0].device_kind}",
            f"  remedies: {with_what}",
            f"  {questions:.0f} questions, on all {titles} of a sequence and {len(control)} others"
            f" after every {asked.ask_every} edit(s)",
            _describe_time(num_params, tokens),
        ]
    )
