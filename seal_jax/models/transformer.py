"""One decoder for every family, in Flax linen; ModelConfig's switches say what a family has.

  h = embed(tokens)
  for each layer:  h += attn(norm(h));  h += mlp(norm(h))
  logits = unembed(norm(h))

Rows that share an adapter are neighbours: with A adapters and B rows, rows [i * B/A, (i + 1) *
B/A) use adapter i. So the frozen base is one flat [tokens, D] @ [D, F] product over everybody's
tokens, and only the two thin LoRA products carry the adapter axis; where sequences have kernels of
their own, see own_kernels.py, it is one such product for each. Layers are separate buffers,
unrolled: on TPUs the inner loop is faster so than with a scan over layers.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from seal_jax.models.attention import attend, attend_apart, flat_heads, is_finite
from seal_jax.models.config import ModelConfig
from seal_jax.models.kv_cache import (
    KVCache,
    RowCaches,
    attend_cached,
    seen_of_layers,
    write_cache,
)
from seal_jax.models.logits import unembed
from seal_jax.models.lora_product import Chunks, chunked_product, grouped_product
from seal_jax.models.own_kernels import each_product, num_own
from seal_jax.models.quantize import product, take_rows
from seal_jax.models.rope import RopeTables, apply_rope, rope_tables
from seal_jax.sharding import auto_axes, platform
from seal_jax.types import Adapters, Array, Params


class RMSNorm(nn.Module):
    epsilon: float
    unit_offset: bool = False  # multiply by 1 + scale, as Gemma does, and in float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],))
        scale = jnp.expand_dims(scale, range(x.ndim - 1))
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(variance + self.epsilon)
        if self.unit_offset:
            return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


_PRODUCT = "product"  # how policies of remat call the product of a linear map


class Linear(nn.Module):
    """x @ kernel + bias, plus scale * (x @ a.T) @ b where the 'lora' collection has an adapter."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, lora: "_Lora | None") -> jax.Array:
        if self.is_initializing():
            self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        kernel = self.get_variable("params", "kernel")  # whatever `product` takes
        flat = x.reshape(-1, x.shape[-1])
        if num_own(kernel) is None:
            y = product("td,df->tf", flat, kernel, x.dtype)
        else:
            y = each_product(flat, kernel)
        y = checkpoint_name(y, _PRODUCT)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype)[None]
        if lora is not None and self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            if lora.on_input is not None:
                name = jnp.uint32(zlib.crc32("/".join(self.path).encode())) + lora.layer
                flat = lora.on_input(flat, name, self.get_variable("lora", "probe"))
            if lora.chunks is None:
                delta = grouped_product(flat, a, b, lora.scale)
            else:
                delta = chunked_product(flat, a, b, lora.scale, lora.chunks)
            y = y + delta.astype(y.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def _linear(config: ModelConfig, features: int, name: str) -> Linear:
    return Linear(features, name in config.biases, name=name)


def _norm(config: ModelConfig, name: str) -> RMSNorm:
    return RMSNorm(config.norm_eps, config.unit_offset, name=name)


class Attention(nn.Module):
    config: ModelConfig
    local: bool

    @nn.compact
    def __call__(self, x: jax.Array, call: "_Call", cache: tuple | None) -> tuple[jax.Array, tuple]:
        c = self.config
        B, T = call.segments.shape
        num_heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        flat = [_linear(c, n * c.head_dim, name)(x, call.lora) for name, n in num_heads.items()]
        q, k, v = (y.reshape(B, T, -1, c.head_dim).transpose(0, 2, 1, 3) for y in flat)
        if c.qk_norm:
            q, k = _norm(c, "q_norm")(q), _norm(c, "k_norm")(k)
        q, k = apply_rope(q, call.rope[self.local]), apply_rope(k, call.rope[self.local])
        texts = call.segments, call.key_segments
        if cache is not None:
            assert call.slot is not None and call.seen is not None
            prompts, own = cache
            k, v = own = write_cache(*own, k, v, call.slot)
            out = flat_heads(attend_cached(c, q, prompts, own, call.seen[self.local]))
        elif call.lora is not None and call.lora.chunks is not None:
            finite = is_finite(*flat).reshape(B, T)
            out = attend_apart(c, q, k, v, *texts, finite, local=self.local)
        else:
            out = flat_heads(attend(c, q, k, v, *texts, local=self.local))
        return _linear(c, c.embed_dim, "o_proj")(out, call.lora), (k, v)


def _gate(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    # On CPUs rounded once, as torch does it: XLA would round each step there, and take longer.
    wide = jnp.float32 if platform() == "cpu" else gate.dtype
    function = nn.silu if activation == "silu" else nn.gelu
    return function(gate.astype(wide)).astype(gate.dtype) * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return activation(gate) * up; the two are saved for the backward pass, nothing between."""
    return _gate(activation, gate, up)


def _gated_backward(activation: str, saved: tuple, grads: jax.Array) -> tuple:
    if platform() == "cpu":  # else XLA keeps all that the forward pass computes between
        saved = jax.lax.optimization_barrier(saved)
    _, pull_back = jax.vjp(functools.partial(_gate, activation), *saved)
    # Made before any is used: else XLA for TPUs makes them anew for every tile of a product.
    return jax.lax.optimization_barrier(pull_back(grads))


_gated.defvjp(lambda name, gate, up: (_gate(name, gate, up), (gate, up)), _gated_backward)


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, lora: "_Lora | None") -> jax.Array:
        c = self.config
        gate = _linear(c, c.mlp_dim, "gate_proj")(x, lora)
        up = _linear(c, c.mlp_dim, "up_proj")(x, lora)
        return _linear(c, c.embed_dim, "down_proj")(_gated(c.activation, gate, up), lora)


class Layer(nn.Module):
    config: ModelConfig
    local: bool

    @nn.compact
    def __call__(self, x: jax.Array, call: "_Call", cache: tuple | None) -> tuple[jax.Array, tuple]:
        c = self.config
        attention = Attention(c, self.local, name="attn")
        attn, cache = attention(_norm(c, "attn_norm")(x), call, cache)
        if c.sandwich_norms:
            attn = _norm(c, "post_attn_norm")(attn)
        x = x + attn
        mlp = MLP(c, name="mlp")(_norm(c, "mlp_norm")(x), call.lora)
        if c.sandwich_norms:
            mlp = _norm(c, "post_mlp_norm")(mlp)
        return x + mlp, cache


class Packed(NamedTuple):
    """What the inner loop adds to `hidden_states`: texts of several adapters share an array row."""

    # i32[B T] of the keys; a token whose own key is of another segment does not see itself. As
    # `segments` by default.
    key_segments: Array | None = None
    # Whose adapter each of the B * T tokens takes, instead of rows grouped by adapter.
    chunks: Chunks | None = None
    # `rope_tables` of the positions, made outside of the loop: XLA for CPUs would compute cosines
    # anew for every head and layer.
    rope: RopeTables | None = None
    # A pytree that is given what every adapter multiplies, [B*T D], with a number that names the
    # linear map, u32[], and what stands beside its `a` and `b` as `probe`, or None. The adapter
    # multiplies what it returns: dropout, or one that only looks.
    on_input: Callable[[jax.Array, jax.Array, Any], jax.Array] | None = None


class _Lora(NamedTuple):
    """Whose adapter each token takes; the adapters' matrices are in the 'lora' collection."""

    scale: Array  # f32[A]
    chunks: Chunks | None  # or rows are grouped by adapter
    on_input: Callable | None  # see `Packed`
    layer: jax.Array | None = None  # u32[] of the maps that ask for it


class _Call(NamedTuple):
    """What every layer is called with; see `hidden_states`."""

    rope: RopeTables
    segments: Array  # i32[B T]
    key_segments: Array  # i32[B T]
    lora: "_Lora | None"
    slot: jax.Array | None = None  # i32[B] of the token, where there is a cache
    seen: tuple | None = None  # there: `seen_slots` of a global and of a local layer


def _and_products(policy: Callable) -> Callable:
    """Return the policy that also keeps what `product` returns: its own rule hides it from them."""
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(policy, policies.save_only_these_names(_PRODUCT))


# What a backward pass keeps of a layer's forward pass, by config word; 'none' keeps everything.
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": _and_products(jax.checkpoint_policies.dots_saveable),
    "dots_with_no_batch_dims_saveable": _and_products(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


def _apply_layer(
    config: ModelConfig,
    local: bool,
    variables: Params,
    x: jax.Array,
    call: _Call,
    cache: tuple | None,
) -> tuple[jax.Array, tuple]:
    """Apply a layer.

    Layers of equal shapes are traced once and lowered as one function, which XLA inlines. Where the
    mesh is manual over some of its axes alone, they are inlined before: XLA aborts on a kernel in
    such a function.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divides = any(mesh.shape[axis] > 1 for axis in auto_axes(mesh))
    is_partly_manual = AxisType.Manual in mesh.axis_types and divides
    apply = _apply_layer_inlined if is_partly_manual else _apply_layer_called
    return apply(config, local, variables, x, call, cache)


def _apply(
    config: ModelConfig,
    local: bool,
    variables: Params,
    x: jax.Array,
    call: _Call,
    cache: tuple | None,
) -> Any:
    layer = Layer
    if config.remat != "none":
        layer = nn.remat(Layer, policy=_REMAT_POLICIES[config.remat])
    return layer(config, local).apply(variables, x, call, cache)


_apply_layer_called = jax.jit(_apply, static_argnums=(0, 1))
_apply_layer_inlined = jax.jit(_apply, static_argnums=(0, 1), inline=True)


class Transformer(nn.Module):
    """Tokens to the last hidden states, normed; `unembed` makes logits of those that need them."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: Array, call: _Call, caches: RowCaches | None = None
    ) -> tuple[jax.Array, KVCache]:
        c = self.config
        embed = nn.Embed(
            c.vocab_size, c.embed_dim, embedding_init=nn.initializers.normal(0.02), name="embed"
        )
        # Flat from here on, but for attention: TPUs then compute norms as part of the products.
        x = take_rows(embed.embedding, tokens.reshape(-1), c.rules)
        if c.scale_embeddings:
            x = x * jnp.asarray(c.embed_dim**0.5, x.dtype)
        keys, values = [], []
        for i in range(c.num_layers):
            cache = None
            if caches is not None:
                cache = tuple((x.keys[i], x.values[i]) for x in (caches.prompts, caches.own))
            name, local = f"layers_{i}", c.is_local(i)
            if self.is_initializing():
                layer = Layer(c, local, name=name)
            else:
                if call.lora is not None:
                    call = call._replace(lora=call.lora._replace(layer=jnp.uint32(i)))
                variables = {kind: tree[name] for kind, tree in self.variables.items()}
                layer = functools.partial(_apply_layer, c, local, variables)
            x, (k, v) = layer(x, call, cache)
            keys.append(k.swapaxes(2, 3) if caches is None else k)
            values.append(v)
        hidden = _norm(c, "final_norm")(x).reshape(*tokens.shape, -1)
        if self.is_initializing() and not c.tie_embeddings:
            Linear(c.vocab_size, name="lm_head")(hidden, None)
        return hidden, KVCache(tuple(keys), tuple(values))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def init_params(
    config: ModelConfig, rng: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32
) -> Params:
    """Return random parameters. A large model is never there in float32: the cast is compiled."""
    one = jnp.zeros((1, 1), jnp.int32)
    call = _Call(rope_tables(config, one), one, one, None)
    params = Transformer(config).init(rng, one, call)["params"]
    return jax.tree.map(lambda x: x.astype(dtype), params)


@jax.custom_vjp
def _unstack(x: jax.Array) -> list[jax.Array]:
    """Return x [A L ...] as L arrays [A ...]; the gradient is one stack, not L padded arrays."""
    return [x[:, i] for i in range(x.shape[1])]


_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, grads: (jnp.stack(grads, axis=1),))


def split_layers(weights: Params) -> Any:
    """Return the weights of a stack of adapters [A L ...] as a tuple of L trees [A ...]."""
    leaves, treedef = jax.tree.flatten(weights)
    by_layer = zip(*(_unstack(x) for x in leaves), strict=True)
    return tuple(treedef.unflatten(layer) for layer in by_layer)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    segments: Array,
    adapters: Adapters | None = None,
    caches: RowCaches | None = None,
    packed: Packed | None = None,
) -> tuple[jax.Array, KVCache]:
    """Run the decoder.

    Args:
      tokens: i32[B T]; with A adapters, B is a multiple of A and rows are grouped by adapter.
      params: where S sequences have kernels of their own, B and A are multiples of S, and rows and
        adapters are grouped by sequence.
      positions: i32[B T], for the rotary embedding.
      adapters: a stack, whose weights may also be a tuple of L already, [A ...] each.
      segments: i32[B T]; a token sees the tokens of its own segment, from itself back. Padding may
        be a segment like any other.
      caches: of rows that have one token each here, which are what is seen then.
      packed: where texts of several adapters share an array row.

    Returns:
      The normed hidden states [B T D], and keys and values: of the texts, or what the rows' own
      cache has become.

    Raises:
      ValueError: rows or adapters that do not fall apart into S equal groups.
    """
    key_segments, chunks, rope, on_input = packed or Packed()
    _check_rows(params, tokens.shape[0], None if chunks is not None else adapters)
    variables = {"params": params}
    lora = None
    if adapters is not None:
        layers = adapters.weights
        if not isinstance(layers, tuple):
            layers = split_layers(layers)
        variables["lora"] = {f"layers_{i}": layer for i, layer in enumerate(layers)}
        lora = _Lora(adapters.scale, chunks, on_input)
    call = _Call(
        rope_tables(config, positions) if rope is None else rope,
        segments,
        segments if key_segments is None else key_segments,
        lora,
        *(() if caches is None else (caches.slot, seen_of_layers(config, caches))),
    )
    found: Any = Transformer(config).apply(variables, tokens, call, caches)
    return found


def _check_rows(params: Params, num_rows: int, adapters: Adapters | None) -> None:
    """Raise ValueError where some row's kernel and adapter would be of different sequences."""
    counts = {"rows": num_rows}
    if adapters is not None:
        counts["adapters"] = adapters.scale.shape[0]
    num = num_own(params)
    for name, count in counts.items():
        if num is not None and count % num:
            raise ValueError(
                f"{count} {name}: expected a multiple of the {num} sequences that have kernels of"
                " their own"
            )


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    adapters: Adapters | None = None,
) -> jax.Array:
    """Return the logits f32[B T V] of whole texts; without segments, a row is one text."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segments is None:
        segments = jnp.ones(tokens.shape, jnp.int32)
    hidden, _ = hidden_states(config, params, tokens, positions, segments, adapters)
    return unembed(config, params, hidden)
