"""The stages that the outer loop and the final comparison share, built once from the settings.

Text and numbers come in and go out; arrays stay inside. Only this module, train.py and compare.py
know the settings.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from seal_jax import keys
from seal_jax.hosts.console import progress
from seal_jax.inner.packing import LONGEST
from seal_jax.inner.population import Needs, Population, fit_population
from seal_jax.inner.texts import PAD_SAMPLES, PADDED, Text, encode_text
from seal_jax.inner.update import InnerLoop, inner_setup, make_inner_loop
from seal_jax.models.divisible import check_divides
from seal_jax.models.model import Model
from seal_jax.models.quantize import quantize_params
from seal_jax.optim import Optimizer, make_optimizer
from seal_jax.outer.evaluate import Run, answer, exam_prompts, make_evaluate
from seal_jax.outer.policy_step import state_shapes
from seal_jax.sampling.generate import check_lengths
from seal_jax.sampling.written import write_self_edits
from seal_jax.sharding import make_mesh, param_shardings, shaped, tree_bytes
from seal_jax.sources import load_model
from seal_jax.tasks import TASKS, field_names, make_task
from seal_jax.tasks.task import Rejected, SelfEdit, Task, marks_of, prompts_of
from seal_jax.types import InnerSettings, OuterSettings, Params, Rollout, Settings

Edit = SelfEdit | Rejected


class Stages(NamedTuple):
    """What every outer step calls, built once from the settings."""

    settings: Settings
    model: Model  # its params are the base, placed on the mesh
    task: Task
    mesh: jax.sharding.Mesh
    evaluate: Any  # see evaluate.make_evaluate
    encode: Callable[..., Text]  # (training text, outputs only) -> its tokens
    constrain: Callable | None  # see tasks/task.py
    at_once: Callable[[int], int]  # the longest row's tokens -> adapters in flight


def make_stages(settings: Settings) -> Stages:
    """Make the mesh, load the model onto it and build the stages that loops and table share."""
    mesh = make_mesh(**settings.mesh)
    model = place_model(settings, settings.model.source, mesh)
    check_divides(mesh, model.config)
    # A task's texts are shared by many self-edits and seeds.
    encode = functools.lru_cache(maxsize=4096)(
        functools.partial(encode_text, model.tokenizer, chat=settings.model.chat)
    )
    given = {
        "batch_size": settings.inner.batch_size,
        "count_tokens": lambda text: len(encode(text, False).tokens),
    }
    taken = field_names(settings.task["name"])
    given = {name: value for name, value in given.items() if name in taken}
    task = make_task(**settings.task, **given)
    inner = settings.inner._asdict()
    optimizer = optimizer_of(settings.inner)
    loop = make_inner_loop(inner_setup(model.config, optimizer, settings.inner, mesh))
    at_once = _at_once(settings, model, loop)
    evaluate = make_evaluate(
        model,
        task,
        loop.update,
        encode=encode,
        at_once=at_once,
        mesh=mesh,
        seed=settings.seed,
        chat=settings.model.chat,
        inner=inner,
        answers=settings.answer._asdict(),
        with_log_likelihood="log_likelihood" in settings.reward.weights,
    )
    constrain = make_constrain(settings, model, task)
    return Stages(settings, model, task, mesh, evaluate, encode, constrain, at_once)


def make_constrain(settings: Settings, model: Model, task: Task) -> Callable | None:
    """Return which tokens a self-edit may go on with; None where it may with any.

    Raises:
      ValueError: that is asked for, and the task cannot say.
    """
    if not settings.sample.constrained:
        return None
    if not hasattr(task, "constrain"):
        raise ValueError(
            "sample.constrained = True: self-edits of task"
            f" {settings.task['name']!r} have no grammar"
        )
    return task.constrain(model.tokenizer, model.config.vocab_size)


def _at_once(settings: Settings, model: Model, loop: InnerLoop) -> Callable[[int], int]:
    """Return how many adapters are in flight, given the tokens of the longest row."""
    inner = settings.inner
    if inner.max_adapters != -1:
        return lambda longest: inner.max_adapters
    # No more than there are runs at once, and than there may be rows of answers: every adapter
    # answers at least one question at a time.
    runs = max(
        settings.outer.problems_per_step * settings.sample.num_edits * inner.num_seeds,
        settings.eval.num_problems * settings.eval.num_edits * settings.eval.num_seeds,
    )
    base = jax.eval_shape(functools.partial(quantize_params, word=inner.quantize), model.params)
    mesh = loop.setup.mesh
    base = shaped(base, param_shardings(mesh, base, model.config.rules))
    needs = Needs(loop, inner, base, resident=resident_bytes(settings, model, mesh))
    latest = [Population(min(settings.answer.max_rows, runs))]

    def at_once(longest: int) -> int:
        latest[0] = fit_population(needs, longest, latest[0])
        return latest[0].number

    return at_once


def resident_bytes(settings: Settings, model: Model, mesh: jax.sharding.Mesh) -> int:
    """Return what lies on each device beside the inner loop's own base and adapters, at most."""
    outer, policy = settings.outer, tree_bytes(model.params)
    optimizer = optimizer_of(outer)

    lora = {"rank": outer.rank, "alpha": outer.alpha, "targets": outer.targets}
    state = state_shapes(model.config, model.params, optimizer, update=outer.update, **lora)
    state = state.adapters, state.opt_state  # a value head is nothing beside them
    # While a policy is trained there is the base too; in the end, every policy that was trained.
    training = policy + tree_bytes(shaped(state, param_shardings(mesh, state, model.config.rules)))
    comparing = policy * (2 if settings.eval.random_control else 1)
    own = 0 if settings.inner.quantize == "none" else policy  # a quantized base is one more
    return max(training, comparing) + own


def longest_row(stages: Stages, problems: Sequence) -> int:
    """Return about how many tokens the longest row of an inner run on these problems will have."""
    passage = max(
        len(stages.encode(text, False).tokens)
        for problem, _ in problems
        for text in stages.task.passage_only(problem).training_texts
    )
    return row_tokens(stages.settings, passage, stages.model.config.max_length)


def row_tokens(settings: Settings, passage: int, max_length: int) -> int:
    """Return about how many tokens the longest row of an inner run has.

    Args:
      passage: tokens of the longest.
      max_length: of the model.
    """
    size, written = settings.inner.batch_size, settings.sample.max_tokens
    longest = max(passage, written) if size == 1 else passage + written
    if (most := text_limit(settings)) is not None:
        longest = size * most
    if settings.inner.pad_loss == "sampled":
        longest += size * (PAD_SAMPLES + 1)
    if settings.inner.pad_loss == "exact":
        longest = max(longest, size * min(PADDED, max_length))
    return min(longest, LONGEST)


def text_limit(settings: Settings) -> int | None:
    """Return how many tokens a text has at most that the task makes; None if the policy writes."""
    default = getattr(TASKS[settings.task["name"]], "max_tokens", None)
    return None if default is None else settings.task.get("max_tokens", default)


def place_model(settings: Settings, source: str, mesh: jax.sharding.Mesh) -> Model:
    """Load a model onto the mesh; it lies there, and computes attention, as the config says."""
    model = load_model(source, settings.model.dtype, mesh, settings.rules)
    attention = settings.model.attention
    return model._replace(config=dataclasses.replace(model.config, attention=attention))


def inner_base(stages: Stages, params: Params) -> Params:
    """Return the frozen base of inner loop and answers: the policy, quantized if so asked.

    The policy itself, which writes the self-edits and is updated, keeps its precision.
    """
    return quantize_params(params, stages.settings.inner.quantize)


def optimizer_of(section: InnerSettings | OuterSettings) -> Optimizer:
    """Return the optimizer that a loop's settings name."""
    return make_optimizer(
        optax_name=section.optax_name,
        optax_kwargs=section.optax_kwargs,
        optimizer=section.optimizer,
        grad_clip=section.grad_clip,
    )


def check_prompts(stages: Stages, problems: Sequence) -> None:
    """Raise ValueError now, and not hours later, where a prompt exceeds the model's context."""
    settings, encode = stages.settings, stages.model.tokenizer.encode_prompt
    limit = longest_text(stages)
    most = getattr(stages.task, "max_tokens", 0)
    if most > limit:
        raise ValueError(
            f"task.max_tokens = {most:,}: expected at most {limit:,}, with this model and"
            f" inner.batch_size = {settings.inner.batch_size}"
        )
    for problem, exam in problems:
        prompt = encode(stages.task.edit_prompt(problem), settings.model.chat)
        questions = exam_prompts(stages.model, stages.task, problem, exam, settings.model.chat)
        try:
            check_lengths(stages.model.config, [prompt], settings.sample.max_tokens)
            check_lengths(stages.model.config, questions, settings.answer.max_tokens)
        except ValueError as error:
            raise ValueError(f"problem {problem.id}: {error}") from error


def write_edits(
    stages: Stages, params: Params, batch: Sequence, step: int, num_edits: int, label: str
) -> tuple[Rollout, list[str]]:
    """Let the policy write `num_edits` self-edits per problem: rows p * num_edits + r."""
    prompts = [stages.task.edit_prompt(problem) for problem, _ in batch]
    paths = [
        (stages.settings.seed, keys.SAMPLE, step, keys.number_of(problem.id), r)
        for problem, _ in batch
        for r in range(num_edits)
    ]
    rollout, texts = write(stages, params, prompts, paths, f"{label}: self-edits", stages.constrain)
    return rollout._replace(step=step), texts


def write(
    stages: Stages,
    params: Params,
    prompts: Sequence[str],
    paths: Sequence[Sequence[int]],
    label: str,
    constrain: Callable | None = None,
) -> tuple[Rollout, list[str]]:
    """Let the policy continue each prompt, as often as there are paths for it (see keys.py)."""
    settings = stages.settings
    sample = settings.sample._asdict()
    del sample["num_edits"], sample["constrained"]
    tokens = [stages.model.tokenizer.encode_prompt(text, settings.model.chat) for text in prompts]
    check_lengths(stages.model.config, tokens, settings.sample.max_tokens)
    bar = progress(len(paths), label, "text")
    written = write_self_edits(
        stages.model,
        params,
        tokens,
        paths,
        mesh=stages.mesh,
        constrain=constrain and (lambda _, tokens: constrain(tokens)),
        show=bar.update,
        **sample,
    )
    bar.close()
    return written


def parse(stages: Stages, batch: Sequence, texts: Sequence[str]) -> list[list[Edit]]:
    """Return [P][R] self-edits; one with a text beyond the model's context is rejected too."""
    num_edits, limit = len(texts) // len(batch), longest_text(stages)
    edits: list[list[Edit]] = []
    for p, (problem, _) in enumerate(batch):
        row: list[Edit] = []
        for text in texts[p * num_edits : (p + 1) * num_edits]:
            edit = stages.task.parse(problem, text)
            if isinstance(edit, SelfEdit):
                edit = reject_long(stages, edit, limit)
            row.append(edit)
        edits.append(row)
    return edits


def longest_text(stages: Stages) -> int:
    """Return how many tokens a training text may have: in this model, and in a batch."""
    room = LONGEST // stages.settings.inner.batch_size
    if stages.settings.inner.pad_loss == "sampled":
        room -= PAD_SAMPLES + 1
    return min(stages.model.config.max_length, room)


def reject_long(stages: Stages, edit: SelfEdit, limit: int) -> Edit:
    longest = max(len(stages.encode(text, False).tokens) for text in edit.training_texts)
    if longest <= limit:
        return edit
    reason = f"too long: a training text of {longest:,} tokens, at most {limit:,}"
    return Rejected(edit.problem_id, edit.prompt, edit.text, reason)


def inner_runs(
    batch: Sequence,
    edits: Sequence[Sequence[Edit | None]],
    step: int,
    seeds: Sequence[int],
    others: Sequence[tuple] | None = None,
) -> list[Run]:
    """Return the inner runs: every self-edit that was not rejected, with each seed.

    Args:
      others: of each problem, the exams that its runs are given beside its own; see `Run`.
    """
    return [
        Run((problem.id, r, e), step, problem, exam, edit, others[p] if others else ())
        for p, ((problem, exam), row) in enumerate(zip(batch, edits, strict=True))
        for r, edit in enumerate(row)
        if isinstance(edit, SelfEdit)
        for e in seeds
    ]


def baseline_accuracy(stages: Stages, params: Params, batch: Sequence) -> list[float]:
    """Return the accuracy of the unadapted policy on each problem: asked once per policy."""
    settings = stages.settings
    prompts = [
        prompt
        for problem, exam in batch
        for prompt in exam_prompts(stages.model, stages.task, problem, exam, settings.model.chat)
    ]
    answers = iter(
        answer(
            stages.model, params, None, [prompts], mesh=stages.mesh, **settings.answer._asdict()
        )[0]
    )
    accuracy = []
    for problem, exam in batch:
        given = [next(answers) for _ in prompts_of(stages.task, problem, exam)]
        accuracy.append(float(np.mean(marks_of(stages.task, problem, exam, given))))
    return accuracy
