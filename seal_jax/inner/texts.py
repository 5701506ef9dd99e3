"""Training texts as tokens, and inner runs as batches of them in order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from seal_jax.models.tokenizer import Tokenizer
from seal_jax.tasks.task import Turn

if TYPE_CHECKING:  # the host side of `continual` imports no jax
    from seal_jax.types import Teacher

# The authors' code pads every text to PADDED tokens and counts the prediction of padding too. Where
# that is asked for, 'sampled' takes so many of the padding's tokens, each for its share of all.
PADDED, PAD_SAMPLES = 2048, 8
PAD_LOSSES = ("off", "sampled", "exact")


class Text(NamedTuple):
    """One training text, and the padding behind it that is in the loss.

    A token with a teacher costs the divergence from it, any other one its negative log-likelihood;
    see models/divergence.py.
    """

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # whether predicting this token counts; the first never does
    pads: tuple[int, ...] = ()  # positions of padding: each predicts the next, the last nothing
    teacher: "Teacher | None" = None  # of its tokens [T K] (numpy); padding has none
    # Multiplies the cost of its tokens, and not their number, by which a row's sum is divided.
    weight: float = 1.0


class Job(NamedTuple):
    """One inner run."""

    rows: tuple[tuple[Text, ...], ...]  # the texts of each step, in order
    learning_rate: float
    seed: int = 0  # of the LoRA dropout
    schedule: str = ""  # of the learning rate; '' is the loop's
    # For each row, texts whose gradient at the same adapter the optimizer gets as `memory_grads`,
    # and on which nothing is trained. Of a row without texts it is 0. Empty: nobody asks for it.
    references: tuple[tuple[Text, ...], ...] = ()


def make_job(
    texts: Sequence[Text],
    *,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    key: Sequence[int],
    pad_loss: str = "off",
    padded: int = PADDED,
) -> Job:
    """Shuffle the texts anew in every epoch and cut them into batches.

    Args:
      key: nonnegative integers (seed, step, problem, self-edit, seed index) that alone decide the
        order, which padding is sampled and what LoRA dropout drops.
      pad_loss: what of the padding to `padded` tokens is in the loss: nothing ('off'), all
        ('exact'), or in every row other PAD_SAMPLES tokens of it in place of all ('sampled'): an
        unbiased estimate of the same loss.

    Raises:
      ValueError: there is no such pad_loss.
    """
    if pad_loss not in PAD_LOSSES:
        raise ValueError(f"pad_loss={pad_loss!r}: expected one of {', '.join(PAD_LOSSES)}")
    rng = np.random.default_rng(list(key))

    def pad(text: Text) -> Text:
        first, last = len(text.tokens), padded - 1
        if pad_loss == "off" or first > last:
            return text
        pads = np.arange(first, last)
        if pad_loss == "sampled" and len(pads) > PAD_SAMPLES:
            pads = np.sort(rng.choice(pads, PAD_SAMPLES, replace=False))
        return text._replace(pads=(*pads.tolist(), last))

    rows = []
    for _ in range(num_epochs):
        order = rng.permutation(len(texts))
        for start in range(0, len(texts), batch_size):
            rows.append(tuple(pad(texts[i]) for i in order[start : start + batch_size]))
    seed = int(np.random.default_rng([*key, 1]).integers(2**31))
    return Job(tuple(rows), learning_rate, seed)


def row_length(row: Sequence[Text]) -> int:
    """Return the tokens that a row takes in a step: text, and padding that is in the loss."""
    return sum(len(text.tokens) + len(text.pads) for text in row)


def num_text_tokens(job: Job) -> int:
    return sum(len(text.tokens) for row in job.rows for text in row)


def num_trained(job: Job) -> int:
    """Return the tokens that a job trains on, padding that is in the loss included."""
    return sum(map(row_length, job.rows))


def encode_text(
    tokenizer: Tokenizer, text: str | Turn, outputs_only: bool = False, *, chat: bool
) -> Text:
    """Return a training text as tokens, with its loss mask.

    The loss is on all tokens but the first, which nothing predicts.

    Args:
      outputs_only: of a turn: the loss is on its outputs, those in its prompt and its answer.
      chat: whether a turn goes through the model's chat template.

    Raises:
      ValueError: `chat`, and the tokenizer has no chat template.
    """
    if isinstance(text, str):
        return text_of(tokenizer.encode(text))
    ids, marked = tokenizer.encode_turn(text.prompt, text.answer, chat)
    mask = (i > 0 and (is_output or not outputs_only) for i, is_output in enumerate(marked))
    return Text(tuple(ids), tuple(mask))


def text_of(tokens: Sequence[int], prompt_length: int = 0) -> Text:
    """Return a training text whose loss counts each token after the first `prompt_length`."""
    first = max(prompt_length, 1)
    return Text(tuple(tokens), tuple(i >= first for i in range(len(tokens))))
