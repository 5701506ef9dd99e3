"""KV caches, and what one token of each row gathers from its prompt and from what it wrote."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seal_jax.models.attention import capped, score_scale, weigh
from seal_jax.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of every layer; keys as the right side of a product takes them."""

    keys: tuple[jax.Array, ...]  # L x [B K H S]
    values: tuple[jax.Array, ...]  # L x [B K S H]


class RowCaches(NamedTuple):
    """What one token of each of B rows attends to; see `attend_cached`."""

    prompts: KVCache  # of P prompts, which B/P neighbours share
    own: KVCache  # of what each row wrote
    prompt_length: jax.Array  # i32[B]
    slot: jax.Array  # i32[B] of the token, in `own`


def init_cache(config: ModelConfig, num_rows: int, length: int, dtype: jnp.dtype) -> KVCache:
    """Return an empty cache for `length` tokens of each row."""
    heads, size = (num_rows, config.num_kv_heads), config.head_dim

    def zeros(*shape: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(heads + shape, dtype) for _ in range(config.num_layers))

    return KVCache(zeros(size, length), zeros(length, size))


def seen_of_layers(config: ModelConfig, caches: RowCaches) -> tuple[jax.Array, jax.Array]:
    """Return `seen_slots` for a global and for a local layer: once, and not in every layer."""
    shape = caches.prompts.values[0].shape[2], caches.own.values[0].shape[2]
    slots = *shape, caches.prompt_length, caches.slot
    return seen_slots(*slots), seen_slots(*slots, config.sliding_window)


def write_cache(
    keys: jax.Array, values: jax.Array, k: jax.Array, v: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Write k and v [B K 1 H] into each row's own slot [B] of keys and values."""
    rows, k, v = jnp.arange(len(keys)), k[:, :, 0], v[:, :, 0]
    keys = keys.at[rows, :, :, slot].set(k.astype(keys.dtype))
    return keys, values.at[rows, :, slot].set(v.astype(values.dtype))


@partial(jax.named_call, name="attention")
def attend_cached(
    config: ModelConfig,
    q: jax.Array,
    prompts: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    seen: jax.Array,
) -> jax.Array:
    """Return what one token of each row gathers from its prompt and from its own slots, [B N 1 H].

    Rows that continue one prompt are neighbours: the prompt's keys and values are read once for
    all of them.

    Args:
      q: [B N 1 H].
      prompts: keys [P K H S] and values [P K S H]; B is a multiple of P.
      own: keys [B K H T] and values [B K T H] behind the prompt, the token's own among them.
      seen: bool[B S+T], see `seen_slots`.
    """
    (prompt_k, prompt_v), (own_k, own_v) = prompts, own
    (B, N, _, H), (P, K, S, _) = q.shape, prompt_v.shape
    dtype = jnp.promote_types(q.dtype, own_v.dtype)  # a cache may be finer than what is computed
    q = q.reshape(B, K, -1, H)

    def together(x: jax.Array) -> jax.Array:  # [B K G n] -> [P K R*G n]
        return x.reshape(P, -1, *x.shape[1:]).swapaxes(1, 2).reshape(P, K, -1, x.shape[-1])

    def apart(x: jax.Array) -> jax.Array:
        return (
            x.reshape(P, K, B // P, -1, x.shape[-1]).swapaxes(1, 2).reshape(B, K, -1, x.shape[-1])
        )

    look = partial(jnp.einsum, "bkgh,bkhs->bkgs", preferred_element_type=jnp.float32)
    gather = partial(jnp.einsum, "bkgs,bksh->bkgh", preferred_element_type=jnp.float32)
    scores = [apart(look(together(q), prompt_k)), look(q, own_k)]
    scores = capped(jnp.concatenate(scores, axis=-1) * score_scale(config), config.attn_softcap)
    weights, share = weigh(scores, seen[:, None, None])
    weights = weights.astype(dtype)
    out = apart(gather(together(weights[..., :S]), prompt_v)) + gather(weights[..., S:], own_v)
    return (out * share).astype(q.dtype).reshape(B, N, 1, H)


def seen_slots(
    num_prompt_slots: int,
    num_own_slots: int,
    prompt_length: jax.Array,
    slot: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Return which slots of its prompt, and of its own, one token of each row sees, bool[B S+T].

    Args:
      prompt_length: i32[B], so many slots of the prompt are seen.
      slot: i32[B], the token's own; those behind it are not seen.
      window: only so many tokens are seen, its own among them.
    """
    in_prompt, in_own = jnp.arange(num_prompt_slots)[None], jnp.arange(num_own_slots)[None]
    slot, length = slot[:, None], prompt_length[:, None]
    seen = jnp.concatenate([in_prompt < length, in_own <= slot], axis=-1)
    if window is not None:
        ages = jnp.concatenate([length + slot - in_prompt, slot - in_own], axis=-1)
        seen &= ages < window
    return seen
