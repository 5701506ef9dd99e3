"""`seal-jax plan`: whether a config fits a slice, what its programs cost there, and its hours.

The programs are compiled for the slice, never run.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from seal_jax.config.check_optimizers import check_optimizers
from seal_jax.config.setup import resident_bytes
from seal_jax.hosts.console import progress
from seal_jax.hosts.memory import SHARE, device_bytes
from seal_jax.models.mesh_fit import check_divides, undivided
from seal_jax.models.model import Model
from seal_jax.planning.chips import Chip, find_slice
from seal_jax.planning.compiled_cost import KINDS, Cost, measure
from seal_jax.planning.run_estimate import EFFICIENCY, matmul_rate
from seal_jax.planning.stage_programs import Lengths, Program, model_shapes, programs
from seal_jax.sampling.call_shapes import check_lengths
from seal_jax.sharding import make_mesh, num_shards
from seal_jax.sources import config_of
from seal_jax.types import Settings

_ADVICE = {
    "sample.max_rows": "lower sample.max_rows or sample.max_tokens",
    "answer.max_rows": "lower answer.max_rows",
    "inner.max_adapters": "lower inner.max_adapters or inner.tokens_per_step, or set"
    " inner.remat=full or inner.quantize=int8",
    "outer.microbatch_size": "lower outer.microbatch_size, or set outer.remat=full",
}

# The programs that have as many rows or adapters as the key of the config says.
_BOUNDED = ("decode", "inner step", "policy update")


class Plan(NamedTuple):
    """A config on a slice."""

    mesh: Mesh
    chip: Chip
    model: Model  # its shapes
    resident: int  # bytes on each device that stay
    costs: list[Cost]
    counts: dict[str, float]  # see step_counts

    @property
    def limit(self) -> float:
        """How many bytes of each device are to use."""
        return SHARE * self.chip.memory

    def total(self, of: Callable[[Cost], float]) -> float:
        """Return what a device gives to a whole run, of what a step costs."""
        return sum(of(cost) * self.num_steps(cost.program) for cost in self.costs)

    def num_steps(self, program: Program) -> float:
        # Inner steps are counted as they are, whoever shares them.
        size = 1 if program.name == "inner step" else program.size
        return self.counts[program.name] / size


def plan_slice(settings: Settings, topology: str, lengths: Lengths) -> tuple[list[str], list[str]]:
    """Return the lines of a plan, and what does not fit.

    Args:
      topology: 'v5e:4x4' or the like, see chips.py; 'here' is for the devices of this process.

    Raises:
      ValueError: there is no such slice, mesh or model, or a passage exceeds the model's context.
    """
    plan = make_plan(settings, topology, lengths)
    lines = _describe(settings, plan)
    if topology == "here":
        lines.append(_reported(plan.mesh.local_devices[0]))
    return lines + _describe_run(plan, lengths), _complaints(plan)


def make_plan(settings: Settings, topology: str, lengths: Lengths) -> Plan:
    """Compile the programs of a run for a slice, and count what they take; see `plan_slice`."""
    sizes = config_of(settings.model.source)
    try:
        check_lengths(sizes, [range(lengths.longest_passage)], settings.sample.max_tokens)
    except ValueError as error:
        raise ValueError(f"--longest-passage {lengths.longest_passage}: {error}") from error
    chip, devices = (None, None) if topology == "here" else find_slice(topology)
    check_optimizers(settings)
    mesh = make_mesh(*settings.mesh, devices=devices)
    if chip is None:
        memory = device_bytes(mesh) / SHARE
        chip = Chip(jax.devices()[0].device_kind, matmul_rate(), memory, math.inf, math.inf)
    model = model_shapes(settings, sizes, mesh)
    check_divides(mesh, model.config)
    resident = resident_bytes(settings, model, mesh)
    found = list(programs(settings, model, mesh, lengths))
    bar = progress(found, f"plan for {topology}", "program")  # minutes, for a large model
    costs = [measure(program, mesh, chip, resident) for program in bar]
    counts = step_counts(settings, lengths, num_shards(mesh, model.config.rules))
    return Plan(mesh, chip, model, resident, costs, counts)


def step_counts(settings: Settings, lengths: Lengths, shards: int) -> dict[str, float]:
    """Return how often a run takes a step of each program, for one row or adapter each time.

    Args:
      shards: over how many parts of the mesh the population is divided.
    """
    outer, inner, held_out = settings.outer, settings.inner, settings.eval
    rewarded = 1 + len(held_out.objectives)  # policies that are trained by rewards
    arms = rewarded + held_out.random_control
    problems = outer.num_steps * outer.problems_per_step
    tests = held_out.num_problems * held_out.num_edits
    written = problems * settings.sample.num_edits * arms + tests * (arms + 1)
    rewards = rewarded * problems * settings.sample.num_edits * inner.num_seeds
    ways = tests * (arms + 1 + len(held_out.texts))  # with self-edits
    table = (ways + held_out.num_problems) * held_out.num_seeds
    runs = rewards + table
    asked = runs * lengths.num_questions
    tokens = runs * inner.num_epochs * 2 * lengths.passage  # the passage, and as much written
    trained = arms * problems * outer.num_epochs
    return {
        "prefill": problems * arms + tests * (arms + 1) + asked,
        "decode": written * settings.sample.most_tokens + asked * settings.answer.most_tokens,
        # Of each run what was written, in lines of 32 tokens; at most, as seeds have the same.
        "teaching": runs * lengths.passage / 32,
        "inner step": tokens / (inner.tokens_per_step * shards),
        "scoring": runs if "log_likelihood" in settings.reward.weights else table,
        "policy update": trained / outer.batch_size * outer.microbatch_size,
    }


def _complaints(plan: Plan) -> list[str]:
    return [
        f"{cost.program.name} does not fit: it needs {_gb(cost.memory['peak'])} a device, and there"
        f" are {_gb(plan.limit)} to use{cost.refused and f' ({cost.refused})'}."
        f" {_ADVICE[cost.program.key].capitalize()}, or divide the model"
        " over more devices (mesh.fsdp, mesh.tensor)"
        for cost in plan.costs
        if cost.memory["peak"] > plan.limit
    ]


def _describe(settings: Settings, plan: Plan) -> list[str]:
    """Return the lines about the model, the devices and each program."""
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(plan.model.params))
    sizes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    lines = [
        f"{settings.model.source}: {count / 1e6:,.0f}M parameters in {settings.model.dtype} on"
        f" {plan.mesh.size} x {plan.chip.name} ({sizes})",
        f"each device has {_gb(plan.chip.memory)}, {_gb(plan.limit)} of it to use;"
        f" {_gb(plan.resident)} are taken"
        " by what stays: the first policy, the trained one's optimizer",
        *_table(plan.costs),
    ]
    whole = undivided(plan.mesh, plan.model.config)
    return [*lines, whole] if whole else lines


def _table(costs: Sequence[Cost]) -> list[str]:
    head = f"{'one step of':14}{''.join(f'{kind:>13}' for kind in KINDS)}"
    lines = [f"{head}{'TFLOP':>10}{'moved':>10}{'ms':>10}  bound by"]
    for cost in costs:
        sizes = "".join(f"{_gb(cost.memory[kind]):>13}" for kind in KINDS)
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


def _reported(device: jax.Device) -> str:
    """Return what a device says of its memory."""
    found = device.memory_stats() or {}
    if "bytes_limit" not in found:
        return f"{device.device_kind} reports nothing of its memory: that of the host is divided"
    used, limit = _gb(found["bytes_in_use"]), _gb(found["bytes_limit"])
    return f"{device.device_kind} reports {used} in use of {limit}"


def _describe_run(plan: Plan, lengths: Lengths) -> list[str]:
    """Return the lines about the whole run."""
    most = max(plan.costs, key=lambda cost: cost.memory["peak"])
    hours = plan.total(lambda cost: cost.seconds) / EFFICIENCY / 3600
    return [
        f"assumed: passages of {lengths.passage} tokens, the longest {lengths.longest_passage},"
        f" {lengths.num_questions} questions each",
        f"in total, a device: {plan.total(lambda cost: cost.flops) / 1e12:.3g} TFLOP,"
        f" {_gb(plan.total(lambda cost: cost.moved))} moved,"
        f" {_gb(plan.total(lambda cost: sum(cost.collectives.values())))} in collectives; at most"
        f" {_gb(most.memory['peak'])} of {_gb(plan.limit)}, in {most.program.name}",
        f"the whole run: about {hours:.2g} hours at {EFFICIENCY:.0%} of these rooflines"
        f" ({plan.counts['inner step']:,.0f} inner steps), without compiling and grading",
    ]


def _gb(num_bytes: float) -> str:
    if num_bytes == math.inf:
        return "too much"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
