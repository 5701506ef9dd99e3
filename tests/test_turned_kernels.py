"""Turned kernels: the same products, and only where they are worth it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from seal_jax.models.quantize import product, quantize_params
from seal_jax.models.transformer import forward, init_params
from seal_jax.models.turned_kernels import Turned, kernels, turn_kernels, turns


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_turned_kernel_multiplies_as_itself(dtype):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in ((7, 12), (12, 20)))
    expected = np.asarray(product("td,df->tf", x, kernel, dtype), np.float32)
    found = jax.jit(lambda x, k: product("td,df->tf", x, k, dtype))(x, Turned(kernel.T))
    assert found.dtype == dtype and found.shape == (7, 20)
    tolerance = 1e-5 if dtype == "float32" else 0.02
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("word", ["none", "int8"])
def test_a_model_with_turned_kernels_has_the_same_logits(word):
    params = quantize_params(init_params(TINY, jax.random.key(0)), word)
    tokens = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    turned = jax.jit(turn_kernels)(params)
    count = len(kernels(params))
    assert count == (7 * TINY.num_layers if word == "none" else 0)  # quantized ones stay
    assert sum(isinstance(x, Turned) for x in _nodes(turned)) == count
    np.testing.assert_allclose(
        forward(TINY, turned, tokens), forward(TINY, params, tokens), rtol=0, atol=1e-5
    )


def _nodes(params):
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Turned))


def test_only_some_rows_on_a_cpu_want_them():
    numbers = (1, 2, 40, 96, 160)
    assert [turns("cpu", n, "float32") for n in numbers] == [False, True, True, True, False]
    assert [turns("cpu", n, "bfloat16") for n in numbers] == [True, True, True, True, False]
    assert not turns("tpu", 40, "float32") and not turns("gpu", 40, "float32")


@pytest.mark.parametrize("turned", [False, True])
def test_a_token_alone_multiplies_as_with_others(turned):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((7, 12), (12, 20)))
    kernel = Turned(kernel.T) if turned else kernel
    multiply = jax.jit(lambda x: product("td,df->tf", x, kernel, jnp.float32))
    assert multiply(x[:1]).shape == (1, 20)
    np.testing.assert_allclose(multiply(x[:1]), multiply(x)[:1], rtol=0, atol=1e-5)


def test_a_token_alone_has_the_gradients_that_it_has_with_others():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((1, 12), (12, 20)))
    grads = jax.grad(lambda x, k: product("td,df->tf", x, k, jnp.float32).sum(), (0, 1))
    alone = grads(x, kernel)
    with_zeros = grads(jnp.pad(x, ((0, 2), (0, 0))), kernel)
    np.testing.assert_array_equal(alone[0], with_zeros[0][:1])
    np.testing.assert_array_equal(alone[1], with_zeros[1])
