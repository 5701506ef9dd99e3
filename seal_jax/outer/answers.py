"""Answers of adapted models, asked without the passage, and their marks."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seal_jax import keys
from seal_jax.hosts.exchange import exchange_shares, spread
from seal_jax.inner.texts import Text
from seal_jax.models.config import ModelConfig
from seal_jax.models.logits import next_token_logp
from seal_jax.models.model import Model
from seal_jax.models.own_kernels import check_groups
from seal_jax.models.padded_lengths import bucket_of
from seal_jax.models.thoughts import Thoughts, read
from seal_jax.models.transformer import hidden_states
from seal_jax.outer.problems import Batch
from seal_jax.outer.rewards import ELSEWHERE, Outcome
from seal_jax.outer.stages import Stages, exam_prompts, gold_texts, thoughts_of
from seal_jax.outer.waves import InnerRun, Wave
from seal_jax.sampling.draw import make_settings
from seal_jax.sampling.generate import generate
from seal_jax.sampling.self_edits import make_stop, texts_of
from seal_jax.sharding import leading, to_device, to_host
from seal_jax.tasks.task import Exam, Problem, Task, marks_of, prompts_of
from seal_jax.types import Adapters, AnswerSettings, Params

Marks = list[list[float]]  # of each exam of a run, of each question: from 0 to 1


def answer(stages: Stages, params: Params, adapters: Adapters, wave: Wave) -> list[list[str]]:
    """Return each adapter's answers to the exams of its run."""
    asked = [
        [prompt for exam in place.run.exams() for prompt in exam_prompts(stages, *exam)]
        if place
        else []
        for place in wave.places
    ]
    return _ask(stages, params, adapters, asked)


def _ask(
    stages: Stages,
    params: Params,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[Sequence[int]]],
) -> list[list[str]]:
    settings, thoughts = stages.settings.answer, thoughts_of(stages)
    return ask(stages.model, params, adapters, prompts, stages.mesh, settings, thoughts)


def ask(
    model: Model,
    params: Params,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[Sequence[int]]],
    mesh: Mesh,
    settings: AnswerSettings,
    thoughts: Thoughts | None = None,
) -> list[list[str]]:
    """Return the greedy answers of adapter i (or of the base) to prompts[i].

    An answer ends before the first of the strings in `settings.stop`. The thoughts before it are
    left out, and where it ends in a thought nothing was answered: ''.
    """
    num_prompts = sum(map(len, prompts))
    samples = generate(
        model.config,
        params,
        adapters,
        prompts,
        keys.fold([(0,)] * num_prompts),
        make_settings(num_prompts, temperature=0.0),
        mesh=mesh,
        stop_ids=model.tokenizer.stop_ids,
        max_tokens=settings.most_tokens,
        max_rows=settings.max_rows,
        pad_id=model.tokenizer.pad_id,
        stop=make_stop(model.tokenizer, settings.stop, thoughts),
    )
    texts = iter(texts_of(model.tokenizer, samples, settings.stop, thoughts))
    return [[read(thoughts, next(texts)).text.strip() for _ in group] for group in prompts]


def grade(stages: Stages, wave: Wave, answers: Sequence[Sequence[str]]) -> list[Marks]:
    """Return the marks of each adapter's answers; every process grades its share."""

    def grade_share(mine: Iterable[int]) -> list[Marks]:
        return [
            marks_by_exam(stages.task, place.run, answers[i]) if (place := wave.places[i]) else []
            for i in mine
        ]

    owners = spread([sum(map(len, texts)) for texts in answers])  # of about as many letters
    return exchange_shares("grading", owners, grade_share)


def marks_by_exam(task: Task, run: InnerRun, answers: Iterable[str]) -> Marks:
    """Return the marks of the answers to a run's exams, exam by exam."""
    given = iter(answers)
    return [
        list(map(float, marks_of(task, *exam, [next(given) for _ in prompts_of(task, *exam)])))
        for exam in run.exams()
    ]


def baseline_accuracy(stages: Stages, params: Params, batch: Batch) -> list[float]:
    """Return the accuracy of the unadapted policy on each problem: asked once per policy."""
    return [float(np.mean(marks)) for marks in baseline_marks(stages, params, batch)]


def baseline_marks(stages: Stages, params: Params, batch: Batch) -> Marks:
    """Return the marks of the unadapted policy on each problem, question by question."""
    answers = _baseline_answers(stages, params, batch)
    return [marks_of(stages.task, *posed, a) for posed, a in zip(batch, answers, strict=True)]


def baseline_logp(stages: Stages, params: Params, batch: Batch) -> list[list[float]]:
    """Return log p per token of the gold answers under the unadapted policy, by problem."""
    golds = [gold_texts(stages, *posed) for posed in batch]
    values = iter(_mean_logp(stages, params, None, [list(chain.from_iterable(golds))])[0])
    return [[next(values) for _ in group] for group in golds]


def _baseline_answers(stages: Stages, params: Params, batch: Batch) -> list[list[str]]:
    prompts = [prompt for posed in batch for prompt in exam_prompts(stages, *posed)]
    answers = iter(_ask(stages, params, None, [prompts])[0])
    return [[next(answers) for _ in prompts_of(stages.task, *posed)] for posed in batch]


def base_outcomes(
    stages: Stages, params: Params, runs: Sequence[InnerRun], golds: bool
) -> list[Outcome]:
    """Return what the unadapted model achieves in each run's exam.

    Args:
      golds: whether it is measured how likely the gold answers are.
    """
    batch = [(run.problem, run.exam) for run in runs]
    logps: list[float | None] = [None] * len(runs)
    if golds:
        logps = [float(np.mean(found)) for found in baseline_logp(stages, params, batch)]
    answers = _baseline_answers(stages, params, batch)
    return [
        Outcome(
            float(np.mean(marks_of(stages.task, *posed, given))),
            logp,
            np.nan,
            np.nan,
            tuple(given),
            0,
        )
        for posed, given, logp in zip(batch, answers, logps, strict=True)
    ]


def gold_logp(stages: Stages, params: Params, adapters: Adapters, wave: Wave) -> list[list[float]]:
    """Return log p per token of the gold answers under each adapter.

    Of several gold answers to a question it is the first. Those to its own exam come first, then
    those to the exams of kind ELSEWHERE.
    """
    golds = [
        [text for posed in _scored(place.run) for text in gold_texts(stages, *posed)]
        if place
        else []
        for place in wave.places
    ]
    return _mean_logp(stages, params, adapters, golds)


def _mean_logp(
    stages: Stages, params: Params, adapters: Adapters | None, texts: Sequence[Sequence[Text]]
) -> list[list[float]]:
    most = stages.settings.answer.max_rows
    return mean_logp(stages.model, params, adapters, texts, mesh=stages.mesh, max_rows=most)


def _scored(run: InnerRun) -> list[tuple[Problem, Exam]]:
    elsewhere = [(problem, exam) for kind, problem, exam in run.others if kind == ELSEWHERE]
    return [(run.problem, run.exam), *elsewhere]


@partial(jax.jit, static_argnames="config")
def score_rows(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    tokens: jax.Array,
    segments: jax.Array,
    loss_mask: jax.Array,
) -> jax.Array:
    """Return the mean log p f32[B] of the tokens in the loss mask, of rows [B T]."""
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    hidden, _ = hidden_states(config, params, tokens, positions, segments, adapters)
    logp = next_token_logp(config, params, hidden, tokens, loss_mask)
    return logp.sum(axis=1) / jnp.maximum(loss_mask[:, 1:].sum(axis=1), 1)


def mean_logp(
    model: Model,
    params: Params,
    adapters: Adapters | None,
    texts: Sequence[Sequence[Text]],
    *,
    mesh: Mesh,
    max_rows: int | None = None,
) -> list[list[float]]:
    """Return the mean log-probability per token, over each text's loss mask, under adapter i.

    Args:
      max_rows: scored at once, but one of every adapter in any case; all by default.
    """
    check_groups(params, None if adapters is None else adapters.scale.shape[0], len(texts))
    count = max(len(group) for group in texts)
    most = count if max_rows is None else min(count, max(1, max_rows // len(texts)))
    T = bucket_of(max(len(text.tokens) for group in texts for text in group))
    found: list[list[float]] = [[] for _ in texts]
    for start in range(0, count, most):
        groups = [group[start : start + most] for group in texts]
        rows = _padded_rows(groups, (len(texts) * most, T), model.tokenizer.pad_id)
        arrays = to_device(rows, leading(mesh, "rows", len(texts) * most, model.config.rules))
        with jax.set_mesh(mesh):
            logp = to_host(score_rows(model.config, params, adapters, *arrays))
        for i, values in enumerate(logp.reshape(len(texts), most)):
            found[i] += values[: len(groups[i])].tolist()
    return found


def _padded_rows(
    groups: Sequence[Sequence[Text]], shape: tuple[int, int], pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, segments and loss mask [B T]; every group has as many rows, some empty."""
    tokens = np.full(shape, pad_id, np.int32)
    segments, loss_mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, group in enumerate(groups):
        for row, text in enumerate(group, start=i * (shape[0] // len(groups))):
            length = len(text.tokens)
            tokens[row, :length] = text.tokens
            segments[row, :length] = 1
            loss_mask[row, :length] = text.loss_mask
    return tokens, segments, loss_mask
