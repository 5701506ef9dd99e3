"""The two thin LoRA products of a linear map: scale * (x @ a.T) @ b, for many adapters at once.

Either the rows of x are grouped by adapter, or, where the tokens of several adapters lie behind one
another, `Chunks` says whose they are. Then tokens are gathered into equal chunks, each with one
adapter, and both products are batched over chunks: a text may begin anywhere.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seal_jax.types import Array


class Chunks(NamedTuple):
    """n chunks of c tokens each, of M tokens; token and slot are each other's inverse."""

    lane: Array  # i32[n] whose adapter a chunk takes
    token: jax.Array  # i32[n c] the token in each slot; an empty one has its chunk's first
    in_use: Array  # bool[n c 1] whether a slot is not empty
    slot: jax.Array  # i32[M] the slot of each token; any, where nobody's adapter takes it
    has_slot: jax.Array  # bool[M 1] whether somebody's does


def make_chunks(lane: Array, token: Array, num_tokens: int) -> Chunks:
    """Return the chunks of M = `num_tokens` tokens.

    Args:
      lane: i32[n], whose adapter a chunk takes.
      token: i32[n c], the token in each slot, the used slots first; M in an empty one.
    """
    in_use, num_slots = token < num_tokens, token.size
    slot = jnp.full(num_tokens, num_slots, jnp.int32)
    slots = jnp.arange(num_slots, dtype=jnp.int32).reshape(token.shape)
    slot = slot.at[token].set(slots, mode="drop")
    chunks = Chunks(
        lane,
        jnp.where(in_use, token, jnp.minimum(token[:, :1], num_tokens - 1)),
        in_use[..., None],
        jnp.minimum(slot, num_slots - 1),
        (slot < num_slots)[:, None],
    )
    # Behind a barrier, or each of hundreds of products would compute them for itself.
    return jax.lax.optimization_barrier(chunks)


def token_lanes(chunks: Chunks) -> jax.Array:
    """Return the lane of each token i32[M]; -1 where it has none."""
    chunk = chunks.slot // chunks.token.shape[1]
    return jnp.where(chunks.has_slot[:, 0], chunks.lane[chunk], -1)


@partial(jax.named_call, name="lora")
def grouped_product(x: jax.Array, a: jax.Array, b: jax.Array, scale: Array) -> jax.Array:
    """Return scale * (x @ a.T) @ b, [M F] for x [M D] grouped by adapter, a [A r D], b [A r F]."""
    grouped = x.reshape(a.shape[0], -1, x.shape[-1]).astype(a.dtype)
    low = jnp.einsum("atd,ard->atr", grouped, a) * scale[:, None, None].astype(a.dtype)
    return jnp.einsum("atr,arf->atf", low, b).reshape(x.shape[0], -1)


@jax.custom_vjp
def chunked_product(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: Array, chunks: Chunks
) -> jax.Array:
    """Return scale * (x @ a.T) @ b, [M F] for x [M D], a [U r D], b [U r F]; 0 for nobody's token.

    Products are taken of numbers in x's dtype and summed in float32, and gradients of a and b are
    float32, as these are. What is not finite in one lane stays there. The backward pass gathers
    once more what the forward pass has gathered: only the [n c r] in between is kept.
    """
    return _forward(x, a, b, scale, chunks)[0]


@partial(jax.named_call, name="lora")
def _forward(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: Array, chunks: Chunks
) -> tuple[jax.Array, tuple]:
    low = _sum("ncd,nrd->ncr", _gather(x, chunks.token), _gather(a, chunks.lane).astype(x.dtype))
    low = _in_use((low * scale[chunks.lane, None, None]).astype(x.dtype), chunks)
    out = _sum("ncr,nrf->ncf", low, _gather(b, chunks.lane).astype(x.dtype)).astype(x.dtype)
    return _to_tokens(out, chunks), (x, a, b, scale, chunks, low)


@partial(jax.named_call, name="lora_backward")
def _backward(saved: tuple, grads: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    x, a, b, scale, chunks, low = saved
    grads = _gather(grads, chunks.token)
    d_low = _sum("ncf,nrf->ncr", grads, _gather(b, chunks.lane).astype(x.dtype))
    d_low = _in_use((d_low * scale[chunks.lane, None, None]).astype(x.dtype), chunks)
    d_a = _sum("ncr,ncd->nrd", d_low, _gather(x, chunks.token))
    d_b = _sum("ncr,ncf->nrf", low, grads)
    d_x = _sum("ncr,nrd->ncd", d_low, _gather(a, chunks.lane).astype(x.dtype)).astype(x.dtype)

    lane = jnp.where(chunks.in_use[:, 0, 0], chunks.lane, a.shape[0])  # beyond the last: dropped

    def by_lane(d: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.zeros_like(like).at[lane].add(d.astype(like.dtype), mode="drop")

    return _to_tokens(d_x, chunks), by_lane(d_a, a), by_lane(d_b, b), None, None


chunked_product.defvjp(_forward, _backward)


def _sum(contract: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(contract, x, y, preferred_element_type=jnp.float32)


def _in_use(low: jax.Array, chunks: Chunks) -> jax.Array:
    """Return [n c r] with zeros in empty slots: what they hold counts for nothing."""
    return jnp.where(chunks.in_use, low, 0)


def _to_tokens(slots: jax.Array, chunks: Chunks) -> jax.Array:
    """Gather slots [n c D] back to their tokens [M D]; 0 for a token without one."""
    flat = slots.reshape(-1, slots.shape[-1])
    return jnp.where(chunks.has_slot, _gather(flat, chunks.slot), 0)


def _gather(x: jax.Array, index: Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
