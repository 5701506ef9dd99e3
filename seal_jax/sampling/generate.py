"""Generation: many rows at once, each with its own adapter, settings and key.

  while rows wait or write:
    admit those that wait to free rows:  cache, logits = prefill(prompts)
    some steps, on the device:           token ~ p(logits);  logits = decode(token)
    finished rows leave

A prompt that is continued several times is read once, and where nobody has to wait its rows share
one cache of it. The cache grows as its rows do. When nobody waits any more, the rows that are left
move into a smaller batch. A row's text depends on its
prompt, key and settings alone: it draws with its key folded with the number of its token.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from seal_jax.models.config import ModelConfig
from seal_jax.sampling.cache_plan import check_lengths, grown, make_plan
from seal_jax.sampling.decode import Rows, admit, decode, move, prefill, start
from seal_jax.sampling.draw import Settings
from seal_jax.sharding import leading, replicated, to_device, to_host
from seal_jax.types import Adapters, Params

# The steps of one device call; fewer where the host looks for stop strings.
_CHUNK, STOP_CHUNK = 32, 8


class Samples(NamedTuple):
    """What was written (numpy). Entries behind a row's end are pad_id, 0 and False."""

    tokens: np.ndarray  # i32[N T], what ended the row included
    logp: np.ndarray  # f32[N T] log-softmax of the model's logits: before any setting
    mask: np.ndarray  # bool[N T] the tokens that were written
    finished: np.ndarray  # bool[N] whether the row ended by a stop token or string


def generate(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[Sequence[int]]],
    keys: jax.Array,
    settings: Settings,
    *,
    mesh: Mesh,
    stop_ids: Sequence[int],
    max_tokens: int,
    max_rows: int,
    pad_id: int,
    stop: Callable[[list[int]], bool] | None = None,
    constrain: Callable[[int, list[int]], np.ndarray] | None = None,
    show: Callable[[int], None] = lambda rows: None,
) -> Samples:
    """Continue every prompt until a stop token or `max_tokens`; an empty one is not continued.

    Args:
      adapters: A of them; None is the base model.
      prompts: of each adapter; one group, where there is none or one. N in all.
      keys: typed PRNG keys [N].
      settings: of each prompt [N].
      stop_ids: a row ends with the first of them, which counts as written.
      max_rows: rows decoded at once, if not more adapters; fewer where memory has no room for them.
      stop: whether a row that has written these tokens has come to its end, as `make_stop` says. It
        is asked on the host, every few steps; the row ends with the first token for which it holds.
      constrain: (i, tokens) -> bool[V], which tokens prompt i may be continued with, after those
        that it has written; shorter than V, the others are not allowed. Asked on the host for every
        token, in order, which is slow: every step waits for it.
      show: called with the number of rows that have come to their end.

    Returns:
      N rows, in the prompts' order.

    Raises:
      ValueError: a prompt is too long for the model; not even a row of every adapter fits into
        memory; numbers of rows that differ; a row that may be continued with no token.
    """
    flat = [tuple(prompt) for group in prompts for prompt in group]
    _check(config, flat, keys, settings, max_tokens, max_rows)
    written = Samples(
        np.full((len(flat), max_tokens), pad_id, np.int32),
        np.zeros((len(flat), max_tokens), np.float32),
        np.zeros((len(flat), max_tokens), bool),
        np.zeros(len(flat), bool),
    )
    if not any(flat):
        return written
    first = np.cumsum([0, *(len(group) for group in prompts)])
    waiting = [
        deque(i for i in range(start, end) if flat[i])
        for start, end in zip(first[:-1], first[1:], strict=True)
    ]
    plan = make_plan(config, params, adapters, prompts, mesh, max_tokens, max_rows)
    S, A = plan.prompt_slots, len(prompts)
    at = np.full((A, plan.size), -1)  # which prompt each row continues
    so_far: dict[int, list[int]] = {}  # what the rows at work have written

    def placed(arrays):
        return to_device(
            arrays, leading(mesh, "rows", len(jax.tree.leaves(arrays)[0]), config.rules)
        )

    slots = grown(_CHUNK, max_tokens)
    dtype = params["embed"]["embedding"].dtype
    turned = params if plan.turned else None
    shape = at.size, at.size // plan.copies, S, slots, max_tokens
    keep_seen = bool((np.asarray(settings.repetition_penalty) != 1).any())
    shape = *shape, pad_id, keep_seen
    turned, adapters, rows = start(config, turned, adapters, dtype, *shape, mesh)
    to_decode = config, turned or params, adapters
    key_data = to_host(jax.random.key_data(keys))
    stop_ids = to_device(np.asarray(stop_ids, np.int32), replicated(mesh))
    chunk = 1 if constrain else STOP_CHUNK if stop else _CHUNK
    num_steps = to_device(np.int32(chunk), replicated(mesh))
    while any(waiting) or (at >= 0).any():
        while _is_time_to_admit(at, waiting):
            chosen, source, *read = _choose_prompts(at, waiting, flat, plan.at_once, S, pad_id)
            with jax.set_mesh(mesh):  # for the attention kernels
                read = placed(tuple(read))
                new = prefill(config, params, adapters, *read, mesh=mesh, keep_seen=keep_seen)
            index = np.maximum(chosen.reshape(-1), 0)
            begun = placed((source, key_data[index], Settings(*(x[index] for x in settings))))
            rows = admit(config, rows, new, *begun, mesh=mesh, pad_id=pad_id)
            so_far |= {int(i): [] for i in chosen[chosen >= 0]}
        needed = min(max(map(len, so_far.values())) + chunk, max_tokens)
        if needed > slots:
            slots = grown(needed, max_tokens)
            same = np.arange(at.size, dtype=np.int32)
            places = placed(same), placed(same[: len(rows.prompts.keys[0])])
            rows = move(config, rows, *places, mesh=mesh, num_slots=slots)
        allowed = None
        if constrain:
            allowed = placed(_allowed(constrain, at.reshape(-1), so_far, config.vocab_size))
        rows = decode(*to_decode, rows, stop_ids, num_steps, allowed, mesh=mesh)
        done = _collect(rows, at.reshape(-1), so_far, stop, written)
        if done.any():
            for i in at[done.reshape(at.shape)]:
                del so_far[i]
            at[done.reshape(at.shape)] = -1
            # Some of them only the host knows about.
            rows = rows._replace(done=placed(at.reshape(-1) < 0))
            show(int(done.sum()))
        few = ((at >= 0).sum(axis=1) <= plan.few).all()
        if few and plan.few < at.shape[1] and not any(waiting):
            order = np.argsort(at < 0, axis=1, kind="stable")[:, : plan.few]  # at work: first
            index = (order + np.arange(A)[:, None] * at.shape[1]).reshape(-1).astype(np.int32)
            prompt = index // (at.size // len(rows.prompts.keys[0]))  # a copy for each
            places = placed(index), placed(prompt)
            rows = move(config, rows, *places, mesh=mesh, num_slots=slots)
            at = np.take_along_axis(at, order, axis=1)
    return written


def _check(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    settings: Settings,
    max_tokens: int,
    max_rows: int,
) -> None:
    if max_tokens < 1 or max_rows < 1:
        raise ValueError(f"max_tokens={max_tokens}, max_rows={max_rows}: expected at least 1")
    lengths = {len(keys), *(len(x) for x in settings)}
    if lengths != {len(prompts)}:
        raise ValueError(f"{len(prompts)} prompts, but keys or settings of {sorted(lengths)} rows")
    check_lengths(config, prompts, max_tokens)


def _is_time_to_admit(at: np.ndarray, waiting: Sequence[deque]) -> bool:
    """Whether prompts can begin: all that wait, or many at a time, or nobody else is at work."""
    ready = sum(
        min(int((row < 0).sum()), len(queue)) for row, queue in zip(at, waiting, strict=True)
    )
    all_wait = ready == sum(map(len, waiting))
    return ready > 0 and (4 * ready >= at.size or (at < 0).all() or all_wait)


def _allowed(
    constrain: Callable[[int, list[int]], np.ndarray],
    at: np.ndarray,
    so_far: dict[int, list[int]],
    vocab_size: int,
) -> np.ndarray:
    """Return the tokens that each row may be continued with, bool[B V]; all, where it is empty."""
    allowed = np.ones((len(at), vocab_size), bool)
    for row in np.flatnonzero(at >= 0):
        i = int(at[row])
        mask = np.asarray(constrain(i, list(so_far[i])))
        if mask.dtype != bool or mask.ndim != 1 or len(mask) > vocab_size:
            raise ValueError(
                f"constrain gave {mask.dtype}{list(mask.shape)} for prompt {i}: expected bool of up"
                f" to {vocab_size} tokens"
            )
        if not mask.any():
            raise ValueError(
                f"constrain allows prompt {i} no token after {len(so_far[i])}: expected at least"
                " one, as a stop token"
            )
        allowed[row] = False
        allowed[row, : len(mask)] = mask
    return allowed


def _collect(
    rows: Rows,
    at: np.ndarray,
    so_far: dict[int, list[int]],
    stop: Callable[[list[int]], bool] | None,
    written: Samples,
) -> np.ndarray:
    """Note what the rows at work have written; return which of them have ended, bool[B]."""
    done, tokens, logp, count, finished = to_host(
        (rows.done, rows.tokens, rows.logp, rows.written, rows.finished)
    )
    done, count, finished = done & (at >= 0), count.copy(), finished.copy()
    for row in np.flatnonzero(at >= 0):
        text = so_far[at[row]] = tokens[row, : count[row]].tolist()
        if stop is not None and stop(text):
            count[row] = 1 + bisect_left(range(1, len(text)), True, key=lambda n: stop(text[:n]))
            done[row] = finished[row] = True
    for row in np.flatnonzero(done):
        i, span = at[row], slice(count[row])
        written.tokens[i, span], written.logp[i, span] = tokens[row, span], logp[row, span]
        written.mask[i, span], written.finished[i] = True, finished[row]
    return done


def _choose_prompts(
    at: np.ndarray,
    waiting: Sequence[deque],
    prompts: Sequence[tuple[int, ...]],
    at_once: int,
    length: int,
    pad_id: int,
) -> tuple[np.ndarray, ...]:
    """Take the next prompts that wait to the free rows, up to `at_once` different ones of a group.

    They come in order: where rows share prompts all begin at the start, and stand as planned.

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
