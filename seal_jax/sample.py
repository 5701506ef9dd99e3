"""Generation: prefill and decode with a KV cache in one jitted program, an adapter per row.

Prompts are padded on the left, so that every row writes its cache at the same slot:

  logits = prefill(prompts);  while any row is not done:  token ~ p(logits);  logits = decode(token)

A prompt that is continued several times is computed once. Each row draws from its own key, folded
with the step: its text does not depend on its neighbors.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.draw import Settings, draw, make_settings
from seal_jax.keys import fold
from seal_jax.models.config import ModelConfig
from seal_jax.models.transformer import KVCache, hidden_states, init_cache, unembed
from seal_jax.self_edit import bucket_of
from seal_jax.sharding import leading, replicated, to_device, to_host
from seal_jax.types import Adapters, Params, Rollout


class Samples(NamedTuple):
    """What was written. Entries behind a row's end are pad_id, 0 and False."""

    tokens: jax.Array  # i32[B T], the stop token included
    logp: jax.Array  # f32[B T] log-softmax of the model's logits: before temperature and top-p
    mask: jax.Array  # bool[B T] the tokens that were written
    finished: jax.Array  # bool[B] whether the row ended by a stop token


class _Decode(NamedTuple):
    step: jax.Array  # i32[]
    logits: jax.Array  # f32[B V] for the next token
    done: jax.Array  # bool[B]
    tokens: jax.Array  # i32[B T]
    logp: jax.Array  # f32[B T]
    mask: jax.Array  # bool[B T]
    seen: jax.Array  # bool[B V] the tokens of the prompt and of what was written
    cache: KVCache


@partial(jax.jit, static_argnames=("config", "max_tokens", "pad_id", "copies"))
def generate(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    stop_ids: jax.Array,
    settings: Settings,
    *,
    max_tokens: int,
    pad_id: int,
    copies: int = 1,
) -> Samples:
    """Continue every prompt until a stop token or `max_tokens`.

    Args:
      adapters: A of them; rows are grouped by adapter, B / A each. None is the base model.
      prompts: i32[P S], padded on the left.
      prompt_mask: bool[P S], the prompts' tokens.
      keys: typed PRNG keys [B], one per row.
      stop_ids: i32[n]; a row ends with the first of them, which counts as written.
      settings: of each row [B].
      copies: the rows that continue each prompt, behind one another: B is P * copies.
    """
    P, S = prompts.shape
    B = P * copies
    lengths = prompt_mask.sum(axis=1)
    padding = S - lengths
    cache = init_cache(config, P, S + max_tokens, params["embed"]["embedding"].dtype)
    slots = jnp.arange(S + max_tokens)
    written = slots[None] >= padding[:, None]  # the padding's slots are a segment apart
    positions = jnp.maximum(jnp.arange(S)[None] - padding[:, None], 0)
    key_segments = written.astype(jnp.int32)
    hidden, cache = hidden_states(
        config, params, prompts, positions, key_segments[:, :S], adapters, cache, 0, key_segments
    )
    seen = jnp.zeros((P, config.vocab_size), bool)
    seen = seen.at[jnp.arange(P)[:, None], prompts].max(prompt_mask)
    prefilled = unembed(config, params, hidden[:, -1]), lengths, key_segments, seen, cache
    logits, lengths, key_segments, seen, cache = jax.tree.map(
        lambda x: jnp.repeat(x, copies, axis=0), prefilled
    )
    first = _Decode(
        step=jnp.int32(0),
        logits=logits,
        done=lengths == 0,
        tokens=jnp.full((B, max_tokens), pad_id, jnp.int32),
        logp=jnp.zeros((B, max_tokens), jnp.float32),
        mask=jnp.zeros((B, max_tokens), bool),
        seen=seen,
        cache=cache,
    )

    def running(s: _Decode) -> jax.Array:
        return (s.step < max_tokens) & ~s.done.all()

    def decode(s: _Decode) -> _Decode:
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, s.step)
        token = jnp.where(s.done, pad_id, draw(s.logits, step_keys, settings, s.seen))
        logp = jnp.take_along_axis(jax.nn.log_softmax(s.logits), token[:, None], axis=-1)[:, 0]
        slot = S + s.step
        hidden, cache = hidden_states(
            config,
            params,
            token[:, None],
            (lengths + s.step)[:, None],
            jnp.ones((B, 1), jnp.int32),
            adapters,
            s.cache,
            slot,
            key_segments,
        )
        return _Decode(
            step=s.step + 1,
            logits=unembed(config, params, hidden[:, 0]),
            done=s.done | (token[:, None] == stop_ids[None]).any(axis=1),
            tokens=s.tokens.at[:, s.step].set(token),
            logp=s.logp.at[:, s.step].set(jnp.where(s.done, 0.0, logp)),
            mask=s.mask.at[:, s.step].set(~s.done),
            seen=s.seen.at[jnp.arange(B), token].set(True),
            cache=cache,
        )

    last = jax.lax.while_loop(running, decode, first)
    return Samples(last.tokens, last.logp, last.mask, last.done & (lengths > 0))


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int, at_least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts padded on the left to a common bucket, i32[B S], and their mask bool[B S]."""
    length = bucket_of(max(at_least, *(len(p) for p in prompts)))
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        if prompt:
            tokens[row, -len(prompt) :] = prompt
            mask[row, -len(prompt) :] = True
    return tokens, mask


def check_lengths(config: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Raise ValueError where a prompt and what may follow it exceed the model's context."""
    longest = max((len(p) for p in prompts), default=0)
    if longest + max_tokens > config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and up to {max_tokens} written ones do not fit into the"
            f" model's context of {config.max_length} tokens: shorten the passage, or lower"
            " max_tokens"
        )


def write_self_edits(
    model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    paths: Sequence[Sequence[int]],
    *,
    mesh,
    max_tokens: int,
    max_rows: int,
    adapters: Adapters | None = None,
    show: Callable[[int], None] = lambda rows: None,
    **settings: float,
) -> tuple[Rollout, list[str]]:
    """Let the policy continue each of P prompts R times, rows p * R + r.

    Args:
      model: whose config and tokenizer are used; the policy is `params`.
      paths: of each of the P * R rows' key (see keys.py).
      max_rows: rows decoded at once; shorter last calls are filled up, so one program serves.
      adapters: one adapter, or None.
      show: called with the number of rows of each finished call.
      settings: see `make_settings`.

    Returns:
      The rollout (host, one row each), and the texts.
    """
    check_lengths(model.config, prompts, max_tokens)
    tokenizer = model.tokenizer
    tokens, mask = pad_prompts(prompts, tokenizer.pad_id)
    stop_ids = to_device(np.asarray(tokenizer.stop_ids, np.int32), replicated(mesh))
    num_copies = len(paths) // len(prompts)
    copies = min(num_copies, max_rows)
    size = min(max_rows // copies, len(prompts))
    where, row_where = leading(mesh, "rows", size), leading(mesh, "rows", size * copies)
    row_settings = to_device(make_settings(size * copies, **settings), row_where)
    parts: dict[int, Samples] = {}
    for p, r in itertools.product(range(0, len(prompts), size), range(0, num_copies, copies)):
        index = np.arange(p, p + size) % len(prompts)
        rows = [i * num_copies + (r + j) % num_copies for i in index for j in range(copies)]
        samples = generate(
            model.config,
            params,
            adapters,
            *to_device((tokens[index], mask[index]), where),
            to_device(fold([paths[i] for i in rows]), row_where),
            stop_ids,
            row_settings,
            max_tokens=max_tokens,
            pad_id=tokenizer.pad_id,
            copies=copies,
        )
        samples = to_host(samples)
        new = {row: Samples(*(x[i] for x in samples)) for i, row in enumerate(rows)}
        show(len(new.keys() - parts.keys()))
        parts |= new
    samples = Samples(
        *(np.stack(x) for x in zip(*(parts[i] for i in range(len(paths))), strict=True))
    )
    texts = [
        tokenizer.decode(row[written].tolist())
        for row, written in zip(samples.tokens, samples.mask, strict=True)
    ]
    prompts = [prompt for prompt in prompts for _ in range(num_copies)]
    return to_rollout(prompts, samples, tokenizer.pad_id), texts


def to_rollout(prompts: Sequence[Sequence[int]], samples: Samples, pad_id: int) -> Rollout:
    """Return prompts and what was written (numpy) as rows, padded on the right to a bucket."""
    lengths = [len(p) + int(m.sum()) for p, m in zip(prompts, samples.mask, strict=True)]
    shape = (len(prompts), bucket_of(max(lengths)))
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
