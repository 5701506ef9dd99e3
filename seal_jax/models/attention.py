"""Attention, one function per way to compute it: XLA, cuDNN on GPUs, splash attention on TPUs.

  softmax(softcap(q k^T scale) where visible) v

Who sees whom follows from segments, so that kernels need no [T, S] mask: a query sees the keys of
its own segment, from its own slot back to the edge of the window. The two kernels never write the
[T, S] scores to memory; they serve whole texts. For generation see kv_cache.py.
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.models.config import ModelConfig
from seal_jax.sharding import attention_specs, auto_axes, platform
from seal_jax.types import Array

_TILE = 128  # splash attention's smallest
# The lengths from which the kernels are worth their overhead.
_SPLASH_FROM = 1024
_CUDNN_FROM = 256

# What is added to the score of a key that is not seen: far below any score, half of it still is.
_UNSEEN = -1e38
# Where texts of several adapters share a row, a query, key or value that is larger counts as
# infinite: no product of smaller ones comes near _UNSEEN.
_LARGEST = 1e15


@partial(jax.named_call, name="attention")
def attend(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Array,
    key_segments: Array,
    *,
    local: bool,
) -> jax.Array:
    """Return what each query of whole texts gathers, [B N T H].

    Args:
      config: whose `attention` names the way: 'auto' chooses by backend, dtype and length.
      q: [B N T H].
      k, v: [B K T H]; K divides N.
      segments: i32[B T] of the queries. Padding may be a segment of its own (0): a token always
        sees itself, so no softmax is empty.
      key_segments: i32[B T]. A query whose own key is of another segment does not see itself.
      local: whether only the last `config.sliding_window` slots are seen.

    Raises:
      ValueError: the config names a kernel that cannot compute this.
    """
    window = config.sliding_window if local else None
    way = _choose(config, q)
    if way == "splash":
        return splash_attention(config, q, k, v, segments, key_segments, window)
    visible = visible_slots(segments, key_segments, window)
    attention = cudnn_attention if way == "cudnn" else xla_attention
    return attention(q, k, v, visible, score_scale(config), config.attn_softcap)


def attend_apart(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Array,
    key_segments: Array,
    finite: jax.Array,
    *,
    local: bool,
) -> jax.Array:
    """Attend where an array row holds texts of several adapters: what diverges stays among its own.

    Attention multiplies what it must not see by 0, and 0 * NaN is NaN: one adapter that diverges
    would reach all that share its array row. So a token that is not finite takes part as zeros and
    gets NaN itself. The backward pass does the same with a token's gradient, which goes to the
    token's own query as NaN.

    Args:
      finite: bool[B T], whether a token's query, key and value are; see `is_finite`.

    Returns:
      [B*T N*H]
    """
    own = finite[:, None, :, None]
    q, k, v = (jnp.where(own, x, 0) for x in (q, k, v))
    q, lost = _with_lost(q)
    out = flat_heads(attend(config, q, k, v, segments, key_segments, local=local))
    return _stop_nonfinite_grads(jnp.where(finite.reshape(-1, 1), out, jnp.nan), lost)


def is_finite(*xs: jax.Array) -> jax.Array:
    """Return which tokens are finite in all of xs [M D], bool[M]; the huge count as infinite."""
    return reduce(jnp.logical_and, [(jnp.abs(x) < _LARGEST).all(axis=-1) for x in xs])


def flat_heads(x: jax.Array) -> jax.Array:
    """Return x [B N T H] as [B*T N*H]."""
    B, N, T, H = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B * T, N * H)


@jax.custom_vjp
def _with_lost(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return q [B N T H], and zeros [B 1 T 1] whose gradient is added to all of a token's query."""
    return q, jnp.zeros_like(q, shape=(q.shape[0], 1, q.shape[2], 1))


_with_lost.defvjp(lambda q: (_with_lost(q), None), lambda _, grads: (grads[0] + grads[1],))


@jax.custom_vjp
def _stop_nonfinite_grads(out: jax.Array, lost: jax.Array) -> jax.Array:
    """Return out [B*T D]; a token's gradient that is not finite goes to `lost` instead, as NaN."""
    del lost
    return out


def _stop_backward(lost: jax.Array, grads: jax.Array) -> tuple[jax.Array, jax.Array]:
    bad = ~jnp.isfinite(grads).all(axis=-1, keepdims=True)
    nan = jnp.where(bad.reshape(lost.shape), jnp.nan, lost)
    return jnp.where(bad, 0, grads), nan


_stop_nonfinite_grads.defvjp(lambda out, lost: (out, lost), _stop_backward)


def _choose(config: ModelConfig, q: jax.Array) -> str:
    if config.attention != "auto":
        return config.attention
    where, length = platform(), q.shape[2]
    if where == "tpu" and length >= _SPLASH_FROM:
        return "splash"
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and config.attn_softcap is None and config.head_dim <= 128
    if where == "gpu" and length >= _CUDNN_FROM and fits:
        return "cudnn"
    return "xla"


def score_scale(config: ModelConfig) -> float:
    return config.head_dim**-0.5 if config.query_scale is None else config.query_scale


def visible_slots(segments: Array, key_segments: Array, window: int | None = None) -> jax.Array:
    """Return bool[B T T], True where query t may look at key s; see `attend`."""
    slots = jnp.arange(segments.shape[1])
    distance = slots[None, :, None] - slots[None, None]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (segments[:, :, None] == key_segments[:, None, :]) & near


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def xla_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Compute attention in plain XLA, scores in float32; visible is bool[B T S].

    The heads that share keys are rows of one product, and the softmax's division waits until after
    the values: there are fewer numbers. The backward pass is written out: it needs no more than the
    weights and the output, both in q's dtype.
    """
    return _xla_forward(q, k, v, visible, scale, softcap)[0]


def _xla_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, tuple]:
    B, N, T, H = q.shape
    K, S = k.shape[1:3]
    # Scaled here, where there are fewer numbers than scores.
    rows = (q * jnp.asarray(scale, q.dtype)).reshape(B, K, -1, H)  # [B K G*T H]
    scores = jnp.einsum("bkth,bksh->bkts", rows, k, preferred_element_type=jnp.float32)
    slope = None
    if softcap is not None:
        scores = capped(scores, softcap)
        slope = (1 - jnp.square(scores / softcap)).astype(q.dtype)
    weights, share = weigh(scores.reshape(B, K, -1, T, S), visible[:, None, None])
    share = share.reshape(B, K, -1, 1)
    weights = weights.reshape(B, K, -1, S).astype(v.dtype)
    out = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32)
    out = (out * share).astype(q.dtype).reshape(B, N, T, H)
    return out, (rows, k, v, weights, share, slope, out)


def capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def weigh(scores: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the softmax of scores [... S], and what its products are still to be multiplied by.

    That is one over the softmax's sum, [... 1], where dividing waits. On GPUs it does not: there
    XLA makes one kernel of a whole softmax.
    """
    if platform() == "tpu":
        highest = jnp.where(seen, scores, _UNSEEN).max(axis=-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(scores - highest), 0)
    else:
        # XLA for CPUs makes one pass of a sum and what follows, and of a choice several.
        scores += jnp.where(seen, 0.0, _UNSEEN)
        weights = jnp.exp(scores - jnp.maximum(scores.max(axis=-1, keepdims=True), _UNSEEN / 2))
    # Who sees nothing has a sum of 0.
    total = jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    if platform() == "gpu":
        return weights / total, jnp.ones_like(total)
    return weights, 1 / total


def _xla_backward(
    scale: float, softcap: float | None, saved: tuple, grads: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    del softcap
    rows, k, v, weights, share, slope, out = saved
    shape = out.shape
    out, grads = (x.reshape(*weights.shape[:3], -1) for x in (out, grads))
    grads = grads.astype(jnp.float32) * share
    lost = (grads * out).sum(axis=-1, keepdims=True)
    grads = grads.astype(rows.dtype)
    d_v = jnp.einsum("bkts,bkth->bksh", weights, grads, preferred_element_type=jnp.float32)
    d_weights = jnp.einsum("bkth,bksh->bkts", grads, v, preferred_element_type=jnp.float32)
    # Who is not seen has weight 0, and gets 0 whatever overflows.
    d_scores = jnp.where(weights > 0, (d_weights - lost) * weights, 0)
    if slope is not None:
        d_scores *= slope
    d_scores = d_scores.astype(rows.dtype)
    d_q = jnp.einsum("bkts,bksh->bkth", d_scores, k, preferred_element_type=jnp.float32)
    d_k = jnp.einsum("bkts,bkth->bksh", d_scores, rows, preferred_element_type=jnp.float32)
    d_q = (d_q * scale).astype(rows.dtype).reshape(shape)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


xla_attention.defvjp(_xla_forward, _xla_backward)


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Compute attention with cuDNN's flash kernel: bfloat16 or float16 on NVIDIA GPUs."""
    if softcap is not None:
        raise ValueError("attention 'cudnn' has no soft cap of the scores: use 'xla'.")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention 'cudnn' needs bfloat16 or float16, found {q.dtype}.")
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # cuDNN's layout is [B T N H]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=visible[:, None], scale=scale, implementation="cudnn"
    )
    return out.transpose(0, 2, 1, 3)


def splash_attention(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Array,
    key_segments: Array,
    window: int | None,
) -> jax.Array:
    """Compute attention with JAX's splash kernel (Pallas), which skips tiles that nobody sees.

    On CPUs it is interpreted, for tests. The compiler cannot partition a kernel: within
    `jax.set_mesh` every device computes the rows and heads that the rules give it.
    """
    T = q.shape[2]
    padding = -T % _TILE
    if padding:  # behind the text: causal, so nobody sees it
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v))
        segments, key_segments = (
            jnp.pad(x, ((0, 0), (0, padding)), constant_values=-1) for x in (segments, key_segments)
        )
    kernel = partial(_splash, window=window, softcap=config.attn_softcap)
    mesh = jax.sharding.get_abstract_mesh()
    # Within the inner loop the population is divided already: only the other axes are left.
    if auto := auto_axes(mesh):
        by_head, by_row = attention_specs(mesh, len(q), k.shape[1], config.rules)
        kernel = jax.shard_map(
            kernel,
            in_specs=(by_head,) * 3 + (by_row,) * 2,
            out_specs=by_head,
            axis_names=auto,
            check_vma=False,
        )
    q = q * jnp.asarray(score_scale(config), q.dtype)
    return kernel(q, k.astype(q.dtype), v.astype(q.dtype), segments, key_segments)[:, :, :T]


def _splash(*arrays: Array, window: int | None, softcap: float | None) -> jax.Array:
    """Run the kernel on q, k, v [B N T H] and the segments of both sides i32[B T]."""
    # Pallas takes a second to import, and only this function needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    N, T = arrays[0].shape[1:3]
    if window is None:
        mask = splash.CausalMask((T, T))
    else:
        mask = splash.LocalMask((T, T), window_size=(window - 1, 0), offset=0)
    block = next(size for size in (512, 256, _TILE) if T % size == 0)
    sizes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in sizes}

    def compute(*arrays: jax.Array, interpret: bool) -> jax.Array:
        *heads, segments, key_segments = arrays
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * N),
            block_sizes=splash.BlockSizes(**blocks),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        return jax.vmap(kernel)(*heads, splash.SegmentIds(q=segments, kv=key_segments))

    interpreted, compiled = (partial(compute, interpret=choice) for choice in (True, False))
    return jax.lax.platform_dependent(*arrays, cpu=interpreted, default=compiled)
