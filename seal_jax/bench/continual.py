"""`seal-jax bench continual`: sequences of self-edits side by side, and what remedies cost.

The work is what `seal-jax continual` does, with a tiny model on synthetic facts. Contestants, in
one process, each once to compile and once for the figures:

  side_by_side    all sequences as a population
  one_by_one      the same sequences one after another, with programs that are compiled already
  remedies        the best composition, side by side

Beside the time of whole runs it says that of an edit alone (written, trained, kept and stored):
what is asked after it measures, and is no part of what a remedy costs.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seal_jax.bench.timing import machine
from seal_jax.config.load import default_config, with_overrides
from seal_jax.config.setup import make_work, settings_of
from seal_jax.continual.experiment import record_of, run_sequences
from seal_jax.continual.remedies.remedy import Work
from seal_jax.continual.sequences import Sequences, make_sequences
from seal_jax.models.config import LINEARS
from seal_jax.outer.problems import read_problems
from seal_jax.tasks import make_task
from seal_jax.types import Settings

REMEDIES = ("replay", "scale")  # what forgets least, see continual/README.md
KEYWORDS = {"replay": {"share": 0.75, "kind": "per_problem"}}


def make_settings(model: str, quick: bool) -> Settings:
    """Return the settings of configs/continual_tiny.py; quick is a shorter one."""
    sizes = (4, 3, 2) if quick else (16, 32, 16)
    names = ("num_sequences", "num_edits", "num_control")
    config = with_overrides(
        default_config(),
        [
            *(f"model.source={model}", "model.chat=False", "task.name=facts", "task.num_eval=600"),
            *("sample.top_p=1.0", "sample.max_tokens=72", "sample.max_rows=64"),
            *("answer.max_tokens=8", "answer.max_rows=512", "inner.rank=8", "inner.alpha=16.0"),
            *("inner.batch_size=4", "inner.num_seeds=1", "inner.learning_rate=1e-3"),
            f"inner.num_epochs={2 if quick else 40}",
            "continual.memory_tokens=8192",
            f"inner.targets={','.join(LINEARS)}",
            *(f"continual.{name}={size}" for name, size in zip(names, sizes, strict=True)),
        ],
    )
    return settings_of(config)


def run(
    *,
    model: str | None = None,
    quick: bool = False,
    json_file: str | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """Time the contestants, print a table and return the figures.

    Args:
      model: a model source; tiny:facts-asked by default, the random byte-tiny one where `quick`.
      quick: few and short sequences.
    """
    if profile:
        raise ValueError("bench continual has no --profile: its parts are those of bench inner")
    source = model or ("random:byte-tiny" if quick else "tiny:facts-asked")
    settings = make_settings(source, quick)
    asked = settings.continual
    drawn = make_sequences(
        read_problems(make_task(**settings.task), "eval"),
        num_sequences=asked.num_sequences,
        length=asked.num_edits,
        num_control=asked.num_control,
        seed=settings.seed,
    )
    plain = make_work(settings, drawn.problems)
    other = settings._replace(continual=asked._replace(remedies=REMEDIES, remedy_kwargs=KEYWORDS))
    remedied = make_work(other, drawn.problems)
    alone = [plain._replace(sequences=[one]) for one in drawn.problems]
    seconds, edits = {}, {}
    for name, works in {
        "side_by_side": [plain],
        "one_by_one": alone,
        "remedies": [remedied],
    }.items():
        _run_all(works[:1], drawn)  # compiles
        seconds[name], edits[name] = _run_all(works, drawn)
    figures = {
        "model": source,
        "remedies": list(REMEDIES),
        "num_sequences": asked.num_sequences,
        "num_edits": asked.num_edits,
        "seconds": seconds,
        "seconds_per_edit": edits,
        "one_by_one_over_side_by_side": seconds["one_by_one"] / seconds["side_by_side"],
        "remedies_over_plain": edits["remedies"] / edits["side_by_side"],
        "machine": machine(),
    }
    _print(figures)
    if json_file:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _run_all(works: list[Work], drawn: Sequences) -> tuple[float, float]:
    """Return the seconds of whole runs, and the median seconds of an edit of all sequences."""
    total, edits = 0.0, []
    for work in works:
        with tempfile.TemporaryDirectory() as folder, jax.transfer_guard("disallow"):
            start = time.perf_counter()
            lines = run_sequences(work, drawn.control, folder)
            total += time.perf_counter() - start
        edits.append(record_of(work, lines, "accuracy").seconds)
    return total, float(np.median(np.sum(edits, axis=0)))


def _print(figures: dict[str, Any]) -> None:
    info = figures["machine"]
    print(f"{figures['model']} on {info['device']}, {info['num_cores']} cores, {info['date']}")
    print(f"  {figures['num_sequences']} sequences of {figures['num_edits']} self-edits")
    for name, taken in figures["seconds"].items():
        edit = figures["seconds_per_edit"][name]
        print(f"  {name:12} {taken:8.1f} seconds in all, {edit:6.3f} of them an edit")
    print(f"  one by one over side by side: {figures['one_by_one_over_side_by_side']:.2f} x")
    words = " + ".join(figures["remedies"])
    print(f"  an edit with {words} over plain merging: {figures['remedies_over_plain']:.2f} x")
