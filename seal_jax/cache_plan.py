"""The shapes of a generation call, and whether they fit: known before anything runs.

Each shape is a program, so there are few. Rows of an adapter are rounded up, and a cache begins
short and doubles until its rows have room to the end.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seal_jax.decode import cache_dtype, cache_sharding
from seal_jax.memory import device_bytes, tree_bytes
from seal_jax.models.config import ModelConfig
from seal_jax.models.turned import kernels, turns
from seal_jax.processes import least
from seal_jax.self_edit import BUCKETS, bucket_of
from seal_jax.sharding import num_parts
from seal_jax.types import Adapters, Params

SHRINK = 4  # by how much a batch shrinks in which nobody waits
# Where nobody ever waits, so many prompt slots are read at once.
_READ_TOKENS = 4096
_SHORTEST_CACHE = 256  # slots; from there it doubles
# What drawing takes for each row and token of the vocabulary: some float32 arrays of [B V].
_DRAW_BYTES = 24


class Plan(NamedTuple):
    """The shapes of a call, known before anything runs."""

    size: int  # rows of each of A adapters
    few: int  # rows of each that the batch shrinks to
    at_once: int  # prompts of each adapter that one call reads
    prompt_slots: int
    most_slots: int  # of the cache, when it has grown to its end
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
    A, most = len(prompts), max(map(len, prompts))
    S = prompt_bucket(max(len(prompt) for group in prompts for prompt in group))
    wanted = max(1, min(_row_bucket(most), max_rows // A))
    dtype = params["embed"]["embedding"].dtype
    room = device_bytes(mesh) - _resident_bytes((params, adapters), mesh)
    room = least("room for generation", room)

    def bytes_of(size: int) -> int:
        return planned_bytes(
            config,
            mesh,
            dtype,
            num_rows=A * size,
            num_slots=S + max_tokens,
            num_prompts=A * at_once_of(size),
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

    size = wanted
    while (needed := bytes_of(size)) > room:
        if size == 1:
            rows = "a row" if A == 1 else f"{A} rows, one of each adapter,"
            raise ValueError(
                f"generation does not fit: {rows} of up to {S + max_tokens} tokens may need"
                f" {needed / 1e9:.3g} GB a device beside the model, and there are {room / 1e9:.3g}"
                " to use. Lower max_tokens, shorten the prompts, take fewer adapters at once"
                " (inner.max_adapters), or divide the model over more devices (mesh.tensor,"
                " mesh.fsdp)"
            )
        size = max(n for n in map(_row_bucket, range(1, size)) if n < size)
    if size < wanted:
        warnings.warn(
            f"generation: {A * size} rows at once, as {A * wanted} of up to {S + max_tokens} tokens"
            f" do not fit into the {room / 1e9:.3g} GB that are left on a device; max_rows or"
            " max_tokens may be lower",
            stacklevel=3,
        )
    turned = turns(mesh.devices.flat[0].platform, A * size)
    turned = turned and bytes_of(size) + tree_bytes(kernels(params)) <= room
    return Plan(size, -(-size // SHRINK), at_once_of(size), S, S + max_tokens, turned)


def _resident_bytes(trees: Any, mesh: Mesh) -> int:
    """Return what lies on a device already; a CPU does not tell, but these arrays do."""
    arrays = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
    stats = mesh.local_devices[0].memory_stats() or {}
    return max(tree_bytes(arrays), stats.get("bytes_in_use", 0))


def prompt_bucket(length: int) -> int:
    """Return the slots that are read for a prompt of `length` tokens."""
    return bucket_of(length) if length <= BUCKETS[-1] else -(-length // BUCKETS[-1]) * BUCKETS[-1]


def _row_bucket(number: int) -> int:
    """Return `number` or a little more, with two significant bits: 1, 2, 3, 4, 6, 8, 12, 16..."""
    step = 1 << max(0, number.bit_length() - 2)
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
    prompt_slots: int,
) -> int:
    """Return about what generation takes on each device beside the model, at most.

    The rows with their cache, twice, as they are copied where the cache grows; the prompts that are
    read at once, with the scores of one layer's attention; and what a draw makes of the logits.

    Args:
      num_slots: of the cache, when it has grown to its end.
      prompt_slots: of each of `num_prompts` prompts.
    """

    def on_device(count: int, slots: int) -> tuple[int, int]:
        shape = count, config.num_kv_heads, slots, config.head_dim
        shard = cache_sharding(config, mesh, count).shard_shape(shape)
        cache = 2 * config.num_layers * math.prod(shard) * cache_dtype(dtype, mesh).itemsize
        return cache + 5 * shard[0] * config.vocab_size, shard[0] * shard[1]

    rows, _ = on_device(num_rows, num_slots)
    prompts, heads = on_device(num_prompts, prompt_slots)
    heads *= config.num_heads // config.num_kv_heads
    scores = 2 * 4 * heads * prompt_slots**2
    draws = _DRAW_BYTES * config.vocab_size * -(-num_rows // num_parts(mesh, "rows", config.rules))
    return 2 * rows + prompts + max(scores, draws)
