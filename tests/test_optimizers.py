"""Every optimizer of optax trains in both loops as in a plain one, or is refused by name."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from seal_jax.config.check_optimizers import check_optimizers
from seal_jax.config.load import load_config
from seal_jax.config.setup import settings_of
from seal_jax.inner import update as inner
from seal_jax.models.lora import take
from seal_jax.optim import accumulate, make_optimizer, scheduled_rate, update
from seal_jax.runs import checkpoint
from seal_jax.runs.train_state import with_keys, without_keys
from seal_jax.train import train
from seal_jax.types import Adapters
from tests.conftest import TINY

CONFIG = "tests/tiny_config.py"
STILL = ("freeze", "masked", "selective_transform")  # some of their arrays do not move
RATE = optax.scale_by_learning_rate


# Those whose state or questions are of a kind of their own; `long` runs all.
OF_A_KIND = (
    "adafactor",
    "inject_hyperparams",
    "inject_stateful_hyperparams",
    "noisy_sgd",
    "partition",
    "polyak_sgd",
    "contrib.mechanize",
    "contrib.momo_adam",
    "contrib.muon",
    "contrib.prodigy",
    "contrib.reduce_on_plateau",
    "contrib.schedule_free",
    "contrib.schedule_free_adamw",
)


@pytest.fixture(autouse=True)
def as_optax_has_it():
    """Let arrays of one number meet others, as some of optax's do."""
    with jax.numpy_rank_promotion("allow"):
        yield


def then(make, *arguments, **keywords):
    """Return the function of a rate that scales by it what a transformation makes of gradients."""
    return lambda rate: optax.chain(make(*arguments, **keywords), RATE(rate))


def around(make, **keywords):
    """Return the function of a rate that wraps SGD at that rate."""
    return lambda rate: make(optax.sgd(rate, momentum=0.5), **keywords)


def late(step):
    """Transform from the third step on."""
    return step >= 2


def by_shape(params):
    return jax.tree.map(lambda x: "long" if x.shape[-1] > 4 else "short", params)


def long_ones(params):
    return jax.tree.map(lambda x: x.shape[-1] > 4, params)


def only_a(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "a", params)


def both(rate):
    return {"long": optax.sgd(rate), "short": optax.adam(rate)}


# By name, with the arguments that they need. The learning rate is their first.
NAMED = {
    **dict.fromkeys(
        """adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb
        lars lion nadam nadamw novograd optimistic_adam optimistic_adam_v2
        optimistic_gradient_descent polyak_sgd radam rmsprop scale_by_learning_rate sgd sign_sgd
        signum sm3 yogi contrib.acprop contrib.ademamix contrib.adopt contrib.cocob
        contrib.dadapt_adamw contrib.dog contrib.dowg contrib.madgrad contrib.momo
        contrib.momo_adam contrib.muon contrib.prodigy contrib.scale_by_madgrad
        contrib.schedule_free_adamw contrib.schedule_free_sgd
        contrib.simplified_ademamix""".split(),
        {},
    ),
    "noisy_sgd": {"key": 1},
}
# By a function of the learning rate.
MADE = {
    "adaptive_grad_clip": then(optax.adaptive_grad_clip, 0.1),
    "add_decayed_weights": then(optax.add_decayed_weights, 0.1),
    "add_noise": then(optax.add_noise, eta=0.1, gamma=0.5, key=0),
    "apply_every": then(optax.apply_every, 2),
    "apply_if_finite": around(optax.apply_if_finite, max_consecutive_errors=2),
    "centralize": then(optax.centralize),
    "chain": lambda rate: optax.chain(optax.scale_by_adam(), RATE(rate)),
    "clip": then(optax.clip, 0.1),
    "clip_by_block_rms": then(optax.clip_by_block_rms, 0.1),
    "clip_by_global_norm": then(optax.clip_by_global_norm, 0.1),
    "conditionally_mask": around(optax.conditionally_mask, should_transform_fn=late),
    "conditionally_transform": then(
        optax.conditionally_transform, optax.scale_by_adam(), should_transform_fn=late
    ),
    "ema": then(optax.ema, 0.9),
    "flatten": around(optax.flatten),
    "freeze": lambda rate: optax.chain(optax.freeze(long_ones), optax.sgd(rate)),
    "identity": then(optax.identity),
    "inject_hyperparams": lambda rate: optax.inject_hyperparams(optax.adamw)(learning_rate=rate),
    "inject_stateful_hyperparams": lambda rate: optax.chain(
        optax.inject_hyperparams(optax.scale_by_adam)(b1=optax.linear_schedule(0.5, 0.9, 4)),
        optax.inject_hyperparams(RATE)(rate),
    ),
    "keep_params_nonnegative": lambda rate: optax.chain(
        optax.sgd(rate), optax.keep_params_nonnegative()
    ),
    "masked": then(optax.masked, optax.scale_by_adam(), mask=long_ones),
    "multi_transform": lambda rate: optax.multi_transform(both(rate), by_shape),
    "named_chain": lambda rate: optax.named_chain(
        ("adam", optax.scale_by_adam()), ("", RATE(rate))
    ),
    "normalize_by_update_norm": then(optax.normalize_by_update_norm),
    "partition": lambda rate: optax.partition(both(rate), by_shape),
    "scale": then(optax.scale, 0.5),
    "scale_by_adadelta": then(optax.scale_by_adadelta),
    "scale_by_adam": then(optax.scale_by_adam),
    "scale_by_adamax": then(optax.scale_by_adamax),
    "scale_by_adan": then(optax.scale_by_adan),
    "scale_by_amsgrad": then(optax.scale_by_amsgrad),
    "scale_by_belief": then(optax.scale_by_belief),
    "scale_by_distance_over_gradients": then(optax.scale_by_distance_over_gradients),
    "scale_by_factored_rms": then(optax.scale_by_factored_rms),
    "scale_by_lbfgs": then(optax.scale_by_lbfgs),
    "scale_by_lion": then(optax.scale_by_lion),
    "scale_by_novograd": then(optax.scale_by_novograd),
    "scale_by_optimistic_gradient": then(optax.scale_by_optimistic_gradient),
    "scale_by_param_block_norm": then(optax.scale_by_param_block_norm),
    "scale_by_param_block_rms": then(optax.scale_by_param_block_rms),
    "scale_by_polyak": then(optax.scale_by_polyak),
    "scale_by_radam": then(optax.scale_by_radam),
    "scale_by_rms": then(optax.scale_by_rms),
    "scale_by_rss": then(optax.scale_by_rss),
    "scale_by_schedule": then(optax.scale_by_schedule, optax.linear_schedule(1.0, 0.5, 4)),
    "scale_by_sign": then(optax.scale_by_sign),
    "scale_by_sm3": then(optax.scale_by_sm3),
    "scale_by_stddev": then(optax.scale_by_stddev),
    "scale_by_trust_ratio": then(optax.scale_by_trust_ratio),
    "scale_by_yogi": then(optax.scale_by_yogi),
    "selective_transform": around(
        optax.selective_transform, freeze_mask={"attn": {"q_proj": {"a": True, "b": False}}}
    ),
    "snapshot": then(optax.snapshot, "norm", optax.tree.norm),
    "stateless": then(optax.stateless, lambda updates, params: updates),
    "stateless_with_tree_map": then(
        optax.stateless_with_tree_map, lambda update, param: 2 * update
    ),
    "trace": then(optax.trace, 0.9),
    "with_extra_args_support": around(optax.with_extra_args_support),
    "zero_nans": then(optax.zero_nans),
    "contrib.mechanize": around(contrib.mechanize),
    "contrib.normalize": then(contrib.normalize),
    "contrib.reduce_on_plateau": lambda rate: optax.chain(
        optax.adam(rate), contrib.reduce_on_plateau(patience=1, rtol=0.5, cooldown=0)
    ),
    "contrib.scale_by_acprop": then(contrib.scale_by_acprop),
    "contrib.scale_by_ademamix": then(contrib.scale_by_ademamix),
    "contrib.scale_by_adopt": then(contrib.scale_by_adopt),
    "contrib.scale_by_cocob": lambda rate: optax.chain(
        contrib.scale_by_cocob(), RATE(rate, flip_sign=False)
    ),
    "contrib.scale_by_muon": then(
        contrib.scale_by_muon,
        weight_dimension_numbers=lambda params: jax.tree.map(
            lambda x: contrib.MuonDimensionNumbers(1, 2), params
        ),
    ),
    "contrib.scale_by_simplified_ademamix": then(contrib.scale_by_simplified_ademamix),
    "contrib.schedule_free": lambda rate: contrib.schedule_free(optax.sgd(rate), rate, b1=0.8),
    "contrib.split_real_and_imaginary": around(contrib.split_real_and_imaginary),
}
# What is refused, as what, and words of the reason. The others of a name alone are refused, too:
# their first argument is no learning rate.
REFUSED = {
    "lbfgs": ("lbfgs", "value_fn"),
    "lookahead": (lambda rate: optax.lookahead(optax.sgd(rate), 2, 0.5), "fails"),
    # Its state has another structure after the first step.
    "measure_with_ema": (
        then(optax.monitor, {"norm": optax.measure_with_ema(optax.tree.norm, 0.9)}),
        "structure",
    ),
    "rprop": ("rprop", "does not reach"),
    "scale_by_backtracking_linesearch": (
        then(optax.scale_by_backtracking_linesearch, 5),
        "value_fn",
    ),
    "scale_by_rprop": ("scale_by_rprop", "does not reach"),
    "scale_by_zoom_linesearch": (then(optax.scale_by_zoom_linesearch, 5), "value_fn"),
    "set_to_zero": (then(optax.set_to_zero), "trains nothing"),
    "contrib.differentially_private_aggregate": (
        then(contrib.differentially_private_aggregate, 1.0, 0.1, key=0),
        "update of",
    ),
    "contrib.dpsgd": (lambda rate: contrib.dpsgd(rate, 1.0, 0.1, seed=0), "update of"),
    "contrib.galore": (lambda rate: contrib.galore(rate, rank=2), "GaLore"),
    "contrib.hutchinson_estimator_diag_hessian": (
        then(contrib.hutchinson_estimator_diag_hessian),
        "obj_fn",
    ),
    "contrib.sam": (lambda rate: contrib.sam(optax.sgd(rate), optax.sgd(0.1)), "sharpness"),
    "contrib.scale_by_galore": (then(contrib.scale_by_galore, 2), "GaLore"),
    "contrib.sophia": ("contrib.sophia", "obj_fn"),
}


def exported():
    """Return the names of all functions of optax that make a transformation."""
    names = set()
    for prefix, module in (("", optax), ("contrib.", contrib)):
        for name, value in vars(module).items():
            if name.startswith("_") or not (inspect.isfunction(value) or hasattr(value, "func")):
                continue  # neither a function nor a partial one
            returns = inspect.signature(value).return_annotation
            says = str(returns) if returns is not inspect.Signature.empty else value.__doc__
            if "GradientTransformation" in (says or ""):
                names.add(prefix + name)
    return names


def test_every_transformation_of_optax_is_known():
    known = [*NAMED, *MADE, *REFUSED]
    assert len(known) == len(set(known))
    assert exported() == set(known)


# --- both loops beside a plain one ---

RATES, STEPS = np.float32([0.05, 0.2, 0.1]), (5, 3, 4)  # of three adapters
# What a plain loop has in place of rates that are kept in a state.
PLAIN = MADE | {
    "inject_hyperparams": optax.adamw,
    "inject_stateful_hyperparams": lambda rate: optax.chain(
        optax.inject_hyperparams(optax.scale_by_adam)(b1=optax.linear_schedule(0.5, 0.9, 4)),
        RATE(rate),
    ),
}


def numbers(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 2, 3, 4), "b": (3, 2, 3, 5)}  # [A L r in], [A L r out]
    arrays = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    return {"attn": {"q_proj": arrays}}


FIRST, GOAL = numbers(0), jax.tree.map(lambda x: x[0], numbers(1))


def loss_of(weights):
    return 0.5 * optax.tree.norm(optax.tree.sub(weights, GOAL), squared=True)


def plain_loop(name, a, num_steps):
    """Train adapter `a` for some steps as optax's pages show it; return it and the state."""

    def make(rate):
        if name in NAMED:
            return make_optimizer(optax_name=name, optax_kwargs=NAMED[name], grad_clip=None)(rate)
        return PLAIN[name](rate)

    weights = jax.tree.map(lambda x: jnp.asarray(x[a]), FIRST)
    state = make(RATES[a]).init(weights)
    for i in range(num_steps):
        rate = scheduled_rate("linear", RATES[a], jnp.int32(i), jnp.int32(STEPS[a]))
        loss, grads = jax.value_and_grad(loss_of)(weights)
        tx = optax.with_extra_args_support(make(rate))
        updates, state = tx.update(grads, state, weights, value=loss, grad=grads)
        weights = optax.apply_updates(weights, updates)
    return weights, state


def population(optimizer, accumulation=1, broken=()):
    """Return the adapters after all steps, as the inner loop trains them side by side.

    Args:
      broken: steps whose losses and gradients are nan.
    """
    setup = inner.InnerSetup(TINY, optimizer, accumulation=accumulation)
    lanes = [[a for a in range(3) if i < STEPS[a]] for i in range(max(STEPS))]
    lanes = jnp.int32([used + [-1] * (3 - len(used)) for used in lanes])
    batch = inner.InnerBatch(*[None] * 7, jnp.asarray(RATES), jnp.int32(STEPS), None)

    def step(state, given):
        lanes, is_broken = given
        weights = jax.tree.map(lambda x: x[jnp.maximum(lanes, 0)], state.adapters.weights)
        found = jax.vmap(jax.value_and_grad(loss_of))(weights)
        losses, grads = jax.tree.map(lambda x: jnp.where(is_broken, jnp.nan, x), found)
        carry = inner.Carry(state.adapters.weights, state.opt_state, state.step, losses)
        one = partial(inner.update_lane, setup, batch._replace(lanes=lanes), grads)
        carry = jax.lax.fori_loop(0, (lanes >= 0).sum(), one, carry)
        adapters = state.adapters._replace(weights=carry.weights)
        return inner.InnerState(adapters, carry.opt_state, carry.steps), carry.losses

    @jax.jit
    def run(adapters):
        state = inner.start_state(setup, adapters, jnp.asarray(RATES))
        is_broken = jnp.array([i in broken for i in range(len(lanes))])
        state, losses = jax.lax.scan(step, state, (lanes, is_broken))
        return inner.evaluated(setup, state.adapters, state.opt_state), losses

    adapters, losses = run(Adapters(FIRST, np.ones(3, np.float32)))
    assert (np.isnan(losses) == np.isin(np.arange(len(losses)), broken)[:, None]).all()
    return jax.device_get(adapters.weights)


@pytest.mark.parametrize(
    "name",
    [
        name if name in OF_A_KIND else pytest.param(name, marks=pytest.mark.long)
        for name in (*NAMED, *MADE)
    ],
)
def test_trains_as_a_plain_loop_does(name):
    make = {"optax_name": name, "optax_kwargs": NAMED[name]} if name in NAMED else {}
    found = population(make_optimizer(**make, optimizer=MADE.get(name), grad_clip=None))
    for a in range(3):
        expected, state = plain_loop(name, a, STEPS[a])
        if isinstance(state, contrib.ScheduleFreeState):
            expected = contrib.schedule_free_eval_params(state, expected)
        moved = take(found, a)
        for one, other, first in zip(*map(jax.tree.leaves, (moved, expected, FIRST)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
            assert name in STILL or not np.array_equal(one, first[a])


@pytest.mark.parametrize(
    "names", [OF_A_KIND, pytest.param((*NAMED, *MADE), marks=pytest.mark.long)]
)
def test_states_survive_a_checkpoint(tmp_path, names):
    states = {name.replace(".", "_"): plain_loop(name, 0, 2)[1] for name in names}
    states = jax.tree.map(jnp.asarray, states)
    trees = {"opt_state": without_keys(states)}
    checkpoint.save_alone(tmp_path / "states", trees, {})
    found, _ = checkpoint.restore_alone(tmp_path / "states", lambda _: trees)
    found = with_keys(found["opt_state"], states)
    assert jax.tree.structure(found) == jax.tree.structure(states)
    for one, other in zip(*map(jax.tree.leaves, (found, states)), strict=True):
        assert one.dtype == other.dtype and (one == other).all()


def test_accumulation_takes_the_mean_of_losses_too():
    def spy():
        def update(updates, state, params=None, *, value, grad, **_):
            return updates, {"value": jnp.asarray(value), "grad": grad}

        zeros = {"value": jnp.float32(0), "grad": jnp.float32(0)}
        return optax.GradientTransformationExtraArgs(lambda _: zeros, update)

    state, weights, seen = accumulate(spy(), 2, True).init(jnp.float32(0)), jnp.float32(0), []
    # The third is a group of its own. Of the next two one counts; of the last two none does.
    nan = float("nan")
    for i, loss in enumerate((1.0, 3.0, 5.0, nan, 7.0, 9.0, nan, nan, nan)):
        ends = i in (1, 2, 4, 6, 8)
        tx = accumulate(spy(), 2, ends)
        move, state = update(tx, jnp.float32(10 * loss), state, weights, jnp.float32(loss))
        seen.append((float(move), *map(float, state.inner_opt_state.values())))
    assert seen == [
        *((0.0, 0.0, 0.0), (20.0, 20.0, 2.0)),
        (50.0, 50.0, 5.0),
        *((0.0, 50.0, 5.0), (70.0, 70.0, 7.0)),
        *((0.0, 70.0, 7.0), (90.0, 90.0, 9.0)),
        *((0.0, 90.0, 9.0), (0.0, 90.0, 9.0)),
    ]


@pytest.mark.parametrize("broken", [(), (0,), (1, 2), (2, 4)])
def test_a_group_is_the_mean_of_its_good_steps(broken):
    found = population(make_optimizer(optax_name="sgd", grad_clip=None), 5, broken)
    for a in range(3):
        grads = optax.tree.sub(take(FIRST, a), GOAL)
        expected = jax.tree.map(lambda w, g: w - RATES[a] * g, take(FIRST, a), grads)  # noqa: B023
        for one, other in zip(*map(jax.tree.leaves, (take(found, a), expected)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


# --- what is refused ---


def frozen(rate):
    """Freeze the embedding, which has its name at the second level of what is trained."""

    def label(params):
        names = jax.tree_util.tree_map_with_path(lambda path, _: path[1].key, params)
        return jax.tree.map(lambda name: "still" if name == "embed" else "moves", names)

    return optax.partition({"moves": optax.adamw(rate), "still": optax.set_to_zero()}, label)


def by_rank(rate):
    return optax.partition(
        {"matrix": optax.adamw(rate), "vector": optax.sgd(rate)},
        lambda params: jax.tree.map(lambda x: "matrix" if x.shape[-1] > 4 else "vector", params),
    )


def checked(*overrides, **functions):
    config = load_config(CONFIG, overrides)
    with config.unlocked():
        for section, function in functions.items():
            config[section].optimizer = function
    check_optimizers(settings_of(config))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_adapters_is_refused(name):
    one, reason = REFUSED[name]
    with pytest.raises(ValueError, match=r"inner\.opt") as refused:
        if callable(one):
            checked(inner=one)
        else:
            checked(f"inner.optax_name={one}")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "section, made",
    [
        ("inner", MADE["inject_hyperparams"]),
        ("inner", MADE["contrib.reduce_on_plateau"]),
        ("inner", lambda rate: optax.MultiSteps(optax.sgd(rate), 4).gradient_transformation()),
        ("outer", MADE["contrib.schedule_free"]),
        pytest.param("outer", optax.lbfgs, marks=pytest.mark.long),
    ],
)
def test_what_trains_is_let_through(section, made):
    checked(**{section: made})


@pytest.mark.long
@pytest.mark.parametrize("name", [*NAMED, *MADE])
def test_what_trains_as_a_plain_loop_does_is_let_through(name):
    if name == "selective_transform":
        checked("inner.targets=q_proj", inner=MADE[name])  # its mask is for these
    elif name in NAMED:
        checked(f"inner.optax_name={name}", f"inner.optax_kwargs={NAMED[name]}")
    else:
        checked(inner=MADE[name])


@pytest.mark.parametrize(
    "made, reason",
    [
        # Each would have trained nothing, or something else, without a word.
        (lambda rate: optax.sgd(0.1), "does not reach"),
        (lambda rate: optax.scale(0.0), "trains nothing"),
        (lambda rate: optax.sgd(rate / 0), "not finite"),
        (lambda rate: optax.sgd(float(rate)), "ConcretizationTypeError"),
        (lambda rate: optax.sgd(rate) if rate > 0 else optax.identity(), "TracerBool"),
        (lambda rate: optax.stateless(lambda g, w: jax.tree.map(lambda x: x[0], g)), "update of"),
        (lambda rate: None, "returns NoneType, expected an optax.Grad"),
        (lambda rate: optax.sgd(-rate), "climbs"),
        (around(optax.masked, mask=only_a), "climbs"),  # adds the other gradients as they are
        (lambda rate: optax.chain(optax.scale_by_adam(), optax.scale(rate)), "climbs"),
        (lambda rate: optax.sgd(optax.warmup_cosine_decay_schedule(0, rate, 3, 9)), "is traced"),
        (contrib.muon, "dimension_numbers"),
    ],
)
def test_a_function_that_does_not_train_is_refused(made, reason):
    for section in ("inner", "outer"):
        with pytest.raises(ValueError, match=rf"{section}\.optimizer = .*{reason}"):
            checked(**{section: made})


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["inner.optax_name=adamww"], ["inner.optax_name = 'adamww'", "no function"]),
        (["inner.optax_name=scale_by_adam"], ["no optimizer", "'b1'"]),
        (["inner.optax_name=MultiSteps"], ["no function"]),
        (["outer.optax_name=contrib.sam"], ["outer.optax_name", "no optimizer"]),
        (["inner.optax_kwargs.momentum=0.9"], ["inner.optax_kwargs", "no momentum", "b1, b2"]),
        (["outer.optax_kwargs={'b3': 1}"], ["outer.optax_kwargs", "no b3"]),
        (["inner.optax_name=sgd", "inner.optax_kwargs={'weight_decay': 0.1}"], ["no weight_decay"]),
        (["inner.optax_kwargs.b1='much'"], ["inner.optax_name = 'adamw'", "fails"]),
        (["inner.optax_name=contrib.prodigy", "inner.warmup_steps=2"], ["warmup_steps", "of 0"]),
    ],
)
def test_a_mistake_is_named(overrides, words):
    with pytest.raises(ValueError) as refused:
        checked(*overrides)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "made, overrides, reason",
    [
        # What is tried is what the loop trains: the policy, and a value head beside it.
        (frozen, ["outer.update=full"], None),
        (by_rank, ["outer.objective=ppo"], "IndexError"),
        # A new state in each outer step, which has one batch; or one for the whole run.
        (around(lambda sgd: optax.MultiSteps(sgd, 8)), [], "outer step makes 2 updates"),
        (around(lambda sgd: optax.MultiSteps(sgd, 8)), ["outer.update=full"], None),
        # In bfloat16 its 0.999 is 1.
        (
            lambda rate: optax.inject_hyperparams(optax.adamw)(learning_rate=rate),
            ["outer.update=full", "model.dtype=bfloat16"],
            "not finite",
        ),
    ],
)
def test_it_is_tried_as_the_run_would_use_it(made, overrides, reason):
    if reason is None:
        return checked(*overrides, outer=made)
    with pytest.raises(ValueError, match=reason):
        checked(*overrides, outer=made)


def test_no_weight_decay_suits_an_optimizer_that_has_none():
    checked("inner.optax_name=sgd", "outer.optax_name=sgd")


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="momentum"):
        train(load_config(CONFIG, ["outer.optax_kwargs.momentum=0.9"]), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
