"""Randomness as a function of names: a key is folded from (seed, purpose, step, problem, ...).

No key is ever carried from step to step, so a resumed or re-batched run is the same run.
"""

import functools
import zlib
from collections.abc import Sequence

import jax
import numpy as np

SAMPLE, ADAPTER, SHUFFLE, POLICY, SELECT, QUESTIONS, EARLIER, REFERENCE = range(8)  # purposes
# What stands in the place of the outer step in the final evaluation, and in a sweep of `tune`.
EVAL_STEP, TUNE_STEP = 1_000_000, 1_000_001
CONTINUAL_STEP = 2_000_000  # and from there on, where one self-edit follows another


def number_of(name: str) -> int:
    """Return a stable number for a problem's id."""
    return zlib.crc32(name.encode())


def fold(paths: Sequence[Sequence[int]]) -> jax.Array:
    """Return typed keys [n], one for each path of integers; the first is the seed."""
    return _fold(jax.device_put(np.asarray(paths, np.uint32)))


def fold_one(*path: int) -> jax.Array:
    """Return the typed key [] of one path."""
    return _fold_first(jax.device_put(np.asarray([path], np.uint32)))


@jax.jit
def _fold(paths: jax.Array) -> jax.Array:
    def one(path: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, path[1:], jax.random.key(path[0]))

    return jax.vmap(one)(paths)


@jax.jit
def _fold_first(paths: jax.Array) -> jax.Array:
    return _fold(paths)[0]
