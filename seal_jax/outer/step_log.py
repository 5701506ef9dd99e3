"""What an outer step writes down: its rewards, its metrics, and a line for every self-edit."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax.hosts.files import append_json
from seal_jax.outer.examination import Attempts, Evaluated
from seal_jax.outer.problems import OuterStep
from seal_jax.outer.reliability import reliability
from seal_jax.outer.rewards import Outcome, seed_rewards
from seal_jax.outer.stages import Edit, Stages
from seal_jax.tasks.task import Rejected
from seal_jax.types import RewardSettings, Rollout


def describe_step(
    stages: Stages,
    rollout: Rollout,
    attempts: Attempts,
) -> dict[str, float]:
    """Return the metrics of an outer step, but for those of its policy update."""
    metrics, evaluated = summarize(attempts), attempts.evaluated
    metrics |= written_lengths(rollout, stages.model.tokenizer.stop_ids)
    if evaluated is not None:
        metrics |= trust(evaluated, stages.settings.reward)
    return metrics


def trust(evaluated: Evaluated, section: RewardSettings) -> dict[str, float]:
    """Return the reliability report of an outer step; see reliability.py.

    And, where the reward is another, that of accuracy alone on the same inner runs, as
    reliability/accuracy/NAME.
    """

    def report(weights: Mapping[str, float], prefix: str) -> dict[str, float]:
        rewards = [
            [
                seed_rewards(found, weights) if all(o.finite for o in found.outcomes) else []
                for found in row
            ]
            for row in evaluated.evidence
        ]
        return {f"{prefix}/{name}": value for name, value in reliability(rewards).items()}

    found = report(section.weights, "reliability")
    if set(section.weights) != {"accuracy"}:
        found |= report({"accuracy": 1.0}, "reliability/accuracy")
    return found


def summarize(attempts: Attempts) -> dict[str, float]:
    """Return the metrics of an outer step's self-edits, inner runs and rewards."""
    edits, evaluated, rewards, advantages = attempts
    flat = [edit for row in edits for edit in row]
    values, known = rewards.values, ~np.isnan(rewards.values)
    best = np.where(known & rewards.keepable, values, -np.inf).max(axis=1)
    metrics: dict[str, float] = {
        "edits/num": len(flat),
        "edits/rejected": sum(isinstance(edit, Rejected) for edit in flat),
        "edits/kept": int((advantages > 0).sum()),
    }
    if evaluated is None or not evaluated.outcomes:
        return metrics
    runs = list(evaluated.outcomes.values())
    finite = [run for run in runs if run.finite]
    trained = sum(run.trained_tokens for run in runs)
    metrics |= {
        "edits/not_finite": len(runs) - len(finite),
        "inner/runs": len(runs),
        "inner/text_tokens": sum(run.useful_tokens for run in runs),
        "inner/useful_tokens": sum(run.useful_tokens for run in runs) / trained,
        "reward/baseline_accuracy": float(np.mean(evaluated.baseline)),
        "reward/missing": int((~known).sum()),
        "reward/mean": float(values[known].mean()) if known.any() else 0.0,
        "reward/best": float(best[np.isfinite(best)].mean()) if np.isfinite(best).any() else 0.0,
        "reward/kept": float(values[advantages > 0].sum() / max(1, (advantages > 0).sum())),
    }
    for field in ("loss_before", "loss_after"):
        metrics[f"inner/{field}"] = float(np.mean([getattr(run, field) for run in finite] or [0.0]))
    return metrics


def held_out_metrics(values: np.ndarray) -> dict[str, float]:
    """Return the mean reward [P R] over held-out problems, and its standard error over them."""
    by_problem = np.array([row[~np.isnan(row)].mean() for row in values if not np.isnan(row).all()])
    if not len(by_problem):
        return {}
    error = by_problem.std(ddof=1) / np.sqrt(len(by_problem)) if len(by_problem) > 1 else 0.0
    return {"eval/reward": float(by_problem.mean()), "eval/reward_error": float(error)}


def written_lengths(rollout: Rollout, stop_ids: Sequence[int]) -> dict[str, float]:
    """Return the mean length of the self-edits, and how many were cut off at max_tokens."""
    lengths = rollout.loss_mask.sum(axis=1)
    last = [
        tokens[mask][-1] for tokens, mask in zip(rollout.tokens, rollout.loss_mask, strict=True)
    ]
    return {
        "edits/mean_tokens": float(lengths.mean()),
        "edits/cut_off": int((~np.isin(last, stop_ids)).sum()),
    }


def log_edits(step: OuterStep, attempts: Attempts) -> None:
    """Append every self-edit of the step to edits.jsonl, with why it was kept or not."""
    edits, evaluated, rewards, advantages = attempts
    for p, (problem, _) in enumerate(step.batch):
        for r, edit in enumerate(edits[p]):
            found = evaluated.evidence[p][r].outcomes if evaluated else ()
            kept = bool(advantages[p, r] > 0)
            entry = {
                "step": step.number,
                "problem": problem.id,
                "title": problem.title,
                "edit": r,
                "prompt": edit.prompt,
                "thoughts": edit.thoughts,
                "text": edit.text,
                **logged_texts(edit),
                "reward": number(rewards.values[p, r]),
                "advantage": number(advantages[p, r]),
                "kept": kept,
                "why": why(edit, found, kept),
            }
            for field in ("accuracy", "log_likelihood", "loss_before", "loss_after"):
                values = [getattr(outcome, field) for outcome in found]
                entry[field] = [v if v is None else number(v) for v in values]
            entry["answers"] = [list(outcome.answers) for outcome in found]
            append_json(os.path.join(step.folder, "edits.jsonl"), entry)


def logged_texts(edit: Edit) -> dict[str, Any]:
    """Return a self-edit's training texts; those that the task made of its settings only as a
    number, for there are hundreds of them, and the same settings make them again."""
    texts = getattr(edit, "training_texts", ())
    written = [text for text in texts if isinstance(text, str)]
    return {"training_texts": written, "num_training_texts": len(texts)}


def number(value: float) -> float | None:
    """Return what JSON can hold."""
    return float(value) if np.isfinite(value) else None


def why(edit: Edit, outcomes: Sequence[Outcome], kept: bool) -> str:
    """Say in a few words why a self-edit was kept or not."""
    if isinstance(edit, Rejected):
        return f"rejected: {edit.reason}"
    if not all(outcome.finite for outcome in outcomes):
        return "not finite: the inner loop's loss or adapter overflowed"
    if not outcomes:
        return "drawn at random" if kept else "not drawn"
    return "selected by reward" if kept else "not selected by reward"


class Clock:
    """Seconds of each stage of a step."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"seconds/{name}"] = round(now - self._last, 3)
        self._last = now
