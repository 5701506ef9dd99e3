"""The shapes of a generation call, and whether they fit: known before anything runs.

Each shape is a program, so there are few. Rows of an adapter are rounded up, and the cache of what
they write begins short and doubles until it has room to the end. Where nobody waits, the rows that
continue one prompt share its cache; rows that come and go one by one have a copy each.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from seal_jax.hosts.exchange import least
from seal_jax.hosts.memory import device_bytes
from seal_jax.models.config import ModelConfig
from seal_jax.models.padded_lengths import BUCKETS, bucket_of
from seal_jax.models.turned_kernels import kernels, turns
from seal_jax.sampling.decode import RowsShape, cache_dtype, cache_sharding
from seal_jax.sharding import num_parts, tree_bytes
from seal_jax.types import Adapters, Params

SHRINK = 4  # by how much a batch shrinks in which nobody waits
# Where nobody ever waits, so many prompt slots are read at once.
_READ_TOKENS = 4096
_SHORTEST_CACHE = 128  # slots; from there it doubles
# What drawing takes for each row and token of the vocabulary: some float32 arrays of [B V].
_DRAW_BYTES = 24


class CallShapes(NamedTuple):
    """What `plan_call` chooses."""

    rows: RowsShape  # of all A adapters; the cache as it is at the end
    few: int  # rows of each adapter that the batch shrinks to
    at_once: int  # prompts of each adapter that one call reads
    turned: bool  # whether decoding takes turned kernels, see models/turned_kernels.py


def check_lengths(config: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Raise ValueError where a prompt and what may follow it exceed the model's context."""
    longest = max((len(p) for p in prompts), default=0)
    if longest + max_tokens > config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and up to {max_tokens} written ones do not fit into the"
            f" model's context of {config.max_length} tokens: shorten the passage, or lower"
            " max_tokens"
        )


def plan_call(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[Sequence[int]]],
    mesh: Mesh,
    max_tokens: int,
    max_rows: int,
) -> CallShapes:
    """Return the largest shapes of a call that fit into memory.

    Raises:
      ValueError: not even one row of every adapter does.
    """
    A, dtype = len(prompts), params["embed"]["embedding"].dtype
    S = prompt_bucket(max(len(prompt) for group in prompts for prompt in group))
    room = _room(params, adapters, mesh)
    wanted, sizes = _sizes(config, mesh, prompts, max_rows)
    for size, copies in sizes:
        at_once = _read_at_once(prompts, size, S)
        rows = RowsShape(dtype, A * size, A * size // copies, S, max_tokens, max_tokens)
        needed = planned_bytes(config, mesh, rows, A * at_once)
        if needed <= room:
            break
    else:
        who = "a row" if A == 1 else f"{A} rows, one of each adapter,"
        raise ValueError(
            f"generation does not fit: {who} of up to {S + max_tokens} tokens may need"
            f" {needed / 1e9:.3g} GB a device beside the model, and there are {room / 1e9:.3g}"
            " to use. Lower max_tokens, shorten the prompts, take fewer adapters at once"
            " (inner.max_adapters), or divide the model over more devices (mesh.tensor,"
            " mesh.fsdp)"
        )
    if size < wanted:
        warnings.warn(
            f"generation: {A * size} rows at once, as {A * wanted} of up to {S + max_tokens} tokens"
            f" do not fit into the {room / 1e9:.3g} GB that are left on a device; max_rows or"
            " max_tokens may be lower",
            stacklevel=4,  # of who calls `generate`
        )
    turned = turns(mesh.devices.flat[0].platform, A * size, dtype)
    turned = turned and needed + tree_bytes(kernels(params)) <= room
    return CallShapes(rows, -(-size // SHRINK), at_once, turned)


def _sizes(
    config: ModelConfig, mesh: Mesh, prompts: Sequence[Sequence[Sequence[int]]], max_rows: int
) -> tuple[int, list[tuple[int, int]]]:
    """Return the rows of an adapter that are wanted; and what to try, from the largest.

    That is how many rows each adapter has, and how many of them share a prompt: only where nobody
    waits, and the rows of a prompt stay on one device.
    """
    A, most = len(prompts), max(sum(map(bool, group)) for group in prompts)
    runs = [len(list(run)) for group in prompts for _, run in groupby(tuple(p) for p in group if p)]
    copies = math.gcd(*runs) or 1  # divides the length of each run of equal prompts
    wanted = max(1, min(_row_bucket(most), max_rows // A))
    size = copies * _row_bucket(-(-most // copies))
    if size > max_rows // A or A * size // copies % num_parts(mesh, "rows", config.rules):
        size, copies = wanted, 1
    smaller = {n for n in map(_row_bucket, range(1, size)) if n < size}
    return min(size, wanted), [(size, copies), *((n, 1) for n in sorted(smaller, reverse=True))]


def _read_at_once(prompts: Sequence[Sequence[Sequence[int]]], size: int, num_slots: int) -> int:
    """Return how many prompts of each adapter one call reads, if it has `size` rows."""
    a_quarter = -(-size // SHRINK)
    if max(sum(map(bool, group)) for group in prompts) > size:
        return a_quarter  # the others wait until so many rows are free
    distinct = max(len(set(map(tuple, group))) for group in prompts)
    num_prompts = min(_row_bucket(distinct), size)
    num_calls = -(-num_prompts // max(a_quarter, _READ_TOKENS // (len(prompts) * num_slots)))
    return -(-num_prompts // num_calls)


def _room(params: Params, adapters: Adapters | None, mesh: Mesh) -> float:
    """Return the bytes that a device has left, of any process, with a copy of the adapters."""
    of_model, of_adapters = (
        tree_bytes([x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)])
        for tree in ((params, adapters), adapters)
    )
    stats = mesh.local_devices[0].memory_stats() or {}  # of a CPU there are none
    taken = max(of_model, stats.get("bytes_in_use", 0)) + of_adapters  # which `start` splits
    taken += _cast_bytes(params)
    return least("room for generation", device_bytes(mesh) - taken)


def _cast_bytes(params: Params) -> int:
    """Return the bytes of what decoding may keep of kernels that are not in the model's dtype."""
    dtype = params["embed"]["embedding"].dtype
    cast = [x for x in jax.tree.leaves(params) if x.ndim == 3 and x.dtype != dtype]
    return sum(tree_bytes(x) * dtype.itemsize // x.dtype.itemsize for x in cast)


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


def planned_bytes(config: ModelConfig, mesh: Mesh, rows: RowsShape, num_read: int) -> int:
    """Return about what generation takes on each device beside the model, at most.

    The rows and their prompts with their caches, twice, as they are copied where the cache grows;
    the `num_read` prompts that are read at once, with the scores of one layer's attention; and what
    a draw makes of the logits.
    """
    B, S = rows.num_rows, rows.prompt_slots
    a_slot = 2 * config.num_layers * config.head_dim * cache_dtype(rows.dtype, mesh).itemsize

    def part(count: int) -> tuple[int, int]:  # of the rows, and of the heads, on a device
        whole = count, config.num_kv_heads
        rows, heads = cache_sharding(config, mesh, count).shard_shape(whole)
        return rows, heads

    def cache_bytes(count: int, slots: int) -> int:
        return a_slot * math.prod(part(count)) * slots

    def logits_bytes(count: int) -> int:  # and which tokens were seen
        return 5 * config.vocab_size * part(count)[0]

    kept = cache_bytes(B, rows.num_slots) + logits_bytes(B) + cache_bytes(rows.num_prompts, S)
    read = cache_bytes(num_read, S) + logits_bytes(num_read)
    heads = math.prod(part(num_read)) * config.num_heads // config.num_kv_heads
    scores = 2 * 4 * heads * S**2
    draws = _DRAW_BYTES * config.vocab_size * -(-B // num_parts(mesh, "rows", config.rules))
    return 2 * kept + read + max(scores, draws)
