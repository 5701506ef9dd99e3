"""The paper's comparison on held-out problems, with the control that it lacks, as one table.

Every arm answers the same questions without the passage:
  base       the base model as it is
  passage    trained on the passage
  own edit   passage + the base policy's own self-edit
  seal       passage + the self-edit of the SEAL-trained policy, applied to that policy
  NAME       the same for a policy that was trained by another objective, eval.objectives
  random     the same for the policy that was trained on randomly chosen self-edits
  external   passage + a self-edit that someone else wrote, one arm for each of them

Beside the share of right answers stands how likely the gold answers are, which has no ties.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from seal_jax.hosts import manifest
from seal_jax.hosts.files import write_json, write_text
from seal_jax.keys import EVAL_STEP
from seal_jax.outer.answers import base_outcomes
from seal_jax.outer.differences import SCORES, bootstrap, compare_pairs, pairs_of, read_pair
from seal_jax.outer.examination import outcomes_of
from seal_jax.outer.examples import ArmRuns, examples_of
from seal_jax.outer.ledger import Outcomes, append_outcome, read_ledger
from seal_jax.outer.problems import Batch, OuterStep
from seal_jax.outer.rewards import Outcome
from seal_jax.outer.stages import Edits, Stages, inner_base, parse, sample
from seal_jax.outer.summary_text import TITLES, to_markdown
from seal_jax.outer.waves import Examination, all_of, inner_runs
from seal_jax.tasks.task import Rejected, SelfEdit, asks_once
from seal_jax.tasks.task import titles_of as task_titles
from seal_jax.types import Params

# Trains, asks and grades inner runs: see `train.evaluate`.
Evaluate = Callable[[Stages, Params, Examination], Outcomes]
Scores = dict[str, dict[str, np.ndarray]]  # f64[P] by score and arm


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
      policies: 'base', and where they exist 'seal', those of eval.objectives, and 'random'.
      reliability: of the rewards that 'seal' was trained on, see `mean_reliability`.
      external: for each further arm, self-edits [P][R] that someone else wrote, applied to the base
        model; none for a problem on which the arm has nothing.

    Raises:
      ValueError: an external arm has the name of another, or nothing on any problem.
    """
    settings, base = stages.settings, policies["base"]
    refuse_external(external, policies)
    titles = titles_of(stages, [*policies, *external], external)
    arms = {"base": run_base(stages, inner_base(stages, base), problems, workdir)}

    def run(arm: str, params: Params, edits: Edits) -> None:
        label = f"held-out, {titles[arm]}"
        arms[arm] = run_arm(stages, evaluate, problems, workdir, (arm, label), params, edits)

    run("passage", base, [[stages.task.passage_only(problem)] for problem, _ in problems])
    for name, params in policies.items():
        arm = "own" if name == "base" else name
        step = OuterStep(EVAL_STEP, f"held-out, {titles[arm]}", workdir, problems)
        _, texts = sample(stages, params, step, settings.eval.num_edits)
        run(arm, params, parse(stages, problems, texts))
    for name, edits in external.items():
        run(name, base, edits)
    summary = {
        **summarize(stages, problems, arms, external),
        "titles": titles,
        "reward_reliability": dict(reliability or {}),
        "examples": examples_of(stages.task, problems, arms),
    }
    # summary.json last: where it is, the run is done.
    write_text(os.path.join(workdir, "summary.md"), to_markdown(summary))
    write_json(os.path.join(workdir, "summary.json"), summary)
    manifest.update(workdir)
    return summary


def refuse_external(external: Mapping[str, Edits], arms: Mapping[str, Any]) -> None:
    """Refuse an external arm that cannot be one.

    Args:
      arms: the other arms, by name.

    Raises:
      ValueError: it has the name of another arm or none that a file can have, or no self-edit.
    """
    for name, edits in external.items():
        if name in TITLES or name in arms:
            raise ValueError(f"external texts {name!r}: that is the name of another arm")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise ValueError(
                f"external texts {name!r}: expected a name of letters, digits, . _ + -"
            )
        if not any(edits):
            raise ValueError(f"external texts {name!r}: none for any of the held-out problems")


def titles_of(
    stages: Stages, arms: Sequence[str] = (), external: Mapping[str, Any] = {}
) -> dict[str, str]:
    """Return what the table calls things in this task, and these arms."""
    titles = {**TITLES, **task_titles(stages.task)}
    made = {arm: titles["external" if arm in external else "objective"].format(arm) for arm in arms}
    return made | titles


def run_base(stages: Stages, params: Params, problems: Batch, workdir: str) -> ArmRuns:
    """Return what the base model answers, an inner run that trains nothing; asked once per run.

    Args:
      params: the frozen base of inner loop and answers.
    """
    edits = [[SelfEdit(problem.id, "", "", ())] for problem, _ in problems]
    runs = inner_runs(problems, edits, EVAL_STEP, [0])
    ledger = os.path.join(workdir, "eval_base.jsonl")
    outcomes = read_ledger(ledger, runs)
    if all_of(runs, outcomes):
        golds = asks_once(stages.task)
        for run, outcome in zip(runs, base_outcomes(stages, params, runs, golds), strict=True):
            if run.name not in outcomes:
                outcomes[run.name] = outcome
                append_outcome(ledger, run, outcome)
        manifest.update(workdir)
    return ArmRuns(edits, outcomes)


def run_arm(
    stages: Stages,
    evaluate: Evaluate,
    problems: Batch,
    workdir: str,
    arm: tuple[str, str],
    params: Params,
    edits: Edits,
) -> ArmRuns:
    """Apply an arm's self-edits to a policy and examine what becomes of it.

    Args:
      arm: its name, and what people see of it.
    """
    name, label = arm
    runs = inner_runs(problems, edits, EVAL_STEP, range(stages.settings.eval.num_seeds))
    ledger = os.path.join(workdir, f"eval_{name}.jsonl")
    examination = Examination(partial(all_of, runs), ledger, label, asks_once(stages.task))
    return ArmRuns(edits, evaluate(stages, inner_base(stages, params), examination))


def summarize(
    stages: Stages, problems: Batch, arms: Mapping[str, ArmRuns], external: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the numbers of summary.json: means, paired differences, and every problem's."""
    held, seed = stages.settings.eval, stages.settings.seed
    scores = scores_of(problems, arms)
    draw = {"num_samples": held.num_bootstrap, "seed": seed}
    stated = [read_pair(text, list(arms)) for text in held.primary]  # None: not in this table
    pairs = [*filter(None, stated), *pairs_of([*arms], external)]
    by_problem = {
        f"{score}_by_problem": {
            problem.id: {
                arm: float(values[p]) for arm, values in found.items() if np.isfinite(values[p])
            }
            for p, (problem, _) in enumerate(problems)
        }
        for score, found in scores.items()
    }
    return {
        "num_problems": len(problems),
        "num_questions": sum(len(exam.questions) for _, exam in problems),
        "num_edits": held.num_edits,
        "num_seeds": held.num_seeds,
        "rejected_self_edits": {
            name: sum(isinstance(edit, Rejected) for row in arm.edits for edit in row)
            for name, arm in arms.items()
            if name not in ("base", "passage")
        },
        "not_finite": {name: bad for name, arm in arms.items() if (bad := _num_bad(name, arm))},
        "arms": bootstrap(scores, **draw),
        "differences": compare_pairs(scores, list(dict.fromkeys(pairs)), **draw),
        "primary": [
            {"stated": text, "pair": pair, "score": held.primary_score}
            for text, pair in zip(held.primary, stated, strict=True)
        ],
        **by_problem,
    }


def _num_bad(name: str, arm: ArmRuns) -> int:
    runs = () if name == "base" else arm.outcomes.values()
    return sum(map(_is_lost, runs))


def scores_of(problems: Batch, arms: Mapping[str, ArmRuns]) -> Scores:
    """Return each arm's scores of each problem: the mean over its self-edits of that over seeds.

    A rejected self-edit, or one whose training was not finite, answered nothing: in accuracy it
    counts as 0. In log-likelihood it counts as the base model's score of the problem, which is the
    model that is left without it. Where an arm has no self-edit for a problem, or no log-likelihood
    was measured (in a ledger of an older version), the score is nan.
    """
    found: Scores = {score: {} for score in SCORES}
    base = arms["base"].outcomes
    for name, arm in arms.items():
        accuracy, dense = np.full((2, len(problems)), np.nan)
        for p, (problem, _) in enumerate(problems):
            left = base[problem.id, 0, 0]
            if name == "base":
                accuracy[p], dense[p] = left.accuracy, _number(left.log_likelihood)
            elif row := arm.edits[p]:
                seeds = [outcomes_of(problem.id, r, arm.outcomes) for r in range(len(row))]
                accuracy[p] = np.mean([_accuracy(outcomes) for outcomes in seeds])
                dense[p] = np.mean(
                    [_log_likelihood(outcomes, left.log_likelihood) for outcomes in seeds]
                )
        found["accuracy"][name], found["log_likelihood"][name] = accuracy, dense
    if all(np.isnan(values).all() for values in found["log_likelihood"].values()):
        del found["log_likelihood"]
    return found


def _accuracy(outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([o.accuracy if o.finite else 0.0 for o in outcomes] or [0.0]))


def _log_likelihood(outcomes: Sequence[Outcome], left: float | None) -> float:
    """Return the mean over the seeds of a self-edit; `left` is that of the base model."""
    values = [_number(left if _is_lost(one) else one.log_likelihood) for one in outcomes]
    return float(np.mean(values or [_number(left)]))


def _is_lost(one: Outcome) -> bool:
    """Return whether a training, or what it made of the gold answers, was not finite."""
    measured = one.log_likelihood is not None
    return not one.finite or measured and not np.isfinite(one.log_likelihood)


def _number(value: float | None) -> float:
    return value if value is not None and np.isfinite(value) else np.nan
