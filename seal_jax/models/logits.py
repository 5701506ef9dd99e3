"""From hidden states to logits, and to log-probabilities of the next tokens, tile by tile."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.models.config import ModelConfig
from seal_jax.models.quantize import product
from seal_jax.types import Array, Params


def unembed(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Return the logits f32[... V] of hidden states [... D]."""
    if config.tie_embeddings:
        table, contract = params["embed"]["embedding"], "td,vd->tv"
    else:
        table, contract = params["lm_head"]["kernel"], "td,dv->tv"
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = product(contract, flat, table, jnp.float32).reshape(*hidden.shape[:-1], -1)
    if config.logit_softcap is not None:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


def next_token_logp(
    config: ModelConfig,
    params: Params,
    hidden: jax.Array,
    tokens: Array,
    wanted: Array,
) -> jax.Array:
    """Return log p f32[B T-1] of all tokens but each row's first, given those before them.

    Args:
      hidden: [B T D] of the tokens i32[B T].
      wanted: [B T], 0 or False where a token's log-probability is not asked for; it is 0 then.
    """
    B, T, D = hidden.shape
    before, targets = hidden[:, :-1].reshape(-1, D), tokens[:, 1:].reshape(-1)
    asked = wanted[:, 1:].reshape(-1).astype(bool)
    return token_logp(config, params, before, targets, asked).reshape(B, T - 1)


@functools.partial(jax.named_call, name="token_logp")
def token_logp(
    config: ModelConfig,
    params: Params,
    hidden: jax.Array,
    targets: Array,
    wanted: Array,
    tile: int = 1024,
) -> jax.Array:
    """Return log p(targets), f32[M], for hidden states [M D] and targets i32[M].

    The [tokens, V] logits would be the largest array of a training step. Beyond `tile` tokens they
    are made in equal tiles of no more, those that are wanted first, and a tile in which nobody
    wants any is left out. The gradient of the hidden states is made with them: no logits are made
    again, but for who trains the head.

    Args:
      wanted: bool[M] whose log-probabilities are asked for; the others' are 0.
    """
    head = head_of(config, params)
    return by_tiles(
        lambda may_skip, *arrays: _tile_logp(config, may_skip, head, *arrays),
        (hidden, targets),
        wanted,
        tile,
    )


def head_of(config: ModelConfig, params: Params) -> Params:
    """Return the parameters that `unembed` takes."""
    name = "embed" if config.tie_embeddings else "lm_head"
    return {name: params[name]}


def by_tiles(of_tile: Callable, arrays: tuple[Any, ...], wanted: Array, tile: int) -> Any:
    """Return what `of_tile` makes of M tokens, in equal tiles of at most `tile`.

    Tokens that are wanted come first, so that a tile of others alone may be left out.

    Args:
      of_tile: (may_skip, *arrays, wanted) -> arrays [m ...]; see `if_any`.
      arrays: [M ...] each.
      wanted: bool[M].
    """
    num_tokens = wanted.shape[0]
    if num_tokens <= tile:
        return of_tile(False, *arrays, wanted)
    num_tiles = -(-num_tokens // tile)
    tile = -(-num_tokens // num_tiles)
    order = jnp.argsort(~wanted)  # stable
    order = jnp.pad(order, (0, num_tiles * tile - num_tokens), mode="edge")
    is_token = jnp.arange(num_tiles * tile) < num_tokens

    def in_tiles(x: jax.Array) -> jax.Array:
        return x.reshape(num_tiles, tile, *x.shape[1:])

    taken = jax.tree.map(lambda x: in_tiles(x[order]), arrays)
    found = jax.lax.map(
        lambda arrays: of_tile(True, *arrays), (*taken, in_tiles(wanted[order] & is_token))
    )
    place = jnp.where(is_token, order, num_tokens)

    def to_tokens(x: jax.Array) -> jax.Array:
        empty = jnp.zeros((num_tokens, *x.shape[2:]), x.dtype)
        return empty.at[place].set(x.reshape(-1, *x.shape[2:]), mode="drop")

    return jax.tree.map(to_tokens, found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tile_logp(
    config: ModelConfig,
    may_skip: bool,
    head: Params,
    hidden: jax.Array,
    targets: Array,
    wanted: Array,
) -> jax.Array:
    """Return log_softmax(logits)[targets], f32[M], of hidden states [M D]; 0 where not wanted.

    Args:
      may_skip: compute nothing where nobody wants any.
    """

    def logp(head: Params, hidden: jax.Array) -> jax.Array:
        return jnp.where(wanted, _log_softmax_at(config, head, hidden, targets)[0], 0.0)

    return if_any(wanted, may_skip, logp, head, hidden)


def _tile_forward(
    config: ModelConfig,
    may_skip: bool,
    head: Params,
    hidden: jax.Array,
    targets: Array,
    wanted: Array,
) -> tuple[jax.Array, tuple]:
    def logp_and_slope(head: Params, hidden: jax.Array) -> tuple[jax.Array, ...]:
        logp, total, unscaled, pull_back = _log_softmax_at(config, head, hidden, targets)
        return jnp.where(wanted, logp, 0.0), total, pull_back(unscaled)[1]

    logp, total, slope = if_any(wanted, may_skip, logp_and_slope, head, hidden)
    return logp, (head, hidden, targets, wanted, total, slope)


def _tile_backward(
    config: ModelConfig, may_skip: bool, saved: tuple, grads: jax.Array
) -> tuple[Params, jax.Array, None, None]:
    head, hidden, targets, wanted, total, slope = saved
    # A token's gradient is scaled behind the product: of D numbers instead of V.
    scale = -grads[:, None] / total
    d_hidden = jnp.where(wanted[:, None], slope.astype(jnp.float32) * scale, 0.0)

    def pull_back_to_head(head: Params, hidden: jax.Array) -> Params:
        _, _, unscaled, pull_back = _log_softmax_at(config, head, hidden, targets)
        return pull_back(jnp.where(wanted[:, None], unscaled * scale, 0.0))[0]

    # A sum over tokens; left out of the program where nobody wants it.
    d_head = if_any(wanted, may_skip, pull_back_to_head, head, hidden)
    return d_head, d_hidden.astype(hidden.dtype), None, None


_tile_logp.defvjp(_tile_forward, _tile_backward)


def if_any(wanted: Array, may_skip: bool, function: Callable, *args: Any) -> Any:
    """Return function(*args); zeros where nobody wants any, if it may be skipped."""
    if not may_skip:
        return function(*args)
    shapes = jax.eval_shape(function, *args)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond(wanted.any(), function, lambda *_: nothing, *args)


def _log_softmax_at(
    config: ModelConfig, head: Params, hidden: jax.Array, targets: Array
) -> tuple[jax.Array, jax.Array, jax.Array, Callable]:
    """Return log_softmax(logits)[targets], and what its gradient is made of.

    Returns:
      f32[M]; the softmax's sum f32[M 1]; that sum times the gradient of the logits, negated,
      f32[M V]; and the function from such a gradient to those of the head and hidden states.
    """
    logits, pull_back = jax.vjp(functools.partial(unembed, config), head, hidden)
    highest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - highest)
    total = exponentials.sum(axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1) - highest
    logp = (chosen - jnp.log(total))[:, 0]
    # In the dtype of the product that they go into, and behind a barrier, or XLA for TPUs keeps
    # the logits and takes exponentials again.
    exponentials = jax.lax.optimization_barrier(exponentials.astype(hidden.dtype))
    is_target = jnp.arange(exponentials.shape[1])[None] == targets[:, None]
    of_target = (jnp.exp(chosen) - total).astype(exponentials.dtype)
    unscaled = jnp.where(is_target, of_target, exponentials).astype(jnp.float32)
    return logp, total, unscaled, pull_back
