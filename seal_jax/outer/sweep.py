"""A sweep: self-edits applied under many settings of the inner loop, by successive halving.

    for round: every setting that competes, on more passages than before
      for group of settings that one compiled program serves:
        self-edits  = the base model's, written once for all settings of a style
        outcomes   += evaluate(self-edits x settings)  # one population
      the better half goes on

What decides is the dense score: the mean log-likelihood of the gold answers to questions about the
passage. Accuracy is beside it, and both for questions about other passages, which tell what a
setting makes the model forget. Of a passage and a self-edit all settings share the random numbers
(the adapter's first values, the order of texts), so differences between settings are paired.

References:
  Jamieson and Talwalkar, Non-stochastic Best Arm Identification, arXiv 1502.07943.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from seal_jax.hosts import manifest
from seal_jax.hosts.console import say
from seal_jax.hosts.exchange import ask_first
from seal_jax.hosts.files import read_json, write_json
from seal_jax.keys import TUNE_STEP
from seal_jax.outer.answers import baseline_logp, baseline_marks
from seal_jax.outer.comparison import Evaluate
from seal_jax.outer.ledger import Outcomes
from seal_jax.outer.problems import Batch, OuterStep
from seal_jax.outer.rewards import ELSEWHERE, Outcome
from seal_jax.outer.stages import Edits, Stages, inner_base, parse, sample
from seal_jax.outer.waves import Examination, InnerRun, Others, all_of
from seal_jax.tasks import field_names
from seal_jax.tasks.task import Exam, Rejected, SelfEdit
from seal_jax.types import Settings


class Setting(NamedTuple):
    """One way to train the adapters."""

    overrides: tuple[str, ...]  # what it changes of the config
    settings: Settings


class Sweep(NamedTuple):
    """What is tried, and on what."""

    settings: Sequence[Setting]
    own: int  # which of them is the config's; it stays to the end, as all are compared with it
    problems: Batch  # N
    others: Batch  # passages about which adapted models are asked beside
    num_edits: int  # K, for each passage
    num_others: int  # questions about other passages, for each inner run
    folder: str

    @property
    def rounds(self) -> list[tuple[int, int]]:
        return halving(len(self.settings), len(self.problems))


class Scores(NamedTuple):
    """What is known of one setting, or of the base model, on one passage."""

    problem: str
    accuracy: float
    log_likelihood: float  # -inf where a training was not finite
    accuracy_elsewhere: float
    log_likelihood_elsewhere: float
    num_steps: float = 0.0  # of an inner run
    num_rejected: int = 0  # self-edits


class Found(NamedTuple):
    """What a sweep has found."""

    base: list[Scores]  # [N] the base model as it is
    settings: list[list[Scores]]  # of each setting, of the passages that it has seen
    groups: list[int]  # which program trained it
    best: int


def halving(num_settings: int, num_problems: int) -> list[tuple[int, int]]:
    """Return rounds (settings that still compete, passages that each has seen by its end).

    Half as many settings each time on twice as many passages, up to all of them, as long as two
    settings are left; the first round has two passages or more.
    """
    halvings = 0
    while num_settings > 2 ** (halvings + 1) and num_problems >= 2 ** (halvings + 2):
        halvings += 1
    return [
        (-(-num_settings // 2**i), -(-num_problems // 2 ** (halvings - i)))
        for i in range(halvings + 1)
    ]


def num_runs(sweep: Sweep) -> int:
    """Return how many inner runs the sweep makes at most: no self-edit is rejected."""
    runs, before = 0, 0
    for count, seen in sweep.rounds:
        own = count < len(sweep.settings)  # it may be beside those that compete
        runs += (count + own) * (seen - before)
        before = seen
    return runs * sweep.num_edits


def program_of(settings: Settings) -> Settings:
    """Return the settings without what is data of the compiled programs."""
    inner = settings.inner._replace(learning_rate=0.0, num_epochs=0, schedule="", batch_size=0)
    if "batch_size" in field_names(settings.task["name"]):  # the task's texts depend on it
        inner = inner._replace(batch_size=settings.inner.batch_size)
    return settings._replace(inner=inner)


def groups_of(settings: Sequence[Setting]) -> list[list[int]]:
    """Return which settings share their programs and their self-edits, in order."""
    groups: list[tuple[Settings, list[int]]] = []
    for i, one in enumerate(settings):
        program = program_of(one.settings)
        for known, members in groups:
            if known == program:
                members.append(i)
                break
        else:
            groups.append((program, [i]))
    return [members for _, members in groups]


def stages_settings(settings: Sequence[Setting], members: Sequence[int]) -> Settings:
    """Return the settings of the stages that serve a group.

    The largest batch decides which self-edits are too long, so that all settings share the same.
    """
    one = settings[members[0]].settings
    size = max(settings[i].settings.inner.batch_size for i in members)
    return one._replace(inner=one.inner._replace(batch_size=size))


def run_sweep(sweep: Sweep, stages: Sequence[Stages], evaluate: Evaluate) -> Found:
    """Try the settings, round by round, and return what each has achieved.

    The same call goes on where it was interrupted: each round depends on those before it alone.

    Args:
      stages: of each group, see `groups_of`, by its `stages_settings`.

    Raises:
      ValueError: the self-edits choose themselves what the sweep is over.
      Stopped: a process was told to end.
    """
    groups = groups_of(sweep.settings)
    group_of = [g for i in range(len(sweep.settings)) for g, m in enumerate(groups) if i in m]
    base = base_scores(sweep, stages[group_of[sweep.own]])
    scores: list[list[Scores]] = [[] for _ in sweep.settings]
    competing, before = list(range(len(sweep.settings))), 0
    for number, (count, seen) in enumerate(sweep.rounds):
        competing = best_of(scores, competing, count)
        tried = sorted({*competing, sweep.own})
        label = f"round {number + 1} of {len(sweep.rounds)}"
        say(f"{label}: {len(tried)} settings on passages {before + 1} to {seen}")
        for g, members in enumerate(groups):
            present = [i for i in members if i in tried]
            if not present:
                continue
            if len(groups) > 1:
                say(f"  program {g + 1} of {len(groups)}: {len(present)} settings")
            edits = write_edits(sweep, stages[g], range(before, seen), g, label)
            runs = list(runs_of(sweep, present, edits, range(before, seen)))
            ledger = os.path.join(sweep.folder, "tune_runs.jsonl")
            examination = Examination(partial(all_of, runs), ledger, label, golds=True)
            params = inner_base(stages[g], stages[g].model.params)
            outcomes = evaluate(stages[g], params, examination)
            for i in present:
                scores[i] += _scores(sweep, i, edits, outcomes, range(before, seen), base)
        before = seen
    competing = sorted({*competing, sweep.own})
    return Found(base, scores, group_of, best_of(scores, competing, 1)[0])


def best_of(scores: Sequence[Sequence[Scores]], among: Sequence[int], count: int) -> list[int]:
    """Return the best of some settings by their dense score; without scores, in their order."""
    worth = [_worth(scores[i]) for i in among]
    order = np.argsort([-x for x in worth], kind="stable")[:count]
    return sorted(among[i] for i in order) if count > 1 else [among[order[0]]]


def _worth(scores: Sequence[Scores]) -> float:
    return float(np.mean([one.log_likelihood for one in scores])) if scores else 0.0


def elsewhere(sweep: Sweep, p: int) -> Others:
    """Return the exams about other passages: the first question of each, other ones for each `p`.

    They have another title, where there are such.
    """
    here = sweep.problems[p][0]
    pool = [pair for pair in sweep.others if pair[0].title != here.title]
    pool = pool or [pair for pair in sweep.others if pair[0].id != here.id]
    count = min(sweep.num_others, len(pool))
    chosen = [pool[(p * count + i) % len(pool)] for i in range(count)]
    return tuple((ELSEWHERE, problem, _first(exam)) for problem, exam in chosen)


def _first(exam: Exam) -> Exam:
    return exam._replace(questions=exam.questions[:1])


def base_scores(sweep: Sweep, stages: Stages) -> list[Scores]:
    """Return what the base model achieves without an adapter."""
    params = inner_base(stages, stages.model.params)
    posed = [*sweep.problems, *[(problem, _first(exam)) for problem, exam in sweep.others]]
    num = len(sweep.problems)
    accuracy = [float(np.mean(x)) for x in baseline_marks(stages, params, posed)]
    logp = [float(np.mean(x)) for x in baseline_logp(stages, params, posed)]
    place = {problem.id: num + i for i, (problem, _) in enumerate(sweep.others)}
    found = []
    for p, (problem, _) in enumerate(sweep.problems):
        others = [place[other.id] for _, other, _ in elsewhere(sweep, p)]
        right, likely = (float(np.mean([x[i] for i in others])) for x in (accuracy, logp))
        found.append(Scores(problem.id, accuracy[p], logp[p], right, likely))
    return found


def write_edits(
    sweep: Sweep, stages: Stages, places: range, group: int, label: str
) -> list[list[SelfEdit | Rejected]]:
    """Return the base model's self-edits [P][K] on some passages; they are written once.

    Raises:
      ValueError: a self-edit chooses what the sweep is over.
    """
    batch = [sweep.problems[p] for p in places]
    like = texts_of_group(sweep, group)
    path = os.path.join(sweep.folder, f"tune_texts_{like}_{places.start}.json")
    found = ask_first("self-edits", lambda: read_json(path))
    if found is None:
        step = OuterStep(TUNE_STEP, label, sweep.folder, batch)
        _, texts = sample(stages, stages.model.params, step, sweep.num_edits)
        write_json(path, {"texts": texts, "problems": [problem.id for problem, _ in batch]})
        manifest.update(sweep.folder)
    else:
        texts = found["texts"]
    edits = parse(stages, batch, texts)
    _refuse_chosen(sweep, edits)
    return edits


def texts_of_group(sweep: Sweep, group: int) -> int:
    """Return the first group whose self-edits are those of this one."""
    groups = groups_of(sweep.settings)
    asked = [
        (sweep.settings[members[0]].settings.task, sweep.settings[members[0]].settings.sample)
        for members in groups
    ]
    return asked.index(asked[group])


def _refuse_chosen(sweep: Sweep, edits: Edits) -> None:
    """Refuse a sweep over what the task's self-edits say themselves."""
    inner = [one.settings.inner for one in sweep.settings]
    for name in ("learning_rate", "num_epochs"):
        chosen = [
            edit
            for row in edits
            for edit in row
            if isinstance(edit, SelfEdit) and getattr(edit, name) is not None
        ]
        if chosen and len({getattr(one, name) for one in inner}) > 1:
            task = sweep.settings[0].settings.task["name"]
            raise ValueError(
                f"inner.{name}: the self-edits of task {task!r} choose their own, as that on"
                f" {chosen[0].problem_id}: {getattr(chosen[0], name)}; a sweep over it would"
                " change nothing"
            )


def runs_of(sweep: Sweep, tried: Sequence[int], edits: Edits, places: range) -> Iterator[InnerRun]:
    inner = [one.settings.inner for one in sweep.settings]
    if len({one.schedule for one in inner}) == 1:  # the program that training has, too
        inner = [one._replace(schedule="") for one in inner]
    for row, p in zip(edits, places, strict=True):
        problem, exam = sweep.problems[p]
        others = elsewhere(sweep, p)
        for r, edit in enumerate(row):
            if isinstance(edit, Rejected):
                continue
            for i in tried:
                name = f"{i}:{problem.id}", r, 0
                yield InnerRun(name, TUNE_STEP, problem, exam, edit, others, inner[i])


def _scores(
    sweep: Sweep, i: int, edits: Edits, outcomes: Outcomes, places: range, base: Sequence[Scores]
) -> list[Scores]:
    """Return what a setting has achieved on some passages: means over its self-edits.

    A rejected self-edit trains nothing: it counts as the base model. A setting with a training that
    was not finite is worth nothing.
    """
    found = []
    inner = sweep.settings[i].settings.inner
    for row, p in zip(edits, places, strict=True):
        rows, steps, problem = [], [], sweep.problems[p][0]
        for r, edit in enumerate(row):
            if isinstance(edit, Rejected):
                rows.append(base[p][1:5])
                continue
            rows.append(_of_outcome(outcomes[f"{i}:{problem.id}", r, 0]))
            size = edit.num_epochs or inner.num_epochs
            steps.append(size * -(-len(edit.training_texts) // inner.batch_size))
        means = np.mean(rows, axis=0).tolist()
        found.append(
            Scores(problem.id, *means, float(np.mean(steps or [0])), len(row) - len(steps))
        )
    return found


def _of_outcome(outcome: Outcome) -> tuple[float, float, float, float]:
    score, beside = outcome.log_likelihood, outcome.log_likelihood_elsewhere
    assert score is not None and beside is not None  # `golds` asks for them
    if not (outcome.finite and np.isfinite(score) and np.isfinite(beside)):
        return 0.0, -np.inf, 0.0, -np.inf
    return outcome.accuracy, score, outcome.others[ELSEWHERE], beside
