"""What was written: as text, as a rollout, and where it stops."""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from seal_jax.keys import fold
from seal_jax.models.model import Model
from seal_jax.models.own_kernels import num_own
from seal_jax.models.thoughts import Thoughts, text_before
from seal_jax.models.tokenizer import Tokenizer
from seal_jax.sampling.call_shapes import prompt_bucket
from seal_jax.sampling.draw import Settings, make_settings
from seal_jax.sampling.generate import Samples, generate
from seal_jax.types import Params, Rollout, SampleSettings


def write_self_edits(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    paths: Sequence[Sequence[int]],
    settings: SampleSettings,
    *,
    mesh: Mesh,
    thoughts: Thoughts | None = None,
    constrain: Callable[[int, list[int]], np.ndarray] | None = None,
    show: Callable[[int], None] = lambda rows: None,
) -> tuple[Rollout, list[str]]:
    """Let the policy continue each of P prompts R times, rows p * R + r.

    A text ends before the first of the strings in `settings.stop`, whose tokens count as written.
    Thoughts are part of it, see thoughts.py.

    Args:
      model: whose config and tokenizer are used; the policy is `params`. With kernels for each of S
        sequences, as many prompts are of each, in order.
      thoughts: how the model marks them, for `settings.stop` does not count in them.
      paths: of each of the P * R rows' key (see keys.py).
      constrain, show: see `Limits`.

    Returns:
      The rollout (host, one row each), and the texts.
    """
    tokenizer, copies = model.tokenizer, len(paths) // len(prompts)
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    size = len(prompts) // (num_own(params) or 1)
    samples = generate(
        model.config,
        params,
        None,
        [prompts[i : i + size] for i in range(0, len(prompts), size)],
        fold(paths),
        make_settings(len(paths), **{name: getattr(settings, name) for name in Settings._fields}),
        mesh=mesh,
        stop_ids=tokenizer.stop_ids,
        max_tokens=settings.most_tokens,
        max_rows=settings.max_rows,
        pad_id=tokenizer.pad_id,
        stop=make_stop(tokenizer, settings.stop, thoughts),
        constrain=constrain,
        show=show,
    )
    texts = texts_of(tokenizer, samples, settings.stop, thoughts)
    return to_rollout(prompts, samples, tokenizer.pad_id), texts


def texts_of(
    tokenizer: Tokenizer,
    samples: Samples,
    stop: Sequence[str] = (),
    thoughts: Thoughts | None = None,
) -> list[str]:
    """Return what was written as texts, each up to the first of the strings in `stop`.

    The token that ended one is no part of it, whether or not it is a special one.
    """
    rows = [row[mask].tolist() for row, mask in zip(samples.tokens, samples.mask, strict=True)]
    ended = [row[:-1] if row and row[-1] in tokenizer.stop_ids else row for row in rows]
    return [text_before(tokenizer.decode(row), stop, thoughts) for row in ended]


def make_stop(
    tokenizer: Tokenizer, strings: Sequence[str], thoughts: Thoughts | None = None
) -> Callable[[list[int]], bool] | None:
    """Return whether the text of tokens has one of the strings in it, for `generate`.

    In the first thought they do not count.

    Special tokens are no text: ids are what stops at them.

    Raises:
      ValueError: an empty string, or one string instead of several.
    """
    if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop={strings!r}: expected a sequence of strings that are not empty")
    if not strings:
        return None

    def stop(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens)
        return text_before(text, strings, thoughts) != text

    return stop


def to_rollout(prompts: Sequence[Sequence[int]], samples: Samples, pad_id: int) -> Rollout:
    """Return prompts and what was written (numpy) as rows, padded on the right to a bucket."""
    lengths = [len(p) + int(m.sum()) for p, m in zip(prompts, samples.mask, strict=True)]
    shape = (len(prompts), prompt_bucket(max(lengths)))
    tokens = np.full(shape, pad_id, np.int32)
    logp = np.zeros(shape, np.float32)
    loss_mask = np.zeros(shape, bool)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        written = samples.mask[row]
        span = slice(len(prompt), length)
        tokens[row, : len(prompt)] = prompt
        tokens[row, span] = samples.tokens[row][written]
        logp[row, span] = samples.logp[row][written]
        loss_mask[row, span] = True
    return Rollout(tokens, logp, loss_mask)
