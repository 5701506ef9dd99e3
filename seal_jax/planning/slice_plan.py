"""`seal-jax plan`: whether a config fits a slice, what its programs cost there, and its hours.

  peak = resident + arguments + temporaries + results - what results overwrite

"by shapes" is what the arguments would take without the compiler's padding.

The programs are compiled for the slice, never run. Their times are rooflines: the longest of what
the products, the memory and the links between chips need at full speed, as if all else were free.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from seal_jax.config.setup import resident_bytes
from seal_jax.hosts.console import progress
from seal_jax.hosts.memory import SHARE, device_bytes
from seal_jax.models.divisible import check_divides, undivided
from seal_jax.planning.chips import Chip, find_slice
from seal_jax.planning.program_costs import collective_bytes, moved_bytes, product_flops
from seal_jax.planning.run_estimate import EFFICIENCY, matmul_rate
from seal_jax.planning.stage_programs import Lengths, Program, model_shapes, programs
from seal_jax.sharding import make_mesh, num_shards
from seal_jax.sources import config_of
from seal_jax.types import Settings

_ADVICE = {
    "sample.max_rows": "lower sample.max_rows or sample.max_tokens",
    "inner.max_adapters": "lower inner.max_adapters or inner.tokens_per_step, or set"
    " inner.remat=full or inner.quantize=int8",
    "outer.microbatch_size": "lower outer.microbatch_size, or set outer.remat=full",
}

# The programs that have as many rows or adapters as the key of the config says.
_BOUNDED = ("decode", "inner step", "policy update")


class Cost(NamedTuple):
    """What one program needs of a device; bytes, operations and seconds are of one step."""

    program: Program
    memory: dict[str, float]  # bytes by kind
    flops: float
    moved: float  # bytes from and to the device's memory
    collectives: dict[str, float]  # bytes by kind
    seconds: float
    bound: str  # what takes the longest: compute, memory or links
    largest: int  # what the config's key could be
    refused: str = ""  # what XLA said, if it compiled nothing


def plan_slice(settings: Settings, topology: str, lengths: Lengths) -> tuple[list[str], list[str]]:
    """Return the lines of a plan, and what does not fit.

    Args:
      topology: 'v5e:4x4' or the like, see chips.py; 'here' is for the devices of this process.

    Raises:
      ValueError: there is no such slice, mesh or model.
    """
    chip, devices = (None, None) if topology == "here" else find_slice(topology)
    mesh = make_mesh(**settings.mesh, devices=devices)
    if chip is None:
        unlimited = math.inf
        memory = device_bytes(mesh) / SHARE
        chip = Chip(jax.devices()[0].device_kind, matmul_rate(), memory, unlimited, unlimited)
    model = model_shapes(settings, config_of(settings.model.source), mesh)
    check_divides(mesh, model.config)
    resident = resident_bytes(settings, model, mesh)
    found = list(programs(settings, model, mesh, lengths))
    bar = progress(found, f"plan for {topology}", "program")  # minutes, for a large model
    costs = [measure(program, mesh, chip, resident) for program in bar]
    limit = SHARE * chip.memory
    complaints = [
        f"{cost.program.name} does not fit: it needs {_gb(cost.memory['peak'])} a device, and there"
        f" are {_gb(limit)} to use{cost.refused and f' ({cost.refused})'}."
        f" {_ADVICE[cost.program.key].capitalize()}, or divide the model"
        " over more devices (mesh.fsdp, mesh.tensor)"
        for cost in costs
        if cost.memory["peak"] > limit
    ]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(model.params))
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"{settings.model.source}: {count / 1e6:,.0f}M parameters in {settings.model.dtype} on"
        f" {mesh.size} x {chip.name} ({sizes})",
        f"each device has {_gb(chip.memory)}, {_gb(limit)} of it to use; {_gb(resident)} are taken"
        " by what stays: the first policy, the trained one's optimizer",
        *_table(costs),
        *([whole] if (whole := undivided(mesh, model.config)) else []),
        *([] if topology != "here" else [_reported(mesh.local_devices[0])]),
        *_run(settings, costs, lengths, limit, num_shards(mesh, model.config.rules)),
    ]
    return lines, complaints


def measure(program: Program, mesh: Mesh, chip: Chip, resident: float) -> Cost:
    """Compile a program and return what it needs; its peak is infinite if XLA refuses it."""
    limit = SHARE * chip.memory
    with jax.set_mesh(mesh):  # for the attention kernels
        jaxpr = program.jaxpr()
        try:
            compiled = program.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            nothing = dict.fromkeys(("by shapes", "arguments", "temporaries", "results"), math.inf)
            memory, said = {**nothing, "peak": math.inf}, str(error).splitlines()[0]
            return Cost(program, memory, 0.0, 0.0, {}, 0.0, "-", 0, said)
    try:
        text, analysis = compiled.as_text(), compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"JAX {jax.__version__} cannot read what this libtpu compiles ({error}): install the"
            " libtpu that belongs to it, as jax[tpu] does"
        ) from None
    memory = {
        "by shapes": _argument_bytes(compiled),
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    }
    memory["peak"] = resident + sum(memory.values()) - memory["by shapes"]
    # XLA counts loops once, but knows what of the work a device does: some is repeated on each.
    counted = (compiled.cost_analysis() or {}).get("flops", 0.0)
    share = counted / max(product_flops(jaxpr, once=True), 1)
    share = min(1.0, max(1 / mesh.size, share))
    flops = product_flops(jaxpr, program.loops) * share / program.steps
    moved = moved_bytes(text, program.loops) / program.steps
    collectives = collective_bytes(text, program.loops)
    collectives = {kind: size / program.steps for kind, size in collectives.items()}
    times = {
        "compute": flops / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": sum(collectives.values()) / chip.link,
    }
    bound = max(times, key=times.get)
    each = program.each or memory["temporaries"] / program.size
    largest = program.size + math.floor((limit - memory["peak"]) / max(each, 1))
    return Cost(program, memory, flops, moved, collectives, times[bound], bound, max(0, largest))


def _argument_bytes(compiled: jax.stages.Compiled) -> int:
    """Return what a program's arguments take of a device by their shapes, without any padding."""
    arguments, treedef = jax.tree.flatten(compiled.args_info)
    shardings = treedef.flatten_up_to(compiled.input_shardings)
    return sum(
        math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x, sharding in zip(arguments, shardings, strict=True)
        if sharding is not None  # None: the program does not use it
    )


def _reported(device: jax.Device) -> str:
    """Return what a device says of its memory."""
    found = device.memory_stats() or {}
    if "bytes_limit" not in found:
        return f"{device.device_kind} reports nothing of its memory: that of the host is divided"
    used, limit = _gb(found["bytes_in_use"]), _gb(found["bytes_limit"])
    return f"{device.device_kind} reports {used} in use of {limit}"


def _table(costs: Sequence[Cost]) -> list[str]:
    kinds = ("by shapes", "arguments", "temporaries", "results", "peak")
    head = f"{'one step of':14}{''.join(f'{kind:>13}' for kind in kinds)}"
    lines = [f"{head}{'TFLOP':>10}{'moved':>10}{'ms':>10}  bound by"]
    for cost in costs:
        sizes = "".join(f"{_gb(cost.memory[kind]):>13}" for kind in kinds)
        lines.append(
            f"{cost.program.name:14}{sizes}{cost.flops / 1e12:10.3g}{_gb(cost.moved):>10}"
            f"{1e3 * cost.seconds:10.3g}  {cost.bound}"
        )
    for cost in costs:
        found = [f"{kind} {_gb(size)}" for kind, size in sorted(cost.collectives.items())]
        lines.append(f"{cost.program.name}, collectives: {', '.join(found) or 'none'}")
        if cost.program.name in _BOUNDED:
            key, size = cost.program.key, cost.program.size
            lines[-1] += f"; {key} is {size} here, and could be about {cost.largest}"
    return lines


def _run(
    settings: Settings, costs: Sequence[Cost], lengths: Lengths, limit: float, shards: int
) -> list[str]:
    """Return the lines about the whole run."""
    counts = step_counts(settings, lengths, shards)
    size = {cost.program.name: cost.program.size for cost in costs}
    size["inner step"] = 1  # its steps are counted as they are, whoever shares them

    def total(numbers: Sequence[float]) -> float:
        names = [cost.program.name for cost in costs]
        return sum(x * counts[name] / size[name] for x, name in zip(numbers, names, strict=True))

    most = max(costs, key=lambda cost: cost.memory["peak"])
    hours = total([cost.seconds for cost in costs]) / EFFICIENCY / 3600
    return [
        f"assumed: passages of {lengths.passage} tokens, the longest {lengths.longest_passage},"
        f" {lengths.num_questions} questions each",
        f"in total, a device: {total([cost.flops for cost in costs]) / 1e12:.3g} TFLOP,"
        f" {_gb(total([cost.moved for cost in costs]))} moved,"
        f" {_gb(total([sum(cost.collectives.values()) for cost in costs]))} in collectives; at most"
        f" {_gb(most.memory['peak'])} of {_gb(limit)}, in {most.program.name}",
        f"the whole run: about {hours:.2g} hours at {EFFICIENCY:.0%} of these"
        f" rooflines ({counts['inner step']:,.0f} inner steps), without compiling and grading",
    ]


def step_counts(settings: Settings, lengths: Lengths, shards: int) -> dict[str, float]:
    """Return how often a run takes a step of each program, for one row or adapter each time.

    Args:
      shards: over how many parts of the mesh the population is divided.
    """
    outer, inner, held_out = settings.outer, settings.inner, settings.eval
    arms = 2 if held_out.random_control else 1
    problems = outer.num_steps * outer.problems_per_step
    tests = held_out.num_problems * held_out.num_edits
    written = problems * settings.sample.num_edits * arms + tests * (arms + 1)
    runs = problems * settings.sample.num_edits * inner.num_seeds
    runs += (tests * (arms + 1) + held_out.num_problems) * held_out.num_seeds
    tokens = runs * inner.num_epochs * 2 * lengths.passage  # the passage, and as much written
    return {
        "prefill": problems * arms + tests * (arms + 1) + runs * lengths.num_questions,
        "decode": written * settings.sample.max_tokens
        + runs * lengths.num_questions * settings.answer.max_tokens,
        "inner step": tokens / (inner.tokens_per_step * shards),
        "scoring": runs,
        "policy update": arms
        * outer.num_steps
        * outer.num_epochs
        * outer.problems_per_step
        / outer.batch_size
        * outer.microbatch_size,
    }


def _gb(num_bytes: float) -> str:
    if num_bytes == math.inf:
        return "too much"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
