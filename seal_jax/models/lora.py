"""LoRA adapters as pytrees: init, stack, take, concatenate, merge, count.

  y = x @ W + (alpha / rank) * (x @ a.T) @ b        (Hu et al., arXiv 2106.09685)

W is frozen, a is random and b zero at the start, so that a new adapter is exactly the base model.
Both are float32 over any base dtype, and [r ...]: the small rank as the last axis would fill few of
a TPU's lanes.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from seal_jax.models.config import LINEARS, ModelConfig
from seal_jax.models.names import linear_shapes
from seal_jax.models.quantize import is_quantized
from seal_jax.types import Adapters, Params

Tree = TypeVar("Tree")

# The block of each linear map that can be adapted.
TARGETS = dict.fromkeys(LINEARS[:4], "attn") | dict.fromkeys(LINEARS[4:], "mlp")


def target_shapes(config: ModelConfig, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return {target: (in, out)} of the adapted kernels.

    Raises:
      ValueError: no target, or one that is not a linear map of the model.
    """
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets:
        raise ValueError(f"LoRA targets must be some of {', '.join(TARGETS)}; got {list(targets)}")
    shapes = linear_shapes(config)
    return {target: shapes[target] for target in TARGETS if target in targets}


def init_adapter(
    config: ModelConfig, rng: jax.Array, *, rank: int, alpha: float, targets: Sequence[str]
) -> Adapters:
    """Return one adapter (A = 1): a uniform in +-1/sqrt(in), as PEFT initializes it, and b zero."""
    L = config.num_layers
    weights: Params = {}
    for i, (target, (fan_in, fan_out)) in enumerate(target_shapes(config, targets).items()):
        bound = fan_in**-0.5
        key = jax.random.fold_in(rng, i)
        a = jax.random.uniform(key, (1, L, fan_in, rank), jnp.float32, -bound, bound)
        a = a.swapaxes(2, 3)
        b = jnp.zeros((1, L, rank, fan_out), jnp.float32)
        weights.setdefault(TARGETS[target], {})[target] = {"a": a, "b": b}
    return Adapters(weights, jnp.full((1,), alpha / rank, jnp.float32))


def init_adapters(
    config: ModelConfig, rngs: jax.Array, *, rank: int, alpha: float, targets: Sequence[str]
) -> Adapters:
    """Return a stack of adapters, one per key of rngs [A]; each depends on its own key alone."""

    def one(rng: jax.Array) -> Adapters:
        return take(init_adapter(config, rng, rank=rank, alpha=alpha, targets=targets), 0)

    return jax.vmap(one)(rngs)


def stack(adapters: Sequence[Adapters]) -> Adapters:
    """Put stacks of adapters behind one another."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *adapters)


def take(adapters: Tree, index: int | slice | jax.Array) -> Tree:
    """Return the adapters at `index` (an int drops the axis, a slice or an array keeps it).

    Likewise of their weights, or of what an optimizer keeps for them.
    """
    return jax.tree.map(lambda x: x[index], adapters)


def concatenate(adapters: Sequence[Adapters]) -> Adapters:
    """Return one stack whose adapter i does what the adapters i of several stacks do together.

    x @ a1.T @ b1 + x @ a2.T @ b2 = x @ [a1; a2].T @ [b1; b2]: ranks add up, scales move into b,
    and a target is adapted if any of the stacks adapts it, so that ranks may differ between them.
    """
    weights: Params = {}
    for target, block in TARGETS.items():
        found = [
            (x.weights[block][target], x.scale[:, None, None, None])
            for x in adapters
            if target in x.weights.get(block, {})
        ]
        if found:
            a = jnp.concatenate([ab["a"] for ab, _ in found], axis=-2)
            b = jnp.concatenate([ab["b"] * scale for ab, scale in found], axis=-2)
            weights.setdefault(block, {})[target] = {"a": a, "b": b}
    return Adapters(weights, jnp.ones_like(adapters[0].scale))


def count(adapters: Adapters) -> int:
    """Return the number of parameters of one adapter of the stack."""
    return sum(x[0].size for x in jax.tree.leaves(adapters.weights))


def merge(params: Params, adapters: Adapters, index: int = 0) -> Params:
    """Return params with adapter `index` added to its kernels; the sum is made in float32.

    Raises:
      ValueError: params are quantized: the sum would be rounded to their few levels.
    """
    if is_quantized(params):
        raise ValueError("an adapter cannot be merged into quantized params: merge, then quantize")
    merged = dict(params)
    num_layers = jax.tree.leaves(adapters.weights)[0].shape[1]
    for i in range(num_layers):
        layer = dict(merged[f"layers_{i}"])
        for block, targets in adapters.weights.items():
            layer[block] = dict(layer[block])
            for target, ab in targets.items():
                kernel = layer[block][target]["kernel"]
                delta = adapters.scale[index] * (ab["a"][index, i].T @ ab["b"][index, i])
                total = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
                layer[block][target] = layer[block][target] | {"kernel": total}
        merged[f"layers_{i}"] = layer
    return merged
