"""Generation: prefill and decode with a KV cache in one jitted program, an adapter per row.

Prompts are padded on the left, so that every row writes its cache at the same slot:

  logits = prefill(prompts);  while any row is not done:  token ~ p(logits);  logits = decode(token)

Each row draws from its own key, folded with the step: its text does not depend on its neighbors.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


def top_p_mask(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return the smallest set of likeliest tokens with mass >= top_p, bool[B V]; ties stay
    together.

    No sort: bisection over the bits of the threshold probability, exact after 31 halvings (the
    bits of nonnegative floats are ordered as the floats are).
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # mass(bits >= low) >= top_p > mass(bits >= high)
        middle = low + (high - low) // 2
        mass = jnp.where(bits >= middle[:, None], probs, 0.0).sum(axis=-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    rows = probs.shape[0]
    low = jnp.zeros((rows,), jnp.int32)
    high = jnp.full((rows,), 0x3F800001, jnp.int32)  # just above the bits of 1.0
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    # The likeliest token stays, whatever rounding does to the mass.
    return (bits >= low[:, None]) | (probs == probs.max(axis=-1, keepdims=True))


def choose(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Draw one token per row, i32[B], from logits f32[B V]; temperature 0 takes the likeliest."""

    def draw(_: None) -> jax.Array:
        scaled = logits / jnp.maximum(temperature, 1e-6)
        scaled = jnp.where(top_p_mask(scaled, top_p), scaled, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys, scaled)

    def greedy(_: None) -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    return jax.lax.cond(temperature > 0, draw, greedy, None).astype(jnp.int32)


class _Decode(NamedTuple):
    step: jax.Array  # i32[]
    logits: jax.Array  # f32[B V] for the next token
    done: jax.Array  # bool[B]
    tokens: jax.Array  # i32[B T]
    logp: jax.Array  # f32[B T]
    mask: jax.Array  # bool[B T]
    cache: KVCache


@partial(jax.jit, static_argnames=("config", "max_tokens", "pad_id"))
def generate(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    stop_ids: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    max_tokens: int,
    pad_id: int,
) -> Samples:
    """Continue every prompt until a stop token or `max_tokens`.

    Args:
      adapters: A of them; rows are grouped by adapter, B / A each. None is the base model.
      prompts: i32[B S], padded on the left.
      prompt_mask: bool[B S], the prompts' tokens.
      keys: typed PRNG keys [B], one per row.
      stop_ids: i32[n]; a row ends with the first of them, which counts as written.
      temperature: f32[]; 0 is greedy.
      top_p: f32[]; 1 keeps all tokens.
    """
    B, S = prompts.shape
    lengths = prompt_mask.sum(axis=1)
    padding = S - lengths
    cache = init_cache(config, B, S + max_tokens, params["embed"]["embedding"].dtype)
    slots = jnp.arange(S + max_tokens)
    written = slots[None] >= padding[:, None]  # the padding's slots are a segment apart
    positions = jnp.maximum(jnp.arange(S)[None] - padding[:, None], 0)
    key_segments = written.astype(jnp.int32)
    hidden, cache = hidden_states(
        config, params, prompts, positions, key_segments[:, :S], adapters, cache, 0, key_segments
    )
    first = _Decode(
        step=jnp.int32(0),
        logits=unembed(config, params, hidden[:, -1]),
        done=lengths == 0,
        tokens=jnp.full((B, max_tokens), pad_id, jnp.int32),
        logp=jnp.zeros((B, max_tokens), jnp.float32),
        mask=jnp.zeros((B, max_tokens), bool),
        cache=cache,
    )

    def running(s: _Decode) -> jax.Array:
        return (s.step < max_tokens) & ~s.done.all()

    def decode(s: _Decode) -> _Decode:
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, s.step)
        token = jnp.where(s.done, pad_id, choose(s.logits, step_keys, temperature, top_p))
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
    temperature: float,
    top_p: float,
    max_tokens: int,
    max_rows: int,
    adapters: Adapters | None = None,
    show: Callable[[int], None] = lambda rows: None,
) -> tuple[Rollout, list[str]]:
    """Let the policy continue each prompt once; returns the rollout (host, one row each) and the
    texts.

    Args:
      model: whose config and tokenizer are used; the policy is `params`.
      paths: of each row's key (see keys.py).
      max_rows: rows decoded at once; shorter last calls are filled up, so one program serves.
      adapters: one adapter, or None.
      show: called with the number of rows of each finished call.
    """
    check_lengths(model.config, prompts, max_tokens)
    tokenizer = model.tokenizer
    tokens, mask = pad_prompts(prompts, tokenizer.pad_id)
    everywhere = replicated(mesh)
    stop_ids = np.asarray(tokenizer.stop_ids, np.int32)
    settings = to_device((stop_ids, np.float32(temperature), np.float32(top_p)), everywhere)
    size = min(max_rows, len(prompts))
    parts = []
    for start in range(0, len(prompts), size):
        index = np.arange(start, start + size) % len(prompts)
        row_keys = fold([paths[i] for i in index])
        rows = to_device((tokens[index], mask[index], row_keys), leading(mesh, "rows", size))
        samples = generate(
            model.config,
            params,
            adapters,
            *rows,
            *settings,
            max_tokens=max_tokens,
            pad_id=tokenizer.pad_id,
        )
        used = min(size, len(prompts) - start)
        parts.append(jax.tree.map(lambda x, used=used: x[:used], to_host(samples)))
        show(used)
    samples = Samples(*(np.concatenate(x) for x in zip(*parts, strict=True)))
    texts = [
        tokenizer.decode(row[written].tolist())
        for row, written in zip(samples.tokens, samples.mask, strict=True)
    ]
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
