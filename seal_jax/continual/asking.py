"""What models know that learn side by side: their answers, and how likely the right ones are."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from seal_jax.continual.remedies.remedy import Learner, Work
from seal_jax.inner.texts import Text
from seal_jax.outer import answers
from seal_jax.outer.problems import Batch
from seal_jax.outer.stages import Stages, exam_prompts, gold_texts, thoughts_of
from seal_jax.tasks.task import marks_of
from seal_jax.types import Adapters, Params


class Known(NamedTuple):
    """What each model knows of some problems, f64[S n]."""

    accuracy: np.ndarray  # share of the questions answered rightly
    log_likelihood: np.ndarray  # of the gold answers, the mean log p per token


class Asked(NamedTuple):
    """Who answers what: adapter i (of none, model i) is asked group i."""

    params: Params
    adapters: Adapters | None
    # Of each sequence and question, which group it goes to.
    groups: list[list[int]]
    num_groups: int


def ask(work: Work, learner: Learner, posed: Sequence[Batch]) -> Known:
    """Ask each model all questions of its problems: posed[s] [n] are those of sequence s."""
    stages = work.stages
    prompts = [[exam_prompts(stages, *pair) for pair in batch] for batch in posed]
    golds = [[gold_texts(stages, *pair) for pair in batch] for batch in posed]
    asked_of = _flat(prompts)
    asked = who_answers(work, learner, posed, list(map(len, asked_of)))
    given = _by_group(asked, asked_of, lambda groups: _answer(stages, asked, groups))
    logps = _by_group(asked, _flat(golds), lambda groups: _score(stages, asked, groups))
    accuracy, likelihood = [], []
    for s, batch in enumerate(posed):
        texts, values = iter(given[s]), iter(logps[s])
        marks = [
            marks_of(stages.task, *pair, [next(texts) for _ in prompts[s][i]])
            for i, pair in enumerate(batch)
        ]
        accuracy.append([float(np.mean(x)) for x in marks])
        likelihood.append([float(np.mean([next(values) for _ in x])) for x in golds[s]])
    return Known(np.array(accuracy), np.array(likelihood))


def who_answers(
    work: Work, learner: Learner, posed: Sequence[Batch], counts: Sequence[int]
) -> Asked:
    """Return which model answers each question: its sequence's, or an adapter of a bank.

    Args:
      counts: questions of each sequence.
    """
    for name, remedy in work.remedies.items():
        if remedy.route is not None:
            return remedy.route(work, learner, learner.stores[name], posed)
    groups = [[s] * count for s, count in enumerate(counts)]
    return Asked(learner.answering, None, groups, len(groups))


def perplexity(work: Work, learner: Learner, texts: Sequence[Text]) -> np.ndarray:
    """Return each model's perplexity f64[S] of some texts, all tokens of which count alike."""
    weights = np.array([sum(text.loss_mask) for text in texts], np.float64)
    asked = Asked(learner.answering, None, [], work.num)
    values = np.array(_score(work.stages, asked, [list(texts)] * work.num))
    return np.exp(-(values * weights).sum(axis=1) / weights.sum())


def text_scores(
    work: Work,
    params: Params,
    texts: Sequence[Sequence[Text]],
    adapters: Adapters | None = None,
) -> list[list[float]]:
    """Return the mean log p per token of texts under each sequence's model, or each adapter on it.

    Args:
      texts: [S][any]; of adapters [S * G], G in a row for each sequence, [S * G][any].
    """
    return _score(work.stages, Asked(params, adapters, [], len(texts)), texts)


def _answer(stages: Stages, asked: Asked, prompts: Sequence[Sequence[Sequence[int]]]) -> list:
    settings, thoughts = stages.settings.answer, thoughts_of(stages)
    return answers.ask(
        stages.model, asked.params, asked.adapters, prompts, stages.mesh, settings, thoughts
    )


def _score(stages: Stages, asked: Asked, texts: Sequence[Sequence[Text]]) -> list[list[float]]:
    if not any(texts):
        return [[] for _ in texts]
    most = stages.settings.answer.max_rows
    return answers.mean_logp(
        stages.model, asked.params, asked.adapters, texts, mesh=stages.mesh, max_rows=most
    )


def _flat(items: Sequence[Sequence[Sequence]]) -> list[list]:
    return [list(chain.from_iterable(batch)) for batch in items]


def _by_group(
    asked: Asked, items: Sequence[Sequence], function: Callable[[list[list]], list[list]]
) -> list[list]:
    """Apply a function of groups to items [S][q], and return its results in the items' order."""
    groups: list[list] = [[] for _ in range(asked.num_groups)]
    for row, places in zip(items, asked.groups, strict=True):
        for item, group in zip(row, places, strict=True):
            groups[group].append(item)
    found: list[Iterator] = [iter(x) for x in function(groups)]
    return [[next(found[group]) for group in places] for places in asked.groups]
