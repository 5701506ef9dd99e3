"""Sequences side by side, each with kernels of its own, against one model after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from one_device import one_device_mesh

from seal_jax import keys
from seal_jax.inner.packing import Layout, job_losses, pack
from seal_jax.inner.texts import make_job, text_of
from seal_jax.inner.update import make_inner_update
from seal_jax.models import lora
from seal_jax.models import own_kernels as own_kernels_module
from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.config import ModelConfig
from seal_jax.models.model import Model
from seal_jax.models.own_kernels import (
    add_each,
    deltas_of,
    merge_each,
    model_at,
    num_own,
    own_kernels,
)
from seal_jax.models.quantize import quantize_params
from seal_jax.models.transformer import forward, init_params
from seal_jax.optim import make_optimizer
from seal_jax.outer.answers import mean_logp
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

S, G = 4, 2  # sequences; adapters of each
TARGETS = ("q_proj", "down_proj")
CONFIG = ModelConfig(
    vocab_size=264,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    max_length=128,
)
TOKENS = np.random.default_rng(0).integers(0, 256, (S * G, 5)).astype(np.int32)
LOGITS = jax.jit(functools.partial(forward, CONFIG))


def random_adapters(seed, num, size=0.3):
    rng = np.random.default_rng(seed)
    weights = {}
    for target, (fan_in, fan_out) in lora.target_shapes(CONFIG, TARGETS).items():
        a, b = (
            rng.normal(0, size, (num, CONFIG.num_layers, 2, fan)).astype(np.float32)
            for fan in (fan_in, fan_out)
        )
        weights.setdefault(lora.TARGETS[target], {})[target] = {"a": a, "b": b}
    return lora.Adapters(weights, np.linspace(0.5, 2, num, dtype=np.float32))


@pytest.fixture(scope="module")
def base():
    params = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, params)


@pytest.fixture(scope="module")
def own(base):
    return merge_each(own_kernels(base, TARGETS, S), random_adapters(0, S))


@pytest.fixture(scope="module")
def models(base):
    """Return the models of `own` one by one, as merging an adapter makes them."""
    merge = jax.jit(lora.merge)
    return [merge(base, random_adapters(0, S), s) for s in range(S)]


def logits_of(params, tokens, adapters=None):
    return np.asarray(LOGITS(params, tokens, None, None, adapters))


def rows_of(s):
    return slice(s * G, (s + 1) * G)


def test_each_model_is_what_merging_one_adapter_makes(base, own, models):
    assert num_own(base) is None and num_own(own) == S
    for s, model in enumerate(models):
        found = model_at(own, s)
        assert jax.tree.structure(found) == jax.tree.structure(model)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(model), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    with pytest.raises(IndexError, match="sequence 4: there are kernels of 4"):
        model_at(own, S)
    with pytest.raises(IndexError, match="kernels of 0 sequences"):
        model_at(base, 0)


@pytest.mark.parametrize("num_adapters", [0, S * G])
def test_logits_are_those_of_each_model(own, models, num_adapters):
    adapters = random_adapters(1, num_adapters) if num_adapters else None
    found = logits_of(own, TOKENS, adapters)
    for s, model in enumerate(models):
        mine = adapters and lora.take(adapters, rows_of(s))
        expected = logits_of(model, TOKENS[rows_of(s)], mine)
        np.testing.assert_allclose(found[rows_of(s)], expected, rtol=0, atol=1e-4)


def test_a_model_in_half_precision_computes_in_it(base):
    half = jax.tree.map(lambda x: x.astype("bfloat16"), base)
    own = merge_each(own_kernels(half, TARGETS, S), random_adapters(0, S))
    assert {str(x.dtype) for x in jax.tree.leaves(own) if x.ndim == 3} == {"float32"}
    found = logits_of(own, TOKENS[::G])
    for s in range(S):
        model = model_at(own, s)
        assert {str(x.dtype) for x in jax.tree.leaves(model)} == {"bfloat16"}
        expected = logits_of(model, TOKENS[s * G : s * G + 1])[0]
        np.testing.assert_allclose(found[s], expected, rtol=0, atol=0.03 * np.abs(expected).max())
        assert np.corrcoef(found[s].ravel(), expected.ravel())[0, 1] > 0.9999


def test_the_gradient_of_a_kernel_is_that_of_its_sequence(own, models):
    weights = np.random.default_rng(1).normal(size=(S * G, 5, CONFIG.vocab_size))

    @jax.jit
    @jax.grad
    def grads(params, tokens, weights):
        return (forward(CONFIG, params, tokens) * weights).sum()

    found = grads(own, TOKENS, weights.astype(np.float32))
    expected = [
        grads(model, TOKENS[rows_of(s)], weights[rows_of(s)].astype(np.float32))
        for s, model in enumerate(models)
    ]
    for i in range(CONFIG.num_layers):
        for target in TARGETS:
            block = lora.TARGETS[target]
            theirs = [x[f"layers_{i}"][block][target]["kernel"] for x in expected]
            mine = found[f"layers_{i}"][block][target]["kernel"]
            scale = float(np.abs(theirs).max())
            np.testing.assert_allclose(mine, np.stack(theirs), rtol=0, atol=1e-5 * scale)


def prompts_of(model):
    questions = ("who built it?", "when?", "of what?")
    return [[model.tokenizer.encode(f"{s} {question}") for question in questions] for s in range(S)]


def write(model, params, prompts, mesh, adapters=None, first=0):
    """Return what is written, two of three texts sampled; rows have keys of their own number."""
    num = sum(map(len, prompts))
    temperature = np.resize(np.array([0.0, 1.0, 1.0], np.float32), num)
    return generate(
        CONFIG,
        params,
        adapters,
        prompts,
        keys.fold([(first + i,) for i in range(num)]),
        make_settings(num, temperature=0.0)._replace(temperature=temperature),
        mesh=mesh,
        stop_ids=model.tokenizer.stop_ids,
        max_tokens=6,
        max_rows=S * 3,
        pad_id=model.tokenizer.pad_id,
    )


def test_each_model_writes_and_scores_its_own_texts(own, models):
    model, mesh = Model(CONFIG, own, ByteTokenizer()), one_device_mesh()
    prompts = prompts_of(model)
    assert plan_call(CONFIG, own, None, prompts, mesh, 6, S * 3).turned
    samples = write(model, own, prompts, mesh)
    texts = [[text_of(p + p, len(p)) for p in group] for group in prompts]
    found = mean_logp(model, own, None, texts, mesh=mesh)
    for s, params in enumerate(models):
        alone = write(model, params, prompts[s : s + 1], mesh, first=3 * s)
        rows = slice(3 * s, 3 * s + 3)
        np.testing.assert_array_equal(samples.tokens[rows], alone.tokens)
        np.testing.assert_allclose(samples.logp[rows], alone.logp, rtol=0, atol=1e-4)
        expected = mean_logp(model, params, None, texts[s : s + 1], mesh=mesh)[0]
        np.testing.assert_allclose(found[s], expected, rtol=0, atol=1e-5)
    assert len({tuple(row) for row in samples.tokens.tolist()}) > 2 * S


def make_jobs(model):
    encode = model.tokenizer.encode
    return [
        make_job(
            [text_of(encode(f"thing {s} is red")), text_of(encode("so it is" * (1 + s % 2)))],
            num_epochs=1 + s % 2,
            batch_size=1,
            learning_rate=0.5,
            key=(s,),
        )
        for s in range(S)
    ]


def side_by_side(jobs, num_shards=1):
    """Pack jobs so that each has array rows of its own; lanes and tokens count within a shard."""
    options = {"tokens_per_step": 32, "steps_per_call": 4, "layout": Layout((32,))}
    batches = []
    for batch in pack(jobs, num_shards=len(jobs), **options):
        num_steps, num_tokens = len(batch.tokens), batch.tokens[0].size // len(jobs)
        place = np.arange(len(jobs)).reshape(num_shards, -1)  # of the jobs, one lane each
        place = np.broadcast_to(place % place.shape[1], (num_steps, *place.shape))
        tokens = batch.chunk_tokens.reshape(*place.shape, -1)
        empty, tokens = tokens == num_tokens, tokens + place[..., None] * num_tokens
        tokens = np.where(empty, place.shape[-1] * num_tokens, tokens)
        lanes = batch.lanes.reshape(place.shape)
        order = np.argsort(lanes < 0, axis=-1, kind="stable")  # those in use come first
        own_lane = np.argsort(order, axis=-1)
        chunks = batch.chunk_lanes.shape[1] // len(jobs)
        batches.append(
            batch._replace(
                lanes=np.take_along_axis(lanes, order, axis=-1).reshape(batch.lanes.shape),
                chunk_lanes=own_lane.repeat(chunks, axis=-1).reshape(batch.chunk_lanes.shape),
                chunk_tokens=tokens.reshape(batch.chunk_tokens.shape),
            )
        )
    return batches


def first_adapters():
    rngs = keys.fold([(9, s) for s in range(S)])
    return lora.init_adapters(CONFIG, rngs, rank=2, alpha=4.0, targets=TARGETS)


def test_adapters_train_each_on_its_own_model(own, models):
    model, adapters = Model(CONFIG, own, ByteTokenizer()), first_adapters()
    update = make_inner_update(CONFIG, make_optimizer(optax_name="sgd"))
    jobs = make_jobs(model)
    batches = side_by_side(jobs)
    new, losses = update(own, adapters, batches)
    found = job_losses(batches, to_host(losses), S)
    for s, params in enumerate(models):
        alone = side_by_side(jobs[s : s + 1])
        expected, losses = update(params, lora.take(adapters, slice(s, s + 1)), alone)
        np.testing.assert_allclose(found[s], job_losses(alone, to_host(losses), 1)[0], rtol=1e-4)
        mine = lora.take(new, slice(s, s + 1))
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
    assert {len(values) for values in found} == {2, 4}
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(new.weights))


def on_mesh(base, mesh):
    """Return what training and then asking gives, on the host."""
    model, adapters = Model(CONFIG, base, ByteTokenizer()), random_adapters(0, S)
    params = to_device(base, param_shardings(mesh, base))
    own = own_kernels(params, TARGETS, S, mesh)
    own = merge_each(own, to_device(adapters, leading(mesh, "adapter", S)))
    kernel = own["layers_0"]["attn"]["q_proj"]["kernel"]
    batches = side_by_side(make_jobs(model), num_shards(mesh))
    placed = [to_device(batch, batch_sharding(mesh)) for batch in batches]
    trained = to_device(first_adapters(), leading(mesh, "adapter", S))
    prompts = prompts_of(model)
    texts = [[text_of(p + p, len(p)) for p in group] for group in prompts]
    with jax.transfer_guard("disallow"):
        update = make_inner_update(CONFIG, make_optimizer(optax_name="sgd"), mesh=mesh)
        trained, losses = update(own, trained, placed)
        merged = merge_each(own, trained)
        logps = mean_logp(model, merged, None, texts, mesh=mesh)
        samples = write(model, merged, prompts, mesh)
    return kernel.sharding, job_losses(batches, to_host(losses), S), logps, samples


def test_eight_devices_give_what_one_gives(base):
    _, *expected = on_mesh(base, one_device_mesh())
    sharding, *found = on_mesh(base, make_mesh(data=2, fsdp=2, tensor=2))
    assert sharding.spec == PartitionSpec("data", "fsdp", "tensor")
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(found[2].tokens, expected[2].tokens)


def test_sequences_that_the_mesh_does_not_divide_are_refused_in_training(base):
    mesh = make_mesh(data=8)
    own = own_kernels(base, TARGETS, S, mesh)  # whole on each device
    model = Model(CONFIG, base, ByteTokenizer())
    batches = pack(make_jobs(model) * 2, num_shards=8, layout=Layout((32, 64)), tokens_per_step=64)
    with pytest.raises(ValueError, match="kernels of 4 sequences on 8 parts of the mesh"):
        make_inner_update(CONFIG, make_optimizer(), mesh=mesh)(
            own, random_adapters(0, 2 * S), batches
        )


def test_many_edits_sum_up_as_exactly_as_float32_can(base):
    half = jax.tree.map(lambda x: x.astype("bfloat16"), base)
    params, factor = own_kernels(half, TARGETS, S), np.array([1, 0.5, 0, 2], np.float32)
    edits = [random_adapters(seed, S, size=0.03) for seed in range(20)]
    for edit in edits:
        params = merge_each(params, edit, factor)
    for target in TARGETS:
        block = lora.TARGETS[target]
        for i in range(CONFIG.num_layers):
            first = np.asarray(half[f"layers_{i}"][block][target]["kernel"], np.float64)
            total = np.zeros((S, *first.shape)) + first
            for edit in edits:
                ab = edit.weights[block][target]
                delta = np.einsum("srd,srf->sdf", ab["a"][:, i], ab["b"][:, i], dtype=np.float64)
                total += (factor * edit.scale)[:, None, None] * delta
            found = params[f"layers_{i}"][block][target]["kernel"]
            largest = np.abs(total).max()
            np.testing.assert_allclose(found, total, rtol=0, atol=20 * 2**-24 * largest)
            assert np.array_equal(found[2], first)


def test_a_refused_edit_changes_nothing_whatever_it_is(own):
    edit = random_adapters(3, S)
    second = np.arange(S).reshape(-1, 1, 1, 1) == 1
    broken = jax.tree.map(lambda x: np.where(second, np.nan, x), edit.weights)
    factor = np.array([1, 0, 1, 1], np.float32)
    found = merge_each(own, edit._replace(weights=broken), factor)
    expected = merge_each(own, edit, factor)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def test_changes_of_whole_kernels_add_up_as_merging_does(own):
    edit = random_adapters(3, S)
    found, expected = add_each(own, deltas_of(edit)), merge_each(own, edit)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_what_cannot_be_is_refused(base, own):
    with pytest.raises(ValueError, match="quantized params"):
        own_kernels(quantize_params(base, "int8"), TARGETS, S)
    with pytest.raises(ValueError, match="for each of 4 sequences already"):
        own_kernels(own, TARGETS, S)
    for targets, num in (((), S), (("head",), S), (TARGETS, 0)):
        with pytest.raises(ValueError, match="at least one sequence, for some of q_proj"):
            own_kernels(base, targets, num)
    for params, count in ((base, S), (own, 1), (own, 2 * S)):
        with pytest.raises(ValueError, match=rf"of shapes \[\({count},\)\]: expected"):
            merge_each(params, random_adapters(1, count))
        with pytest.raises(ValueError, match=rf"of shapes \[\({count},\)\]: expected"):
            add_each(params, deltas_of(random_adapters(1, count)))
    with pytest.raises(ValueError, match=r"of shapes \[\(1,\), \(4,\)\]: expected \[\(4,\)\]"):
        merge_each(own, random_adapters(1, S), np.ones(1, np.float32))
    part = own_kernels(base, TARGETS[:1], S)
    with pytest.raises(ValueError, match="kernels of down_proj are shared"):
        merge_each(part, random_adapters(1, S))


def test_rows_that_would_take_anothers_kernel_are_refused(own):
    model, mesh = Model(CONFIG, own, ByteTokenizer()), one_device_mesh()
    with pytest.raises(ValueError, match="6 rows: expected a multiple of the 4 sequences"):
        logits_of(own, TOKENS[:6])
    with pytest.raises(ValueError, match="2 adapters: expected a multiple of the 4 sequences"):
        logits_of(own, TOKENS, random_adapters(0, 2))
    two = [[[1, 2], [3]], [[4], [5]]]
    for adapters, words in ((None, "of the 4 sequences"), (random_adapters(0, S), "adapter, 4")):
        with pytest.raises(ValueError, match=rf"rows in 2 groups: .* {words}"):
            write(model, own, two, mesh, adapters)
        texts = [[text_of([1, 2])] * 2] * 2
        with pytest.raises(ValueError, match=rf"rows in 2 groups: .* {words}"):
            mean_logp(model, own, adapters, texts, mesh=mesh)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_a_product_and_its_gradients_are_those_of_each_sequence(dtype, device, monkeypatch):
    """On CPUs they are taken one after another, elsewhere at once."""
    monkeypatch.setattr(own_kernels_module, "platform", lambda: device)
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(S * 3, n)), dtype) for n in (16, 24))
    kernel = jnp.asarray(rng.normal(size=(S, 16, 24)), jnp.float32)
    y, pull_back = jax.vjp(own_kernels_module.each_product, x, kernel)
    d_x, d_kernel = pull_back(g)
    assert (y.dtype, d_x.dtype, d_kernel.dtype) == (dtype, dtype, "float32")
    xs, gs = (np.asarray(v, np.float64).reshape(S, 3, -1) for v in (x, g))
    ks = np.asarray(kernel.astype(dtype), np.float64)
    for found, contract, operands in (
        (y, "std,sdf->stf", (xs, ks)),
        (d_x, "stf,sdf->std", (gs, ks)),
        (d_kernel, "std,stf->sdf", (xs, gs)),
    ):
        expected = np.einsum(contract, *operands).reshape(found.shape)
        tolerance = 1e-5 if found.dtype == np.float32 else 0.01 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, 0, tolerance)
