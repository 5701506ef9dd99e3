"""Generation: many rows at once, each with its own adapter, settings and key.

  while rows wait or write:
    admit those that wait to free rows:  cache, logits = prefill(prompts)
    some steps, on the device:           token ~ p(logits);  logits = decode(token)
    finished rows leave

A row writes its keys and values behind its own prompt, so rows of any age decode side by side; a
prompt that is continued several times is computed once. When nobody waits any more, the rows that
are left move into a smaller batch. A row's text depends on its prompt, key and settings alone: it
draws with its key folded with the number of its token.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from seal_jax.draw import Settings, draw, make_settings
from seal_jax.keys import fold
from seal_jax.models.config import ModelConfig
from seal_jax.models.transformer import KVCache, hidden_states, init_cache, unembed
from seal_jax.self_edit import bucket_of
from seal_jax.sharding import leading, replicated, to_device, to_host
from seal_jax.types import Adapters, Params, Rollout

# The steps of one device call, and by how much a batch shrinks in which nobody waits.
_CHUNK, _SHRINK = 32, 4


class Samples(NamedTuple):
    """What was written (numpy). Entries behind a row's end are pad_id, 0 and False."""

    tokens: np.ndarray  # i32[N T], the stop token included
    logp: np.ndarray  # f32[N T] log-softmax of the model's logits: before any setting
    mask: np.ndarray  # bool[N T] the tokens that were written
    finished: np.ndarray  # bool[N] whether the row ended by a stop token


class _Prefilled(NamedTuple):
    """Prompts that were read, [P ...]."""

    logits: jax.Array  # f32[P V] for the next token
    seen: jax.Array  # bool[P V] the tokens of the prompt
    length: jax.Array  # i32[P]
    cache: KVCache  # of the prompts' S slots


class _Rows(NamedTuple):
    """Rows that are being written, [B ...]."""

    logits: jax.Array  # f32[B V] for the next token
    seen: jax.Array  # bool[B V] the tokens of the prompt and of what was written
    length: jax.Array  # i32[B] of the prompt and of what was written: the next slot
    cache: KVCache
    keys: jax.Array  # typed PRNG keys [B]
    settings: Settings
    written: jax.Array  # i32[B]
    tokens: jax.Array  # i32[B T]
    logp: jax.Array  # f32[B T]
    done: jax.Array  # bool[B] written to the end, or empty
    finished: jax.Array  # bool[B] by a stop token


@partial(jax.jit, static_argnames="config")
def _prefill(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    prompts: jax.Array,
    length: jax.Array,
) -> _Prefilled:
    """Read prompts i32[P S], padded on the right, of length [P]."""
    P, S = prompts.shape
    slots = jnp.broadcast_to(jnp.arange(S), (P, S))
    ones = jnp.ones((P, S), jnp.int32)  # causal: nobody looks at what is behind a prompt
    cache = init_cache(config, P, S, params["embed"]["embedding"].dtype)
    hidden, cache = hidden_states(config, params, prompts, slots, ones, adapters, cache, 0)
    last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    seen = jnp.zeros((P, config.vocab_size), bool)
    seen = seen.at[jnp.arange(P)[:, None], prompts].max(slots < length[:, None])
    return _Prefilled(unembed(config, params, last), seen, length, cache)


@partial(jax.jit, static_argnums=range(7))
def _no_rows(
    config: ModelConfig,
    dtype: jnp.dtype,
    num_rows: int,
    num_slots: int,
    max_tokens: int,
    pad_id: int,
    sharding: NamedSharding,
) -> _Rows:
    B, shape = num_rows, (num_rows, max_tokens)
    count, some = jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.float32)
    rows = _Rows(
        logits=jnp.zeros((B, config.vocab_size), jnp.float32),
        seen=jnp.zeros((B, config.vocab_size), bool),
        length=count,
        cache=init_cache(config, B, num_slots, dtype),
        keys=jax.random.split(jax.random.key(0), B),
        settings=Settings(some, count, some, some, some),
        written=count,
        tokens=jnp.full(shape, pad_id, jnp.int32),
        logp=jnp.zeros(shape, jnp.float32),
        done=jnp.ones(B, bool),
        finished=jnp.zeros(B, bool),
    )
    return jax.lax.with_sharding_constraint(rows, sharding)


@partial(jax.jit, donate_argnames="rows", static_argnames="pad_id")
def _admit(
    rows: _Rows,
    new: _Prefilled,
    source: jax.Array,
    key_data: jax.Array,
    settings: Settings,
    *,
    pad_id: int,
) -> _Rows:
    """Begin rows anew with prompt source[b], i32[B]; those with -1 go on."""
    fresh = source >= 0

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), x, old)

    def put_cache(old: jax.Array, prompts: jax.Array) -> jax.Array:
        part = put(old[:, :, : prompts.shape[2]], prompts[source])
        return jax.lax.dynamic_update_slice(old, part, (0, 0, 0, 0))

    begun = ("logits", "seen", "length")
    return rows._replace(
        **{name: put(getattr(rows, name), getattr(new, name)[source]) for name in begun},
        cache=jax.tree.map(put_cache, rows.cache, new.cache),
        keys=jnp.where(fresh, jax.random.wrap_key_data(key_data), rows.keys),
        settings=jax.tree.map(put, rows.settings, settings),
        written=put(rows.written, 0),
        tokens=put(rows.tokens, pad_id),
        logp=put(rows.logp, 0.0),
        done=rows.done & ~fresh,
        finished=rows.finished & ~fresh,
    )


@jax.jit
def _move(rows: _Rows, index: jax.Array) -> _Rows:
    """Return the rows at index [B']."""
    return jax.tree.map(lambda x: x[index], rows)


@partial(jax.jit, donate_argnames="rows", static_argnames=("config", "num_steps"))
def _decode(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    rows: _Rows,
    stop_ids: jax.Array,
    *,
    num_steps: int,
) -> _Rows:
    """Let every row that is not done write up to `num_steps` tokens."""
    B, max_tokens = rows.tokens.shape
    each, S = jnp.arange(B), rows.cache.keys[0].shape[2]
    ones = jnp.ones((B, 1), jnp.int32)

    def running(carry: tuple) -> jax.Array:
        step, rows = carry
        return (step < num_steps) & ~rows.done.all()

    def step(carry: tuple) -> tuple:
        number, r = carry
        token_keys = jax.vmap(jax.random.fold_in)(r.keys, r.written)
        token = draw(r.logits, token_keys, r.settings, r.seen)
        logp = jnp.take_along_axis(jax.nn.log_softmax(r.logits), token[:, None], axis=-1)[:, 0]
        place = jnp.where(r.done, max_tokens, r.written)  # beyond the end: written nowhere
        written = r.written + (~r.done).astype(jnp.int32)
        finished = r.finished | (~r.done & (token[:, None] == stop_ids[None]).any(axis=1))
        hidden, cache = hidden_states(
            config,
            params,
            token[:, None],
            r.length[:, None],
            ones,
            adapters,
            r.cache,
            jnp.minimum(r.length, S - 1),
            jnp.ones((B, S), jnp.int32),
        )
        return number + 1, r._replace(
            logits=unembed(config, params, hidden[:, 0]),
            seen=r.seen.at[each, token].set(True),
            length=r.length + (~r.done).astype(jnp.int32),
            cache=cache,
            written=written,
            tokens=r.tokens.at[each, place].set(token, mode="drop"),
            logp=r.logp.at[each, place].set(logp, mode="drop"),
            done=r.done | finished | (written >= max_tokens),
            finished=finished,
        )

    return jax.lax.while_loop(running, step, (jnp.int32(0), rows))[1]


def generate(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[Sequence[int]]],
    keys: jax.Array,
    settings: Settings,
    *,
    mesh,
    stop_ids: Sequence[int],
    max_tokens: int,
    max_rows: int,
    pad_id: int,
    show: Callable[[int], None] = lambda rows: None,
) -> Samples:
    """Continue every prompt until a stop token or `max_tokens`; an empty one is not continued.

    Args:
      adapters: A of them; None is the base model.
      prompts: of each adapter; one group, where there is none or one. N in all.
      keys: typed PRNG keys [N].
      settings: of each prompt [N].
      stop_ids: a row ends with the first of them, which counts as written.
      max_rows: rows decoded at once, if not more adapters; the cache has
        2 * num_layers * num_kv_heads * head_dim numbers for each of a row's tokens.
      show: called with the number of rows that have come to their end.

    Returns:
      N rows, in the prompts' order.

    Raises:
      ValueError: a prompt is too long for the model.
    """
    flat = [tuple(prompt) for group in prompts for prompt in group]
    check_lengths(config, flat, max_tokens)
    first = np.cumsum([0, *(len(group) for group in prompts)])
    waiting = [
        deque(i for i in range(start, end) if flat[i])
        for start, end in zip(first[:-1], first[1:], strict=True)
    ]
    A, most = len(prompts), max(len(group) for group in prompts)
    size = max(1, min(most, max_rows // A))  # rows of each adapter
    at_once = -(-size // _SHRINK)  # prompts of each adapter that one call reads
    S = bucket_of(max(map(len, flat)))
    at = np.full((A, size), -1)  # which prompt each row continues

    def placed(arrays):
        return to_device(arrays, leading(mesh, "rows", len(jax.tree.leaves(arrays)[0])))

    with_params = config, params, adapters
    dtype = params["embed"]["embedding"].dtype
    where = leading(mesh, "rows", A * size)
    rows = _no_rows(config, dtype, A * size, S + max_tokens, max_tokens, pad_id, where)
    key_data = to_host(jax.random.key_data(keys))
    stop_ids = to_device(np.asarray(stop_ids, np.int32), replicated(mesh))
    written = Samples(
        np.full((len(flat), max_tokens), pad_id, np.int32),
        np.zeros((len(flat), max_tokens), np.float32),
        np.zeros((len(flat), max_tokens), bool),
        np.zeros(len(flat), bool),
    )
    while any(waiting) or (at >= 0).any():
        ready = sum(min(int((at[a] < 0).sum()), len(waiting[a])) for a in range(A))
        while ready and (4 * ready >= at.size or (at < 0).all() or ready == sum(map(len, waiting))):
            chosen, source, tokens, length = _choose_prompts(at, waiting, flat, at_once, S, pad_id)
            new = _prefill(*with_params, *placed((tokens, length)))
            index = np.maximum(chosen.reshape(-1), 0)
            begun = placed((source, key_data[index], Settings(*(x[index] for x in settings))))
            rows = _admit(rows, new, *begun, pad_id=pad_id)
            ready = sum(min(int((at[a] < 0).sum()), len(waiting[a])) for a in range(A))
        rows = _decode(*with_params, rows, stop_ids, num_steps=_CHUNK)
        done, *found = to_host((rows.done, rows.tokens, rows.logp, rows.written, rows.finished))
        ended = np.flatnonzero(done & (at.reshape(-1) >= 0))
        for row in ended:
            i, (tokens, logp, count, finished) = at.flat[row], (x[row] for x in found)
            written.tokens[i], written.logp[i], written.finished[i] = tokens, logp, finished
            written.mask[i, :count] = True
            at.flat[row] = -1
        if len(ended):
            show(len(ended))
        if at_once < at.shape[1] and not any(waiting) and ((at >= 0).sum(axis=1) <= at_once).all():
            order = np.argsort(at < 0, axis=1, kind="stable")[:, :at_once]  # those at work first
            index = order + np.arange(A)[:, None] * at.shape[1]
            rows = _move(rows, placed(index.reshape(-1).astype(np.int32)))
            at = np.take_along_axis(at, order, axis=1)
    return written


def _choose_prompts(
    at: np.ndarray,
    waiting: Sequence[deque],
    prompts: Sequence[tuple[int, ...]],
    at_once: int,
    length: int,
    pad_id: int,
) -> tuple[np.ndarray, ...]:
    """Take the next prompts that wait to the free rows, up to `at_once` different ones of a group.

    Returns:
      chosen [A size]: which prompt begins in a row, or -1; `at` is changed accordingly.
      source i32[B]: its place among the tokens i32[A * at_once, S], and those's lengths.
    """
    chosen, source = np.full_like(at, -1), np.full(at.shape, -1, np.int32)
    tokens = np.full((len(at) * at_once, length), pad_id, np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for a, queue in enumerate(waiting):
        places: dict[tuple[int, ...], int] = {}
        for row in np.flatnonzero(at[a] < 0):
            if not queue:
                break
            prompt = prompts[queue[0]]
            if prompt not in places and len(places) == at_once:
                break
            place = places.setdefault(prompt, a * at_once + len(places))
            tokens[place, : len(prompt)], lengths[place] = prompt, len(prompt)
            chosen[a, row] = at[a, row] = queue.popleft()
            source[a, row] = place
    return chosen, source.reshape(-1), tokens, lengths


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
      max_rows: rows decoded at once.
      adapters: one adapter, or None.
      show: called with the number of rows that have come to their end.
      settings: see `make_settings`.

    Returns:
      The rollout (host, one row each), and the texts.
    """
    tokenizer, copies = model.tokenizer, len(paths) // len(prompts)
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    samples = generate(
        model.config,
        params,
        adapters,
        [prompts],
        fold(paths),
        make_settings(len(paths), **settings),
        mesh=mesh,
        stop_ids=tokenizer.stop_ids,
        max_tokens=max_tokens,
        max_rows=max_rows,
        pad_id=tokenizer.pad_id,
        show=show,
    )
    return to_rollout(prompts, samples, tokenizer.pad_id), texts_of(tokenizer, samples)


def texts_of(tokenizer, samples: Samples) -> list[str]:
    return [
        tokenizer.decode(row[written].tolist())
        for row, written in zip(samples.tokens, samples.mask, strict=True)
    ]


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
