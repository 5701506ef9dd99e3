"""The ledger of finished inner runs: one line for each, written as soon as its wave ends.

So an interrupted run repeats one wave at most.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from seal_jax.hosts.exchange import ask_first
from seal_jax.hosts.files import append_json, read_jsonl
from seal_jax.inner.packing import job_losses, useful_tokens
from seal_jax.inner.texts import num_text_tokens
from seal_jax.outer.answers import Marks
from seal_jax.outer.rewards import Outcome
from seal_jax.outer.waves import InnerRun, Place, RunName, Wave
from seal_jax.types import InnerBatch, InnerSettings

Outcomes = dict[RunName, Outcome]
_MAY_BE_NAN = ("loss_before", "loss_after", "log_likelihood", "log_likelihood_elsewhere")


def outcomes_of_wave(
    wave: Wave,
    batches: Sequence[InnerBatch],
    losses: Sequence[np.ndarray],
    answers: Sequence[Sequence[str]],
    marks: Sequence[Marks],
    logps: Sequence[Sequence[float] | None],
    inner: InnerSettings,
) -> Outcomes:
    """Return what each run of a wave achieved, in the order of its places.

    Args:
      batches, losses: that the wave was trained on, and f32[I U] of each.
      answers, marks, logps: of each adapter.
      inner: where a run or its self-edit does not choose its own.
    """
    num_runs = sum(place is not None for place in wave.places)
    trained = useful_tokens(batches)[1] / num_runs
    by_job = job_losses(batches, losses, len(wave.places))
    parts = zip(wave.places, by_job, answers, marks, logps, strict=True)
    return {
        place.run.name: _outcome(place, loss, texts, mark, logp, inner)._replace(
            trained_tokens=trained
        )
        for place, loss, texts, mark, logp in parts
        if place is not None
    }


def _outcome(
    place: Place,
    losses: Sequence[float],
    answers: Sequence[str],
    marks: Marks,
    logps: Sequence[float] | None,
    inner: InnerSettings,
) -> Outcome:
    own, *rest = marks
    by_kind: dict[str, list[float]] = {}
    for (kind, _, _), found in zip(place.run.others, rest, strict=True):
        by_kind.setdefault(kind, []).extend(found)
    per_epoch = len(place.job.rows) // place.run.settings(inner).num_epochs
    here = None if logps is None else logps[: len(place.run.exam.questions)]
    elsewhere = None if logps is None else logps[len(place.run.exam.questions) :]
    return Outcome(
        accuracy=float(np.mean(own)),
        log_likelihood=None if here is None else float(np.mean(here)),
        loss_before=float(np.mean(losses[:per_epoch])),
        loss_after=float(np.mean(losses[-per_epoch:])),
        answers=tuple(answers),
        useful_tokens=num_text_tokens(place.job),
        others={kind: float(np.mean(found)) for kind, found in by_kind.items()},
        log_likelihood_elsewhere=float(np.mean(elsewhere)) if elsewhere else None,
    )


def append_outcome(ledger: str, run: InnerRun, outcome: Outcome) -> None:
    """Write a finished run into the ledger."""
    entry: dict[str, Any] = {"name": list(run.name), "step": run.step, "text": _digest(run)}
    entry |= outcome._asdict()
    for field in _MAY_BE_NAN:
        if entry[field] is not None and not math.isfinite(entry[field]):
            entry[field] = "nan"  # JSON has none
    append_json(ledger, entry)


def read_ledger(ledger: str, runs: Sequence[InnerRun]) -> Outcomes:
    """Return the outcomes that the ledger has of these runs: of the same texts in the same step."""
    wanted = {run.name: (run.step, _digest(run)) for run in runs}
    outcomes: Outcomes = {}
    for entry in ask_first("ledger", lambda: _lines(ledger)):
        name = tuple(entry.pop("name"))
        if wanted.get(name) != (entry.pop("step"), entry.pop("text")):
            continue
        for field in _MAY_BE_NAN:
            if entry.get(field) == "nan":  # an older version's may lack it
                entry[field] = math.nan
        entry["answers"] = tuple(entry["answers"])
        try:
            outcomes[name] = Outcome(**entry)
        except TypeError as error:  # a field that this version does not know
            raise ValueError(f"{ledger}: inner run {name}: {error}") from error
    return outcomes


def _lines(ledger: str) -> list[dict[str, Any]]:
    needed = [field for field in Outcome._fields if field not in Outcome._field_defaults]
    return read_jsonl(ledger, ["name", "step", "text", *needed]) if os.path.exists(ledger) else []


def _digest(run: InnerRun) -> str:
    # Texts, and what else the self-edit chose; thoughts change nothing of a run.
    fields = {name: value for name, value in run.edit._asdict().items() if name != "thoughts"}
    text = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return xxhash.xxh64_hexdigest(f"SelfEdit({text})".encode("utf-8", "surrogatepass"))
