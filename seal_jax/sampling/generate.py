"""Generation: many rows at once, each with its own adapter, settings and key.

  while rows wait or write:
    admit    those that wait begin in free rows:  cache, logits = prefill(prompts)
    grow     the cache, where it is full
    decode   some steps, on the device:           token ~ p(logits);  logits = decode(token)
    collect  what was written; rows that ended leave
    shrink   the batch, where nobody waits any more

A prompt that is continued several times is read once, and where nobody has to wait its rows share
one cache of it. A row's text depends on its prompt, key and settings alone: it draws each token
with its key folded with the token's number.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from seal_jax.models.config import ModelConfig
from seal_jax.models.own_kernels import check_groups
from seal_jax.sampling import decode
from seal_jax.sampling.call_shapes import CallShapes, check_lengths, grown, plan_call
from seal_jax.sampling.draw import Settings
from seal_jax.sharding import leading, replicated, to_device, to_host
from seal_jax.types import Adapters, Params

# The steps of one device call; fewer where the host looks for stop strings.
_CHUNK, STOP_CHUNK = 32, 8

Constrain = Callable[[int, list[int]], np.ndarray]  # see `Limits`


class Samples(NamedTuple):
    """What was written (numpy). Entries behind a row's end are pad_id, 0 and False."""

    tokens: np.ndarray  # i32[N T], what ended the row included
    logp: np.ndarray  # f32[N T] log-softmax of the model's logits: before any setting
    mask: np.ndarray  # bool[N T] the tokens that were written
    finished: np.ndarray  # bool[N] whether the row ended by a stop token or string


class Limits(NamedTuple):
    """How `generate` writes, and where it ends.

    Args:
      stop_ids: a row ends with the first of them, which counts as written.
      max_tokens: a row ends with so many.
      max_rows: rows decoded at once, if not more adapters; fewer where memory has no room for them.
      pad_id: what stands behind a row's end.
      stop: whether a row that has written these tokens has come to its end, as `make_stop` says. It
        is asked on the host, every few steps; the row ends with the first token for which it holds.
      constrain: (i, tokens) -> bool[V], which tokens prompt i may be continued with, after those
        that it has written; shorter than V, the others are not allowed. Asked on the host for every
        token, in order, which is slow: every step waits for it.
      show: called with the number of rows that have come to their end.
    """

    stop_ids: Sequence[int]
    max_tokens: int
    max_rows: int
    pad_id: int
    stop: Callable[[list[int]], bool] | None = None
    constrain: Constrain | None = None
    show: Callable[[int], None] = lambda rows: None


class _Call(NamedTuple):
    """What a call of `generate` is asked for."""

    config: ModelConfig
    params: Params
    adapters: Adapters | None
    prompts: list[tuple[int, ...]]  # [N]
    key_data: np.ndarray  # [N ...]
    settings: Settings  # [N]
    mesh: Mesh
    limits: Limits


class _State(NamedTuple):
    """What a call knows between two calls of the device; the host's part is changed in place."""

    turned: Params  # what decoding takes instead of params, see models/turned_kernels.py
    adapters: Adapters | None  # split by layers
    rows: decode.Rows
    stop_ids: jax.Array
    num_steps: jax.Array  # of one device call
    chunk: int  # the same, on the host
    shapes: CallShapes
    at: np.ndarray  # i64[A B/A] which prompt each row continues; -1 is an empty row
    waiting: list[deque[int]]  # of each adapter, the prompts that no row continues yet
    so_far: dict[int, list[int]]  # what the rows at work have written, by prompt


def generate(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[Sequence[int]]],
    keys: jax.Array,
    settings: Settings,
    *,
    mesh: Mesh,
    **limits: Any,
) -> Samples:
    """Continue every prompt until a stop token or `max_tokens`; an empty one is not continued.

    Args:
      adapters: A of them; None is the base model.
      prompts: of each adapter, or of each sequence that has kernels of its own; else one group. N
        in all.
      keys: typed PRNG keys [N].
      settings: of each prompt [N].
      limits: the fields of `Limits`: stop_ids, max_tokens, max_rows, pad_id, and optional ones.

    Returns:
      N rows, in the prompts' order.

    Raises:
      ValueError: a prompt is too long for the model; not even a row of every adapter fits into
        memory; numbers of rows or groups that differ; a row that may be continued with no token.
    """
    groups = [[tuple(prompt) for prompt in group] for group in prompts]
    flat, key_data = list(chain(*groups)), to_host(jax.random.key_data(keys))
    call = _Call(config, params, adapters, flat, key_data, settings, mesh, Limits(**limits))
    check_groups(params, None if adapters is None else adapters.scale.shape[0], len(groups))
    _check(call)
    shape = len(flat), call.limits.max_tokens
    tokens = np.full(shape, call.limits.pad_id, np.int32)
    logp, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
    samples = Samples(tokens, logp, mask, np.zeros(len(flat), bool))
    if not any(flat):
        return samples
    state = _begin(call, groups)
    while state.so_far or any(state.waiting):
        while _is_time_to_admit(state):
            state = _admit(call, state)
        state = _grow(call, state)
        state = _decode(call, state)
        state = _collect(call, state, samples)
        state = _shrink(call, state)
    return samples


def _check(call: _Call) -> None:
    max_tokens, max_rows, N = call.limits.max_tokens, call.limits.max_rows, len(call.prompts)
    if max_tokens < 1 or max_rows < 1:
        raise ValueError(f"max_tokens={max_tokens}, max_rows={max_rows}: expected at least 1")
    lengths = {len(call.key_data), *(len(x) for x in call.settings)}
    if lengths != {N}:
        raise ValueError(f"{N} prompts, but keys or settings of {sorted(lengths)} rows")
    check_lengths(call.config, call.prompts, max_tokens)


def _begin(call: _Call, groups: list[list[tuple[int, ...]]]) -> _State:
    """Choose the shapes, and make rows that are all empty."""
    config, params, adapters, *_, mesh, limits = call
    max_tokens = limits.max_tokens
    shapes = plan_call(config, params, adapters, groups, mesh, max_tokens, limits.max_rows)
    rows_shape = shapes.rows._replace(
        num_slots=grown(_CHUNK, max_tokens),
        pad_id=limits.pad_id,
        keep_seen=bool((np.asarray(call.settings.repetition_penalty) != 1).any()),
    )
    to_turn = params if shapes.turned else None
    turned, adapters, rows = decode.start(config, to_turn, adapters, rows_shape, mesh)
    chunk = 1 if limits.constrain else STOP_CHUNK if limits.stop else _CHUNK
    firsts = accumulate(map(len, groups[:-1]), initial=0)
    numbered = [enumerate(group, first) for group, first in zip(groups, firsts, strict=True)]
    return _State(
        turned=turned or params,
        adapters=adapters,
        rows=rows,
        stop_ids=to_device(np.asarray(limits.stop_ids, np.int32), replicated(mesh)),
        num_steps=to_device(np.int32(chunk), replicated(mesh)),
        chunk=chunk,
        shapes=shapes,
        at=np.full((len(groups), rows_shape.num_rows // len(groups)), -1),
        waiting=[deque(i for i, prompt in group if prompt) for group in numbered],
        so_far={},
    )


def _by_row(call: _Call, arrays: Any) -> Any:
    """Put host arrays [B ...] on the devices."""
    num_rows = len(jax.tree.leaves(arrays)[0])
    return to_device(arrays, leading(call.mesh, "rows", num_rows, call.config.rules))


def _is_time_to_admit(state: _State) -> bool:
    """Whether prompts can begin: all that wait, or many at a time, or nobody else is at work."""
    groups = zip(state.at, state.waiting, strict=True)
    ready = sum(min(int((rows < 0).sum()), len(queue)) for rows, queue in groups)
    all_wait = ready == sum(map(len, state.waiting))
    return ready > 0 and (4 * ready >= state.at.size or not state.so_far or all_wait)


def _admit(call: _Call, state: _State) -> _State:
    """Read the next prompts, and let them begin in free rows."""
    chosen, source, *read = _choose_prompts(call, state)
    keep_seen = state.rows.seen is not None
    with jax.set_mesh(call.mesh):  # for the attention kernels
        read = _by_row(call, tuple(read))
        new = decode.prefill(
            call.config, call.params, state.adapters, *read, mesh=call.mesh, keep_seen=keep_seen
        )
    index = np.maximum(chosen.reshape(-1), 0)
    settings = Settings(*(x[index] for x in call.settings))
    begun = _by_row(call, (source, call.key_data[index], settings))
    pad_id = call.limits.pad_id
    rows = decode.admit(call.config, state.rows, new, *begun, mesh=call.mesh, pad_id=pad_id)
    state.so_far.update((int(i), []) for i in chosen[chosen >= 0])
    return state._replace(rows=rows)


def _choose_prompts(call: _Call, state: _State) -> tuple[np.ndarray, ...]:
    """Take the next prompts that wait to the free rows, as many as one call reads of a group.

    They come in order: where rows share prompts all begin at the start, and stand as planned.

    Returns:
      chosen [A B/A]: which prompt begins in a row, or -1; `at` is changed accordingly.
      source i32[B]: its place among the tokens, which come next.
      tokens i32[A * at_once, S], and their lengths.
    """
    at, at_once = state.at, state.shapes.at_once
    chosen, source = np.full_like(at, -1), np.full(at.shape, -1, np.int32)
    shape = len(at) * at_once, state.shapes.rows.prompt_slots
    tokens = np.full(shape, call.limits.pad_id, np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for a, queue in enumerate(state.waiting):
        places: dict[tuple[int, ...], int] = {}
        for row in np.flatnonzero(at[a] < 0):
            if not queue:
                break
            prompt = call.prompts[queue[0]]
            if prompt not in places and len(places) == at_once:
                break
            place = places.setdefault(prompt, a * at_once + len(places))
            tokens[place, : len(prompt)], lengths[place] = prompt, len(prompt)
            chosen[a, row] = at[a, row] = queue.popleft()
            source[a, row] = place
    return chosen, source.reshape(-1), tokens, lengths


def _grow(call: _Call, state: _State) -> _State:
    """Give the cache room for the next steps, if it has none."""
    max_tokens = call.limits.max_tokens
    needed = min(max(map(len, state.so_far.values())) + state.chunk, max_tokens)
    if needed <= state.rows.num_slots:
        return state
    same = np.arange(state.at.size, dtype=np.int32)
    prompts = same[: state.rows.num_prompts]
    return state._replace(rows=_move(call, state.rows, same, prompts, grown(needed, max_tokens)))


def _decode(call: _Call, state: _State) -> _State:
    """Let the rows at work write some tokens."""
    constrain = call.limits.constrain
    allowed = _by_row(call, _allowed(call, state, constrain)) if constrain else None
    arguments = state.turned, state.adapters, state.rows, state.stop_ids, state.num_steps
    rows = decode.decode(call.config, *arguments, allowed, mesh=call.mesh)
    return state._replace(rows=rows)


def _allowed(call: _Call, state: _State, constrain: Constrain) -> np.ndarray:
    """Return the tokens that each row may be continued with, bool[B V]; all, where it is empty."""
    at, vocab_size = state.at.reshape(-1), call.config.vocab_size
    allowed = np.ones((len(at), vocab_size), bool)
    for row in np.flatnonzero(at >= 0):
        i = int(at[row])
        mask = np.asarray(constrain(i, list(state.so_far[i])))
        if mask.dtype != bool or mask.ndim != 1 or len(mask) > vocab_size:
            raise ValueError(
                f"constrain gave {mask.dtype}{list(mask.shape)} for prompt {i}: expected bool of up"
                f" to {vocab_size} tokens"
            )
        if not mask.any():
            raise ValueError(
                f"constrain allows prompt {i} no token after {len(state.so_far[i])}: expected at"
                " least one, as a stop token"
            )
        allowed[row] = False
        allowed[row, : len(mask)] = mask
    return allowed


def _collect(call: _Call, state: _State, samples: Samples) -> _State:
    """Note what the rows at work have written; those that have ended leave."""
    rows, at, stop = state.rows, state.at.reshape(-1), call.limits.stop
    done, tokens, logp, lengths, finished = to_host(
        (rows.done, rows.tokens, rows.logp, rows.written, rows.finished)
    )
    done, lengths, finished = done & (at >= 0), lengths.copy(), finished.copy()
    for row in np.flatnonzero(at >= 0):
        text = state.so_far[at[row]] = tokens[row, : lengths[row]].tolist()
        if stop is not None and stop(text):
            before = bisect_left(range(1, len(text)), True, key=lambda n: stop(text[:n]))
            lengths[row] = before + 1
            done[row] = finished[row] = True
    if not done.any():
        return state
    for row in np.flatnonzero(done):
        i, span = at[row], slice(lengths[row])
        samples.tokens[i, span], samples.logp[i, span] = tokens[row, span], logp[row, span]
        samples.mask[i, span], samples.finished[i] = True, finished[row]
        del state.so_far[i]
    state.at[done.reshape(state.at.shape)] = -1
    # Some of them only the host knows about.
    rows = rows._replace(done=_by_row(call, state.at.reshape(-1) < 0))
    call.limits.show(int(done.sum()))
    return state._replace(rows=rows)


def _shrink(call: _Call, state: _State) -> _State:
    """Move the rows that are left into a smaller batch, where nobody waits and they are few."""
    (A, size), few = state.at.shape, state.shapes.few
    if any(state.waiting) or few >= size or ((state.at >= 0).sum(axis=1) > few).any():
        return state
    order = np.argsort(state.at < 0, axis=1, kind="stable")[:, :few]  # at work: first
    index = (order + np.arange(A)[:, None] * size).reshape(-1).astype(np.int32)
    prompts = index // (A * size // state.rows.num_prompts)  # a copy for each
    rows = _move(call, state.rows, index, prompts, state.rows.num_slots)
    return state._replace(rows=rows, at=np.take_along_axis(state.at, order, axis=1))


def _move(
    call: _Call, rows: decode.Rows, index: np.ndarray, prompts: np.ndarray, num_slots: int
) -> decode.Rows:
    places = _by_row(call, index), _by_row(call, prompts)
    return decode.move(call.config, rows, *places, mesh=call.mesh, num_slots=num_slots)
