"""Distributions of a frozen model as teachers of training texts.

  teacher(token) = p(token | context, the text before it)    the model with the context in front
  student(token) = q(token | the text before it)             the model with an adapter, without it

With a problem's passage as the context this is context distillation: what the passage tells goes
into the adapter. The texts of a self-edit were drawn from the model with the passage before it, so
behind what stood before each they are the teacher's own samples. With no context it holds the
student to what the model says already: a penalty on forgetting, for texts of a memory.

The teacher does not move while an adapter trains: a text's is computed once, however often the text
is trained on.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seal_jax.inner.texts import Text
from seal_jax.models.config import ModelConfig
from seal_jax.models.divergence import likeliest
from seal_jax.models.model import Model
from seal_jax.models.own_kernels import check_groups
from seal_jax.models.padded_lengths import BUCKETS, bucket_of
from seal_jax.models.transformer import hidden_states
from seal_jax.sharding import leading, to_device, to_host
from seal_jax.types import Array, Params, Teacher


class Lesson(NamedTuple):
    """A text, and the tokens that its teacher reads before it; None where it has no teacher."""

    text: Text
    context: tuple[int, ...] | None = ()


class Reading(NamedTuple):
    """What the teacher reads [B T], a lesson in each row; the rest is padding."""

    tokens: Array  # i32
    segments: Array  # i32
    wanted: Array  # bool: its distribution is


@partial(jax.jit, static_argnames=("config", "top"))
def score_tokens(config: ModelConfig, params: Params, rows: Reading, top: int) -> Teacher:
    """Return the distribution of each token in [B T] that is wanted; the others' mean nothing.

    Args:
      params: rows are grouped by the kernels that are of one group alone.
      top: K, how many tokens of each distribution are told apart.
    """
    B, T = rows.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    hidden, _ = hidden_states(config, params, rows.tokens, positions, rows.segments)
    before = hidden[:, :-1].reshape(B * (T - 1), -1)
    found = likeliest(config, params, before, rows.wanted[:, 1:].reshape(-1), top)
    in_rows = jax.tree.map(lambda x: x.reshape(B, T - 1, -1), found)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0))), in_rows)


def with_teachers(
    model: Model,
    params: Params,
    groups: Sequence[Sequence[Lesson]],
    *,
    top: int,
    mesh: Mesh,
    max_rows: int | None = None,
) -> list[list[Text]]:
    """Return the texts of each group's lessons with their teachers.

    Args:
      params: the teacher of group i is the model with the i-th of what they have for each group;
        one teaches all, where there is one group.
      top: K.
      max_rows: read at once, but one of every group in any case; all by default.

    Raises:
      ValueError: a text behind its context is too long for the model, or K beyond the vocabulary.
    """
    check_groups(params, None, len(groups))
    if not 1 <= top <= (most := model.config.vocab_size):
        raise ValueError(f"top = {top}: expected from 1 to the model's {most} tokens")
    lessons = groups
    groups = [[one for one in group if one.context is not None] for group in lessons]
    longest = max((_length(model, lesson) for group in groups for lesson in group), default=0)
    if longest == 0:
        return [[lesson.text for lesson in group] for group in lessons]
    if longest > (limit := longest_row(model.config)):
        raise ValueError(
            f"a text behind its context has {longest:,} tokens: expected at most {limit:,}"
        )
    # Few shapes, because each is a program.
    count, T = bucket_of_rows(max(map(len, groups))), bucket_of(longest)
    if max_rows is not None:
        count = min(count, max(1, max_rows // len(groups)))
    found: list[list[Text]] = [[] for _ in groups]
    for start in range(0, max(map(len, groups)), count):
        parts = [group[start : start + count] for group in groups]
        rows = _rows(model, parts, (len(groups) * count, T))
        rows = to_device(rows, leading(mesh, "rows", len(groups) * count, model.config.rules))
        with jax.set_mesh(mesh):
            scored = to_host(score_tokens(model.config, params, rows, top))
        for i, part in enumerate(parts):
            for row, lesson in enumerate(part, start=i * count):
                first = _first(model, lesson)
                found[i].append(_taught(lesson.text, scored.ids[row], scored.logp[row], first))
    rest = map(iter, found)
    return [
        [lesson.text if lesson.context is None else next(texts) for lesson in group]
        for group, texts in zip(lessons, rest, strict=True)
    ]


def bucket_of_rows(count: int) -> int:
    """Return a number of rows that holds so many: one of few."""
    return 1 << (count - 1).bit_length()


def longest_row(config: ModelConfig) -> int:
    """Return how many tokens a context and a text may have together."""
    return min(config.max_length, BUCKETS[-1])


def _first(model: Model, lesson: Lesson) -> int:
    """Return where the teacher reads the text's first token, as if it read all of them.

    Behind a context it does not read the token that begins every text (`bos`), which the context
    begins with.
    """
    start, bos = len(lesson.context or ()), model.tokenizer.bos
    return start - (start > 0 and bos is not None and lesson.text.tokens[:1] == (bos,))


def _length(model: Model, lesson: Lesson) -> int:
    return _first(model, lesson) + len(lesson.text.tokens)


def _rows(model: Model, groups: Sequence[Sequence[Lesson]], shape: tuple[int, int]) -> Reading:
    """Return the rows of all groups: each has as many, some of them empty."""
    rows = Reading(
        np.full(shape, model.tokenizer.pad_id, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, bool),
    )
    for i, group in enumerate(groups):
        for row, lesson in enumerate(group, start=i * (shape[0] // len(groups))):
            first, (tokens, loss_mask) = _first(model, lesson), lesson.text[:2]
            end = first + len(tokens)
            rows.tokens[row, first:end] = tokens
            rows.tokens[row, : len(lesson.context or ())] = lesson.context or ()
            rows.segments[row, :end] = 1
            rows.wanted[row, first:end] = loss_mask
    return rows


def _taught(text: Text, ids: np.ndarray, logp: np.ndarray, first: int) -> Text:
    """Return the text with what was found of its tokens, which lie from `first` on."""
    span, counts = slice(first, first + len(text.tokens)), np.array(text.loss_mask)[:, None]
    teacher = Teacher(np.where(counts, ids[span], -1), np.where(counts, logp[span], np.float32(0)))
    return text._replace(teacher=teacher)
