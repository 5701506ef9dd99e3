"""What an outer step writes down: its rewards, its metrics, and a line for every self-edit."""

import os
import time
from collections.abc import Sequence

import numpy as np

from seal_jax.metrics import append_json
from seal_jax.rewards import Outcome, reward_of
from seal_jax.stages import Edit
from seal_jax.tasks.task import Rejected, SelfEdit
from seal_jax.types import Rollout


def outcomes_of(problem_id: str, r: int, outcomes: dict[tuple, Outcome]) -> list[Outcome]:
    """Return the outcomes of one self-edit, seed by seed."""
    names = [name for name in outcomes if name[:2] == (problem_id, r)]
    return [outcomes[name] for name in sorted(names)]


def tabulate(
    edits: Sequence[Sequence[Edit]], outcomes: dict[tuple, Outcome], *, kind: str, rejected: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return rewards f32[P R], and which self-edits may be kept, bool[P R]."""
    shape = (len(edits), len(edits[0]))
    rewards, valid = np.full(shape, rejected, np.float32), np.zeros(shape, bool)
    for p, row in enumerate(edits):
        for r, edit in enumerate(row):
            found = outcomes_of(edit.problem_id, r, outcomes)
            rewards[p, r] = reward_of(found, kind, rejected)
            valid[p, r] = isinstance(edit, SelfEdit) and all(o.finite for o in found)
    return rewards, valid


def summarize(
    edits: Sequence[Sequence[Edit]],
    outcomes: dict[tuple, Outcome],
    rewards: np.ndarray,
    valid: np.ndarray,
    advantages: np.ndarray,
) -> dict[str, float]:
    """Return the metrics of an outer step's self-edits, inner runs and rewards."""
    flat = [edit for row in edits for edit in row]
    metrics = {
        "edits/num": len(flat),
        "edits/rejected": sum(isinstance(edit, Rejected) for edit in flat),
        "edits/kept": int((advantages > 0).sum()),
    }
    runs = list(outcomes.values())
    if not runs:
        return metrics
    finite = [run for run in runs if run.finite]
    trained = sum(run.trained_tokens for run in runs)
    metrics |= {
        "edits/not_finite": len(runs) - len(finite),
        "inner/runs": len(runs),
        "inner/text_tokens": sum(run.useful_tokens for run in runs),
        "inner/useful_tokens": sum(run.useful_tokens for run in runs) / trained,
        "reward/mean": float(rewards.mean()),
        "reward/best": float(np.where(valid, rewards, -np.inf).max(axis=1).mean()),
        "reward/kept": float((rewards * (advantages > 0)).sum() / max(1, (advantages > 0).sum())),
    }
    for field in ("loss_before", "loss_after"):
        metrics[f"inner/{field}"] = float(np.mean([getattr(run, field) for run in finite] or [0.0]))
    return metrics


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


def log_edits(
    folder: str,
    step: int,
    batch: Sequence,
    edits: Sequence[Sequence[Edit]],
    outcomes: dict[tuple, Outcome],
    rewards: np.ndarray,
    advantages: np.ndarray,
) -> None:
    """Append every self-edit of the step to edits.jsonl, with why it was kept or not."""
    for p, (problem, _) in enumerate(batch):
        for r, edit in enumerate(edits[p]):
            found = outcomes_of(problem.id, r, outcomes)
            kept = bool(advantages[p, r] > 0)
            entry = {
                "step": step,
                "problem": problem.id,
                "title": problem.title,
                "edit": r,
                "prompt": edit.prompt,
                "text": edit.text,
                "training_texts": list(getattr(edit, "training_texts", ())),
                "reward": float(rewards[p, r]) if found or isinstance(edit, Rejected) else None,
                "kept": kept,
                "why": why(edit, found, kept),
            }
            for field in ("accuracy", "log_likelihood", "loss_before", "loss_after"):
                values = [getattr(outcome, field) for outcome in found]
                entry[field] = [v if v is None or np.isfinite(v) else None for v in values]
            entry["answers"] = [list(outcome.answers) for outcome in found]
            append_json(os.path.join(folder, "edits.jsonl"), entry)


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
