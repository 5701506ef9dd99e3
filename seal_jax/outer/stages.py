"""`Stages`: what every outer step calls. And the stages that write and parse self-edits.

`Stages` holds the model, the task, the mesh and the functions that train adapters. It is made once,
in config/setup.py, and the outer loop and the final comparison use the same one. Text and numbers
come in and go out; arrays stay inside.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from seal_jax import keys
from seal_jax.hosts.console import progress
from seal_jax.inner.steps import LONGEST
from seal_jax.inner.teachers import Lesson, longest_row
from seal_jax.inner.texts import PAD_SAMPLES, Text, text_of
from seal_jax.inner.update import InnerUpdate
from seal_jax.models.chat_template import ChangedByTemplate
from seal_jax.models.model import Model
from seal_jax.models.quantize import quantize_params
from seal_jax.models.thoughts import Thoughts, read
from seal_jax.models.tokenizer import TokenBeyondModel
from seal_jax.outer.problems import Batch, OuterStep
from seal_jax.sampling.call_shapes import check_lengths
from seal_jax.sampling.self_edits import write_self_edits
from seal_jax.tasks.task import (
    Exam,
    Problem,
    Rejected,
    SelfEdit,
    Task,
    Turn,
    max_tokens_of,
    prompts_of,
    teacher_prompt_of,
)
from seal_jax.types import Adapters, Params, Rollout, Settings

Edit = SelfEdit | Rejected
Edits = Sequence[Sequence[Edit]]  # [P][R]
# Tokens that a self-edit has written -> bool[V], which tokens it may go on with.
Constrain = Callable[[list[int]], np.ndarray]


class Stages(NamedTuple):
    """What every outer step calls, built once from the settings."""

    settings: Settings
    model: Model  # its params are the base, placed on the mesh
    task: Task
    mesh: Mesh
    encode: Callable[[str | Turn, bool], Text]  # (training text, outputs only) -> its tokens
    init_adapters: Callable[[jax.Array], Adapters]  # a new adapter for each key
    inner_update: InnerUpdate
    at_once: Callable[[int], int]  # the longest row's tokens -> adapters in flight
    constrain: Constrain | None


def inner_base(stages: Stages, params: Params) -> Params:
    """Return the frozen base of inner loop and answers: the policy, quantized if so asked.

    The policy itself, which writes the self-edits and is updated, keeps its precision.
    """
    return quantize_params(params, stages.settings.inner.quantize)


def teacher_context(stages: Stages, problem: Problem) -> tuple[int, ...]:
    """Return the tokens of what the teacher of a problem's training texts reads before them."""
    prompt = teacher_prompt_of(stages.task)
    if prompt is None:
        raise ValueError(f"task {stages.settings.task['name']!r} has no teacher_prompt")
    return tuple(stages.model.tokenizer.encode(prompt(problem)))


def lessons_of(stages: Stages, problem: Problem, texts: Sequence[Text]) -> list[Lesson]:
    """Return a self-edit's texts, each with what its teacher reads before it.

    That is the passage and the texts before it, a line end behind each: about what stood there when
    the policy wrote it, so that the text is its own sample. Passage and texts are plain, without a
    chat template. The texts of the passage itself have no teacher: nobody wrote them behind it, and
    what is known word for word needs none.

    Args:
      texts: in the order of the self-edit.
    """
    tokenizer, passage = stages.model.tokenizer, stages.task.passage_only(problem).training_texts
    of_passage = {stages.encode(text, False).tokens for text in passage}
    line_end = tuple(tokenizer.encode("\n", start=False))
    context, lessons = teacher_context(stages, problem), []
    for text in texts:
        taught = text.tokens not in of_passage
        lessons.append(Lesson(text, context if taught else None))
        if taught:
            context += (*text.tokens[text.tokens[:1] == (tokenizer.bos,) :], *line_end)
    return lessons


def _plain(problem: Problem, texts: Sequence[str | Turn]) -> None:
    """Raise ValueError where a text is a turn of a chat, before which no passage is put."""
    if any(isinstance(text, Turn) for text in texts):
        raise ValueError(
            f"inner.objective = 'distill': a training text of {problem.id} is a turn of a chat,"
            " expected plain text"
        )


def exam_prompts(stages: Stages, problem: Problem, exam: Exam) -> list[list[int]]:
    """Return the tokens of the prompts that ask an exam, without the passage."""
    return [ask_tokens(stages, prompt) for prompt in prompts_of(stages.task, problem, exam)]


def ask_tokens(stages: Stages, prompt: str) -> list[int]:
    """Return the tokens of a question, and of `answer.prefix`, which its answer begins with."""
    if not stages.settings.answer.prefix:
        return stages.model.tokenizer.encode_prompt(prompt, stages.settings.model.chat)
    return _answered(stages, prompt, stages.settings.answer.prefix)[0]


def gold_texts(stages: Stages, problem: Problem, exam: Exam) -> list[Text]:
    """Return each question of an exam with its first gold answer."""
    return [
        gold_text(stages, stages.task.answer_prompt(problem, question.question), question.answer)
        for question in exam.questions
    ]


def gold_text(stages: Stages, prompt: str, gold: str) -> Text:
    """Return a question with its gold answer, whose tokens alone are in the loss mask.

    Behind raw text the answer begins with a space, in a chat as its template says. What ends the
    answer does not count, nor does `answer.prefix`.
    """
    prefix = stages.settings.answer.prefix
    if not prefix:
        return text_of(*_answered(stages, prompt, gold))
    before = ask_tokens(stages, prompt)
    tokens, first = _answered(stages, prompt, f"{prefix} {gold}")
    while first < len(before) and tokens[first] == before[first]:
        first += 1
    return text_of(tokens, first)


def _answered(stages: Stages, prompt: str, answer: str) -> tuple[list[int], int]:
    """Return the tokens of a question and its answer, and where the answer begins."""
    tokenizer, chat = stages.model.tokenizer, stages.settings.model.chat
    answer = answer if chat else f" {answer}"
    tokens, marked = tokenizer.encode_turn([(prompt, False)], answer, chat)
    return tokens[:-1], marked.index(True)


def check_prompts(stages: Stages, problems: Batch, golds: bool = False) -> None:
    """Raise ValueError now, and not hours later, where a prompt exceeds the model's context.

    Args:
      golds: gold answers are going to be scored. None may be a text that the model cannot be given.
    """
    settings, encode = stages.settings, stages.model.tokenizer.encode_prompt
    limit = longest_text(stages)
    most = max_tokens_of(stages.task) or 0
    if most > limit:
        raise ValueError(
            f"task.max_tokens = {most:,}: expected at most {limit:,}, with this model and"
            f" inner.batch_size = {settings.inner.batch_size}"
        )
    if settings.inner.num_taught > (known := stages.model.config.vocab_size):
        raise ValueError(
            f"inner.distill_top = {settings.inner.distill_top:,}: expected at most the {known:,}"
            " tokens of the model"
        )
    for problem, exam in problems:
        prompt = encode(stages.task.edit_prompt(problem), settings.model.chat)
        try:
            questions = exam_prompts(stages, problem, exam)
            scored = [text.tokens for text in gold_texts(stages, problem, exam)] if golds else []
            check_lengths(stages.model.config, [prompt], settings.sample.most_tokens)
            check_lengths(stages.model.config, questions, settings.answer.most_tokens)
            check_lengths(stages.model.config, scored, 0)
            if settings.inner.num_taught:
                check_lengths(stages.model.config, [teacher_context(stages, problem)], 1)
                _plain(problem, stages.task.passage_only(problem).training_texts)
        except ValueError as error:
            raise ValueError(f"problem {problem.id}: {error}") from error


def sample(
    stages: Stages, params: Params, step: OuterStep, num_edits: int
) -> tuple[Rollout, list[str]]:
    """Let the policy write `num_edits` self-edits per problem: rows p * num_edits + r."""
    prompts = [stages.task.edit_prompt(problem) for problem, _ in step.batch]
    paths = [
        (stages.settings.seed, keys.SAMPLE, step.number, keys.number_of(problem.id), r)
        for problem, _ in step.batch
        for r in range(num_edits)
    ]
    label = f"{step.label}: self-edits"
    rollout, texts = write(stages, params, prompts, paths, label, stages.constrain)
    return rollout._replace(step=step.number), texts


def write(
    stages: Stages,
    params: Params,
    prompts: Sequence[str],
    paths: Sequence[Sequence[int]],
    label: str,
    constrain: Constrain | None = None,
) -> tuple[Rollout, list[str]]:
    """Let the policy continue each prompt, as often as there are paths for it (see keys.py).

    The texts have its thoughts in them.
    """
    settings = stages.settings
    encode, chat = stages.model.tokenizer.encode_prompt, settings.model.chat
    tokens = [encode(text, chat) for text in prompts]
    check_lengths(stages.model.config, tokens, settings.sample.most_tokens)
    bar = progress(len(paths), label, "text")
    written = write_self_edits(
        stages.model,
        params,
        tokens,
        paths,
        settings.sample,
        mesh=stages.mesh,
        thoughts=thoughts_of(stages),
        constrain=None if constrain is None else lambda _, tokens: constrain(tokens),
        show=bar.update,
    )
    bar.close()
    return written


def thoughts_of(stages: Stages) -> Thoughts | None:
    """Return how the model marks its thoughts, None where it has none."""
    return stages.model.tokenizer.thoughts(stages.settings.model.chat)


def parse(stages: Stages, batch: Batch, texts: Sequence[str]) -> list[list[Edit]]:
    """Return [P][R] self-edits, apart from the thoughts before them.

    One that ends in a thought, or has a text beyond the model's context, is rejected too.
    """
    num_edits = len(texts) // len(batch)
    return [
        [
            _reject_unusable(stages, problem, _parse_one(stages, problem, text))
            for text in texts[p * num_edits : (p + 1) * num_edits]
        ]
        for p, (problem, _) in enumerate(batch)
    ]


def parse_given(stages: Stages, batch: Batch, texts: Sequence[Sequence[str]]) -> list[list[Edit]]:
    """Return self-edits [P][any] that somebody else wrote: no thoughts of the model's are in them.

    One that has a text beyond the model's context is rejected, as the model's own are.
    """
    return [
        [_reject_unusable(stages, problem, stages.task.parse(problem, text)) for text in row]
        for (problem, _), row in zip(batch, texts, strict=True)
    ]


def longest_text(stages: Stages) -> int:
    """Return how many tokens a training text may have: in this model, and in a batch."""
    room = LONGEST // stages.settings.inner.batch_size
    if stages.settings.inner.pad_loss == "sampled":
        room -= PAD_SAMPLES + 1
    return min(stages.model.config.max_length, room)


def _parse_one(stages: Stages, problem: Problem, text: str) -> Edit:
    written = read(thoughts_of(stages), text)
    if written.is_cut:
        prompt, reason = stages.task.edit_prompt(problem), "cut off inside a thought"
        return Rejected(problem.id, prompt, "", reason, written.thoughts)
    edit = stages.task.parse(problem, written.text)
    return edit._replace(thoughts=written.thoughts) if written.thoughts else edit


def _reject_unusable(stages: Stages, problem: Problem, edit: Edit) -> Edit:
    if isinstance(edit, Rejected):
        return edit
    limit, behind = longest_text(stages), ""
    try:
        longest = max(len(stages.encode(text, False).tokens) for text in edit.training_texts)
        if longest <= limit and stages.settings.inner.num_taught:
            _plain(problem, edit.training_texts)
            texts = [stages.encode(text, False) for text in edit.training_texts]
            lessons = lessons_of(stages, problem, texts)
            longest = max(len(one.context or ()) + len(one.text.tokens) for one in lessons)
            limit, behind = longest_row(stages.model.config), " behind what the teacher reads"
        if longest <= limit:
            return edit
        reason = f"too long: a training text{behind} of {longest:,} tokens, at most {limit:,}"
    except TokenBeyondModel as error:
        reason = f"no token of the model: {error}"
    except ChangedByTemplate as error:
        reason = f"no text for the chat template: {error}"
    return Rejected(edit.problem_id, edit.prompt, edit.text, reason, edit.thoughts)
