"""The shapes of a generation call, and whether they fit: known before anything runs.

Each shape is a program, so there are few. Rows of an adapter are rounded up, and the cache of what
they write begins short and doubles until it has room to the end. Where nobody waits, the rows that
continue one prompt share its cache; rows that come and go one by one have a copy each.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seal_jax.hosts.exchange import least
from seal_jax.hosts.memory import device_bytes
from seal_jax.models.config import ModelConfig
from seal_jax.models.lengths import BUCKETS, bucket_of
from seal_jax.models.turned import kernels, turns
from seal_jax.sampling.decode import cache_dtype, cache_sharding
from seal_jax.sharding import num_parts, tree_bytes
from seal_jax.types import Adapters, Params

SHRINK = 4  # by how much a batch shrinks in which nobody waits
# Where nobody ever waits, so many prompt slots are read at once.
_READ_TOKENS = 4096
_SHORTEST_CACHE = 128  # slots; from there it doubles
# What drawing takes for each row and token of the vocabulary: some float32 arrays of [B V].
_DRAW_BYTES = 24


class Plan(NamedTuple):
    """The shapes of a call, known before anything runs."""

    size: int  # rows of each of A adapters
    copies: int  # rows that share a prompt
    few: int  # rows of each that the batch shrinks to
    at_once: int  # prompts of each adapter that one call reads
    prompt_slots: int
    turned: bool  # whether decoding takes turned kernels, see models/turned.py


def check_lengths(config: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Raise ValueError where a prompt and what may follow it exceed the model's context."""
    longest = max((len(p) for p in prompts), default=0)
    if longest + max_tokens > config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and up to {max_tokens} written ones do not fit into the"
            f" model's context of {config.max_length} tokens: shorten the passage, or lower"
            " max_tokens"
        )


def make_plan(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[Sequence[int]]],
    mesh: Mesh,
    max_tokens: int,
    max_rows: int,
) -> Plan:
    """Return the shapes of a call: few different ones, as each is a set of programs."""
    A, most = len(prompts), max(sum(map(bool, group)) for group in prompts)
    S = prompt_bucket(max(len(prompt) for group in prompts for prompt in group))
    dtype = params["embed"]["embedding"].dtype
    resident, split = _resident_bytes((params, adapters), mesh), _array_bytes(adapters)
    room = device_bytes(mesh) - resident - split  # see `start`
    room = least("room for generation", room)

    def bytes_of(size: int, copies: int) -> int:
        return planned_bytes(
            config,
            mesh,
            dtype,
            num_rows=A * size,
            num_slots=max_tokens,
            num_prompts=A * size // copies,
            num_read=A * at_once_of(size),
            prompt_slots=S,
        )

    def at_once_of(size: int) -> int:
        a_quarter = -(-size // SHRINK)
        if most > size:  # the others begin a quarter at a time
            return a_quarter
        distinct = max(len(set(map(tuple, group))) for group in prompts)
        num_prompts = min(_row_bucket(distinct), size)
        num_calls = -(-num_prompts // max(a_quarter, _READ_TOKENS // (A * S)))
        return -(-num_prompts // num_calls)

    wanted = max(1, min(_row_bucket(most), max_rows // A))
    copies = _copies(prompts)
    shared = copies * _row_bucket(-(-most // copies))
    if shared > max_rows // A or A * shared // copies % num_parts(mesh, "rows", config.rules):
        shared, copies = wanted, 1
    size, wanted = shared, min(shared, wanted)
    while (needed := bytes_of(size, copies)) > room:
        if size == 1:
            rows = "a row" if A == 1 else f"{A} rows, one of each adapter,"
            raise ValueError(
                f"generation does not fit: {rows} of up to {S + max_tokens} tokens may need"
                f" {needed / 1e9:.3g} GB a device beside the model, and there are {room / 1e9:.3g}"
                " to use. Lower max_tokens, shorten the prompts, take fewer adapters at once"
                " (inner.max_adapters), or divide the model over more devices (mesh.tensor,"
                " mesh.fsdp)"
            )
        size, copies = max(n for n in map(_row_bucket, range(1, size)) if n < size), 1
    if size < wanted:
        warnings.warn(
            f"generation: {A * size} rows at once, as {A * wanted} of up to {S + max_tokens} tokens"
            f" do not fit into the {room / 1e9:.3g} GB that are left on a device; max_rows or"
            " max_tokens may be lower",
            stacklevel=3,
        )
    turned = turns(mesh.devices.flat[0].platform, A * size, dtype)
    turned = turned and bytes_of(size, copies) + tree_bytes(kernels(params)) <= room
    return Plan(size, copies, -(-size // SHRINK), at_once_of(size), S, turned)


def _copies(prompts: Sequence[Sequence[Sequence[int]]]) -> int:
    """Return how many rows can share a prompt everywhere: what divides the length of each run."""
    runs = [
        len(list(run)) for group in prompts for prompt, run in groupby(tuple(p) for p in group if p)
    ]
    return math.gcd(*runs) or 1


def _resident_bytes(trees: Any, mesh: Mesh) -> int:
    """Return what lies on a device already; a CPU does not tell, but these arrays do."""
    stats = mesh.local_devices[0].memory_stats() or {}
    return max(_array_bytes(trees), stats.get("bytes_in_use", 0))


def _array_bytes(trees: Any) -> int:
    return tree_bytes([x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)])


def prompt_bucket(length: int) -> int:
    """Return the slots that are read for a prompt of `length` tokens."""
    return bucket_of(length) if length <= BUCKETS[-1] else -(-length // BUCKETS[-1]) * BUCKETS[-1]


def _row_bucket(number: int) -> int:
    """Return `number` or a little more: 1 to 6, and from there 8, 12, 16, 24, 32..."""
    # Five is how many questions there are of a passage, and how many self-edits.
    step = 1 if number <= 6 else 1 << (number.bit_length() - 2)
    return -(-number // step) * step


def grown(needed: int, most: int) -> int:
    """Return the slots of a cache with room for `needed` of `most`."""
    slots = _SHORTEST_CACHE
    while slots < needed:
        slots *= 2
    return most if 1.5 * slots >= most else slots


def planned_bytes(
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    *,
    num_rows: int,
    num_slots: int,
    num_prompts: int,
    num_read: int,
    prompt_slots: int,
) -> int:
    """Return about what generation takes on each device beside the model, at most.

    The rows and their prompts with their caches, twice, as they are copied where the cache grows;
    the prompts that are read at once, with the scores of one layer's attention; and what a draw
    makes of the logits.

    Args:
      num_slots: of each row's own cache, when it has grown to its end.
      prompt_slots: of each of the `num_prompts` that rows continue, and of the `num_read`.
    """

    def cache_shape(count: int, slots: int) -> tuple[int, ...]:
        shape = count, config.num_kv_heads, slots, config.head_dim
        return cache_sharding(config, mesh, count).shard_shape(shape)

    def cache_bytes(count: int, slots: int) -> int:
        numbers = 2 * config.num_layers * math.prod(cache_shape(count, slots))
        return numbers * cache_dtype(dtype, mesh).itemsize

    def logits_bytes(count: int) -> int:  # and which tokens were seen
        return 5 * config.vocab_size * cache_shape(count, 1)[0]

    rows = cache_bytes(num_rows, num_slots) + logits_bytes(num_rows)
    rows += cache_bytes(num_prompts, prompt_slots)
    read = cache_bytes(num_read, prompt_slots) + logits_bytes(num_read)
    heads = math.prod(cache_shape(num_read, 1)[:2]) * config.num_heads // config.num_kv_heads
    scores = 2 * 4 * heads * prompt_slots**2
    draws = _DRAW_BYTES * config.vocab_size * -(-num_rows // num_parts(mesh, "rows", config.rules))
    return 2 * rows + read + max(scores, draws)
