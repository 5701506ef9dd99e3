"""The policy update against a slow loop, and what every objective's update has in common."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seal_jax import keys
from seal_jax.models import lora
from seal_jax.models.transformer import forward
from seal_jax.objectives import make_objective
from seal_jax.objectives.objective import Past
from seal_jax.optim import find_factory, make_optimizer
from seal_jax.outer.policy_step import init_train_state, rollout_logp
from seal_jax.outer.policy_update import make_policy_update
from seal_jax.types import Rollout

B, T, SEED = 7, 16, 3
LORA = {"rank": 3, "alpha": 6.0, "targets": ("q_proj", "v_proj", "down_proj")}
SETTINGS = {"learning_rate": 0.05, "num_epochs": 2, "batch_size": 3}
ADVANTAGES = np.array([1, 0, 2, 1, 0, 1, 0.5], np.float32)
# Smooth in the gradient, unlike Adam with its usual eps, which turns a gradient's noise into steps.
OPTIMIZER = {"optax_name": "adamw", "optax_kwargs": {"eps": 1e-2, "weight_decay": 0.01}}
# Another point to evaluate; the loss; the loss at other points.
AVERAGED = {"optax_name": "contrib.schedule_free_sgd", "optax_kwargs": {"b1": 0.7}}
BY_LOSS = {"optax_name": "contrib.momo", "optax_kwargs": {"lower_bound": -10.0}}
BY_SEARCH = {"optax_name": "lbfgs", "optax_kwargs": {"memory_size": 3}}
OPTIMIZERS = {
    "adamw": OPTIMIZER,
    "averaged": AVERAGED,
    "by loss": BY_LOSS,
    "by search": BY_SEARCH,
}


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
def make_update(config, kind, microbatch_size, name="rloo", optimizer="adamw", **settings):
    return make_policy_update(
        config,
        make_objective(name),
        make_optimizer(**OPTIMIZERS[optimizer]),
        mesh=one_device(),
        seed=SEED,
        update=kind,
        microbatch_size=microbatch_size,
        **SETTINGS | settings,
        **LORA,
    )


def first_state(tiny, kind, value_head=False, optimizer="adamw"):
    config, params = tiny
    optimizer = make_optimizer(**OPTIMIZERS[optimizer])
    return init_train_state(
        config,
        params,
        optimizer,
        mesh=one_device(),
        learning_rate=0.1,
        update=kind,
        value_head=value_head,
        **LORA,
    )


def update(tiny, rollout, advantages, kind, steps=1, microbatch_size=2, optimizer="adamw"):
    """Return the state after `steps` policy updates on the same rollout: -advantage * log p."""
    state = first_state(tiny, kind, optimizer=optimizer)
    policy_update = make_update(tiny[0], kind, microbatch_size, optimizer=optimizer)
    for step in range(steps):
        rollout = rollout._replace(step=step)
        state, metrics = policy_update(state, rollout, advantages)
    return state, metrics


def slow_update(tiny, rollout, advantages, kind, steps, optimizer="adamw"):
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
                    delta = scale * ab["a"][layer].T @ ab["b"][layer]
                    kernel["kernel"] = kernel["kernel"] + delta
        return params

    def loss(trained, params, row, advantage):
        used = trained if kind == "full" else with_adapter(params, trained)
        tokens = row.tokens[None]
        logits = forward(config, used, tokens)[0]
        logp = jax.nn.log_softmax(logits[:-1])[jnp.arange(T - 1), row.tokens[1:]]
        return -advantage * (logp * row.loss_mask[1:]).sum()

    factory = find_factory(OPTIMIZERS[optimizer]["optax_name"])
    loss_and_grad = jax.jit(jax.value_and_grad(loss))
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
                optax.clip_by_global_norm(1.0),
                factory(rate, **OPTIMIZERS[optimizer]["optax_kwargs"]),
            )
            tx_state = tx.init(trained) if tx_state is None else tx_state
            found = [
                loss_and_grad(trained, params, Rollout(*(x[b] for x in rollout[:3])), advantages[b])
                for b in rows
            ]
            total = jax.tree.map(lambda *g: sum(g), *found)
            value, mean = optax.tree.scale(1 / rollout.loss_mask[rows].sum(), total)
            more = {"value": value} if optimizer == "by loss" else {}
            updates, tx_state = tx.update(mean, tx_state, trained, **more)
            trained = optax.apply_updates(trained, updates)
        evaluated = trained
        if optimizer == "averaged":
            evaluated = optax.contrib.schedule_free_eval_params(tx_state[1], trained)
        params = trained if kind == "full" else with_adapter(params, evaluated)
    return (evaluated if kind == "full" else params), evaluated


@pytest.mark.parametrize(
    "kind, optimizer", [("full", "averaged"), ("lora", "averaged"), ("lora", "by loss")]
)
def test_an_optimizer_that_asks_for_more(tiny, rollout, kind, optimizer):
    state, _ = update(tiny, rollout, ADVANTAGES, kind, steps=2, optimizer=optimizer)
    params, _ = slow_update(tiny, rollout, ADVANTAGES, kind, steps=2, optimizer=optimizer)
    assert_close(state.params, params, 1e-4)
    with pytest.raises(AssertionError):
        assert_close(state.params, tiny[1], 1e-4)


@pytest.mark.long
def test_a_line_search_lowers_the_loss_of_the_batch(tiny, rollout):
    _, metrics = update(tiny, rollout, ADVANTAGES, "lora", optimizer="by search")
    _, first = update(tiny, rollout, ADVANTAGES, "lora")
    assert metrics["policy/skipped"] == 0
    assert metrics["policy/loss_first"] == pytest.approx(first["policy/loss_first"])
    assert metrics["policy/loss_last"] < first["policy/loss_last"]


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
    assert metrics["policy/no_advantage"] == 1
    assert metrics["policy/num_batches"] == metrics["policy/num_rows"] == 0
    assert metrics["policy/skipped"] == 0
    assert int(state.step) == 1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_update_that_is_not_finite_is_taken_back_and_counted(tiny, rollout, kind, capsys):
    # The second batch breaks: what the first one trained is taken back, too.
    advantages = np.where(np.arange(B) == 4, np.inf, 1).astype(np.float32)
    state, metrics = update(tiny, rollout, advantages, kind)
    jax.tree.map(np.testing.assert_array_equal, state.params, tiny[1])
    before = first_state(tiny, kind)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)
    assert metrics["policy/skipped"] == 1 and "policy/loss_last" not in metrics
    assert int(state.step) == 1
    assert "update skipped: batch" in capsys.readouterr().out


def test_log_probabilities_at_the_start_are_the_samplers(tiny, rollout):
    logp = np.array(rollout_logp(tiny[0], tiny[1], None, rollout))
    _, metrics = update(tiny, rollout._replace(logp=logp), ADVANTAGES, "lora")
    assert metrics["outer/ratio_at_start"] == pytest.approx(1, abs=1e-4)
    logp[1, 8] += 0.5  # row 1 has no advantage: it is not looked at
    logp[2, 8] += 0.5 * rollout.loss_mask[2, 8]
    _, metrics = update(tiny, rollout._replace(logp=logp), ADVANTAGES, "lora")
    assert metrics["outer/ratio_at_start"] == pytest.approx(np.exp(0.5), rel=1e-4)


def test_a_rollout_of_another_policy_is_refused_unless_asked_for(tiny, rollout):
    state = first_state(tiny, "lora")
    stale = rollout._replace(step=3)
    with pytest.raises(ValueError, match="policy of outer step 3 wrote.*the policy of step 0"):
        make_update(tiny[0], "lora", 2)(state, stale, ADVANTAGES)
    allowed = make_update(tiny[0], "lora", 2, allow_stale=True)
    _, metrics = allowed(state, stale, ADVANTAGES)
    assert metrics["policy/num_batches"] == 4


def loss_by_hand(tiny, rollout, advantages, name, kl=0.0, entropy=0.0, reference=None):
    """Return the first batch's loss at the start, where every ratio is 1: from full logits."""
    config, params = tiny

    def log_softmax(params):
        logits = forward(config, params, rollout.tokens)[:, :-1]
        return jax.nn.log_softmax(logits), rollout.loss_mask[:, 1:]

    logp, mask = log_softmax(params)
    at = jnp.asarray(rollout.tokens)[:, 1:, None]
    chosen = jnp.take_along_axis(logp, at, axis=-1)[..., 0]
    used = ~np.isnan(advantages)
    loss = -np.nan_to_num(advantages)[:, None] * (chosen if name == "rloo" else 1.0)
    if kl:
        difference = jnp.take_along_axis(log_softmax(reference)[0], at, axis=-1)[..., 0] - chosen
        loss += kl * (jnp.exp(difference) - 1 - difference)
    loss += entropy * (jnp.exp(logp) * logp).sum(axis=-1)
    lengths = mask.sum(axis=1)
    weight = 1 / lengths[used].sum() if name == "rloo" else 1 / (lengths * used.sum())
    return float(((loss * mask).sum(axis=1) * weight)[used].sum())


@pytest.mark.parametrize("name", ["rloo", "grpo"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_kl_penalty_and_entropy_bonus_are_added_to_any_objective(tiny, rollout, name, kind):
    advantages = np.array([1, np.nan, 2, -1, 0, 1, 0.5], np.float32)
    reference = jax.tree.map(lambda x: 1.3 * x, tiny[1])
    settings = {"kl_coef": 0.3, "entropy_coef": 0.2, "batch_size": B, "num_epochs": 1}
    policy_update = make_update(tiny[0], kind, 2, name, **settings)
    state = first_state(tiny, kind)
    _, metrics = policy_update(state, rollout, advantages, reference=reference)
    expected = loss_by_hand(tiny, rollout, advantages, name, 0.3, 0.2, reference)
    assert metrics["policy/loss_first"] == pytest.approx(expected, rel=1e-5)
    assert metrics["policy/num_rows"] == 6  # the row without an advantage has a penalty
    assert metrics["policy/kl_coef"] == 0.3 and metrics["policy/kl"] > 0


def test_the_kl_coefficient_follows_its_target(tiny, rollout):
    settings = {"kl_coef": 0.3, "kl_target": 0.1, "batch_size": B, "num_epochs": 1}
    policy_update = make_update(tiny[0], "lora", 2, **settings)
    past = Past(kls=(10.0, 0.0, 0.11))
    _, metrics = policy_update(
        first_state(tiny, "lora"), rollout, ADVANTAGES, past=past, reference=tiny[1]
    )
    assert metrics["policy/kl_coef"] == pytest.approx(0.3 * 1.02 * 0.98 * 1.01)
    assert metrics["policy/kl"] == 0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_ppo_trains_a_value_head_that_learns_what_to_expect(tiny, rollout, kind):
    rewards = np.full(B, 0.7, np.float32)
    settings = {"num_epochs": 8, "batch_size": B, "schedule": "constant", "learning_rate": 0.02}
    policy_update = make_update(tiny[0], kind, 2, "ppo", **settings)
    state = first_state(tiny, kind, value_head=True)
    assert not any(x.any() for x in jax.tree.leaves(state.value_head))
    errors = []
    for step in range(3):
        state, metrics = policy_update(state, rollout._replace(step=step), rewards)
        errors.append(metrics["policy/value_error"])
    assert errors[0] == pytest.approx(0.7 * 0.95 ** np.arange(0).sum(), abs=0.3)
    assert errors[2] < errors[1] < errors[0]
    assert state.value_head["kernel"].shape == (tiny[0].embed_dim,)
    assert metrics["policy/num_rows"] == B
