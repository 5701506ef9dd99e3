"""Test adapted models: train a wave of adapters, ask them without the passage, grade the answers.

  for wave of runs:
    adapters = inner_update(params, adapters0, pack(runs));  grade(answer(adapters))

A run is one self-edit with one seed. Its outcome is written to a ledger as soon as its wave ends,
so that an interrupted run repeats one wave at most. A wave always has the same number of adapters
(A, filled up with idle ones), and each has its own prompts, so few programs serve all waves.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from seal_jax import keys
from seal_jax.hosts.console import progress
from seal_jax.hosts.files import append_json, read_jsonl
from seal_jax.hosts.preemption import stop_if_told
from seal_jax.hosts.processes import ask_first, exchange_shares, spread
from seal_jax.inner.packing import job_losses, pack, useful_tokens
from seal_jax.inner.texts import (
    PADDED,
    Job,
    Text,
    make_job,
    num_text_tokens,
    num_trained,
    row_length,
    text_of,
)
from seal_jax.inner.update import batch_sharding
from seal_jax.inner.update import num_shards as inner_shards
from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.models.lengths import bucket_of
from seal_jax.models.logits import next_token_logp
from seal_jax.models.transformer import hidden_states
from seal_jax.outer.rewards import Outcome
from seal_jax.sampling.draw import make_settings
from seal_jax.sampling.generate import generate
from seal_jax.sampling.written import make_stop, texts_of
from seal_jax.sharding import leading, num_parts, to_device, to_host
from seal_jax.tasks.task import Exam, Problem, SelfEdit, marks_of, prompts_of
from seal_jax.types import Adapters, Params


class Run(NamedTuple):
    """One inner run to make: a self-edit with one seed."""

    name: tuple[str, int, int]  # problem id, which self-edit, which seed: unique in its ledger
    step: int  # the outer step, for the randomness
    problem: Problem
    exam: Exam
    edit: SelfEdit
    # Exams beside its own, (kind, problem, exam): their accuracy is reported by kind.
    others: tuple[tuple[str, Problem, Exam], ...] = ()

    def exams(self) -> list[tuple[Problem, Exam]]:
        """Return its own exam, then the others."""
        return [(self.problem, self.exam), *((problem, exam) for _, problem, exam in self.others)]

    def path(self, seed: int, purpose: int) -> tuple[int, ...]:
        problem, edit, seed_index = self.name
        return (seed, purpose, self.step, keys.number_of(problem), edit, seed_index)


def exam_prompts(model, task, problem: Problem, exam: Exam, chat: bool) -> list[list[int]]:
    """Return the tokens of the prompts that ask an exam, without the passage."""
    prompts = prompts_of(task, problem, exam)
    return [model.tokenizer.encode_prompt(prompt, chat) for prompt in prompts]


def make_evaluate(
    model,
    task,
    inner_update: Callable,
    *,
    encode: Callable[..., Text],
    at_once: Callable[[int], int],
    mesh,
    seed: int,
    chat: bool,
    inner: Mapping[str, Any],
    answers: Mapping[str, Any],
    with_log_likelihood: bool,
) -> Callable[..., dict[tuple, Outcome]]:
    """Return `evaluate(params, runs, ledger, label, keep) -> {run.name: outcome}`.

    `keep(run, adapter)`, where given, takes each trained adapter (A = 1, numpy) before the ledger
    has its outcome, so that no outcome is without its adapter after a kill.

    Args:
      encode: (training text, outputs only) -> its tokens and loss mask; see self_edit.encode_text.
      at_once: tokens of the longest row -> the number of adapters in flight; see memory.py.
      inner: rank, alpha, targets, learning_rate, num_epochs, batch_size, pad_loss, tokens_per_step,
        steps_per_call.
      answers: max_tokens, max_rows and stop.
    """
    rules = model.config.rules
    num_shards, multiple = inner_shards(mesh, rules), num_parts(mesh, "adapter", rules)
    init_adapters = partial(
        lora.init_adapters,
        model.config,
        rank=inner["rank"],
        alpha=inner["alpha"],
        targets=inner["targets"],
    )
    init = jax.jit(init_adapters)

    def job_of(run: Run) -> Job:
        edit = run.edit
        texts = [encode(text, edit.outputs_only) for text in edit.training_texts]
        return make_job(
            [text for text in texts if len(text.tokens) > 1],
            num_epochs=edit.num_epochs or inner["num_epochs"],
            batch_size=inner["batch_size"],
            learning_rate=edit.learning_rate or inner["learning_rate"],
            key=run.path(seed, keys.SHUFFLE),
            pad_loss=inner["pad_loss"],
            padded=min(PADDED, model.config.max_length),
        )

    def gold_texts(run: Run) -> list[Text]:
        # Behind raw text the answer begins with a space, behind a chat template it does not.
        space, tokenizer, texts = "" if chat else " ", model.tokenizer, []
        for question, gold in run.exam.questions:
            prompt = tokenizer.encode_prompt(task.answer_prompt(run.problem, question), chat)
            tokens = [*prompt, *tokenizer.encode(space + gold, start=False)]
            texts.append(text_of(tokens, len(prompt)))
        return texts

    def wave(
        params: Params, places: Sequence[tuple[Run, Job] | None], show: Callable[[int], None]
    ) -> tuple[list[Outcome | None], Adapters]:
        """Train, ask and grade the runs at the population's places; None is an idle one."""
        num_adapters = len(places)
        runs = [place[0] if place else None for place in places]
        jobs = [place[1] if place else Job((), 0.0) for place in places]
        paths = [run.path(seed, keys.ADAPTER) if run else (0,) * 6 for run in runs]
        batches = pack(
            jobs,
            tokens_per_step=inner["tokens_per_step"],
            steps_per_call=inner["steps_per_call"],
            pad_id=model.tokenizer.pad_id,
            num_shards=num_shards,
        )
        fresh = to_device(init(keys.fold(paths)), leading(mesh, "adapter", num_adapters, rules))
        on_devices = [to_device(batch, batch_sharding(mesh, rules)) for batch in batches]
        with jax.set_mesh(mesh):  # for the attention kernels
            adapters, losses = inner_update(params, fresh, on_devices, show)
        losses = job_losses(batches, to_host(losses), num_adapters)
        asked = [
            [p for exam in run.exams() for p in exam_prompts(model, task, *exam, chat)]
            if run
            else []
            for run in runs
        ]
        written = answer(model, params, adapters, asked, mesh=mesh, **answers)
        logps: list = [None] * num_adapters
        if with_log_likelihood:
            golds = [gold_texts(run) if run else [] for run in runs]
            logps = mean_logp(model, params, adapters, golds, mesh=mesh)
        trained = useful_tokens(batches)[1] / sum(run is not None for run in runs)

        def grade(mine: list[int]) -> list[list[float]]:
            return [marks_by_exam(task, runs[i], written[i]) if runs[i] else [] for i in mine]

        # Every process grades its share, of about as many letters.
        owners = spread([sum(map(len, texts)) for texts in written])
        marks = exchange_shares("grading", owners, grade)
        return [
            run and _outcome(run, inner["num_epochs"], *parts)._replace(trained_tokens=trained)
            for run, *parts in zip(runs, jobs, losses, written, marks, logps, strict=True)
        ], adapters

    def deal(pairs: Sequence[tuple[Run, Job]], num_adapters: int) -> list[tuple[Run, Job] | None]:
        """Return a place for each adapter: all shards of the population have as much to train."""
        most = num_adapters // num_shards
        shards: list[list] = [[] for _ in range(num_shards)]
        owners = spread([num_trained(job) for _, job in pairs], num_shards, most)
        for pair, owner in zip(pairs, owners, strict=True):
            shards[owner].append(pair)
        return [pair for shard in shards for pair in [*shard, *[None] * (most - len(shard))]]

    def evaluate(
        params: Params,
        runs: Sequence[Run],
        ledger: str,
        label: str,
        keep: Callable[[Run, Adapters], None] | None = None,
    ) -> dict[tuple, Outcome]:
        outcomes = read_ledger(ledger, runs)
        if all(run.name in outcomes for run in runs):
            return outcomes
        planned = [(run, job_of(run)) for run in runs]
        longest = max((row_length(row) for _, job in planned for row in job.rows), default=1)
        num_adapters = -(-at_once(longest) // multiple) * multiple
        # The longest first, so that those of a wave end together.
        planned.sort(key=lambda pair: -num_trained(pair[1]))
        waves = [planned[i : i + num_adapters] for i in range(0, len(planned), num_adapters)]
        # A wave that was cut short is made again as it was: beside other neighbors, padded to
        # other lengths, the last bits of a run's numbers may differ.
        waves = [pairs for pairs in waves if any(run.name not in outcomes for run, _ in pairs)]
        num_steps = sum(len(job.rows) for pairs in waves for _, job in pairs)
        bar = progress(num_steps, f"{label}: {sum(map(len, waves))} inner runs", "step")
        for pairs in waves:
            places = deal(pairs, num_adapters)
            finished, adapters = wave(params, places, bar.update)
            if keep is not None:
                adapters = to_host(adapters)
            for i, (place, outcome) in enumerate(zip(places, finished, strict=True)):
                if place is None:
                    continue
                run = place[0]
                if run.name not in outcomes:
                    if keep is not None:
                        keep(run, lora.take(adapters, slice(i, i + 1)))
                    append_json(ledger, _ledger_entry(run, outcome))
                outcomes[run.name] = outcome
            stop_if_told()
        bar.close()
        return outcomes

    return evaluate


def marks_by_exam(task, run: Run, answers: Sequence[str]) -> list[list[float]]:
    """Return the marks of the answers to a run's exams, exam by exam."""
    given = iter(answers)
    return [
        list(map(float, marks_of(task, *exam, [next(given) for _ in prompts_of(task, *exam)])))
        for exam in run.exams()
    ]


def _outcome(run: Run, num_epochs: int, job: Job, losses, answers, marks, logps) -> Outcome:
    own, *rest = marks
    by_kind: dict[str, list[float]] = {}
    for (kind, _, _), marks in zip(run.others, rest, strict=True):
        by_kind.setdefault(kind, []).extend(marks)
    per_epoch = len(job.rows) // (run.edit.num_epochs or num_epochs)
    return Outcome(
        accuracy=float(np.mean(own)),
        log_likelihood=None if logps is None else float(np.mean(logps)),
        loss_before=float(np.mean(losses[:per_epoch])),
        loss_after=float(np.mean(losses[-per_epoch:])),
        answers=tuple(answers),
        useful_tokens=num_text_tokens(job),
        others={kind: float(np.mean(marks)) for kind, marks in by_kind.items()},
    )


def _ledger_entry(run: Run, outcome: Outcome) -> dict[str, Any]:
    entry = {"name": list(run.name), "step": run.step, "text": _digest(run), **outcome._asdict()}
    for field in ("loss_before", "loss_after", "log_likelihood"):
        if entry[field] is not None and not np.isfinite(entry[field]):
            entry[field] = "nan"  # JSON has none
    return entry


def _digest(run: Run) -> str:
    # Texts, and what else the self-edit chose.
    return xxhash.xxh64_hexdigest(repr(run.edit).encode("utf-8", "surrogatepass"))


def read_ledger(ledger: str, runs: Sequence[Run]) -> dict[tuple, Outcome]:
    """Return the outcomes that the ledger has of these runs: of the same texts in the same step."""
    wanted = {run.name: (run.step, _digest(run)) for run in runs}
    outcomes = {}
    exists = os.path.exists
    for entry in ask_first("ledger", lambda: read_jsonl(ledger) if exists(ledger) else []):
        name = tuple(entry.pop("name"))
        if wanted.get(name) != (entry.pop("step"), entry.pop("text")):
            continue
        for field in ("loss_before", "loss_after", "log_likelihood"):
            entry[field] = float("nan") if entry[field] == "nan" else entry[field]
        outcomes[name] = Outcome(**entry | {"answers": tuple(entry["answers"])})
    return outcomes


def answer(
    model,
    params: Params,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[Sequence[int]]],
    *,
    mesh,
    max_tokens: int,
    max_rows: int,
    stop: Sequence[str] = (),
) -> list[list[str]]:
    """Return the greedy answers of adapter i (or of the base) to prompts[i].

    An answer ends before the first of the strings in `stop`.
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
        max_tokens=max_tokens,
        max_rows=max_rows,
        pad_id=model.tokenizer.pad_id,
        stop=make_stop(model.tokenizer, stop),
    )
    texts = iter(texts_of(model.tokenizer, samples, stop))
    return [[next(texts).strip() for _ in group] for group in prompts]


@partial(jax.jit, static_argnames="config")
def _mean_logp(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    tokens: jax.Array,
    segments: jax.Array,
    loss_mask: jax.Array,
) -> jax.Array:
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    hidden, _ = hidden_states(config, params, tokens, positions, segments, adapters)
    logp = next_token_logp(config, params, hidden, tokens, loss_mask)
    return logp.sum(axis=1) / jnp.maximum(loss_mask[:, 1:].sum(axis=1), 1)


def mean_logp(
    model,
    params: Params,
    adapters: Adapters | None,
    texts: Sequence[Sequence[Text]],
    *,
    mesh,
) -> list[list[float]]:
    """Return the mean log-probability per token, over each text's loss mask, under adapter i."""
    most = max(len(group) for group in texts)
    T = bucket_of(max(len(text.tokens) for group in texts for text in group))
    shape = (len(texts) * most, T)
    tokens = np.full(shape, model.tokenizer.pad_id, np.int32)
    segments, loss_mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, group in enumerate(texts):
        for j, text in enumerate(group):
            row, length = i * most + j, len(text.tokens)
            tokens[row, :length] = text.tokens
            segments[row, :length] = 1
            loss_mask[row, :length] = text.loss_mask
    where = leading(mesh, "rows", shape[0], model.config.rules)
    arrays = to_device((tokens, segments, loss_mask), where)
    with jax.set_mesh(mesh):
        logp = to_host(_mean_logp(model.config, params, adapters, *arrays))
    logp = logp.reshape(len(texts), most)
    return [logp[i, : len(group)].tolist() for i, group in enumerate(texts)]
