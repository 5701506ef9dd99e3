"""Rotary position embeddings (RoPE, arXiv 2104.09864), halves paired as in Hugging Face."""

import math

import jax
import jax.numpy as jnp

from seal_jax.models.config import ModelConfig
from seal_jax.sharding import platform
from seal_jax.types import Array

# (cos, sin) of a global and of a local layer, f32[... 1 T H] each.
RopeTables = tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def rope_frequencies(config: ModelConfig, local: bool = False) -> jax.Array:
    """Return the rotary frequencies f32[H/2] of a layer, scaled for long contexts if asked."""
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    if local and config.local_rope_theta is not None:
        return 1.0 / config.local_rope_theta**half
    frequency = 1.0 / config.rope_theta**half / config.rope_factor
    s = config.rope_scaling
    if s is None:
        return frequency
    # Short waves stay, long ones are stretched by `factor`, those between are blended.
    turns = s.original_max_position * frequency / (2 * math.pi)
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return frequency * blend + frequency / s.factor * (1.0 - blend)


def _rope_table(positions: Array, frequency: jax.Array) -> tuple[jax.Array, jax.Array]:
    angle = positions.astype(jnp.float32)[..., None, :, None]
    angle = angle * jnp.expand_dims(frequency, range(positions.ndim + 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


@jax.custom_vjp
def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x [B N T H] by its table's angles; halves are paired as in Hugging Face."""
    cos, sin = table
    half, wide = x.shape[-1] // 2, x.astype(jnp.float32)
    if platform() == "tpu":
        # In a product: the halves lie in one register's lanes. It is exact.
        swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=-1)
        other = jnp.einsum(
            "...h,hi->...i", x, swap, precision="highest", preferred_element_type=jnp.float32
        )
    else:
        # Of float32: XLA for CPUs is slow to reverse bfloat16.
        other = jnp.flip(wide.reshape(*x.shape[:-1], 2, half), axis=-2).reshape(x.shape)
    return (wide * cos + other * sin).astype(x.dtype)


# The gradient is turned back: a product of x's dtype too, where JAX would make one of float32.
apply_rope.defvjp(
    lambda x, table: (apply_rope(x, table), table),
    lambda table, grads: (apply_rope(grads, (table[0], -table[1])), None),
)


def rope_tables(config: ModelConfig, positions: Array) -> RopeTables:
    """Return cosine and signed sine of the angles at positions i32[... T]."""
    table = _rope_table(positions, rope_frequencies(config))
    if config.local_rope_theta is None:
        return table, table
    return table, _rope_table(positions, rope_frequencies(config, local=True))
