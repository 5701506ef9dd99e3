"""The same numbers on one device and on eight, however the mesh divides them."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from collectives import replica_groups
from jax.sharding import PartitionSpec
from one_device import one_device_mesh
from tiny_run import CONFIG as TINY_CONFIG
from tiny_run import run_loop

from seal_jax import keys, sharding
from seal_jax.bench.timing import count_compiles
from seal_jax.config import load_config
from seal_jax.config.setup import place_model, settings_of
from seal_jax.hosts.files import read_jsonl
from seal_jax.inner.packing import job_losses, pack
from seal_jax.inner.steps import Layout
from seal_jax.inner.texts import make_job, text_of
from seal_jax.inner.update import make_inner_update
from seal_jax.models import lora
from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.config import ModelConfig
from seal_jax.models.mesh_fit import check_divides, undivided
from seal_jax.models.model import Model
from seal_jax.models.transformer import forward, init_params
from seal_jax.objectives import make_objective
from seal_jax.optim import make_optimizer
from seal_jax.outer.answers import ask, mean_logp
from seal_jax.outer.policy_step import init_train_state
from seal_jax.outer.policy_update import make_policy_update
from seal_jax.sampling.call_shapes import plan_call
from seal_jax.sampling.draw import make_settings
from seal_jax.sampling.generate import generate
from seal_jax.sharding import (
    batch_sharding,
    leading,
    make_mesh,
    num_shards,
    param_shardings,
    to_device,
    to_host,
)
from seal_jax.types import AnswerSettings, Rollout

pytest_plugins = ["tiny_fixtures"]
CONFIG = ModelConfig(
    vocab_size=264,
    num_layers=1,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_length=256,
)
NUM_ADAPTERS = 8
# What divides the rest of a run, beside the model as it is by default ...
MORE_ROWS = (("rows", "data fsdp"), ("adapter", "data fsdp"), ("batch", "fsdp tensor"))
# ... and a model that every device has whole.
WHOLE = (
    *((name, "data fsdp tensor") for name in ("adapter", "rows", "batch")),
    *((name, "") for name in sharding.PARAM_AXES),
)
RULES = (("embed", ""), ("vocab", "fsdp tensor"), ("heads", "fsdp"), ("mlp", "tensor"))
MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"data": 1, "fsdp": 8},
    "tensor=8": {"data": 1, "tensor": 8},  # more parts than heads
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def model():
    params = init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(8 * x if x.ndim == 2 else x), params)
    return Model(CONFIG, params, ByteTokenizer())


def inner_arguments(model, mesh):
    """Return (params, adapters, batches) of an inner update, placed on the mesh."""
    encode = model.tokenizer.encode
    jobs = [
        make_job(
            [text_of(encode(f"thing {i} is red")), text_of(encode("so it is" * (1 + i % 2)))],
            num_epochs=2,
            batch_size=2,
            learning_rate=1e-2,
            key=(i,),
        )
        for i in range(NUM_ADAPTERS)
    ]
    batches = pack(
        jobs,
        tokens_per_step=512 // num_shards(mesh, model.config.rules),
        steps_per_call=4,
        pad_id=model.tokenizer.pad_id,
        num_shards=num_shards(mesh, model.config.rules),
        layout=Layout((32, 64)),
    )
    init = jax.jit(
        functools.partial(
            lora.init_adapters, CONFIG, rank=4, alpha=8.0, targets=("q_proj", "up_proj")
        )
    )
    adapters = init(keys.fold([(i,) for i in range(NUM_ADAPTERS)]))
    return (
        to_device(model.params, param_shardings(mesh, model.params, model.config.rules)),
        to_device(adapters, leading(mesh, "adapter", NUM_ADAPTERS, model.config.rules)),
        [to_device(batch, batch_sharding(mesh, model.config.rules)) for batch in batches],
    )


def compute(model, mesh):
    """Return what the three device stages make on `mesh`, on the host."""
    encode = model.tokenizer.encode
    params, adapters, batches = inner_arguments(model, mesh)
    with jax.transfer_guard("disallow"):
        update = make_inner_update(model.config, make_optimizer(), mesh=mesh)
        adapters, losses = update(params, adapters, batches)
        losses = job_losses(to_host(batches), to_host(losses), NUM_ADAPTERS)
        prompts = [[encode(f"thing {i}?"), encode("so?")] for i in range(NUM_ADAPTERS)]
        answers = ask(model, params, adapters, prompts, mesh, AnswerSettings(6, (), 16))
        golds = [[text_of(p + encode("red", start=False), len(p)) for p in g] for g in prompts]
        logps = mean_logp(model, params, adapters, golds, mesh=mesh)
        samples = generate(
            model.config,
            params,
            adapters,
            prompts,
            keys.fold([(7, i) for i in range(16)]),
            make_settings(16, temperature=1.0, top_p=0.9),
            mesh=mesh,
            stop_ids=[258],
            max_tokens=6,
            max_rows=16,
            pad_id=256,
        )
        return (to_host(adapters), losses), answers, logps, samples


@pytest.fixture(scope="module")
def expected(model):
    return compute(model, one_device_mesh())


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_logits_of_eight_devices_are_those_of_one(model, sizes):
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 12)).astype(np.int32)
    logits = jax.jit(functools.partial(forward, CONFIG))
    one, mesh = one_device_mesh(), make_mesh(**sizes)

    def compute(mesh):
        params = to_device(model.params, param_shardings(mesh, model.params))
        return logits(params, to_device(tokens, leading(mesh, "rows", len(tokens))))

    found, expected = compute(mesh), to_host(compute(one))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(to_host(found), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_eight_devices_give_what_one_gives(model, expected, sizes):
    assert_same(compute(model, make_mesh(**sizes)), expected)


def test_rows_that_share_a_prompt_are_divided_as_any(model):
    """8 prompts that 3 rows each continue: over 4 x 2 devices, as on one."""
    encode = model.tokenizer.encode
    prompts = [[encode(f"thing {i} is") for i in range(8) for _ in range(3)]]

    def write(mesh):
        params = to_device(model.params, param_shardings(mesh, model.params, CONFIG.rules))
        rows = plan_call(CONFIG, params, None, prompts, mesh, 6, 24).rows
        assert (rows.num_rows, rows.num_prompts) == (24, 8)
        rngs, settings = keys.fold([(7, i) for i in range(24)]), make_settings(24, temperature=1.0)
        sizes = {"max_tokens": 6, "max_rows": 24, "pad_id": 256}
        with jax.transfer_guard("disallow"):
            return generate(
                CONFIG, params, None, prompts, rngs, settings, mesh=mesh, stop_ids=[258], **sizes
            )

    found, expected = write(make_mesh(data=4, tensor=2)), write(one_device_mesh())
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert len(np.unique(found.tokens, axis=0)) > 8
    np.testing.assert_allclose(found.logp, expected.logp, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rules", [RULES, MORE_ROWS, WHOLE], ids=["model", "rows", "whole"])
def test_other_rules_give_the_same_numbers(model, expected, rules):
    divided = model._replace(config=dataclasses.replace(CONFIG, rules=rules))
    assert_same(compute(divided, make_mesh(data=2, fsdp=2, tensor=2)), expected)


def test_the_configs_rules_are_the_tables():
    assert dict(load_config(TINY_CONFIG).sharding) == sharding.RULES


@pytest.mark.parametrize(
    ("rules", "shards"),
    [
        ((), 2),  # the base is divided over the other two
        (WHOLE, 8),
        (MORE_ROWS, 1),  # over data, too
        ((*WHOLE, ("adapter", "data fsdp")), 4),
    ],
)
def test_a_population_falls_apart_over_axes_that_do_not_divide_the_base(rules, shards):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert num_shards(mesh, rules) == shards
    lanes = batch_sharding(mesh, rules).lanes
    assert 16 // lanes.shard_shape((1, 16))[1] == shards


@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"fsdp": 2, "tensor": 2}, {"fsdp": 4}], ids=str)
def test_who_shares_a_base_does_the_same_work_on_fewer_devices(model, sizes):
    """Twice the devices along `data` halve each one's work, and nothing crosses between the two."""
    flops = {}
    for data in (1, 2):
        mesh = make_mesh(data=data, **sizes, devices=jax.devices()[: 4 * data])
        update = jax.jit(make_inner_update(CONFIG, make_optimizer(), mesh=mesh))
        params, adapters, batches = inner_arguments(model, mesh)
        compiled = update.lower(params, adapters, batches[:1]).compile()
        flops[data] = compiled.cost_analysis()["flops"] * batches[0].lanes.shape[0]
        groups = replica_groups(compiled.as_text())
        assert groups and all(len({i // 4 for i in group}) == 1 for group in groups)
    assert flops[2] < 0.55 * flops[1]


def test_the_configs_rules_place_the_model():
    config = load_config(TINY_CONFIG, ("mesh.fsdp=2", "mesh.tensor=2", "sharding.heads="))
    mesh = make_mesh(**config.mesh)
    layer = place_model(settings_of(config), config.model.source, mesh).params["layers_0"]
    assert layer["attn"]["q_proj"]["kernel"].sharding.spec == PartitionSpec("fsdp", None)
    assert layer["mlp"]["up_proj"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")


def assert_same(found, expected):
    trained, answers, logps, samples = found

    def assert_close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.abs(y).max()))

    jax.tree.map(assert_close, trained, expected[0])
    assert answers == expected[1]
    assert len({text for group in answers for text in group}) > 2  # not all the same
    jax.tree.map(assert_close, logps, expected[2])
    np.testing.assert_array_equal(samples.tokens, expected[3].tokens)
    assert len(np.unique(samples.tokens, axis=0)) > 2
    jax.tree.map(assert_close, samples, expected[3])


def test_the_parts_of_a_population_do_not_talk(model):
    """With the base on every device, the inner loop has no collective at all."""
    mesh = make_mesh(data=8)
    update = jax.jit(make_inner_update(CONFIG, make_optimizer(), mesh=mesh))
    params, adapters, batches = inner_arguments(model, mesh)
    text = update.lower(params, adapters, batches[:1]).compile().as_text()
    assert "while" in text  # the scan is there
    for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert word not in text


@pytest.mark.parametrize(
    "settings",
    [
        ("mesh.fsdp=2", "mesh.tensor=2"),
        pytest.param(("inner.max_adapters=8",), marks=pytest.mark.long),
        pytest.param(("mesh.data=1", "mesh.fsdp=8"), marks=pytest.mark.long),
        # The model has 4 heads.
        pytest.param(("mesh.data=1", "mesh.tensor=8", "sharding.heads="), marks=pytest.mark.long),
        pytest.param(("mesh.tensor=2", "outer.update=full"), marks=pytest.mark.long),
        pytest.param(
            ("mesh.fsdp=2", "sharding.rows=data fsdp", "sharding.adapter=fsdp", "sharding.batch="),
            marks=pytest.mark.long,
        ),
    ],
    ids=" ".join,
)
def test_an_outer_step_on_eight_devices_is_that_on_one(finished, tmp_path, settings):
    small = ("outer.num_steps=1", "inner.tokens_per_step=96")
    run_loop(load_config(TINY_CONFIG, (*small, *settings)), tmp_path)
    expected = read_jsonl(finished / "edits.jsonl")[:4]  # of the first step
    for edit, other in zip(read_jsonl(tmp_path / "edits.jsonl"), expected, strict=True):
        assert (edit["text"], edit["kept"]) == (other["text"], other["kept"])
        assert edit["reward"] == pytest.approx(other["reward"], rel=1e-5)
        assert edit["loss_after"] == pytest.approx(other["loss_after"], rel=1e-5)


def test_every_kernel_is_divided_as_the_table_says(model):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    wide, narrow = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
    shardings = param_shardings(mesh, model.params)
    assert jax.tree.map(lambda sharding: sharding.spec, shardings) == {
        "embed": {"embedding": narrow},
        "final_norm": {"scale": PartitionSpec()},
        "layers_0": {
            "attn": {
                "k_proj": {"kernel": wide},
                "o_proj": {"kernel": narrow},
                "q_proj": {"kernel": wide},
                "v_proj": {"kernel": wide},
            },
            "attn_norm": {"scale": PartitionSpec()},
            "mlp": {
                "down_proj": {"kernel": narrow},
                "gate_proj": {"kernel": wide},
                "up_proj": {"kernel": wide},
            },
            "mlp_norm": {"scale": PartitionSpec()},
        },
    }
    kernel = to_device(model.params, shardings)["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 24)}


def test_an_optimizers_state_lies_where_its_parameters_lie(model):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = jax.eval_shape(optax.adam(1e-3).init, model.params)
    found = param_shardings(mesh, state)[0]
    expected = param_shardings(mesh, model.params)
    assert found.mu == found.nu == expected
    assert found.count.spec == PartitionSpec()


def test_a_size_that_its_axis_does_not_divide_stays_whole():
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    params = {
        "lm_head": {"kernel": np.zeros((6, 8))},
        "q_proj": {"kernel": np.zeros((6, 10))},
        "down_proj": {"kernel": np.zeros((5, 7))},
    }
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(mesh, params))
    assert specs == {
        "lm_head": {"kernel": PartitionSpec("fsdp", "tensor")},
        "q_proj": {"kernel": PartitionSpec("fsdp", None)},
        "down_proj": {"kernel": PartitionSpec(None, None)},
    }
    assert leading(mesh, "rows", 3).spec == PartitionSpec("data")
    assert leading(make_mesh(), "adapter", 16).spec == PartitionSpec("data")
    assert leading(make_mesh(), "adapter", 12).spec == PartitionSpec(None)


def test_a_vocabulary_that_stays_whole_is_said():
    mesh, odd = make_mesh(tensor=4), dataclasses.replace(CONFIG, vocab_size=258)
    assert undivided(mesh, CONFIG) == ""
    assert "4 parts do not divide its 258 tokens" in undivided(mesh, odd)


def test_a_models_rules_go_before_the_table(model):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    specs = jax.tree.map(lambda one: one.spec, param_shardings(mesh, model.params, RULES))
    assert specs["embed"]["embedding"] == PartitionSpec(("fsdp", "tensor"), None)
    assert specs["layers_0"]["attn"]["q_proj"]["kernel"] == PartitionSpec(None, "fsdp")
    assert specs["layers_0"]["mlp"]["down_proj"]["kernel"] == PartitionSpec("tensor", None)
    narrow = dataclasses.replace(CONFIG, mlp_dim=42, rules=(("mlp", "fsdp tensor"),))
    with pytest.raises(ValueError, match="mesh.fsdp = 2 x mesh.tensor = 2 does not divide the 42 "):
        check_divides(mesh, narrow)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tensor": 8}, "mesh.tensor = 8 does not divide the 4 heads"),
        ({"data": 1, "fsdp": 8}, None),
        ({"tensor": 4}, None),  # 2 key and value heads are divided within
    ],
    ids=str,
)
def test_an_axis_that_does_not_divide_the_model_is_refused(sizes, words):
    mesh = make_mesh(**sizes)
    if words is None:
        return check_divides(mesh, CONFIG)
    with pytest.raises(ValueError, match=words):
        check_divides(mesh, CONFIG)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"embed_dim": 30}, "mesh.fsdp = 4 does not divide the 30 dimensions of the model"),
        ({"mlp_dim": 47}, "mesh.tensor = 2 does not divide the 47 dimensions of the MLP"),
    ],
    ids=str,
)
def test_what_an_axis_does_not_divide_is_named_with_its_size(changed, words):
    config = dataclasses.replace(CONFIG, **changed)
    with pytest.raises(ValueError, match=words):
        check_divides(make_mesh(fsdp=4, tensor=2), config)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "tensor": 8}, (1, 1, 8)),
    ],
)
def test_minus_one_takes_the_rest(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    "sizes",
    [{"data": 3}, {"data": 16}, {"fsdp": 3}, {"data": 4}, {"data": -1, "fsdp": -1}, {"tensor": 16}],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_refused_with_both_sides(sizes):
    with pytest.raises(ValueError, match="does not fit 8 devices") as error:
        make_mesh(**sizes)
    for name, size in sizes.items():
        assert f"{name}={size}" in str(error.value)


OBJECTIVES = {
    "rest_em": {},
    "reinforce": {"entropy_coef": 0.1},
    "rloo": {"kl_coef": 0.1, "update": "full"},
    "grpo": {"kl_coef": 0.1},
    "ppo": {"entropy_coef": 0.1, "kl_coef": 0.1, "update": "full"},
}


def policy_update(model, mesh, name, *, update="lora", **penalties):
    """Return the policy after an update on rows of several lengths, and its metrics."""
    objective = make_objective(name)
    # Smooth in the gradient: with its usual eps, Adam turns a gradient's last bits into steps.
    optimizer = make_optimizer(optax_name="adamw", optax_kwargs={"eps": 1e-2})
    kind = {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "up_proj"), "update": update}
    sizes = {"learning_rate": 0.01, "num_epochs": 2, "batch_size": 8, "microbatch_size": 8}
    train = make_policy_update(
        CONFIG, objective, optimizer, mesh=mesh, seed=0, **sizes, **kind, **penalties
    )
    params = to_device(model.params, param_shardings(mesh, model.params))
    rng = np.random.default_rng(0)
    tokens, ends = rng.integers(1, 256, (12, 24)).astype(np.int32), rng.integers(8, 25, (12, 1))
    loss_mask = (np.arange(24) >= 5) & (np.arange(24) < ends)
    logp = np.where(loss_mask, -rng.random((12, 24)), 0).astype(np.float32)
    advantages = rng.normal(size=12).astype(np.float32)
    with jax.transfer_guard("disallow"):
        head = objective.gae is not None
        state = init_train_state(
            CONFIG, params, optimizer, mesh=mesh, learning_rate=0.01, value_head=head, **kind
        )
        rollout = Rollout(tokens, logp, loss_mask)
        state, _ = train(state, rollout, advantages, reference=params)
        with count_compiles() as compiled:
            rollout = rollout._replace(step=1)
            state, metrics = train(state, rollout, advantages, reference=params)
        assert not compiled
    return state, metrics


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, marks=() if len(sizes) == 3 else pytest.mark.long, id=name)
        for name, sizes in MESHES.items()
    ],
)
def test_every_objectives_update_on_eight_devices_is_that_on_one(model, sizes, name):
    mesh = make_mesh(**sizes)
    found, metrics = policy_update(model, mesh, name, **OBJECTIVES[name])
    expected, known = policy_update(model, one_device_mesh(), name, **OBJECTIVES[name])

    def assert_close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1, np.abs(y).max()))

    jax.tree.map(assert_close, to_host(found.params), to_host(expected.params))
    jax.tree.map(assert_close, to_host(found.opt_state), to_host(expected.opt_state))
    assert metrics == pytest.approx(known, rel=1e-4)
    for x, where in zip(
        jax.tree.leaves(found.params),
        jax.tree.leaves(param_shardings(mesh, model.params)),
        strict=True,
    ):
        assert x.sharding.is_equivalent_to(where, x.ndim)


def test_rows_that_train_the_policy_are_divided_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert leading(mesh, "batch", 8, before=1).spec == PartitionSpec(None, ("data", "fsdp"))
    assert leading(mesh, "batch", 6, before=1).spec == PartitionSpec(None, None)
