"""The paper's comparison on held-out problems, with the control that it lacks, as one table.

Every arm answers the same questions without the passage:
  base       the base model as it is
  passage    trained on the passage
  own edit   passage + the base policy's own self-edit
  seal       passage + the self-edit of the SEAL-trained policy, applied to that policy
  random     the same for the policy that was trained on randomly chosen self-edits
  external   passage + a self-edit that someone else wrote, one arm for each of them

Intervals are of a paired bootstrap: problems are drawn with replacement, and all arms share each
draw.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from seal_jax.hosts import manifest
from seal_jax.hosts.files import write_json, write_text
from seal_jax.keys import EVAL_STEP
from seal_jax.outer.answers import baseline_accuracy
from seal_jax.outer.examination import outcomes_of
from seal_jax.outer.ledger import Outcomes
from seal_jax.outer.problems import Batch, OuterStep
from seal_jax.outer.stages import Edits, Stages, inner_base, parse, sample
from seal_jax.outer.waves import Examination, all_of, inner_runs
from seal_jax.tasks.task import Rejected
from seal_jax.tasks.task import titles_of as task_titles
from seal_jax.types import Params

# What the table calls the arms, and what was asked; a task may have `titles` of its own.
TITLES = {
    "base": "base model",
    "passage": "trained on the passage",
    "own": "passage + own self-edit",
    "seal": "passage + self-edit of the SEAL policy",
    "random": "passage + self-edit of the random-control policy",
    "external": "passage + self-edit of {}",
    "problems": "passages",
    "questions": "questions asked without the passage",
}


# Trains, asks and grades inner runs: see `train.evaluate`.
Evaluate = Callable[[Stages, Params, Examination], Outcomes]


def compare(
    stages: Stages,
    evaluate: Evaluate,
    policies: Mapping[str, Params],
    problems: Batch,
    workdir: str,
    reliability: Mapping[str, float] | None = None,
    external: Mapping[str, Edits] = {},
) -> dict[str, Any]:
    """Test every arm on the problems; write summary.json and summary.md, and return the former.

    Args:
      policies: 'base', and where they exist 'seal' and 'random'.
      reliability: of the rewards that 'seal' was trained on, see `mean_reliability`.
      external: for each further arm, self-edits [P][R] that someone else wrote, applied to the base
        model; none for a problem on which the arm has nothing.

    Raises:
      ValueError: an external arm has the name of another, or nothing on any problem.
    """
    settings, base = stages.settings, policies["base"]
    examine = partial(run_arm, stages, evaluate, problems, workdir)
    refuse_external(external, policies)
    titles = titles_of(stages)
    titles |= {name: titles["external"].format(name) for name in external}
    accuracy = {"base": np.array(baseline_accuracy(stages, inner_base(stages, base), problems))}
    edits = [[stages.task.passage_only(problem)] for problem, _ in problems]
    accuracy["passage"], _ = examine("passage", base, edits)
    num_rejected = {}
    for name, params in policies.items():
        arm = "own" if name == "base" else name
        label = f"held-out, {titles[arm]}"
        step = OuterStep(EVAL_STEP, label, workdir, problems)
        _, texts = sample(stages, params, step, settings.eval.num_edits)
        edits = parse(stages, problems, texts)
        accuracy[arm], num_rejected[arm] = examine(arm, params, edits)
    for name, edits in external.items():
        accuracy[name], num_rejected[name] = examine(name, base, edits)
    summary = {
        "num_problems": len(problems),
        "num_questions": sum(len(exam.questions) for _, exam in problems),
        "titles": titles,
        "num_edits": settings.eval.num_edits,
        "num_seeds": settings.eval.num_seeds,
        "rejected_self_edits": num_rejected,
        "reward_reliability": dict(reliability or {}),
        "arms": bootstrap(accuracy, settings.eval.num_bootstrap, settings.seed),
        "accuracy_by_problem": {
            problem.id: {
                arm: float(values[p]) for arm, values in accuracy.items() if np.isfinite(values[p])
            }
            for p, (problem, _) in enumerate(problems)
        },
    }
    # summary.json last: where it is, the run is done.
    write_text(os.path.join(workdir, "summary.md"), to_markdown(summary))
    write_json(os.path.join(workdir, "summary.json"), summary)
    manifest.update(workdir)
    return summary


def refuse_external(external: Mapping[str, Edits], policies: Mapping[str, Params]) -> None:
    """Raise ValueError where an external arm has the name of another, or no self-edit at all."""
    for name, edits in external.items():
        if name in TITLES or name in policies:
            raise ValueError(f"external texts {name!r}: that is the name of another arm")
        if not any(edits):
            raise ValueError(f"external texts {name!r}: none for any of the held-out problems")


def titles_of(stages: Stages) -> dict[str, str]:
    """Return what the table calls things in this task."""
    return {**TITLES, **task_titles(stages.task)}


def run_arm(
    stages: Stages,
    evaluate: Evaluate,
    problems: Batch,
    workdir: str,
    arm: str,
    params: Params,
    edits: Edits,
) -> tuple[np.ndarray, int]:
    """Return the accuracy of each problem, f64[P], and how many self-edits were rejected.

    A rejected self-edit, or one whose training was not finite, answered nothing: it counts as 0.
    A problem without any self-edit has no accuracy: nan.
    """
    runs = inner_runs(problems, edits, EVAL_STEP, range(stages.settings.eval.num_seeds))
    ledger = os.path.join(workdir, f"eval_{arm}.jsonl")
    titles = titles_of(stages)
    label = f"held-out, {titles.get(arm) or titles['external'].format(arm)}"
    examination = Examination(partial(all_of, runs), ledger, label)
    outcomes = evaluate(stages, inner_base(stages, params), examination)
    accuracy = np.array([0.0 if row else np.nan for row in edits])
    for p, (problem, _) in enumerate(problems):
        for r in range(len(edits[p])):
            found = [o.accuracy if o.finite else 0.0 for o in outcomes_of(problem.id, r, outcomes)]
            accuracy[p] += float(np.mean(found or [0.0])) / len(edits[p])
    return accuracy, sum(isinstance(edit, Rejected) for row in edits for edit in row)


def bootstrap(
    accuracy: Mapping[str, np.ndarray], num_samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return each arm's mean accuracy and its difference to 'own', with 95 % intervals.

    And the difference of 'seal' to 'random': what selection by reward is worth.

    Args:
      accuracy: f64[P] for each arm, of the same problems in the same order; nan where an arm has
        none. A mean is over the problems that have a value, a difference over those where both do;
        where that is not all, NAME_problems says how many.
    """

    def describe(values: np.ndarray, name: str, interval: str) -> dict[str, Any]:
        known = values[~np.isnan(values)]
        rng = np.random.default_rng([seed, num_samples])
        draws = rng.integers(len(known), size=(num_samples, len(known)))
        bounds = np.percentile(known[draws].mean(axis=1), [2.5, 97.5]).tolist()
        found: dict[str, Any] = {name: float(known.mean()), interval: bounds}
        return found if len(known) == len(values) else {**found, f"{name}_problems": len(known)}

    arms = {arm: describe(values, "accuracy", "interval") for arm, values in accuracy.items()}
    for arm, values in accuracy.items():
        if arm != "own":
            minus = values - accuracy["own"]
            arms[arm] |= describe(minus, "minus_own", "minus_own_interval")
    if "seal" in accuracy and "random" in accuracy:
        minus = accuracy["seal"] - accuracy["random"]
        arms["seal"] |= describe(minus, "minus_random", "minus_random_interval")
    return arms


def mean_reliability(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean over outer steps of the reliability report in their metrics."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("reliability/"):
                found.setdefault(name.removeprefix("reliability/"), []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def describe_reliability(report: Mapping[str, float]) -> list[str]:
    """Return a line on how far the training rewards could be trusted; none without a report."""
    parts = []
    if "reliability_of_mean" in report:
        parts.append(f"reliability {report['reliability_of_mean']:.2f}")
        parts.append(f"{report['reliability_of_one']:.2f} of one seed")
    if "gain_apparent" in report:
        gain = f"the best self-edit looks {report['gain_apparent']:+.3f} better than the mean"
        if "gain_cross_validated" in report:
            gain += f" and is {report['gain_cross_validated']:+.3f}, cross-validated"
        parts.append(gain)
    return [f"Rewards in training (mean over outer steps): {'; '.join(parts)}."] if parts else []


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Return the table, with what it can and cannot show."""
    titles = TITLES | summary.get("titles", {})

    def percent(value: float, interval: Sequence[float], sign: str = "") -> str:
        low, high = (f"{100 * x:{sign}.1f}" for x in interval)
        return f"{100 * value:{sign}.1f} [{low}, {high}]"

    lines = [
        "| method | accuracy, % [95 % interval] | minus own self-edit, points |",
        "|---|---|---|",
    ]
    for arm, row in summary["arms"].items():
        versus = ""
        if "minus_own" in row:
            versus = percent(row["minus_own"], row["minus_own_interval"], "+")
        lines.append(f"| {titles[arm]} | {percent(row['accuracy'], row['interval'])} | {versus} |")
    num, seal = summary["num_problems"], summary["arms"].get("seal", {})
    if "minus_random" in seal:
        versus = percent(seal["minus_random"], seal["minus_random_interval"], "+")
        lines += [
            "",
            f"SEAL policy minus random control (what selection is worth): {versus} points",
        ]
    lines += [
        "",
        f"{num} held-out {titles['problems']}, {summary['num_questions']} {titles['questions']};"
        f" {summary['num_edits']} self-edit(s) x {summary['num_seeds']} seed(s) for each."
        f" Intervals: paired bootstrap over {titles['problems']}.",
    ]
    if num < 50:
        lines.append(
            f"With {num} {titles['problems']} the intervals are wide, and a bootstrap over so few"
            " still makes them too narrow: a difference whose interval includes 0, or barely not,"
            " is not shown."
        )
    lines += describe_reliability(summary.get("reward_reliability", {}))
    lines.append(f"Rejected self-edits (counted as 0): {summary['rejected_self_edits']}")
    return "\n".join(lines) + "\n"
