"""Draw one token a row: rejection sampling from the nucleus, without sorting the vocabulary.

  penalty on what was seen -> temperature -> top_k -> top_p -> min_p -> draw

as Hugging Face's warpers do it, one after the other; tokens of equal probability stay together.

The nucleus is what top_p leaves: a token belongs to it if the likelier ones together have less than
top_p. A token is drawn from all. If it belongs to the nucleus, it is taken. If it does not, no less
likely one does either: it is rejected, and the next one is drawn among the likelier ones. A few
tries give the exact distribution, each with one pass over the vocabulary. A pass keeps only sums of
exponentials, one of each block of the vocabulary. A token is found by its block's sum, and then
within the block.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.types import Array

# Tokens in a block of the vocabulary; fewer where that divides the vocabulary without padding.
_BLOCK, _SMALLEST_BLOCK = 256, 64


class Settings(NamedTuple):
    """How each row draws; data, so that one program serves all."""

    temperature: Array  # f32[B] 0 is greedy
    top_k: Array  # i32[B] the k likeliest; 0 is all
    top_p: Array  # f32[B] the likeliest with this mass; 1 is all
    min_p: Array  # f32[B] those with this share of the likeliest's probability; 0 is all
    repetition_penalty: Array  # f32[B] of tokens that were seen; 1 is none


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


class _Summary(NamedTuple):
    """What one look at logits [B V] tells, as n blocks of the vocabulary."""

    likeliest: jax.Array  # i32[B]
    highest: jax.Array  # f32[B 1 1] its logit
    masses: jax.Array  # f32[B n] of each block, as likely as exp(logit - highest)


@partial(jax.named_call, name="draw")
def draw(
    logits: jax.Array,
    keys: jax.Array,
    settings: Settings,
    seen: jax.Array | None = None,
    allowed: jax.Array | None = None,
    first: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return one token per row, i32[B], and its log-softmax f32[B], from logits f32[B V].

    No setting is in the log-softmax.

    Args:
      keys: typed PRNG keys [B]; a row's token depends on its own logits, key and settings alone.
      seen: bool[B V], the tokens that the repetition penalty is for.
      allowed: bool[B V], the tokens that may be drawn at all: at least one a row.
      first: `first_uniforms(keys)`, where it is at hand.
    """
    raw, has_changed = logits, jnp.zeros(len(logits), bool)
    if seen is not None:
        has_changed = settings.repetition_penalty != 1
        penalty = settings.repetition_penalty[:, None]
        punished = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, punished, logits)
    if allowed is not None:
        has_changed = jnp.ones_like(has_changed)
        logits = jnp.where(allowed, logits, -jnp.inf)
    summary = _summarize(logits)
    random = settings.temperature > 0
    first = first_uniforms(keys) if first is None else first
    token = jax.lax.cond(
        random.any(),
        lambda: _draw(logits, summary, keys, settings, first),
        lambda: summary.likeliest,
    )
    token = jnp.where(random, token, summary.likeliest)
    if allowed is not None:
        # Of logits that are not numbers, or none above -inf, anything may come.
        is_allowed = jnp.take_along_axis(allowed, token[:, None], axis=-1)[:, 0]
        token = jnp.where(is_allowed, token, jnp.argmax(allowed, axis=-1).astype(jnp.int32))
    total = _log_total(summary)
    if logits is not raw:
        total = _for_some(has_changed, lambda: _log_total(_summarize(raw)), total)
    return token, jnp.take_along_axis(raw, token[:, None], axis=-1)[:, 0] - total


def first_uniforms(keys: jax.Array, number: jax.Array | int = 0) -> jax.Array:
    """Return what each key's first try is drawn with, or that of a number: f32, in [0, 1)."""
    one = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number)))
    return one(keys.reshape(-1)).reshape(keys.shape)


def _summarize(logits: jax.Array) -> _Summary:
    """Look at logits [B V] once, block by block: XLA:CPU is slow at an argmax of whole rows."""
    blocks = _blocks(logits, -jnp.inf)
    maxima = blocks.max(axis=-1)
    highest = maxima.max(axis=-1)[:, None, None]
    block = jnp.argmax(maxima, axis=-1)
    place = block * blocks.shape[-1] + jnp.argmax(_take_block(blocks, block), axis=-1)
    # Of what is not a number, any place may come, but not one beyond the vocabulary.
    likeliest = jnp.minimum(place, logits.shape[1] - 1).astype(jnp.int32)
    return _Summary(likeliest, highest, jnp.exp(blocks - highest).sum(axis=-1))


def _log_total(summary: _Summary) -> jax.Array:
    """Return the logarithm of the sum of exp(logits), f32[B]."""
    return summary.highest[:, 0, 0] + jnp.log(summary.masses.sum(axis=-1))


def _for_some(some: Array, make: Callable[[], jax.Array], others: jax.Array) -> jax.Array:
    """Return what `make` gives for some rows [B], the others' [B ...]; made if there are any."""
    some = some.reshape(-1, *[1] * (others.ndim - 1))
    return jax.lax.cond(some.any(), lambda: jnp.where(some, make(), others), lambda: others)


class _Chances(NamedTuple):
    """How likely each token is: as exp((logit - highest) / temperature)."""

    logits: jax.Array  # f32[B V]
    blocks: jax.Array  # f32[B n block] of them
    highest: jax.Array  # f32[B 1 1]
    temperature: jax.Array  # f32[B] above 0


def _weigh(chances: _Chances, logits: jax.Array) -> jax.Array:
    """Return how likely tokens with these logits [B ? ?] are."""
    return jnp.exp((logits - chances.highest) / chances.temperature[:, None, None])


def _masses_above(chances: _Chances, low: jax.Array, *, itself: bool) -> jax.Array:
    """Return the masses f32[B n] of what is likelier than logits low [B], or as likely."""
    low, blocks = low[:, None, None], chances.blocks
    kept = blocks >= low if itself else blocks > low
    return jnp.where(kept, _weigh(chances, blocks), 0).sum(axis=-1)


def _draw(
    logits: jax.Array, summary: _Summary, keys: jax.Array, settings: Settings, first: jax.Array
) -> jax.Array:
    """Return a token of each row, by its temperature, top_k, top_p and min_p.

    A pass over the vocabulary is made where a row needs it, and only what such a row gets from it
    is used: or its text would depend on its neighbors, by rounding.
    """
    temperature = jnp.maximum(settings.temperature, 1e-6)
    chances = _Chances(logits, _blocks(logits, -jnp.inf), summary.highest, temperature)
    above = partial(_masses_above, chances, itself=True)
    random = settings.temperature > 0
    has_scale = random & (settings.temperature != 1)
    masses = _for_some(
        has_scale, lambda: _weigh(chances, chances.blocks).sum(axis=-1), summary.masses
    )
    has_top_k, has_min_p = random & (settings.top_k > 0), random & (settings.min_p > 0)
    none = jnp.full(len(logits), -jnp.inf)
    least = jax.lax.cond(has_top_k.any(), _least_of_top_k, lambda *_: none, logits, settings.top_k)
    masses = _for_some(has_top_k, lambda: above(least), masses)
    room = settings.top_p * masses.sum(axis=-1)
    least = jnp.maximum(least, summary.highest[:, 0, 0] + temperature * jnp.log(settings.min_p))
    masses = _for_some(has_min_p, lambda: above(least), masses)
    has_top_p = random & (settings.top_p < 1)
    # A branch: XLA would make what every try needs, as exponentials, whether one is made or not.
    return jax.lax.cond(
        has_top_p.any(),
        lambda token: _try_again(chances, least, room, keys, token, ~has_top_p),
        lambda token: token,
        _pick(chances, masses, none, least, first),
    )


def _pick(
    chances: _Chances, masses: jax.Array, low: jax.Array, least: jax.Array, u: jax.Array
) -> jax.Array:
    """Return a token of each row above the logit `low` and not below `least`, all [B].

    Such tokens have the masses f32[B n]; `u`, in [0, 1), says where in their sum it stands.
    """
    block, rest = _step(masses, u)
    x = _take_block(chances.blocks, block)
    kept = (x > low[:, None]) & (x >= least[:, None])
    weights = jnp.where(kept, _weigh(chances, x[:, None])[:, 0], 0)
    place, _ = _step(weights, rest, share=False)
    place += block * chances.blocks.shape[-1]
    # Weights that are not numbers may lead anywhere, but not beyond the vocabulary.
    return jnp.minimum(place, chances.logits.shape[1] - 1).astype(jnp.int32)


def _try_again(
    chances: _Chances,
    least: jax.Array,
    room: Array,
    keys: jax.Array,
    token: jax.Array,
    done: Array,
) -> jax.Array:
    """Draw the tokens that are not done anew, until what is likelier has less mass than `room`."""

    def undecided(carry: tuple) -> jax.Array:
        return ~carry[-1].all()

    def attempt(carry: tuple) -> tuple:
        number, token, done = carry
        found = jnp.take_along_axis(chances.logits, token[:, None], axis=-1)[:, 0]
        likelier = _masses_above(chances, found, itself=False)
        mass = likelier.sum(axis=-1)
        done |= (mass < room) | ~(mass > 0)
        other = _pick(chances, likelier, found, least, first_uniforms(keys, number))
        return number + 1, jnp.where(done, token, other), done

    return jax.lax.while_loop(undecided, attempt, (jnp.int32(1), token, done))[1]


@partial(jax.named_call, name="top_k")
def _least_of_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Return the least of the k highest of each row of logits [B V]; -inf where k is 0.

    By bisection over their bits, which are ordered as the floats are.
    """
    bits = _ordered(jax.lax.bitcast_convert_type(logits, jnp.int32))

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # count(bits >= low) >= k > count(bits >= high)
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = (bits >= middle[:, None]).sum(axis=-1) >= top_k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    ends = (jnp.full_like(top_k, end) for end in (-(2**31), 2**31 - 1))
    low, _ = jax.lax.fori_loop(0, 32, halve, tuple(ends))
    least = jax.lax.bitcast_convert_type(_ordered(low), jnp.float32)
    return jnp.where((top_k > 0) & (top_k < logits.shape[1]), least, -jnp.inf)


def _ordered(bits: jax.Array) -> jax.Array:
    """Return the bits of floats as integers of the same order, and these as bits again."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _blocks(x: jax.Array, filler: float) -> jax.Array:
    """Return x [B V] as [B n block]."""
    block = math.gcd(x.shape[1], _BLOCK)
    if block < _SMALLEST_BLOCK:
        block = _BLOCK
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=filler)
    return x.reshape(x.shape[0], -1, block)


def _take_block(blocks: jax.Array, block: jax.Array) -> jax.Array:
    """Return block i32[B] of each row of [B n block]."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _step(weights: jax.Array, target: jax.Array, share: bool = True) -> tuple[jax.Array, jax.Array]:
    """Return the first place where the running sum of weights [B n] exceeds the target [B].

    Beyond the end, by rounding, it is the last with a weight. And what of the target is left there.
    With `share`, the target is a share of the sum of all.
    """
    sums = jnp.cumsum(weights, axis=-1)
    if share:
        target = target * sums[:, -1]
    over = sums > target[:, None]
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    place = jnp.where(over.any(axis=-1), jnp.argmax(over, axis=-1), last)
    before = jnp.take_along_axis(sums - weights, place[:, None], axis=-1)[:, 0]
    return place, jnp.maximum(target - before, 0.0)
