"""Projections and penalties of gradients, each against a direct computation on a small problem."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from seal_jax import optim
from seal_jax.config.check_optimizers import check_optimizers
from seal_jax.config.load import load_config
from seal_jax.config.setup import settings_of
from seal_jax.continual.given import zero_maps
from seal_jax.continual.memory_gradients import make_memory_gradients
from seal_jax.continual.remedies.a_gem import a_gem
from seal_jax.continual.remedies.ewc import Importance, add_fisher, ewc, no_fisher
from seal_jax.continual.remedies.null_space import add_covariance, null_space, projectors_of, start
from seal_jax.continual.remedies.o_lora import add_subspace, o_lora
from seal_jax.continual.remedies.ogd import add_direction, directions_of, no_directions, ogd
from seal_jax.inner.packing import Layout, pack
from seal_jax.inner.texts import Job, text_of
from seal_jax.inner.update import InnerSetup
from seal_jax.models import lora
from seal_jax.models.transformer import Packed, forward, hidden_states
from seal_jax.types import Adapters

S, L, R, D, F = 3, 2, 4, 6, 5  # sequences, and the sizes of an adapter


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapters(seed, *leading):
    """Return weights of an adapter of two maps, or of a stack."""
    shapes = {"a": (L, R, D), "b": (L, R, F)}
    targets = {"attn": ["q_proj", "v_proj"]}
    return {
        block: {
            target: {
                ab: numbers(seed + 10 * i + j, *leading, *shape)
                for j, (ab, shape) in enumerate(shapes.items())
            }
            for i, target in enumerate(names)
        }
        for block, names in targets.items()
    }


def flat(tree, num=S):
    """Return [num n] of a stacked pytree, in float64."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(x, np.float64).reshape(num, -1) for x in leaves], axis=1)


def updated(tx, grads, params, **given):
    """Return what one update makes of a stack of gradients, vmapped and compiled."""

    def one(grads, params, given):
        return tx.update(grads, tx.init(params), params, **given)[0]

    return jax.jit(jax.vmap(one))(grads, params, given)


def test_ogd_removes_the_stored_directions_and_nothing_else():
    memory, grads = adapters(1, S, 3), adapters(2, S)
    directions = jax.jit(jax.vmap(directions_of))(memory)
    found = flat(updated(ogd(), grads, grads, directions=directions))
    for s in range(S):
        basis = flat(jax.tree.map(lambda x, s=s: x[s], memory), 3)
        g = flat(grads)[s]
        inside = basis.T @ np.linalg.lstsq(basis.T, g, rcond=None)[0]
        np.testing.assert_allclose(found[s], g - inside, atol=1e-5)
        np.testing.assert_allclose(basis @ found[s], 0, atol=1e-4)


def gram(directions):
    vectors = flat(directions.vectors, len(jax.tree.leaves(directions.vectors)[0]))
    return vectors @ vectors.T


def test_a_full_store_keeps_a_sample_of_all_directions():
    axes, key = np.eye(40, dtype=np.float32), jax.random.key(3)

    def body(store, x):
        i, one = x
        return add_direction(store, {"w": one}, jax.random.fold_in(key, i)), None

    @jax.jit
    def add_all(axes):
        empty = no_directions({"w": axes[0]}, 4)
        return jax.lax.scan(body, empty, (jnp.arange(40), axes))[0]

    store = add_all(axes)
    kept = np.asarray(store.vectors["w"])
    assert store.count == 40 and kept.shape == (4, 40)
    assert set(kept.sum(axis=1)) == {1.0} and len(set(kept.argmax(axis=1))) == 4
    assert kept.argmax(axis=1).min() < 20 <= kept.argmax(axis=1).max()  # of early and of late ones


def test_a_direction_in_the_span_of_the_others_is_left_out():
    x, y = numbers(0, 2, 8)
    nearly = 0.3 * x - 2.0 * y + 1e-5 * numbers(1, 8)
    nothing, broken = np.zeros(8, np.float32), np.full(8, np.nan, np.float32)
    tiny = 1e-25 * numbers(2, 8)  # its square is 0 in float32
    store = jax.jit(directions_of)({"w": np.stack([x, y, nearly, nothing, broken, tiny])})
    assert store.count == 3
    np.testing.assert_allclose(gram(store), np.diag([1, 1, 1, 0, 0, 0]), atol=1e-6)
    with pytest.raises(ValueError, match="ogd stores 0 directions; expected 1 or more"):
        no_directions({"w": x}, 0)


def test_a_gem_projects_only_where_the_gradient_goes_against_the_memory():
    grads, memory = adapters(1, S), adapters(5, S)
    g, m = flat(grads), flat(memory)
    sign = -np.sign((g * m).sum(axis=1))  # against, with, and no memory
    sign[1:] *= [-1, 0]
    memory = jax.tree.map(lambda x: x * sign.reshape(S, 1, 1, 1).astype(np.float32), memory)
    m = flat(memory)
    found = flat(updated(a_gem(), grads, grads, memory_grads=memory))
    dot = (g[0] * m[0]).sum()
    np.testing.assert_allclose(
        found[0], g[0] - dot / (m[0] ** 2).sum() * m[0], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose((found[0] * m[0]).sum(), 0, atol=1e-4)
    np.testing.assert_array_equal(found[1:], g[1:])


def test_a_memory_that_is_not_finite_shows():
    grads, memory = adapters(1, S), adapters(5, S)
    memory["attn"]["q_proj"]["b"][0, 0, 0, 0] = np.nan
    found = flat(updated(a_gem(), grads, grads, memory_grads=memory))
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()


def test_o_lora_adds_the_gradient_of_its_penalty():
    grads, now, earlier = adapters(1, S), adapters(2, S), [adapters(i, S) for i in (3, 4)]
    subspaces = zero_maps(now)
    for weights in earlier:
        subspaces = add_subspace(subspaces, weights)

    def penalty(weights):
        total = 0.0
        for target in ("q_proj", "v_proj"):
            for other in earlier:
                a, a_i = (w["attn"][target]["a"] for w in (weights, other))
                total += 0.3 * jnp.square(jnp.einsum("slrd,slqd->slrq", a, a_i)).sum()
        return total

    expected = flat(grads) + flat(jax.jit(jax.grad(penalty))(now))
    found = flat(updated(o_lora(0.3), grads, now, subspaces=subspaces))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_in_the_null_space_does_not_see_the_memory():
    inputs = numbers(1, S, L, 9, 3) @ numbers(2, S, L, 3, D)  # of three directions of D
    squares = {"attn": dict.fromkeys(("q_proj", "v_proj"), inputs.swapaxes(2, 3) @ inputs)}
    projectors = projectors_of(squares, 1e-5)
    u, _, _ = np.linalg.svd(inputs.swapaxes(2, 3))
    expected = np.eye(D) - u[..., :3] @ u[..., :3].swapaxes(2, 3)
    np.testing.assert_allclose(projectors["attn"]["q_proj"], expected, atol=1e-5)
    weights, grads = start(adapters(3, S), projectors), adapters(4, S)
    moves = updated(null_space(), grads, weights, projectors=projectors)
    for target, ab in moves["attn"].items():
        a = weights["attn"][target]["a"] + ab["a"]
        np.testing.assert_allclose(np.einsum("sltd,slrd->sltr", inputs, a), 0, atol=1e-4)
        assert np.abs(ab["a"]).max() > 0.1
        np.testing.assert_array_equal(ab["b"], grads["attn"][target]["b"])


def test_the_null_space_holds_a_share_of_the_memorys_energy():
    inputs = numbers(1, L, 50, D) * np.float32([30, 10, 3, 1, 0.3, 0.1])
    squares = {"attn": {"q_proj": inputs.swapaxes(1, 2) @ inputs}}
    squares = add_covariance(zero_maps({"attn": {"q_proj": {"a": inputs}}}), squares, decay=0.5)
    c, p = squares["attn"]["q_proj"], projectors_of(squares, 0.02)["attn"]["q_proj"]
    share = np.trace(p @ c, axis1=1, axis2=2) / np.trace(c, axis1=1, axis2=2)
    dims = np.trace(p, axis1=1, axis2=2)
    assert (share <= 0.02).all() and np.allclose(dims, 4, atol=1e-4)
    scaled = projectors_of(jax.tree.map(lambda x: 1e6 * x, squares), 0.02)["attn"]["q_proj"]
    np.testing.assert_allclose(scaled, p, atol=1e-4)
    nothing, broken = np.zeros_like(c), np.full_like(c, np.nan)
    np.testing.assert_allclose(projectors_of({"": {"": nothing}})[""][""][0], np.eye(D), atol=1e-6)
    assert np.isnan(projectors_of({"": {"": broken}})[""][""]).all()
    with pytest.raises(ValueError, match="energy = 1, expected a share between 0 and 1"):
        projectors_of(squares, 1)


def test_ewc_pulls_back_by_importance():
    grads, params, center = (adapters(i, S) for i in (1, 2, 3))
    of_texts = [adapters(i, S, 4) for i in (4, 5)]
    fisher, add = jax.vmap(no_fisher)(params), jax.jit(jax.vmap(partial(add_fisher, decay=0.9)))
    for one in of_texts:
        fisher = add(fisher, one)
    mean = [flat(jax.tree.map(lambda x: np.square(x).mean(axis=1), one)) for one in of_texts]
    expected = flat(grads) + 0.7 * (0.9 * mean[0] + mean[1]) * (flat(params) - flat(center))
    found = updated(ewc(0.7), grads, params, importance=Importance(fisher, center))
    np.testing.assert_allclose(flat(found), expected, rtol=1e-4, atol=1e-5)
    two = jax.tree.map(lambda x: np.concatenate([x[0, :2], 0 * x[0, 2:]]), of_texts[0])
    some = add_fisher(no_fisher(adapters(0)), two, num_texts=2)
    only = add_fisher(no_fisher(adapters(0)), jax.tree.map(lambda x: x[:2], two))
    np.testing.assert_array_equal(flat(some, 1), flat(only, 1))


@pytest.mark.parametrize(
    "made, given, message",
    [
        (ogd, {}, r"ogd takes directions when it is made, ogd\(directions=\.\.\.\).* has neither"),
        (lambda: a_gem(adapters(1)), {"memory_grads": adapters(1)}, "a_gem takes.* it has both"),
        (
            lambda: o_lora(1.0),
            {"subspaces": {"attn": {"q_proj": np.zeros((L, D, D))}}},
            r"o_lora's subspaces: nothing for attn/v_proj, expected \(2, 6, 6\)",
        ),
        (
            lambda: ewc(1.0),
            {"importance": Importance({"w": np.zeros(3)}, adapters(1))},
            r"ewc's fisher: nothing for \['attn'\]\['q_proj'\]\['a'\], expected \(2, 4, 6\)",
        ),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said(made, given, message):
    tx = made()
    with pytest.raises(TypeError, match=message):
        tx.update(adapters(2), optax.EmptyState(), adapters(2), **given)


def test_a_remedy_for_adapters_says_that_it_is_one():
    with pytest.raises(TypeError, match="null_space's projectors takes an adapter's weights"):
        null_space({}).init({"layers_0": {"attn": {"q_proj": {"kernel": np.zeros((4, 4))}}}})


# A linear regression on two tasks, one after the other, whose inputs share two of their directions.
# The second leaves room: it has fewer examples than directions of its own.
SIZE, RANK, OUT = 12, 8, 4
SGD = optax.sgd(0.05)
CHAINS = {
    "plain": [SGD],
    "ogd": [SGD, ogd()],
    "a_gem": [a_gem(), SGD],
    "o_lora": [o_lora(1.0), SGD],
    "null_space": [SGD, null_space()],
    "ewc": [ewc(3.0), SGD],
}
OF_ADAPTERS = ("o_lora", "null_space")  # the others train the kernel itself


def outputs(kernel, weights, x):
    if "kernel" in weights:
        return x @ weights["kernel"]
    ab = weights["attn"]["q_proj"]
    return x @ (kernel + ab["a"][0].T @ ab["b"][0])


def loss_of(weights, kernel, x, y):
    return jnp.mean(jnp.square(outputs(kernel, weights, x) - y))


def fresh(seed):
    a = 0.05 * numbers(seed, 1, RANK, SIZE)
    return {"attn": {"q_proj": {"a": a, "b": np.zeros((1, RANK, OUT), np.float32)}}}


@partial(jax.jit, static_argnames="name")
def train(name, kernel, weights, tasks, given):
    """Return the weights after 300 steps on the second task, and both tasks' losses."""
    tx = optax.with_extra_args_support(optax.chain(*CHAINS[name]))

    def step(carry, _):
        weights, state = carry
        old, grads = (jax.grad(loss_of)(weights, kernel, *task) for task in tasks)
        updates, state = tx.update(grads, state, weights, memory_grads=old, **given)
        return (optax.apply_updates(weights, updates), state), None

    new = jax.lax.scan(step, (weights, tx.init(weights)), length=300)[0][0]
    return new, jnp.stack([loss_of(new, kernel, *task) for task in tasks])


@pytest.fixture(scope="module")
def two_tasks():
    """Return both tasks, a kernel that knows the first, and what remedies store of it."""
    axes = np.eye(SIZE, dtype=np.float32)
    inputs = [numbers(1, 8, 4) @ axes[:4], numbers(2, 4, 6) @ axes[2:8]]
    tasks = [(x, x @ numbers(3 + i, SIZE, OUT)) for i, x in enumerate(inputs)]
    kernel = np.zeros((SIZE, OUT), np.float32)
    first, _ = train("plain", kernel, fresh(1), [tasks[0]] * 2, {})
    ab = first["attn"]["q_proj"]
    kernel = np.asarray(kernel + ab["a"][0].T @ ab["b"][0])
    x = inputs[0]
    of_outputs = {"kernel": np.einsum("nd,oe->node", x, np.eye(OUT)).reshape(-1, SIZE, OUT)}
    params = {"kernel": kernel}
    return {
        "kernel": kernel,
        "tasks": tasks,
        "directions": directions_of(of_outputs),
        "importance": Importance(add_fisher(no_fisher(params), of_outputs), params),
        "subspaces": add_subspace(zero_maps(fresh(2)), first),
        "projectors": projectors_of({"attn": {"q_proj": (x.T @ x)[None]}}, 1e-4),
    }


@pytest.mark.parametrize("name", ["ogd", "a_gem", "o_lora", "null_space", "ewc"])
def test_it_forgets_less_than_plain_training(two_tasks, name):
    stores = dict(two_tasks)
    kernel, tasks = stores.pop("kernel"), stores.pop("tasks")
    before = fresh(2) if name in OF_ADAPTERS else {"kernel": kernel}
    begin = start(before, stores["projectors"]) if name == "null_space" else before
    keyword = {"ogd": "directions", "ewc": "importance", "o_lora": "subspaces"}
    keyword |= {"null_space": "projectors"}
    given = {keyword[name]: stores[keyword[name]]} if name in keyword else {}
    unchanged = np.array([loss_of(before, kernel, *task) for task in tasks])
    _, plain = train("plain", kernel, before, tasks, {})
    _, found = train(name, kernel, begin, tasks, given)
    forgotten = (found[0] - unchanged[0]) / (plain[0] - unchanged[0])
    most = {"ogd": 1e-3, "null_space": 1e-3, "a_gem": 0.05, "ewc": 0.25, "o_lora": 0.7}
    assert unchanged[0] < 0.02 * unchanged[1] and plain[0] > 10 * unchanged[0]
    assert forgotten < most[name]
    assert found[1] < 0.15 * unchanged[1]  # and it has learned


# The policy's optimizer, with directions closed over, as configs/README.md shows it.


def policy_optimizer(learning_rate):
    return optax.chain(optax.adamw(learning_rate, weight_decay=0.0), ogd(DIRECTIONS))


AXES = np.eye(6, dtype=np.float32)[:2].reshape(2, 3, 2)
DIRECTIONS = directions_of({"w": AXES})


def test_the_policys_optimizer_keeps_to_the_complement():
    goal = numbers(1, 3, 2)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: jnp.square(p["w"] - goal).sum())(params)
            loss = jnp.float32(0)
            updates, state = optim.update(optimizer(0.05), grads, state, params, loss)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer(0.05).init(params)), length=200)[0][0]

    optimizer = optim.make_optimizer(optimizer=policy_optimizer)
    found = run({"w": jnp.zeros((3, 2))})["w"].reshape(-1)
    np.testing.assert_allclose(found[:2], 0, atol=1e-6)
    np.testing.assert_allclose(found[2:], goal.reshape(-1)[2:], atol=1e-2)


def test_one_made_for_a_larger_model_is_let_through_before_a_run():
    config = load_config("tests/tiny_config.py")
    config.outer.optimizer = policy_optimizer
    check_optimizers(settings_of(config))
    with pytest.raises(optim.OtherShapes, match=r"ogd's directions: nothing for \['v'\]"):
        policy_optimizer(0.1).init({"v": np.zeros(3)})


# What a memory of texts says of a model, against one text at a time.
LAYOUT = {"tokens_per_step": 64, "layout": Layout((32, 64)), "steps_per_call": 2}


@pytest.fixture(scope="module")
def memory(tiny):
    """Return two adapters, of maps of unlike inputs, their jobs, and what looks at them."""
    config, _ = tiny
    a, b, wide = (0.2 * numbers(i, 2, 2, 3, size) for i, size in enumerate((32, 32, 48)))
    weights = {"attn": {"q_proj": {"a": a, "b": b}}, "mlp": {"down_proj": {"a": wide, "b": -b}}}
    adapters = Adapters(weights, np.float32([2.0, 0.5]))
    texts = [text_of((7 * np.arange(n) + n).tolist(), p) for n, p in ((9, 0), (20, 4), (13, 0))]
    texts = [text._replace(tokens=tuple(t % 64 for t in text.tokens)) for text in texts]
    jobs = [Job(((texts[0],), (texts[1], texts[2])), 1.0), Job(((texts[1],),), 1.0)]
    setup = InnerSetup(config, optim.make_optimizer())
    return adapters, jobs, make_memory_gradients(setup)


def row_loss(config, params, adapter, texts, masks):
    """Return the mean loss of a row of padded texts [n T], an adapter merged into the model."""
    logits = forward(config, lora.merge(params, adapter), texts)
    logp = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(logp, texts[:, 1:, None], axis=-1)[..., 0]
    return -(chosen * masks[:, 1:]).sum() / masks[:, 1:].sum()


def test_gradients_of_rows_are_those_of_each_alone(tiny, memory):
    config, params = tiny
    adapters, jobs, look = memory
    grads, losses = look.of_rows(params, adapters, pack(jobs, **LAYOUT), 2)
    direct = jax.jit(jax.value_and_grad(partial(row_loss, config, params)))
    for s, r in ((0, 0), (0, 1), (1, 0)):
        texts, masks = np.zeros((2, 2, 20), np.int32)
        for i, text in enumerate(jobs[s].rows[r]):
            texts[i, : len(text.tokens)], masks[i, : len(text.tokens)] = text.tokens, text.loss_mask
        loss, expected = direct(lora.take(adapters, slice(s, s + 1)), texts, masks)
        np.testing.assert_allclose(losses[s, r], loss, rtol=1e-4)
        found = flat(jax.tree.map(lambda x, s=s, r=r: x[s, r], grads), 1)
        assert np.linalg.norm(found - flat(expected.weights, 1)) < 1e-3 * np.linalg.norm(found)
    assert np.isnan(losses[1, 1]) and not flat(jax.tree.map(lambda x: x[1, 1], grads), 1).any()
    with pytest.raises(ValueError, match="a memory of 2 rows, expected at most 1"):
        look.of_rows(params, adapters, pack(jobs, **LAYOUT), 1)

    broken = jax.tree.map(np.array, adapters)
    broken.weights["mlp"]["down_proj"]["b"][1, 1] = np.inf
    grads, losses = look.of_rows(params, broken, pack(jobs, **LAYOUT), 2)
    kept, lost = (flat(jax.tree.map(lambda x, s=s: x[s, 0], grads), 1) for s in (0, 1))
    assert np.isfinite(kept).all() and np.isnan(lost).all() and np.isnan(losses[1, 0])


def test_covariances_are_those_of_the_inputs_of_text(tiny, memory):
    config, params = tiny
    adapters, jobs, look = memory
    first, second = jobs[0].rows
    padded = second[1]._replace(pads=(13, 14, 15))  # these are in the loss, but no text
    jobs = [Job(((padded, *first),), 1.0), Job((second,), 1.0)]
    found = look.covariances(params, adapters, pack(jobs, **LAYOUT))

    texts = [text.tokens for job in jobs for text in job.rows[0]]  # two of each adapter's
    tokens, is_text = np.zeros((2, 4, 20), np.int32)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], is_text[i, : len(text)] = text, 1
    inputs = {}

    def see(x, name, probe):
        jax.debug.callback(lambda name, x: inputs.update({int(name): np.asarray(x)}), name, x)
        return x

    packed, places = Packed(on_input=Partial(see)), np.tile(np.arange(20, dtype=np.int32), (4, 1))
    given = params, tokens, places, is_text, adapters
    jax.jit(lambda *given: hidden_states(config, *given, packed=packed))(*given)
    jax.effects_barrier()
    assert len(inputs) == 4
    for block, target in (("attn", "q_proj"), ("mlp", "down_proj")):
        for layer in range(2):
            x = inputs[zlib.crc32(f"{block}/{target}".encode()) + layer] * is_text.reshape(-1, 1)
            x = x.reshape(2, -1, x.shape[-1])  # by adapter
            expected = np.einsum("std,ste->sde", x, x)
            error = np.abs(found[block][target][:, layer] - expected).max()
            assert error < 1e-4 * np.abs(expected).max()
