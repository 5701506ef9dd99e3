"""Objectives: advantages and losses against their formulas, and rewards that tell nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.config import default_config, validate
from seal_jax.objectives import OBJECTIVES, make_objective
from seal_jax.objectives.objective import (
    AVERAGES,
    Gae,
    Past,
    Rewards,
    Tokens,
    kl_coefficient,
    kl_penalty,
    token_advantages,
)
from seal_jax.objectives.reinforce import running_mean

NAN = np.nan
REWARDS = np.array([[0.1, 0.9, 0.5], [0.4, 0.4, 0.2], [0.0, 0.7, 0.8]], np.float32)
KEEPABLE = np.array([[True, False, True], [True, True, True], [False, False, False]])
ALL, NONE = np.ones_like(KEEPABLE), np.zeros_like(KEEPABLE)


def advantages_of(name, rewards, keepable=ALL, past=Past(), seed=0, **options):  # noqa: B008
    rewards = Rewards(np.asarray(rewards, np.float32), np.asarray(keepable))
    rng = np.random.default_rng(seed)
    found = make_objective(name, **options).advantages(rewards, past, rng)
    assert found.dtype == np.float32 and found.shape == rewards.values.shape
    return found


@pytest.mark.parametrize(
    ("options", "keepable", "kept"),
    [
        ({}, KEEPABLE, [[0, 0, 1], [1, 0, 0], [0, 0, 0]]),
        ({}, ALL, [[0, 1, 0], [1, 0, 0], [0, 0, 1]]),
        ({"k": 2}, KEEPABLE, [[1, 0, 1], [1, 1, 0], [0, 0, 0]]),
        ({"select": "threshold", "threshold": 0.3}, KEEPABLE, [[0, 0, 1], [1, 1, 0], [0, 0, 0]]),
        ({"select": "threshold", "threshold": 0.4}, ALL, [[0, 1, 1], [0, 0, 0], [0, 1, 1]]),
        ({"select": "threshold", "threshold": 0.9}, KEEPABLE, NONE),
        ({"select": "fraction", "fraction": 1 / 3}, ALL, [[0, 1, 0], [0, 0, 0], [0, 1, 1]]),
        ({"select": "fraction", "fraction": 0.01}, KEEPABLE, [[0, 0, 1], [0, 0, 0], [0, 0, 0]]),
        ({}, NONE, NONE),
    ],
)
def test_rest_em_keeps(options, keepable, kept):
    found = advantages_of("rest_em", REWARDS, keepable, **options)
    np.testing.assert_array_equal(found, np.where(kept, 1, NAN))


def test_rest_em_never_keeps_what_nobody_could_grade():
    rewards = np.array([[NAN, 0.1], [NAN, NAN]])
    for options in ({}, {"select": "threshold", "threshold": -9}, {"select": "fraction"}):
        found = advantages_of("rest_em", rewards, ALL[:2, :2], **options)
        np.testing.assert_array_equal(found, [[NAN, 1], [NAN, NAN]])


def test_random_em_keeps_one_self_edit_of_each_problem_whatever_its_reward():
    counts = np.zeros((3, 3))
    for seed in range(300):
        kept = advantages_of("random_em", REWARDS, KEEPABLE, seed=seed)
        same = advantages_of("random_em", NAN * REWARDS, KEEPABLE, seed=seed)
        np.testing.assert_array_equal(kept, same)
        np.testing.assert_array_equal(np.nansum(kept, axis=1), [1, 1, 0])
        counts += np.nan_to_num(kept)
    assert not counts[~KEEPABLE].any()
    np.testing.assert_allclose(counts[0, [0, 2]] / 300, 1 / 2, atol=0.1)
    np.testing.assert_allclose(counts[1] / 300, 1 / 3, atol=0.1)
    assert not make_objective("random_em").needs_rewards


def test_reinforce_subtracts_its_baseline():
    mean = REWARDS.mean()
    np.testing.assert_allclose(advantages_of("reinforce", REWARDS), REWARDS - mean, atol=1e-6)
    past = Past(mean_rewards=(1.0, 0.0))
    found = advantages_of("reinforce", REWARDS, past=past, baseline="running", decay=0.5)
    np.testing.assert_allclose(found, REWARDS - 1 / 3, atol=1e-6)  # (0.5 * 1 + 1 * 0) / 1.5
    found = advantages_of("reinforce", REWARDS, baseline="running")  # the first step
    np.testing.assert_allclose(found, REWARDS - mean, atol=1e-6)
    np.testing.assert_array_equal(advantages_of("reinforce", REWARDS, baseline="none"), REWARDS)
    # What nobody could grade is left out of the mean, too.
    np.testing.assert_array_equal(
        advantages_of("reinforce", [[1, NAN, 3]], ALL[:1]), [[-1, NAN, 1]]
    )


def test_rloo_compares_with_the_others_of_the_problem():
    rewards = [[1.0, 0.0, 0.5], [NAN, 0.2, 0.6], [NAN, NAN, 0.9]]
    expected = [[0.75, -0.75, 0.0], [NAN, -0.4, 0.4], [NAN, NAN, 0.0]]
    np.testing.assert_allclose(advantages_of("rloo", rewards), expected, atol=1e-6)


def test_grpo_is_relative_to_its_group():
    rewards = [[1.0, 0.0, 0.5], [NAN, 0.2, 0.6], [0.3, 0.3, 0.3]]
    std = np.sqrt(1 / 6)
    expected = [[0.5 / std, -0.5 / std, 0.0], [NAN, -1.0, 1.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(advantages_of("grpo", rewards), expected, atol=1e-5)
    expected = [[0.5, -0.5, 0.0], [NAN, -0.2, 0.2], [0.0, 0.0, 0.0]]
    found = advantages_of("grpo", rewards, normalize_std=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ppo_gives_rewards_to_its_value_head():
    np.testing.assert_array_equal(advantages_of("ppo", REWARDS), REWARDS)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
@given(rewards=st.lists(st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3), min_size=1))
def test_a_groups_advantages_sum_to_nothing_and_ignore_a_shift(name, rewards):
    rewards = np.array(rewards, np.float32)
    found = advantages_of(name, rewards, np.ones_like(rewards, bool))
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-3)
    if name == "rloo":
        shifted = advantages_of(name, rewards + 1, np.ones_like(rewards, bool))
        np.testing.assert_allclose(shifted, found, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rewards_that_tell_nothing_give_no_advantage_and_no_nan(name):
    for value in (0.0, 0.3, -100.0):
        found = advantages_of(name, np.full((2, 3), value), ALL[:2])
        if name in ("reinforce", "rloo", "grpo"):
            np.testing.assert_allclose(found, 0, atol=1e-6)
        assert not np.isinf(found).any()
    missing = advantages_of(name, np.full((2, 3), NAN), ALL[:2])
    if name != "random_em":
        assert np.isnan(missing).all()  # dropped, not zero
    one = advantages_of(name, [[0.7]], [[True]])  # a group of one
    assert np.isfinite(one).all()
    if name in ("rloo", "grpo"):
        assert one == 0 and make_objective(name).min_edits == 2


def tokens(logp, old_logp=0.0, advantages=1.0, values=0.0, old_values=0.0, returns=0.0):
    arrays = np.broadcast_arrays(logp, old_logp, advantages, values, old_values, returns)
    return Tokens(*(jnp.asarray(x, jnp.float32) for x in arrays))


def test_imitation_is_a_negative_log_likelihood():
    for name in ("rest_em", "random_em"):
        np.testing.assert_array_equal(make_objective(name).loss(tokens([-1.0, -2.0])), [1, 2])


@pytest.mark.parametrize("name", ["reinforce", "rloo"])
def test_the_gradient_of_reinforce_is_the_advantage(name):
    loss = make_objective(name).loss
    grad = jax.grad(
        lambda logp: loss(tokens(0.0, advantages=[2.0, -3.0])._replace(logp=logp)).sum()
    )
    np.testing.assert_allclose(grad(jnp.asarray([-1.0, -2.0])), [-2, 3])


def test_the_ratio_is_clipped_on_the_side_that_would_gain():
    ratio = np.array([0.5, 0.9, 1.1, 1.25, 1.5])
    for options, low, high in (({}, 0.8, 1.2), ({"clip_high": 0.28}, 0.8, 1.28)):
        loss = make_objective("grpo", **options).loss
        found = loss(tokens(np.log(ratio), advantages=2.0))
        np.testing.assert_allclose(found, -2 * np.minimum(ratio, high), rtol=1e-6)
        found = loss(tokens(np.log(ratio), advantages=-2.0))
        np.testing.assert_allclose(found, 2 * np.maximum(ratio, low), rtol=1e-6)
    flat = jax.grad(lambda logp: loss(tokens(0.0)._replace(logp=logp)).sum())
    np.testing.assert_array_equal(flat(jnp.log(jnp.asarray([1.1, 1.5])) + 0)[1], 0)


def test_ppo_clips_how_far_a_value_moves():
    loss = make_objective("ppo", value_coef=1.0, value_clip=0.2).loss
    found = loss(tokens(0.0, advantages=0.0, values=[0.1, 0.9], old_values=0.0, returns=1.0))
    np.testing.assert_allclose(found, [0.5 * 0.9**2, 0.5 * 0.8**2], rtol=1e-6)  # 0.9 counts as 0.2


def slow_gae(gae, reward, values):
    """Return advantages of one self-edit by the sum that defines them."""
    n = len(values)
    rewards = [0.0] * (n - 1) + [reward]
    nexts = [*values[1:], 0.0]
    deltas = [r + gae.discount * v1 - v0 for r, v1, v0 in zip(rewards, nexts, values, strict=True)]
    factor = gae.discount * gae.decay
    return [sum(factor ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gae", [Gae(1.0, 0.95, False), Gae(0.9, 0.5, False), Gae(1.0, 1.0, False)])
def test_token_advantages_are_the_defining_sum(gae):
    rng = np.random.default_rng(0)
    start, end = np.array([1, 3, 0, 7]), np.array([4, 8, 8, 8])
    at = np.arange(8)[None]
    mask = (at >= start[:, None]) & (at < end[:, None])
    values, rewards = rng.normal(size=(4, 8)).astype(np.float32), rng.normal(size=4)
    advantages, returns = token_advantages(gae, rewards, values, mask)
    for b in range(4):
        expected = slow_gae(gae, rewards[b], values[b][mask[b]].tolist())
        np.testing.assert_allclose(advantages[b][mask[b]], expected, atol=1e-5)
    np.testing.assert_allclose(returns[mask], (advantages + values)[mask], atol=1e-6)
    assert not advantages[~mask].any() and not returns[~mask].any()
    normal, same = token_advantages(gae._replace(normalize=True), rewards, values, mask)
    np.testing.assert_allclose([normal[mask].mean(), normal[mask].std()], [0, 1], atol=1e-5)
    np.testing.assert_array_equal(same, returns)


def test_averages_weigh_rows():
    lengths = np.array([1, 4])
    np.testing.assert_allclose(AVERAGES["token"](lengths, 8), [1 / 5, 1 / 5])
    np.testing.assert_allclose(AVERAGES["sequence"](lengths, 8), [1 / 2, 1 / 8])
    np.testing.assert_allclose(AVERAGES["constant"](lengths, 8), [1 / 16, 1 / 16])


def test_the_kl_penalty_is_never_negative_and_unbiased():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    each = kl_penalty(jnp.log(p), jnp.log(q))
    assert (each >= 0).all()
    np.testing.assert_allclose((p * each).sum(), (p * np.log(p / q)).sum(), rtol=1e-5)


def test_the_kl_coefficient_rises_above_the_target_and_falls_below():
    assert kl_coefficient(0.2, 0.0, [5.0, 5.0]) == 0.2
    assert kl_coefficient(0.2, 1.0, []) == 0.2
    assert kl_coefficient(0.2, 1.0, [9.0, 1.0]) == pytest.approx(0.2 * 1.02)
    assert kl_coefficient(0.2, 1.0, [0.0, 0.9]) == pytest.approx(0.2 * 0.98 * 0.99)


def test_a_running_mean_forgets():
    assert running_mean([3.0], 0.9) == 3.0
    assert running_mean([3.0, 1.0], 0.0) == 1.0


def test_the_config_knows_the_objectives():
    config = default_config()
    for name in OBJECTIVES:
        config.outer.objective = name
        validate(config)
    config.outer.objective = "grop"
    with pytest.raises(ValueError, match=f"one of {', '.join(map(repr, OBJECTIVES))}$"):
        validate(config)


def test_an_objective_is_a_function_wherever_it_is_asked_for():
    import seal_jax.objectives.rloo
    from seal_jax.objectives import grpo, rloo

    assert grpo().min_edits == rloo().min_edits == seal_jax.objectives.rloo().min_edits == 2
    assert seal_jax.rloo is rloo and seal_jax.objectives.Gae is Gae
    assert set(OBJECTIVES) == {"grpo", "ppo", "random_em", "reinforce", "rest_em", "rloo"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grop", {}, "objective 'grop': expected one of grpo, ppo, random_em"),
        ("grpo", {"clp": 0.1}, "grpo has no option 'clp'; did you mean 'clip'"),
        ("grpo", {"clip": 0.0}, "clip=0.0"),
        ("grpo", {"clip": "wide"}, "grpo: .*wide"),
        ("grpo", {"average": "rows"}, "average='rows': expected one of token, sequence, constant"),
        ("rest_em", {"select": "worst"}, "select='worst': expected 'best', 'threshold' or"),
        ("rest_em", {"k": 0}, "k=0"),
        ("random_em", {"k": 0}, "k=0"),
        ("reinforce", {"baseline": "mean"}, "baseline='mean': expected 'batch', 'running'"),
        ("reinforce", {"decay": 1.0}, "decay=1.0"),
        ("ppo", {"value_clip": 0.0}, "value_clip=0.0"),
        ("ppo", {"discount": 0.0}, "discount=0.0"),
        ("ppo", {"gae_decay": 2.0}, "gae_decay=2.0"),
    ],
)
def test_an_unknown_objective_or_option_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(name, **options)
