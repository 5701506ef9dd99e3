"""`seal-jax bench learning`: does each objective learn, where it is known what there is to learn?

A tiny model (models/toys/tiny_facts.py) writes notes on facts about invented things, in one of four
styles, of which one is asked as the exam asks; it draws them so that its mean reward is about a
third of what that style earns. Every objective has the same number of inner runs, problems and
seeds; what is shown is the reward on held-out problems after each outer step. `random_em` is the
control.

The runs are `train`'s own outer loop, in a folder, and resume like any other.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from seal_jax.bench.timing import machine
from seal_jax.config.load import default_config, validate
from seal_jax.config.setup import configured_objective, make_stages, settings_of
from seal_jax.config.workdir import check_workdir, claim_workdir
from seal_jax.hosts.files import read_jsonl, read_object, write_json
from seal_jax.hosts.folder_lock import hold
from seal_jax.hosts.outputs import check_output
from seal_jax.keys import EVAL_STEP
from seal_jax.models.config import LINEARS
from seal_jax.models.toys.tiny_facts import STYLES, notes, tiny_facts_folder
from seal_jax.outer.problems import split_problems
from seal_jax.outer.stages import Stages, inner_base
from seal_jax.outer.waves import Examination, all_of, inner_runs
from seal_jax.tasks.task import Exam, Problem
from seal_jax.train import evaluate, examine, outer_loop

# What an objective changes of the config below, each chosen on seeds that are not reported.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "rest_em": {"batch_size": 6, "learning_rate": 3e-4},
    "reinforce": {"num_epochs": 1},
    "rloo": {},
    "grpo": {"objective_kwargs": {"average": "token"}},
    # Which style is written is decided in the first tokens, and the reward comes at the end.
    "ppo": {"objective_kwargs": {"gae_decay": 1.0, "value_coef": 0.1}},
    "random_em": {"batch_size": 6, "learning_rate": 3e-4},
}
Batch = Sequence[tuple[Problem, Exam]]

SEEDS, NUM_STEPS = (0, 1, 2), 8
QUICK: dict[str, Any] = {"algorithms": ("rest_em",), "seeds": (0,), "num_steps": 3}


def make_config(model: Path, algorithm: str, seed: int, num_steps: int) -> ConfigDict:
    """Return the config of one run."""
    config = default_config()
    config.seed = seed
    config.model.update(source=str(model), chat=False)
    config.task.update(name="facts", num_train=6 * num_steps)
    config.sample.update(num_edits=8, top_p=1.0, max_tokens=72, max_rows=48)
    config.answer.update(max_tokens=8, max_rows=96)
    config.inner.update(rank=8, alpha=16.0, targets=LINEARS, max_adapters=32, tokens_per_step=1024)
    config.inner.update(learning_rate=1e-2, num_epochs=10, batch_size=8, num_seeds=1)
    config.outer.update(objective=algorithm, num_steps=num_steps, problems_per_step=6)
    config.outer.update(update="full", learning_rate=1.5e-4, schedule="constant")
    config.outer.update(num_epochs=2, batch_size=32, microbatch_size=16)
    config.eval.update(every=1, num_problems=32)
    config.outer.update(ALGORITHMS[algorithm])
    validate(config)
    config.lock()
    return config


def run(
    *,
    model: str | None = None,
    quick: bool = False,
    json_file: str | None = None,
    profile: str | None = None,
    workdir: str = "runs/bench_learning",
    algorithms: Sequence[str] = tuple(ALGORITHMS),
    seeds: Sequence[int] = SEEDS,
    num_steps: int = NUM_STEPS,
) -> dict[str, Any]:
    """Train with every objective, print a table, draw a plot and return the figures.

    Args:
      model: a folder with a model that writes notes, in place of one trained on the spot.
      quick: one objective, one seed, few steps.
      workdir: holds the model, the runs and curves.png; what is done in it is not done again.
    """
    if profile:
        raise ValueError("bench learning has no --profile: it is `train`; profile bench inner")
    check_output(workdir, "--workdir", folder=True)
    if quick:
        algorithms, seeds, num_steps = QUICK["algorithms"], QUICK["seeds"], QUICK["num_steps"]
    folder = Path(workdir)
    with hold(folder):
        return _run_all(folder, model, json_file, algorithms, seeds, num_steps)


def _run_all(
    folder: Path,
    model: str | None,
    json_file: str | None,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    num_steps: int,
) -> dict[str, Any]:
    source = Path(model) if model else tiny_facts_folder(folder)
    runs: dict[str, list[list[dict[str, float]]]] = {algorithm: [] for algorithm in algorithms}
    best = []
    for seed in seeds:
        make = partial(make_config, source, seed=seed, num_steps=num_steps)
        stages = make_stages(settings_of(make(algorithms[0])))
        training, held_out = split_problems(stages.settings, stages.task)
        with jax.transfer_guard("disallow"):
            before = _start(stages, held_out, folder / f"start_{seed}.json")
            best.append(before["best_possible"])
            for algorithm in algorithms:
                workdir = str(folder / f"{algorithm}_{seed}")
                rows = _train(make(algorithm), stages, training, held_out, workdir)
                runs[algorithm].append([before, *rows])
    figures = {}
    for algorithm, seen in runs.items():
        curves = [[row["eval/reward"] for row in rows] for rows in seen]
        errors = [[row["eval/reward_error"] for row in rows] for rows in seen]
        figures[algorithm] = summarize(curves, errors, float(np.mean(best)))
    _print(figures, machine())
    plot(figures, folder / "curves.png")
    print(f"{folder / 'curves.png'} shows it; the runs are in {folder}")
    if json_file:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _start(stages: Stages, held_out: Batch, path: Path) -> dict[str, float]:
    """Return the reward of the policy as it is, and of the best notes on the same problems."""
    if not path.exists():
        params, label = stages.model.params, "base policy"
        found: dict[str, float] = examine(stages, params, held_out, str(path.parent), label)
        edits = [[stages.task.parse(p, notes(p, "asked"))] for p, _ in held_out]
        runs = inner_runs(held_out, edits, EVAL_STEP, range(stages.settings.inner.num_seeds))
        ledger = path.with_suffix(".jsonl")
        examination = Examination(partial(all_of, runs), str(ledger), "best notes")
        outcomes = evaluate(stages, inner_base(stages, params), examination)
        found["best_possible"] = float(np.mean([o.accuracy for o in outcomes.values()]))
        write_json(path, found)
    return read_object(path)


def _train(
    config: ConfigDict, stages: Stages, training: Batch, held_out: Batch, workdir: str
) -> list[dict[str, float]]:
    """Run the outer loop, or what is left of it; returns its metrics, one dict a step."""
    check_workdir(config, workdir)
    claim_workdir(config, workdir)
    settings = settings_of(config)
    label = f"{settings.outer.objective}, seed {settings.seed},"
    objective = configured_objective(settings)
    stages = stages._replace(settings=settings)
    outer_loop(stages, objective, training, held_out, folder=workdir, label=label)
    return read_jsonl(Path(workdir, "metrics.jsonl"))


def summarize(
    curves: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], best: float
) -> dict[str, Any]:
    """Return the figures of one objective.

    Args:
      curves: the held-out reward of each seed, before the first step and after each.
      errors: their standard errors, over held-out problems.
    """
    rewards, num_seeds = np.array(curves), len(curves)
    mean = rewards.mean(axis=0)
    half = 1.96 * np.sqrt((np.array(errors) ** 2).sum(axis=0)) / num_seeds
    return {
        "start": float(mean[0]),
        "end": float(mean[-1]),
        "best_possible": best,
        "per_seed": rewards[:, -1].tolist(),
        "start_per_seed": rewards[:, 0].tolist(),
        "mean": mean.tolist(),
        "interval": [(mean - half).tolist(), (mean + half).tolist()],
        "curves": rewards.tolist(),
    }


def _print(figures: Mapping[str, Mapping[str, Any]], info: Mapping[str, Any]) -> None:
    print(f"{info['device']}, {info['num_cores']} cores, {info['date']}; notes: {list(STYLES)}")
    for algorithm, row in figures.items():
        low, high = (bound[-1] for bound in row["interval"])
        seeds = ", ".join(f"{end:.2f}" for end in row["per_seed"])
        print(
            f"  {algorithm:10} held-out reward {row['start']:.2f} -> {row['end']:.2f}"
            f" [{low:.2f}, {high:.2f}] of {row['best_possible']:.2f} at best; by seed {seeds}"
        )


def plot(figures: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the held-out reward over outer steps, a line and its 95 % interval per objective."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for algorithm, row in figures.items():
        steps = range(len(row["mean"]))
        style = "--" if algorithm == "random_em" else "-"
        (line,) = axes.plot(steps, row["mean"], style, label=algorithm)
        axes.fill_between(steps, *row["interval"], color=line.get_color(), alpha=0.12)
    best = next(iter(figures.values()))["best_possible"]
    axes.axhline(best, color="gray", linewidth=0.8, linestyle=":")
    axes.annotate("best notes", (0, best), (2, 3), textcoords="offset points", color="gray")
    axes.set(xlabel="outer step", ylabel="held-out reward", ylim=(0, 1))
    axes.legend(frameon=False, loc="lower center", ncols=3)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
