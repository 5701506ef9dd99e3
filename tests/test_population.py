"""How many adapters fit: what the compiler counts, and what follows from it."""

import dataclasses
import functools
import math

import jax
import pytest
from tiny_run import CONFIG as TINY_CONFIG
from tiny_run import run_loop

from seal_jax.config.load import ConfigError, load_config
from seal_jax.config.setup import make_stages, settings_of
from seal_jax.hosts.files import read_jsonl
from seal_jax.hosts.memory import device_bytes
from seal_jax.inner.packing import empty_batch
from seal_jax.inner.population import (
    Needs,
    Population,
    fit_adapters,
    fit_population,
    largest_shapes,
    program_bytes,
)
from seal_jax.inner.update import InnerSetup, make_inner_loop
from seal_jax.models.lora import init_adapters
from seal_jax.optim import make_optimizer
from seal_jax.outer.problems import split_problems
from seal_jax.planning.run_estimate import describe, estimate_run
from seal_jax.sharding import (
    batch_sharding,
    leading,
    make_mesh,
    num_shards,
    param_shardings,
    shaped,
    tree_bytes,
)

pytest_plugins = ["tiny_fixtures"]
# Every test below waits for a compiler: one layer, and often the smallest optimizer.
LORA = {"rank": 16, "alpha": 32.0, "targets": ("q_proj", "v_proj")}
MESHES = {"data=1": (1, 1, 1), "data=8": (8, 1, 1), "data=2 fsdp=2 tensor=2": (2, 2, 2)}


@pytest.fixture(scope="module")
def small(tiny):
    config, params = tiny
    params = {name: value for name, value in params.items() if name != "layers_1"}
    return dataclasses.replace(config, num_layers=1), params


def mesh_of(sizes):
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh(sizes, axes, (jax.sharding.AxisType.Auto,) * 3)


def fresh(config, mesh, num_adapters):
    """Return adapters as ShapeDtypeStructs."""
    init = functools.partial(init_adapters, config, **LORA)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_adapters))
    return shaped(jax.eval_shape(init, keys), leading(mesh, "adapter", num_adapters))


def base(params, mesh):
    return shaped(params, param_shardings(mesh, params))


def count(small, mesh, num_adapters, longest=256, optax_name="adamw", **options):
    """Return the bytes of an inner update with so many adapters, on each device."""
    config, params = small
    optimizer = make_optimizer(optax_name=optax_name)
    loop = make_inner_loop(InnerSetup(config, optimizer, mesh=mesh, **options))
    batch = empty_batch(largest_shapes(longest, 256)[-1], num_adapters, 2, num_shards(mesh))
    batch = shaped(batch, batch_sharding(mesh))
    adapters = fresh(config, mesh, num_adapters)
    return program_bytes(loop, base(params, mesh), adapters, batch)


@pytest.mark.parametrize(
    ("sizes", "options", "copies"),
    [
        *((sizes, {}, 4) for sizes in MESHES.values()),
        ((1, 1, 1), {"accumulation": 2}, 5),
    ],
    ids=[*MESHES, "accumulation"],
)
def test_64_adapters_add_only_adapters_to_the_memory_of_the_fewest(small, sizes, options, copies):
    """As many copies of its numbers: the first, the trained, two moments, summed gradients. And
    while there are fewer adapters than a step has places, a copy and a gradient for each place.
    """
    mesh = mesh_of(sizes)
    few = mesh.shape["data"]
    added = count(small, mesh, 64, **options) - count(small, mesh, few, **options)
    each = tree_bytes(fresh(small[0], mesh, few)) / (few // num_shards(mesh))
    adapters = (64 - few) // num_shards(mesh)
    most_places = largest_shapes(256, 256)[-1].num_chunks
    places = min(most_places, 64 // num_shards(mesh)) - 1
    # Where the base is divided too, the compiler may divide a step's adapters further, and copy.
    least, most = (0.9, 1.1) if mesh.size == few else (0.7, 1.4)
    assert least * copies * adapters * each < added
    assert added < most * (copies * adapters + 2 * places) * each


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("most", [1, 5, 64])
@pytest.mark.parametrize("room", [150, 199, 200, 201, 400, 10_000])
def test_fit_adapters_finds_the_largest_that_fits(room, most, multiple):
    asked = []

    def needed(number):
        asked.append(number)
        return 100 + 10 * number

    fitting = [n for n in range(multiple, most + multiple, multiple) if 100 + 10 * n <= room]
    options = {"room": room, "most": most, "multiple": multiple}
    assert fit_adapters(needed, lambda n: 10 * n, **options) == (
        fitting[-1],
        100 + 10 * fitting[-1],
    )
    assert len(asked) <= 2


def test_fit_adapters_asks_for_fewer_where_the_compiler_refuses():
    def needed(number):
        return math.inf if number > 20 else 10 * number

    assert fit_adapters(needed, lambda n: n, room=1000, most=64) == (16, 160)


@pytest.mark.parametrize(("found", "words"), [(3e9, "3 GB"), (math.inf, "more than")])
def test_nothing_fits(found, words):
    with pytest.raises(ValueError, match="the inner loop does not fit") as error:
        fit_adapters(lambda number: found, float, room=1.5e9, most=64)
    keys = ("inner.tokens_per_step", "inner.remat", "inner.quantize", "mesh.fsdp", "mesh.tensor")
    for word in (words, "one adapter needs", "1.5 GB", *keys):
        assert word in str(error.value)


def needs(small, limit, sizes=(1, 1, 1), resident=0):
    mesh, optimizer = mesh_of(sizes), make_optimizer(optax_name="sgd")
    inner = settings_of(load_config(TINY_CONFIG, ())).inner
    inner = inner._replace(**LORA, accumulation=1, tokens_per_step=256, steps_per_call=2)
    loop = make_inner_loop(InnerSetup(small[0], optimizer, mesh=mesh))
    return Needs(loop, inner, base(small[1], mesh), resident, limit)


def test_the_number_follows_from_the_limit(small, capsys):
    room = count(small, mesh_of((1, 1, 1)), 4, optax_name="sgd")
    given = needs(small, room + 10**6, resident=10**6)
    found = fit_population(given, 200, Population(64))
    assert found.number == 4
    assert capsys.readouterr().out.startswith("inner loop: 4 adapters at once (")
    # The same steps: said once.
    assert fit_population(given, 256, found) == found and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="one adapter needs .* MB .*inner.tokens_per_step"):
        fit_population(needs(small, 10**6), 200, Population(64))


def test_longer_rows_leave_room_for_fewer(small, capsys):
    room = count(small, mesh_of((1, 1, 1)), 8, longest=512, optax_name="sgd")
    given = needs(small, room)
    found = fit_population(given, 256, Population(64))
    assert found.number == 64
    found = fit_population(given, 300, found)
    assert found.number == 8
    for longest in (100, 512):
        assert fit_population(given, longest, found).number == 8  # it never grows
    assert capsys.readouterr().out.count("\n") == 2


def test_a_population_is_a_multiple_of_what_it_is_divided_by(small):
    sizes = (8, 1, 1)
    limit = count(small, mesh_of(sizes), 16, optax_name="sgd")
    given = needs(small, limit + 100, sizes=sizes)
    assert fit_population(given, 200, Population(64)).number == 16


def test_cpu_devices_share_the_hosts_memory():
    alone, shared = device_bytes(mesh_of((1, 1, 1))), device_bytes(make_mesh())
    assert shared == pytest.approx(alone / 8, abs=1)
    assert shared > 1e6


def test_a_run_that_counts_for_itself_gives_what_a_fixed_number_gives(
    finished, one_device, tmp_path, capsys
):
    config = load_config(TINY_CONFIG, ("inner.max_adapters=-1", "outer.num_steps=1"))
    stages = make_stages(settings_of(config))
    problems = split_problems(stages.settings, stages.task)
    assert "8 inner runs, up to 8 at once" in describe(stages, *problems)
    assert "inner loop: 8 adapters at once" in capsys.readouterr().out
    settings = stages.settings
    external = settings.eval._replace(texts={"a": "a.jsonl", "b": "b.jsonl"}, num_seeds=3)
    without, both = (
        estimate_run(stages._replace(settings=settings._replace(eval=held)), *problems)
        for held in (external._replace(texts={}), external)
    )
    more = 2 * len(problems[1]) * external.num_edits * 3
    assert more and both.num_held_out_runs == without.num_held_out_runs + more
    assert both.num_tokens > without.num_tokens
    further = settings._replace(eval=settings.eval._replace(objectives=("rloo",)))
    said = describe(stages._replace(settings=further), *problems)
    assert "8 inner runs for each of 2 policies, up to 8 at once" in said
    run_loop(config, tmp_path)
    expected = read_jsonl(finished / "edits.jsonl")[:4]  # of the first step
    for edit, other in zip(read_jsonl(tmp_path / "edits.jsonl"), expected, strict=True):
        assert (edit["text"], edit["kept"]) == (other["text"], other["kept"])
        assert edit["reward"] == pytest.approx(other["reward"], rel=1e-5)


@pytest.mark.parametrize("number", ["0", "-2", "auto"])
def test_the_config_takes_a_number_or_minus_one(number):
    with pytest.raises(ConfigError, match="an integer >= 1 or -1"):
        load_config(TINY_CONFIG, (f"inner.max_adapters={number}",))
