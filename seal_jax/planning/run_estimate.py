"""What a run is going to do, and about how long it takes, said before it starts."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.config.setup import longest_row, text_limit
from seal_jax.models.divisible import undivided
from seal_jax.outer.comparison import titles_of
from seal_jax.outer.stages import Stages
from seal_jax.tasks.task import Problem
from seal_jax.types import Params

EFFICIENCY = 0.37  # of the matmul rate over a whole quick start: compiling and writing included
WRITTEN = 1.0  # expected length of a self-edit, as a multiple of its passage's


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


def num_params(params: Params) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def text_tokens(stages: Stages, problem: Problem) -> int:
    """Return the tokens of what is trained on without a self-edit."""
    texts = stages.task.passage_only(problem).training_texts
    return sum(len(stages.encode(text, False).tokens) for text in texts)


def describe(stages: Stages, training: Sequence, held_out: Sequence) -> str:
    """Return a few lines: the model, the inner runs, the tokens, and an estimate of the time.

    Where the config leaves the number of adapters to the memory, it is counted and printed now.

    Raises:
      ValueError: not even one adapter fits.
    """
    settings = stages.settings
    outer, inner = settings.outer, settings.inner
    used = training[: outer.problems_per_step * outer.num_steps]
    # What a problem's own texts have, and what a self-edit adds where its text is trained on.
    length = np.mean([text_tokens(stages, problem) for problem, _ in used])
    added = WRITTEN if text_limit(settings) is None else 0
    runs = len(used) * settings.sample.num_edits * inner.num_seeds
    if outer.objective == "random_em":
        runs = 0
    arms = 3 if settings.eval.random_control else 2
    tests = len(held_out) * settings.eval.num_edits * settings.eval.num_seeds
    controls = len(held_out) * settings.eval.num_seeds
    problems = titles_of(stages)["problems"]
    edited = (runs + arms * tests) * length * (1 + added)
    tokens = inner.num_epochs * (edited + controls * length)
    rows = outer.num_steps * outer.problems_per_step * outer.num_epochs * (arms - 1)
    encode = stages.model.tokenizer.encode
    prompt = np.mean([len(encode(stages.task.edit_prompt(problem))) for problem, _ in used])
    tokens += rows * (prompt + length * added)
    count = num_params(stages.model.params)
    minutes = 4 * count * tokens / (matmul_rate() * EFFICIENCY) / 60
    control = " (and once more for the random control)" if settings.eval.random_control else ""
    device = jax.devices()[0]
    at_once = stages.at_once(longest_row(stages, [*used, *held_out]))
    whole = undivided(stages.mesh, stages.model.config)
    return "\n".join(
        [
            f"SEAL on {settings.model.source}: {count / 1e6:.0f}M parameters,"
            f" {settings.model.dtype},"
            f" on {jax.device_count()} x {device.device_kind}",
            f"  {outer.num_steps} round(s) of {settings.outer.objective}{control}:"
            f" {outer.problems_per_step} {problems} x {settings.sample.num_edits} self-edits x"
            f" {inner.num_seeds} seed(s) = {runs} inner runs, up to {at_once} at once",
            f"  then {len(held_out)} held-out {problems}: the base model and {arms + 1} ways to"
            f" adapt it, {arms * tests + controls} inner runs",
            f"  about {tokens / 1e3:.0f} thousand training tokens,"
            f" about {minutes:.0f} minutes here",
            *([f"  {whole}"] if whole else []),
        ]
    )
