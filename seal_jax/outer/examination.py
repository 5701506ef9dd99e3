"""What the rewards of an outer step are made of, and which inner runs it still needs.

Beside the problem's own exam, an adapted model may be asked questions that the policy wrote with
the passage in context (no labels needed), and questions of earlier problems (was anything lost?).
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from seal_jax import keys
from seal_jax.hosts.console import progress
from seal_jax.hosts.exchange import ask_first, exchange_shares, spread
from seal_jax.hosts.files import read_json, remove, write_json
from seal_jax.models.thoughts import read
from seal_jax.objectives.objective import Rewards
from seal_jax.outer.answers import baseline_accuracy
from seal_jax.outer.judge import Judge, judge_all
from seal_jax.outer.ledger import Outcomes
from seal_jax.outer.problems import Batch, OuterStep
from seal_jax.outer.reliability import seed_rounds
from seal_jax.outer.rewards import EARLIER, OWN, Evidence, Outcome, reward_of
from seal_jax.outer.stages import Edit, Edits, Stages, inner_base, thoughts_of, write
from seal_jax.outer.waves import Examination, InnerRun, Others, all_of, inner_runs
from seal_jax.tasks.task import Exam, SelfEdit, asks_itself
from seal_jax.types import Params, RewardSettings, Rollout, Settings


class Known(NamedTuple):
    """What is known of a step's self-edits beside their inner runs, as far as rewards ask."""

    lengths: np.ndarray  # f32[P R] tokens written, as a share of those allowed
    baseline: list[float]  # [P] accuracy of the unadapted policy
    others: list[Others]  # [P] exams beside each problem's own
    earlier_baseline: float  # the unadapted policy's accuracy on earlier problems; nan without
    judged: list[list[float]]  # [P][R] the judge's scores; nan where there is none


class Evaluated(NamedTuple):
    """What an outer step learned of its self-edits."""

    evidence: list[list[Evidence]]  # [P][R]
    outcomes: Outcomes
    baseline: list[float]  # [P] accuracy of the unadapted policy


class Attempts(NamedTuple):
    """A step's self-edits, and what came of them."""

    edits: Edits
    evaluated: Evaluated | None  # None where the objective needs no rewards
    rewards: Rewards
    advantages: np.ndarray  # f32[P R]; above 0 what is reinforced


def check_rewards(stages: Stages) -> None:
    """Raise ValueError now where the task cannot give what the reward's terms ask for."""
    settings = stages.settings
    if "self_questions" in settings.reward.weights and not asks_itself(stages.task):
        raise ValueError(
            f"reward.weights has self_questions, but task {settings.task['name']!r} has no"
            " question_prompt and parse_questions (see tasks/task.py)"
        )


def look_up(
    stages: Stages, params: Params, step: OuterStep, rollout: Rollout, edits: Edits
) -> Known:
    """Return what the rewards ask for beside the inner runs.

    Args:
      params: the policy; it writes questions too, where the reward asks for them.
    """
    settings = stages.settings
    weights = settings.reward.weights
    frozen = inner_base(stages, params)
    baseline = baseline_accuracy(stages, frozen, step.batch)
    others: list[Others] = [() for _ in step.batch]
    if "self_questions" in weights:
        others = write_questions(stages, params, step)
    earlier_baseline = np.nan
    if "regression" in weights and step.earlier:
        seed = [settings.seed, step.number]
        chosen = choose_earlier(step.earlier, settings.reward.num_earlier, seed)
        # Of one question each, so that the mean over them is the accuracy.
        asked = [(problem, exam) for _, problem, exam in chosen]
        earlier_baseline = float(np.mean(baseline_accuracy(stages, frozen, asked)))
        others = [(*group, *chosen) for group in others]
    judged = judge_edits(stages, step, edits)
    written = np.asarray(rollout.loss_mask).sum(axis=1).reshape(len(edits), -1)
    return Known(written / settings.sample.most_tokens, baseline, others, earlier_baseline, judged)


def gather(step: OuterStep, edits: Edits, known: Known, outcomes: Outcomes) -> list[list[Evidence]]:
    """Return the evidence [P][R] for the rewards, as far as inner runs have ended."""
    return [
        [
            Evidence(
                outcomes=outcomes_of(edit.problem_id, r, outcomes),
                text=edit.text,
                passage=step.batch[p][0].passage,
                length=float(known.lengths[p, r]),
                baseline=known.baseline[p],
                earlier_baseline=known.earlier_baseline,
                judged=known.judged[p][r],
            )
            for r, edit in enumerate(row)
        ]
        for p, row in enumerate(edits)
    ]


def runs_to_make(
    settings: Settings, step: OuterStep, edits: Edits, known: Known, outcomes: Outcomes
) -> list[InnerRun]:
    """Return the inner runs of the first round that has not ended; none where all have.

    There is one round, or several where seeds are spent on those that compete
    (`reward.adaptive_seeds`). A round depends only on the outcomes of those before it.
    """
    rounds = [(len(edits[0]), settings.inner.num_seeds)]
    if settings.reward.adaptive_seeds:
        rounds = seed_rounds(*rounds[0])
    done = 0
    for count, num_seeds in rounds:
        before = {name: outcome for name, outcome in outcomes.items() if name[2] < done}
        evidence = gather(step, edits, known, before)
        competing = best_edits(evidence, edits, count, settings.reward.weights)
        seeds = range(done, num_seeds)
        runs = inner_runs(step.batch, competing, step.number, seeds, known.others)
        if all_of(runs, outcomes):
            return runs
        done = num_seeds
    return []


def reward(edits: Edits, evaluated: Evaluated | None, section: RewardSettings) -> Rewards:
    """Return the rewards [P R] of self-edits; where nothing was evaluated, all nan.

    What was rejected, or whose training was not finite, earns `section.rejected`, and never more
    than the worst of its problem's other self-edits: rewards may all be negative.
    """
    keepable = np.array([[isinstance(edit, SelfEdit) for edit in row] for row in edits])
    values = np.full(keepable.shape, np.nan, np.float32)
    for p, row in enumerate(evaluated.evidence if evaluated else ()):
        for r, found in enumerate(row):
            values[p, r] = reward_of(found, section.weights, section.rejected)
            keepable[p, r] &= all(outcome.finite for outcome in found.outcomes)
        applied = values[p][keepable[p] & ~np.isnan(values[p])]
        values[p] = np.where(
            keepable[p], values[p], np.minimum(values[p], min(applied, default=np.inf))
        )
    return Rewards(values, keepable)


def examination_of(settings: Settings, step: OuterStep, edits: Edits, known: Known) -> Examination:
    """Return what is to be examined in a step."""
    to_make = partial(runs_to_make, settings, step, edits, known)
    golds = "log_likelihood" in settings.reward.weights
    return Examination(to_make, pending(step.folder, step.number), step.label, golds)


def outcomes_of(problem_id: str, r: int, outcomes: Outcomes) -> list[Outcome]:
    """Return the outcomes of one self-edit, seed by seed."""
    names = [name for name in outcomes if name[:2] == (problem_id, r)]
    return [outcomes[name] for name in sorted(names)]


def best_edits(
    evidence: Sequence[Sequence[Evidence]], edits: Edits, count: int, weights: Mapping[str, float]
) -> list[list[Edit | None]]:
    """Return the edits with all but the `count` best of each problem (so far) made None."""
    chosen: list[list[Edit | None]] = []
    for found, row in zip(evidence, edits, strict=True):
        worth = [_worth(one, edit, weights) for one, edit in zip(found, row, strict=True)]
        best = np.argsort(-np.array(worth), kind="stable")[:count]
        chosen.append([edit if r in best else None for r, edit in enumerate(row)])
    return chosen


def _worth(evidence: Evidence, edit: Edit, weights: Mapping[str, float]) -> float:
    if not isinstance(edit, SelfEdit):
        return -np.inf
    if not evidence.outcomes:
        return 0.0  # nothing is known: in the order of writing
    value = reward_of(evidence, weights, -np.inf)
    return -np.inf if np.isnan(value) else value


def write_questions(stages: Stages, params: Params, step: OuterStep) -> list[Others]:
    """Let the policy write questions on each problem, with the passage in context."""
    task, seed = stages.task, stages.settings.seed
    assert asks_itself(task)  # see `check_rewards`
    prompts = [task.question_prompt(problem) for problem, _ in step.batch]
    paths = [
        (seed, keys.QUESTIONS, step.number, keys.number_of(problem.id), 0)
        for problem, _ in step.batch
    ]
    _, texts = write(stages, params, prompts, paths, f"{step.label}: questions")
    groups: list[Others] = []
    for (problem, _), text in zip(step.batch, texts, strict=True):
        text = read(thoughts_of(stages), text).text
        questions = task.parse_questions(problem, text)[: stages.settings.reward.num_questions]
        exam = Exam(problem.id, tuple(questions))
        groups.append(((OWN, problem, exam),) if questions else ())
    return groups


def choose_earlier(problems: Batch, count: int, seed: list[int]) -> Others:
    """Return `count` questions of earlier problems, drawn at random."""
    rng = np.random.default_rng([*seed, keys.EARLIER])
    pool = [(problem, exam, q) for problem, exam in problems for q in exam.questions]
    chosen = rng.permutation(len(pool))[:count].tolist()
    return tuple(
        (EARLIER, problem, Exam(exam.problem_id, (question,)))
        for problem, exam, question in (pool[i] for i in chosen)
    )


def judge_edits(stages: Stages, step: OuterStep, edits: Edits) -> list[list[float]]:
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
    path = judged(step.folder, step.number)
    found: dict[str, Any] | None = ask_first("scores of the judge", lambda: read_json(path))
    if found is None or found.get("texts") != texts:
        settings = Judge(section.judge_url, section.judge_model, num_tries=section.judge_tries)
        pairs = [
            (step.batch[p][0].passage, text) for (p, _), text in zip(asked, texts, strict=True)
        ]

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
    """Delete what was kept until a step's checkpoint is on disk."""
    for path in (pending(folder, step), judged(folder, step)):
        remove(path)
