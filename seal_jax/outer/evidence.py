"""From parsed self-edits to the evidence for their rewards: exams, inner runs, a judge.

Beside the problem's own exam, an adapted model may be asked questions that the policy wrote with
the passage in context (no labels needed), and questions of earlier problems (was anything lost?).
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from seal_jax import keys
from seal_jax.hosts.console import progress
from seal_jax.hosts.exchange import ask_first, exchange_shares, spread
from seal_jax.hosts.files import read_json, remove, write_json
from seal_jax.outer.evaluate import Run
from seal_jax.outer.judge import Judge, judge_all
from seal_jax.outer.reliability import seed_rounds
from seal_jax.outer.rewards import EARLIER, OWN, Evidence, Outcome, reward_of
from seal_jax.outer.stages import Edit, Stages, baseline_accuracy, inner_base, inner_runs, write
from seal_jax.tasks.task import Exam, Problem, SelfEdit
from seal_jax.types import Params, Rollout

Others = tuple[tuple[str, Problem, Exam], ...]  # exams beside a problem's own, by their kind


class Evaluated(NamedTuple):
    """What an outer step learned of its self-edits."""

    evidence: list[list[Evidence]]  # [P][R]
    runs: list[Run]
    outcomes: dict[tuple, Outcome]
    baseline: list[float]  # [P] accuracy of the unadapted policy


def check_rewards(stages: Stages) -> None:
    """Raise ValueError now where the task cannot give what the reward's terms ask for."""
    weights, task = stages.settings.reward.weights, stages.task
    if "self_questions" in weights and not hasattr(task, "question_prompt"):
        raise ValueError(
            f"reward.weights has self_questions, but task {stages.settings.task['name']!r} has no"
            " question_prompt and parse_questions (see tasks/task.py)"
        )


def evaluate_edits(
    stages: Stages,
    params: Params,
    batch: Sequence[tuple[Problem, Exam]],
    earlier: Sequence[tuple[Problem, Exam]],
    rollout: Rollout,
    edits: Sequence[Sequence[Edit]],
    step: int,
    *,
    folder: str,
    label: str,
    keep: Callable | None = None,
) -> Evaluated:
    """Apply and examine every self-edit of an outer step, under its seeds.

    Args:
      params: the policy; it writes questions too, where the reward asks for them.
      earlier: problems of the steps before this one.
      folder: of the run; finished inner runs and the judge's scores are kept there until the
        step's checkpoint is on disk.
    """
    settings, weights = stages.settings, stages.settings.reward.weights
    frozen = inner_base(stages, params)
    baseline = baseline_accuracy(stages, frozen, batch)
    others, earlier_baseline = other_exams(stages, params, frozen, batch, earlier, step, label)
    judged = judge_edits(stages, batch, edits, step, folder)
    lengths = rollout.loss_mask.sum(axis=1).reshape(len(edits), -1) / settings.sample.max_tokens

    def gather(outcomes: dict[tuple, Outcome]) -> list[list[Evidence]]:
        return [
            [
                Evidence(
                    outcomes=outcomes_of(edit.problem_id, r, outcomes),
                    text=edit.text,
                    passage=batch[p][0].passage,
                    length=float(lengths[p, r]),
                    baseline=baseline[p],
                    earlier_baseline=earlier_baseline,
                    judged=judged[p][r],
                )
                for r, edit in enumerate(row)
            ]
            for p, row in enumerate(edits)
        ]

    rounds = [(len(edits[0]), settings.inner.num_seeds)]
    if settings.reward.adaptive_seeds:
        rounds = seed_rounds(*rounds[0])
    ledger = pending(folder, step)
    runs: list[Run] = []
    outcomes: dict[tuple, Outcome] = {}
    done = 0
    for count, num_seeds in rounds:
        competing = best_edits(gather(outcomes), edits, count, weights)
        more = inner_runs(batch, competing, step, range(done, num_seeds), others)
        outcomes |= stages.evaluate(frozen, more, ledger, label, keep)
        runs, done = [*runs, *more], num_seeds
    return Evaluated(gather(outcomes), runs, outcomes, baseline)


def other_exams(
    stages: Stages,
    params: Params,
    frozen: Params,
    batch: Sequence,
    earlier: Sequence,
    step: int,
    label: str,
) -> tuple[list[Others], float]:
    """Return each problem's exams beside its own, as far as the reward asks for them, and the
    unadapted policy's accuracy on those of earlier problems (nan without)."""
    settings = stages.settings
    others: list[Others] = [() for _ in batch]
    if "self_questions" in settings.reward.weights:
        others = write_questions(stages, params, batch, step, label)
    if "regression" not in settings.reward.weights or not earlier:
        return others, np.nan
    chosen = choose_earlier(earlier, settings.reward.num_earlier, [settings.seed, step])
    # Of one question each, so that the mean over them is the accuracy.
    asked = [(problem, exam) for _, problem, exam in chosen]
    accuracy = float(np.mean(baseline_accuracy(stages, frozen, asked)))
    return [(*group, *chosen) for group in others], accuracy


def outcomes_of(problem_id: str, r: int, outcomes: dict[tuple, Outcome]) -> list[Outcome]:
    """Return the outcomes of one self-edit, seed by seed."""
    names = [name for name in outcomes if name[:2] == (problem_id, r)]
    return [outcomes[name] for name in sorted(names)]


def best_edits(
    evidence: Sequence[Sequence[Evidence]],
    edits: Sequence[Sequence[Edit]],
    count: int,
    weights: dict[str, float],
) -> list[list[Edit | None]]:
    """Return the edits with all but the `count` best of each problem (so far) made None."""

    def worth(p: int, r: int) -> float:
        if not isinstance(edits[p][r], SelfEdit):
            return -np.inf
        if not evidence[p][r].outcomes:
            return 0.0  # nothing is known: in the order of writing
        value = reward_of(evidence[p][r], weights, -np.inf)
        return -np.inf if np.isnan(value) else value

    chosen: list[list[Edit | None]] = []
    for p, row in enumerate(edits):
        best = sorted(range(len(row)), key=lambda r, p=p: -worth(p, r))[:count]
        chosen.append([edit if r in best else None for r, edit in enumerate(row)])
    return chosen


def write_questions(
    stages: Stages, params: Params, batch: Sequence, step: int, label: str
) -> list[Others]:
    """Let the policy write questions on each problem, with the passage in context."""
    task = stages.task
    prompts = [task.question_prompt(problem) for problem, _ in batch]
    paths = [
        (stages.settings.seed, keys.QUESTIONS, step, keys.number_of(problem.id), 0)
        for problem, _ in batch
    ]
    _, texts = write(stages, params, prompts, paths, f"{label}: questions")
    groups: list[Others] = []
    for (problem, _), text in zip(batch, texts, strict=True):
        questions = task.parse_questions(problem, text)[: stages.settings.reward.num_questions]
        exam = Exam(problem.id, tuple(questions))
        groups.append(((OWN, problem, exam),) if questions else ())
    return groups


def choose_earlier(problems: Sequence[tuple[Problem, Exam]], count: int, seed: list[int]) -> Others:
    """Return `count` questions of earlier problems, drawn at random."""
    rng = np.random.default_rng([*seed, keys.EARLIER])
    pool = [(problem, exam, q) for problem, exam in problems for q in exam.questions]
    chosen = rng.permutation(len(pool))[:count].tolist()
    return tuple(
        (EARLIER, problem, Exam(exam.problem_id, (question,)))
        for problem, exam, question in (pool[i] for i in chosen)
    )


def judge_edits(
    stages: Stages, batch: Sequence, edits: Sequence[Sequence[Edit]], step: int, folder: str
) -> list[list[float]]:
    """Return the judge's scores [P][R]; nan where there is none. They are asked for once."""
    section = stages.settings.reward
    scores = [[np.nan] * len(row) for row in edits]
    if "judge" not in section.weights:
        return scores
    asked = [
        (p, r)
        for p, row in enumerate(edits)
        for r, edit in enumerate(row)
        if isinstance(edit, SelfEdit)
    ]
    texts = [edits[p][r].text for p, r in asked]
    path = judged(folder, step)
    found = ask_first("scores of the judge", lambda: read_json(path))
    if found is None or found["texts"] != texts:
        settings = Judge(section.judge_url, section.judge_model, num_tries=section.judge_tries)
        pairs = [(batch[p][0].passage, text) for (p, _), text in zip(asked, texts, strict=True)]

        def ask(mine: list[int]) -> list[float | None]:
            bar = progress(len(mine), "judge", "self-edit")
            scores = judge_all(settings, [pairs[i] for i in mine], show=bar.update)
            bar.close()
            return scores

        owners = spread([len(passage) + len(text) for passage, text in pairs])
        found = {"texts": texts, "scores": exchange_shares("judge", owners, ask)}
        write_json(path, found)
    for (p, r), score in zip(asked, found["scores"], strict=True):
        scores[p][r] = np.nan if score is None else score
    return scores


def pending(folder: str, step: int) -> str:
    """Return the ledger of a step's finished inner runs, kept until its checkpoint is on disk."""
    return os.path.join(folder, f"pending_{step}.jsonl")


def judged(folder: str, step: int) -> str:
    """Return the file of a step's scores by the judge, kept as long."""
    return os.path.join(folder, f"judged_{step}.json")


def drop_pending(folder: str, step: int) -> None:
    for path in (pending(folder, step), judged(folder, step)):
        remove(path)
