"""The policy update against a slow loop, and which self-edits ReST-EM keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seal_jax import keys, lora
from seal_jax.models.transformer import forward
from seal_jax.objectives import rest_em
from seal_jax.optim import make_optimizer
from seal_jax.policy import init_train_state, make_policy_update
from seal_jax.types import Rollout

B, T, SEED = 7, 16, 3
LORA = {"rank": 3, "alpha": 6.0, "targets": ("q_proj", "v_proj", "down_proj")}
SETTINGS = {"learning_rate": 0.05, "num_epochs": 2, "batch_size": 3}
ADVANTAGES = np.array([1, 0, 2, 1, 0, 1, 0.5], np.float32)
# Smooth in the gradient, unlike Adam with its usual eps, which turns a gradient's noise into steps.
OPTIMIZER = {"optax_name": "adamw", "optax_kwargs": {"eps": 1e-2, "weight_decay": 0.01}}


@pytest.fixture(scope="module")
def rollout():
    rng = np.random.default_rng(1)
    start, end = rng.integers(1, T // 2, size=B), rng.integers(T // 2 + 1, T + 1, size=B)
    at = np.arange(T)[None]
    loss_mask = (at >= start[:, None]) & (at < end[:, None])
    logp = np.where(loss_mask, -rng.random((B, T)), 0).astype(np.float32)
    return Rollout(rng.integers(64, size=(B, T)).astype(np.int32), logp, loss_mask)


def one_device():
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh((1, 1, 1), axes, (jax.sharding.AxisType.Auto,) * 3)


@functools.cache
def make_update(config, kind, microbatch_size):
    return make_policy_update(
        config,
        rest_em(),
        make_optimizer(**OPTIMIZER),
        mesh=one_device(),
        seed=SEED,
        update=kind,
        microbatch_size=microbatch_size,
        **SETTINGS,
        **LORA,
    )


def update(tiny, rollout, advantages, kind, steps=1, microbatch_size=2):
    """Return the state after `steps` policy updates on the same rollout."""
    config, params = tiny
    optimizer = make_optimizer(**OPTIMIZER)
    state = init_train_state(config, params, optimizer, mesh=one_device(), update=kind, **LORA)
    for _ in range(steps):
        state, metrics = make_update(config, kind, microbatch_size)(state, rollout, advantages)
    return state, metrics


def slow_update(tiny, rollout, advantages, kind, steps):
    """Do the same row by row: full logits, log-softmax, and an adapter as changed kernels."""
    config, params = tiny
    tx_state, params = None, jax.tree.map(jnp.asarray, params)
    scale = LORA["alpha"] / LORA["rank"]

    def with_adapter(params, weights):
        params = jax.tree.map(lambda x: x, params)
        for block, targets in weights.items():
            for target, ab in targets.items():
                for layer in range(config.num_layers):
                    kernel = params[f"layers_{layer}"][block][target]
                    delta = scale * ab["a"][layer] @ ab["b"][layer]
                    kernel["kernel"] = kernel["kernel"] + delta
        return params

    def loss(trained, params, row, advantage):
        used = trained if kind == "full" else with_adapter(params, trained)
        tokens = row.tokens[None]
        logits = forward(config, used, tokens)[0]
        logp = jax.nn.log_softmax(logits[:-1])[jnp.arange(T - 1), row.tokens[1:]]
        return -advantage * (logp * row.loss_mask[1:]).sum()

    grad = jax.jit(jax.grad(loss))
    for step in range(steps):
        if kind == "full":
            trained = params
        else:
            key = keys.fold_one(SEED, keys.POLICY, step)
            trained = lora.take(lora.init_adapter(config, key, **LORA), 0).weights
            tx_state = None
        rng = np.random.default_rng([SEED, keys.POLICY, step])
        batches = []
        for _ in range(SETTINGS["num_epochs"]):
            order = rng.permutation(np.flatnonzero(advantages))
            batches += [order[i : i + 3] for i in range(0, len(order), 3)]
        for i, rows in enumerate(batches):
            rate = SETTINGS["learning_rate"] * (1 - i / len(batches))
            tx = optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(rate, **OPTIMIZER["optax_kwargs"])
            )
            tx_state = tx.init(trained) if tx_state is None else tx_state
            grads = [
                grad(trained, params, Rollout(*(x[b] for x in rollout)), advantages[b])
                for b in rows
            ]
            total = jax.tree.map(lambda *g: sum(g), *grads)
            mean = optax.tree.scale(1 / rollout.loss_mask[rows].sum(), total)
            updates, tx_state = tx.update(mean, tx_state, trained)
            trained = optax.apply_updates(trained, updates)
        params = trained if kind == "full" else with_adapter(params, trained)
    return params, trained


def assert_close(found, expected, tolerance):
    """Compare two pytrees, each leaf relative to its largest value."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def one(x, y):
        y = np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())

    jax.tree.map(one, found, expected)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_updates_are_the_slow_loops(tiny, rollout, kind):
    before = jax.tree.map(np.array, tiny[1])
    state, metrics = update(tiny, rollout, ADVANTAGES, kind, steps=2)
    params, trained = slow_update(tiny, rollout, ADVANTAGES, kind, steps=2)
    assert_close(state.params, params, 1e-5)
    assert int(state.step) == 2
    assert metrics["policy/num_rows"] == 5 and metrics["policy/num_batches"] == 4
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), state.params, before)
    assert moved["layers_1"]["mlp"]["down_proj"]["kernel"] > 1e-3
    assert (moved["embed"]["embedding"] > 0) == (kind == "full")
    if kind == "lora":
        assert_close(lora.take(state.adapters, 0).weights, trained, 1e-4)
    else:
        assert state.adapters is None
    # The caller's params are its own.
    jax.tree.map(np.testing.assert_array_equal, tiny[1], before)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("lora", 3), *(pytest.param(kind, 1, marks=pytest.mark.long) for kind in ("lora", "full"))],
)
def test_the_microbatch_size_changes_nothing(tiny, rollout, kind, size):
    expected, expected_metrics = update(tiny, rollout, ADVANTAGES, kind)
    state, metrics = update(tiny, rollout, ADVANTAGES, kind, microbatch_size=size)
    assert_close(state.params, expected.params, 1e-6)
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)


def test_rows_without_an_advantage_do_not_matter(tiny, rollout):
    state, _ = update(tiny, rollout, ADVANTAGES, "lora")
    out = (ADVANTAGES == 0)[:, None]
    other = Rollout(
        np.where(out, 1, rollout.tokens).astype(np.int32),
        np.where(out, -9, rollout.logp).astype(np.float32),
        rollout.loss_mask | out,
    )
    again, _ = update(tiny, other, ADVANTAGES, "lora")
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_no_advantage_at_all_leaves_the_policy_as_it_is(tiny, rollout, kind):
    state, metrics = update(tiny, rollout, np.zeros(B, np.float32), kind)
    jax.tree.map(np.testing.assert_array_equal, state.params, tiny[1])
    assert metrics == {"policy/num_batches": 0, "policy/num_rows": 0}
    assert int(state.step) == 1


def test_a_loss_that_is_not_finite_stops_the_run(tiny, rollout):
    broken = tiny[0], jax.tree.map(lambda x: x * np.nan, tiny[1])
    with pytest.raises(FloatingPointError, match="outer step 0, batch 0.*outer.learning_rate"):
        update(broken, rollout, ADVANTAGES, "lora")


REWARDS = np.array([[0.1, 0.9, 0.5], [0.4, 0.4, 0.2], [0.0, 0.7, 0.8]], np.float32)
VALID = np.array([[True, False, True], [True, True, True], [False, False, False]])


@pytest.mark.parametrize(
    ("select", "threshold", "valid", "kept"),
    [
        ("best", 0.0, VALID, [[0, 0, 1], [1, 0, 0], [0, 0, 0]]),
        ("best", 0.0, np.ones_like(VALID), [[0, 1, 0], [1, 0, 0], [0, 0, 1]]),
        ("threshold", 0.3, VALID, [[0, 0, 1], [1, 1, 0], [0, 0, 0]]),
        ("threshold", 0.4, np.ones_like(VALID), [[0, 1, 1], [0, 0, 0], [0, 1, 1]]),
        ("threshold", 0.9, VALID, np.zeros((3, 3))),
        ("best", 0.0, np.zeros_like(VALID), np.zeros((3, 3))),
        ("random", 0.0, np.zeros_like(VALID), np.zeros((3, 3))),
    ],
)
def test_rest_em_keeps(select, threshold, valid, kept):
    objective = rest_em(select, threshold)
    advantages = objective.advantages(REWARDS, valid, np.random.default_rng(0))
    assert advantages.dtype == np.float32
    np.testing.assert_array_equal(advantages, kept)
    assert objective.needs_rewards == (select != "random")


def test_random_keeps_one_valid_self_edit_of_each_problem_whatever_its_reward():
    objective, counts = rest_em("random"), np.zeros((3, 3))
    for seed in range(300):
        rng = np.random.default_rng(seed)
        kept = objective.advantages(REWARDS, VALID, rng)
        same = objective.advantages(-REWARDS, VALID, np.random.default_rng(seed))
        np.testing.assert_array_equal(kept, same)
        np.testing.assert_array_equal(kept.sum(axis=1), [1, 1, 0])
        counts += kept
    assert not counts[~VALID].any()
    np.testing.assert_allclose(counts[0, [0, 2]] / 300, 1 / 2, atol=0.1)
    np.testing.assert_allclose(counts[1] / 300, 1 / 3, atol=0.1)


def test_rest_em_is_a_masked_negative_log_likelihood():
    logp = jnp.asarray([[-1.0, -2.0], [-3.0, -4.0]])
    loss = rest_em().loss(logp, jnp.zeros((2, 2)), jnp.asarray([[1.0], [0.0]]))
    np.testing.assert_array_equal(loss, [[1, 2], [0, 0]])


def test_an_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="select='worst': expected 'best', 'threshold' or"):
        rest_em("worst")
