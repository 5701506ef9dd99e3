"""One token a row, from its logits and its settings, without sorting the vocabulary.

  penalty on what was seen -> temperature -> top_k -> top_p -> min_p -> draw

as Hugging Face's warpers do it, one after the other; tokens of equal probability stay together. A
token is drawn from all and then asked whether it belongs to the nucleus: it does if the mass of the
likelier ones is below top_p. If not, neither does any that is less likely, so the next try is among
those that are likelier: few tries, each one pass over the vocabulary, and the exact distribution.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A cumulative sum over the vocabulary is made in two levels: over blocks, then within one. Smaller
# ones where these divide the vocabulary: Qwen's small models have 1187 * 128 tokens.
_BLOCK, _SMALLEST_BLOCK = 256, 64


class Settings(NamedTuple):
    """How each row draws; data, so that one program serves all."""

    temperature: jax.Array  # f32[B] 0 is greedy
    top_k: jax.Array  # i32[B] the k likeliest; 0 is all
    top_p: jax.Array  # f32[B] the likeliest with this mass; 1 is all
    min_p: jax.Array  # f32[B] those with this share of the likeliest's probability; 0 is all
    repetition_penalty: jax.Array  # f32[B] of tokens that were seen; 1 is none


def make_settings(
    num_rows: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
) -> Settings:
    """Return the settings of `num_rows` rows (numpy), each given for all or row by row.

    Raises:
      ValueError: one is out of range or not a number.
    """
    ranges = {
        "temperature": (temperature, "at least 0", lambda x: x >= 0),
        "top_k": (top_k, "an integer, at least 0", lambda x: (x >= 0) & (x == np.floor(x))),
        "top_p": (top_p, "in (0, 1]", lambda x: (x > 0) & (x <= 1)),
        "min_p": (min_p, "in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
        "repetition_penalty": (repetition_penalty, "above 0", lambda x: x > 0),
    }
    arrays = {}
    for name, (values, expected, holds) in ranges.items():
        array = np.broadcast_to(np.asarray(values, np.float64), (num_rows,))
        bad = ~(np.isfinite(array) & holds(array))
        if bad.any():
            raise ValueError(f"{name}={array[bad][0]:g}: expected a number {expected}")
        arrays[name] = array.astype(np.int32 if name == "top_k" else np.float32)
    return Settings(**arrays)


@partial(jax.named_call, name="draw")
def draw(
    logits: jax.Array,
    keys: jax.Array,
    settings: Settings,
    seen: jax.Array | None = None,
    allowed: jax.Array | None = None,
    first: jax.Array | None = None,
) -> jax.Array:
    """Return one token per row, i32[B], from logits f32[B V].

    Args:
      keys: typed PRNG keys [B]; a row's token depends on its own logits, key and settings alone.
      seen: bool[B V], the tokens that the repetition penalty is for.
      allowed: bool[B V], the tokens that may be drawn at all: at least one a row.
      first: `first_uniforms(keys)`, where it is at hand.
    """
    if seen is not None:
        penalty = settings.repetition_penalty[:, None]
        punished = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, punished, logits)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    likeliest = argmax(logits)
    random = settings.temperature > 0
    highest = jnp.take_along_axis(logits, likeliest[:, None], axis=-1)
    token = jax.lax.cond(
        random.any(), lambda: _draw(logits, highest, keys, settings, first), lambda: likeliest
    )
    token = jnp.where(random, token, likeliest)
    if allowed is None:
        return token
    # Of logits that are not numbers, or none above -inf, anything may come.
    is_allowed = jnp.take_along_axis(allowed, token[:, None], axis=-1)[:, 0]
    return jnp.where(is_allowed, token, jnp.argmax(allowed, axis=-1).astype(jnp.int32))


def first_uniforms(keys: jax.Array, number: jax.Array | int = 0) -> jax.Array:
    """Return what each key's first try is drawn with, or that of a number: f32, in [0, 1)."""
    one = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number)))
    return one(keys.reshape(-1)).reshape(keys.shape)


def _draw(
    logits: jax.Array,
    highest: jax.Array,
    keys: jax.Array,
    settings: Settings,
    first: jax.Array | None,
) -> jax.Array:
    # Of the likeliest, the probability is 1: they are normalized nowhere.
    probs = jnp.exp((logits - highest) / jnp.maximum(settings.temperature, 1e-6)[:, None])
    probs = jax.lax.cond((settings.top_k > 0).any(), _keep_top_k, lambda p, _: p, probs, settings)
    first = first_uniforms(keys) if first is None else first
    room = settings.top_p * probs.sum(axis=-1)
    drawable = jnp.where(probs >= settings.min_p[:, None], probs, 0.0)

    def undecided(carry: tuple) -> jax.Array:
        return ~carry[-1].all()

    def attempt(carry: tuple) -> tuple:
        number, token, pivot, done = carry
        u = jax.lax.cond(number > 0, lambda: first_uniforms(keys, number), lambda: first)
        drawn = _invert(jnp.where(drawable > pivot[:, None], drawable, 0.0), u)
        found = jnp.take_along_axis(probs, drawn[:, None], axis=-1)
        above = jnp.where(probs > found, probs, 0.0).sum(axis=-1)
        accepted = (above < room) | (above == 0)
        token = jnp.where(done, token, drawn)
        return number + 1, token, jnp.where(done, pivot, found[:, 0]), done | accepted

    rows = probs.shape[0]
    none = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32), settings.temperature <= 0
    return jax.lax.while_loop(undecided, attempt, (jnp.int32(0), *none))[1]


@partial(jax.named_call, name="top_k")
def _keep_top_k(probs: jax.Array, settings: Settings) -> jax.Array:
    """Return probs [B V], 0 but for the k likeliest of each row, by bisection over their bits: the
    bits of nonnegative floats are ordered as the floats are."""
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)
    k = jnp.where(settings.top_k > 0, settings.top_k, probs.shape[-1])

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # count(bits >= low) >= k > count(bits >= high)
        middle = low + (high - low) // 2
        enough = (bits >= middle[:, None]).sum(axis=-1) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros_like(k)
    high = jnp.full_like(k, 0x3F800001)  # just above the bits of 1.0
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where(bits >= low[:, None], probs, 0.0)


def argmax(x: jax.Array) -> jax.Array:
    """Return the first place of the largest of x [B V], i32[B]; any, where some are not numbers.

    In two levels, of which the first is a plain maximum: XLA:CPU takes an argmax on one core, a
    number at a time.
    """
    blocks = _blocks(x, -jnp.inf)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = block * blocks.shape[-1] + jnp.argmax(within, axis=-1)
    return jnp.minimum(place, x.shape[1] - 1).astype(jnp.int32)


def _blocks(x: jax.Array, filler: float) -> jax.Array:
    """Return x [B V] as [B n block]."""
    block = math.gcd(x.shape[1], _BLOCK)
    if block < _SMALLEST_BLOCK:
        block = _BLOCK
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=filler)
    return x.reshape(x.shape[0], -1, block)


def _invert(weights: jax.Array, u: jax.Array) -> jax.Array:
    """Return where the running sum of weights [B V] exceeds u [B] of its end, i32[B].

    What is returned has a positive weight, if any has.
    """
    blocks = _blocks(weights, 0.0)
    block, rest = _step(blocks.sum(axis=-1), u)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place, _ = _step(within, rest, share=False)
    # Weights that are not numbers may lead anywhere, but not beyond the vocabulary.
    return jnp.minimum(block * blocks.shape[-1] + place, weights.shape[1] - 1).astype(jnp.int32)


def _step(weights: jax.Array, target: jax.Array, share: bool = True) -> tuple[jax.Array, jax.Array]:
    """Return the first place where the running sum of weights [B n] exceeds the target [B], and
    what of the target is left there. Beyond the end, by rounding, it is the last with a weight."""
    sums = jnp.cumsum(weights, axis=-1)
    if share:
        target = target * sums[:, -1]
    over = sums > target[:, None]
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    place = jnp.where(over.any(axis=-1), jnp.argmax(over, axis=-1), last)
    before = jnp.take_along_axis(sums - weights, place[:, None], axis=-1)[:, 0]
    return place, jnp.maximum(target - before, 0.0)
