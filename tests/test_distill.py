"""A teacher's distributions as what the inner loop learns from, against dense computations."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.inner.packing import Layout, pack
from seal_jax.inner.texts import Job, text_of
from seal_jax.models.config import ModelConfig
from seal_jax.models.divergence import DIVERGENCES, likeliest, token_costs
from seal_jax.models.logits import unembed
from seal_jax.types import Teacher

M, D, V = 11, 8, 13
CONFIG = ModelConfig(
    vocab_size=260,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    max_length=64,
)
LAYOUT = Layout((32, 64), chunk=8)


class Head(NamedTuple):
    config: ModelConfig
    params: dict
    hidden: jax.Array
    teacher_hidden: jax.Array
    targets: jax.Array
    wanted: jax.Array


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, vocab_size=V, embed_dim=D, tie_embeddings=True)
    states = jnp.asarray(rng.normal(size=(2, M, D)), jnp.float32)
    params = {"embed": {"embedding": jnp.asarray(rng.normal(size=(V, D)), jnp.float32)}}
    wanted = jnp.asarray(rng.random(M) < 0.7)
    return Head(config, params, *states, jnp.asarray(rng.integers(0, V, M)), wanted)


def dense(head, teacher_logits, params, hidden, top, divergence):
    """Return the divergence over K + 1 outcomes from whole distributions, as the formula has it."""
    p = jax.nn.softmax(teacher_logits)
    q = jax.nn.softmax(unembed(head.config, params, hidden))
    chosen = jnp.argsort(-p, axis=-1)[:, :top]
    p_k, q_k = (jnp.take_along_axis(x, chosen, axis=-1) for x in (p, q))
    if top < V:
        p_k, q_k = (jnp.append(x, 1 - x.sum(-1, keepdims=True), axis=-1) for x in (p_k, q_k))
    if divergence == "reverse":
        p_k, q_k = q_k, p_k
    return jnp.where(head.wanted, (p_k * jnp.log(p_k / q_k)).sum(-1), 0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("top", "tile"), [(3, 4), (V, 1024)])
def test_costs_and_gradients_are_those_of_whole_distributions(head, top, tile, divergence):
    every = jnp.ones(M, bool)
    teacher = likeliest(head.config, head.params, head.teacher_hidden, every, top)
    logits = unembed(head.config, head.params, head.teacher_hidden)
    shares = jnp.exp(teacher.logp).sum(axis=-1)
    np.testing.assert_allclose(shares, 1, rtol=1e-5)
    factors = jnp.linspace(-1.0, 2.0, M)  # other gradients for each token

    def fast(params, hidden):
        given = head.targets, teacher, head.wanted, divergence
        costs = token_costs(head.config, params, hidden, *given, tile=tile)
        return (factors * costs).sum(), costs

    def slow(params, hidden):
        costs = dense(head, logits, params, hidden, top, divergence)
        return (factors * costs).sum(), costs

    found, expected = (
        jax.grad(f, argnums=(0, 1), has_aux=True)(head.params, head.hidden) for f in (fast, slow)
    )
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert (found[1] >= -1e-6).all() and found[1].max() > 0.1
    for one, other in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_the_teacher_costs_nothing_and_a_text_without_one_its_likelihood(
    head, divergence
):
    teacher = likeliest(head.config, head.params, head.hidden, jnp.ones(M, bool), 4)
    ids = teacher.ids.at[::2].set(-1)
    mixed = Teacher(ids, teacher.logp.at[::2].set(0.0))
    every = jnp.ones(M, bool)
    given = head.config, head.params, head.hidden, head.targets, mixed, every, divergence
    costs = token_costs(*given)
    np.testing.assert_allclose(costs[1::2], 0, atol=1e-6)
    logp = jax.nn.log_softmax(unembed(head.config, head.params, head.hidden))
    chosen = jnp.take_along_axis(logp, head.targets[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(costs[::2], -chosen[::2], rtol=1e-5)


def test_the_likeliest_tokens_do_not_depend_on_tiles(head):
    whole = likeliest(
        head.config, head.params, jnp.tile(head.hidden, (100, 1)), jnp.ones(1100) > 0, 3
    )
    logp = jax.nn.log_softmax(unembed(head.config, head.params, head.hidden))
    values, ids = jax.lax.top_k(logp, 3)
    np.testing.assert_array_equal(whole.ids, np.tile(ids, (100, 1)))
    np.testing.assert_allclose(whole.logp[:, :3], np.tile(values, (100, 1)), rtol=1e-5, atol=1e-6)
    rest = np.log1p(-np.exp(values).sum(-1))
    np.testing.assert_allclose(whole.logp[:, 3], np.tile(rest, 100), rtol=1e-4)


def test_what_does_not_fit_is_refused(head):
    teacher = Teacher(jnp.zeros((M, V + 1), jnp.int32), jnp.zeros((M, V + 2)))
    given = head.config, head.params, head.hidden, head.targets
    with pytest.raises(ValueError, match="a teacher of 14 tokens: expected at most the model's 13"):
        token_costs(*given, teacher, head.wanted, "forward")
    with pytest.raises(ValueError, match="divergence='both': expected one of forward, reverse"):
        token_costs(*given, teacher, head.wanted, "both")
    texts = [
        text_of([1, 2])._replace(teacher=Teacher(np.zeros((2, k), np.int32), np.zeros((2, k + 1))))
        for k in (2, 3)
    ]
    with pytest.raises(ValueError, match="teachers of 2, 3 tokens: expected one number for all"):
        pack([Job(((text,),), 0.1) for text in texts], layout=LAYOUT)
