"""Adapters beside the base, merged into it, and grouped by rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.models import lora
from seal_jax.models.transformer import forward

pytestmark = pytest.mark.usefixtures("strict")

TARGETS = tuple(lora.TARGETS)
T = 12


def random_adapters(config, num_adapters, seed=0, targets=TARGETS):
    """Return adapters (numpy) as after training: b is not zero, and the scales differ."""
    rng = np.random.default_rng(seed)
    weights = {}
    for target, (fan_in, fan_out) in lora.target_shapes(config, targets).items():
        a = rng.normal(0.0, 0.2, (num_adapters, config.num_layers, 4, fan_in))
        b = rng.normal(0.0, 0.2, (num_adapters, config.num_layers, 4, fan_out))
        block = weights.setdefault(lora.TARGETS[target], {})
        block[target] = {"a": a.astype(np.float32), "b": b.astype(np.float32)}
    return lora.Adapters(weights, np.arange(1, num_adapters + 1, dtype=np.float32))


def init(config, rngs, **options):
    return jax.jit(lambda rngs: lora.init_adapters(config, rngs, **options))(rngs)


def rows(config, num_rows):
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(num_rows, T))
    return jnp.asarray(tokens, jnp.int32)


def logits_of(config, params, tokens, adapters=None):
    run = jax.jit(forward, static_argnums=0)
    return np.asarray(run(config, params, tokens, adapters=adapters))


def test_a_new_adapter_is_exactly_the_base_model(tiny):
    config, params = tiny
    rngs = jax.random.split(jax.random.key(3), 3)
    new = init(config, rngs, rank=4, alpha=8.0, targets=TARGETS)
    tokens = rows(config, 6)
    base = logits_of(config, params, tokens)
    np.testing.assert_array_equal(logits_of(config, params, tokens, new), base)
    assert np.abs(logits_of(config, params, tokens, random_adapters(config, 3)) - base).max() > 0.1


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), TARGETS], ids=["qv", "all"])
def test_merged_params_give_the_logits_of_base_and_adapter(tiny, targets):
    config, params = tiny
    adapters = random_adapters(config, 3, targets=targets)
    tokens = rows(config, 2)
    for i in range(3):
        beside = logits_of(config, params, tokens, lora.take(adapters, slice(i, i + 1)))
        merged = logits_of(config, jax.jit(lora.merge)(params, adapters, i), tokens)
        np.testing.assert_allclose(merged, beside, rtol=0, atol=1e-5 * np.abs(beside).max())


def test_merge_changes_only_the_targets_and_not_its_argument(tiny):
    config, params = tiny
    before = jax.tree.map(np.array, params)
    merged = jax.jit(lora.merge)(
        params, random_adapters(config, 1, targets=("k_proj", "down_proj"))
    )
    jax.tree.map(np.testing.assert_array_equal, params, before)
    same = jax.tree.map(np.array_equal, merged, before)
    for i in range(config.num_layers):
        layer = same[f"layers_{i}"]
        assert not layer["attn"].pop("k_proj")["kernel"]
        assert not layer["mlp"].pop("down_proj")["kernel"]
    assert all(jax.tree.leaves(same))


def test_each_row_gets_the_adapter_of_its_group(tiny):
    config, params = tiny
    adapters = random_adapters(config, 3)
    tokens = rows(config, 6)
    together = logits_of(config, params, tokens, adapters)
    for i in range(3):
        group = slice(2 * i, 2 * i + 2)
        alone = logits_of(config, params, tokens[group], lora.take(adapters, slice(i, i + 1)))
        np.testing.assert_allclose(together[group], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_init_depends_on_the_own_key_alone(tiny):
    config, _ = tiny
    options = {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "down_proj")}
    rngs = jax.random.split(jax.random.key(5), 4)
    population = jax.tree.map(np.asarray, init(config, rngs, **options))
    reversed_ = jax.tree.map(np.asarray, init(config, rngs[::-1], **options))
    for i in range(4):
        alone = lora.init_adapter(config, rngs[i], **options)
        one = lora.take(population, slice(i, i + 1))
        jax.tree.map(np.testing.assert_array_equal, one, alone)
        jax.tree.map(np.testing.assert_array_equal, lora.take(reversed_, slice(3 - i, 4 - i)), one)
    # The layers, the targets and the keys all differ, within PEFT's bound.
    a = np.asarray(population.weights["attn"]["q_proj"]["a"])
    assert len(np.unique(a)) > 0.99 * a.size
    bound = config.embed_dim**-0.5
    assert 0.95 * bound < np.abs(a).max() <= bound
    assert abs(a.mean()) < 0.05 * bound


def test_a_target_starts_alike_whatever_else_comes_after_it(tiny):
    config, _ = tiny
    options = {"rank": 2, "alpha": 2.0}
    key = jax.random.key(0)
    one = lora.init_adapter(config, key, targets=("q_proj",), **options)
    two = lora.init_adapter(config, key, targets=("v_proj", "q_proj"), **options)
    np.testing.assert_array_equal(
        one.weights["attn"]["q_proj"]["a"], two.weights["attn"]["q_proj"]["a"]
    )


def test_shapes_and_dtypes(tiny):
    config, _ = tiny
    rngs = jax.random.split(jax.random.key(0), 3)
    adapters = init(config, rngs, rank=4, alpha=8.0, targets=("v_proj", "up_proj"))
    shapes = jax.tree.map(lambda x: x.shape, adapters)
    D, F, KH, L = 32, 48, 16, 2
    assert shapes.weights == {
        "attn": {"v_proj": {"a": (3, L, 4, D), "b": (3, L, 4, KH)}},
        "mlp": {"up_proj": {"a": (3, L, 4, D), "b": (3, L, 4, F)}},
    }
    assert shapes.scale == (3,)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
    assert lora.count(adapters) == L * 4 * (D + KH + D + F)
    for target in (adapters.weights["attn"]["v_proj"], adapters.weights["mlp"]["up_proj"]):
        assert 0.9 * D**-0.5 < jnp.abs(target["a"]).max() <= D**-0.5  # by what goes in
        assert not target["b"].any()


def test_stack_and_take_are_inverse(tiny):
    config, _ = tiny
    two, three = random_adapters(config, 2, seed=1), random_adapters(config, 3, seed=2)
    five = lora.stack([two, three])
    jax.tree.map(np.testing.assert_array_equal, lora.take(five, slice(2, 5)), three)
    shuffled = lora.take(five, np.array([4, 0]))
    jax.tree.map(np.testing.assert_array_equal, lora.take(shuffled, 1), lora.take(two, 0))
    assert lora.count(five) == lora.count(two)


@pytest.mark.parametrize("targets", [(), ("q_proj", "lm_head"), ("attn",)])
def test_wrong_targets_are_refused(tiny, targets):
    with pytest.raises(ValueError, match="LoRA targets must be some of q_proj"):
        lora.target_shapes(tiny[0], targets)


def test_alpha_over_rank_scales_the_change(tiny):
    config, params = tiny
    rng = jax.random.key(0)
    half = lora.init_adapter(config, rng, rank=4, alpha=2.0, targets=("q_proj",))
    double = lora.init_adapter(config, rng, rank=4, alpha=8.0, targets=("q_proj",))
    assert (float(half.scale[0]), float(double.scale[0])) == (0.5, 2.0)
    trained = jax.tree.map(lambda x: x + 0.1, half.weights)
    kernel = params["layers_1"]["attn"]["q_proj"]["kernel"]
    small, large = (
        lora.merge(params, x._replace(weights=trained))["layers_1"]["attn"]["q_proj"]["kernel"]
        - kernel
        for x in (half, double)
    )
    np.testing.assert_allclose(large, 4.0 * small, rtol=1e-3, atol=1e-6)


def test_over_a_bfloat16_base_the_adapter_stays_float32(tiny):
    config, params = tiny
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapters = random_adapters(config, 1, targets=("q_proj", "v_proj"))
    merged = jax.jit(lora.merge)(half, adapters)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    tokens = rows(config, 2)
    logits = logits_of(config, half, tokens, adapters)
    assert logits.dtype == np.float32
    exact = logits_of(config, params, tokens, adapters)
    base = logits_of(config, params, tokens)
    assert np.linalg.norm(logits - exact) < 0.1 * np.linalg.norm(exact - base)
