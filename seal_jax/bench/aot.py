"""The inner loop compiled for TPUs where there are none, and what XLA's own model says of it.

`pip install libtpu` and set JAX_PLATFORMS=cpu: only its compiler is used. Figures are for the
28 layers of Qwen2.5-7B, rank 32 on q_proj and v_proj, and AdamW. Every chip has the whole base and
16 adapters of its own, all of which take part in every step, with a row of 61 tokens each.

XLA for TPUs notes the clock cycles that it expects of nearly every instruction. Their sum is a
model of time, for comparisons and against regressions, and no measurement: it has no figure for
gathers, scatters and sorts that are kernels of their own, for copies between memories, for Pallas
kernels and for collectives, and it knows no gaps.
"""

import collections
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from seal_jax import lora
from seal_jax.bench.timing import matmul_params
from seal_jax.inner import batch_sharding, make_inner_update
from seal_jax.memory import shaped
from seal_jax.models.config import LINEARS, ModelConfig
from seal_jax.models.quantize import quantize_params
from seal_jax.models.transformer import init_params
from seal_jax.optim import make_optimizer
from seal_jax.self_edit import Job, pack, text_of, useful_tokens
from seal_jax.sharding import leading, replicated
from seal_jax.types import InnerBatch

QWEN_7B = ModelConfig(
    vocab_size=152064,
    num_layers=28,
    embed_dim=3584,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=18944,
    family="qwen2",
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=False,
    biases=LINEARS[:3],
)
ADAPTERS, TOKENS, STEPS = 16, 1024, 8  # on a chip; a step has room for, on a chip; of one call


class Chip(NamedTuple):
    """A kind of TPU: its slice of 8 cores, and what one chip can do."""

    topology: str
    flops: float  # per second, bfloat16
    clock: float  # Hz
    quantize: str = "none"  # the base, where it does not fit otherwise


CHIPS = {
    "v6e": Chip("v6e:2x4", 918e12, 1.75e9),
    "v5e": Chip("v5e:2x4", 197e12, 1.5e9, "int8"),
    "v5p": Chip("v5p:2x2x1", 459e12, 1.75e9),  # 4 chips, each of two cores that work as one
}


def report(kind: str, config: ModelConfig = QWEN_7B) -> dict[str, Any]:
    """Return what a step costs a chip of a kind in CHIPS, by the compiler's model.

    Returns:
      ms: milliseconds a step.
      share_of_peak: what text needs, 4 operations for each parameter and token (the base has no
        gradient of its own), over what the chip could do in that time.
      share_with_padding: the same of all tokens that a step has room for.
      argument_bytes, temp_bytes: on a chip; results take the place of arguments.
      collectives: instructions by which chips wait for one another.
    """
    chip, mesh = CHIPS[kind], topology_mesh(CHIPS[kind].topology)
    batch = make_batch(mesh.size)
    compiled = compile_inner_update(config, mesh, batch, quantize=chip.quantize)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    seconds = estimated_cycles(text, unknown_trip_count=ADAPTERS) / STEPS / chip.clock
    share = 4 * matmul_params(config) * TOKENS / (seconds * chip.flops)
    useful, trained = useful_tokens([batch])
    return {
        "ms": 1e3 * seconds,
        "share_of_peak": share * useful / trained,
        "share_with_padding": share,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "collectives": len(_COLLECTIVE.findall(text)),
    }


def topology_mesh(name: str) -> Mesh:
    """Return a mesh of all chips of a topology, as 'v6e:2x4', over which adapters are divided."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    axis_types = (AxisType.Auto,) * 3
    return Mesh(np.reshape(devices, (-1, 1, 1)), ("data", "fsdp", "tensor"), axis_types=axis_types)


def make_batch(num_chips: int) -> InnerBatch:
    """Return one device call's batch (numpy) for ADAPTERS on every chip, packed as any other."""
    row = (text_of(range(TOKENS // ADAPTERS - 3)),)
    jobs = [Job((row,) * STEPS, learning_rate=1e-3)] * (ADAPTERS * num_chips)
    (batch,) = pack(jobs, tokens_per_step=TOKENS, steps_per_call=STEPS, num_shards=num_chips)
    return batch


def compile_inner_update(
    config: ModelConfig, mesh: Mesh, batch: InnerBatch, *, quantize: str = "none"
) -> jax.stages.Compiled:
    """Return `make_inner_update`'s device call, compiled; its base is bfloat16 or quantized."""
    optimizer = make_optimizer(optax_kwargs={"weight_decay": 0.0})
    update = make_inner_update(config, optimizer, mesh=mesh)
    num_adapters = len(batch.num_steps)

    def init() -> tuple:
        params = init_params(config, jax.random.key(0), jnp.bfloat16)
        keys = jax.random.split(jax.random.key(0), num_adapters)
        targets = ("q_proj", "v_proj")
        adapters = lora.init_adapters(config, keys, rank=32, alpha=64.0, targets=targets)
        return quantize_params(params, quantize), adapters

    with jax.set_mesh(mesh):
        params, adapters = jax.eval_shape(init)
        return update.lower_batch(
            shaped(params, replicated(mesh)),
            shaped(adapters, leading(mesh, "adapter", num_adapters)),
            shaped(batch, batch_sharding(mesh)),
        ).compile()


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r"ROOT .* compare\(.*?%?([\w.\-]+)\), direction=LT")
_BRANCHES = re.compile(r" conditional\(.*branch_computations=\{([^}]*)\}")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.\-]+)")
_COLLECTIVE = re.compile(r" (?:all-\w+|reduce-scatter|collective-permute|send)(?:-start)?\(")


def estimated_cycles(hlo_text: str, unknown_trip_count: int = 1) -> int:
    """Return the clock cycles that XLA expects of a compiled program; see `cycles_by_op`."""
    return cycles_by_op(hlo_text, unknown_trip_count).total()


def cycles_by_op(hlo_text: str, unknown_trip_count: int = 1) -> collections.Counter:
    """Return a compiled program's estimated cycles by op_name, which says what of JAX they are for.

    Loops count as often as they run, conditionals as their dearest branch. A fusion has its
    estimate itself: what is in it is not looked at.

    Args:
      unknown_trip_count: how often a loop runs whose count is data, as that over lanes.

    Raises:
      ValueError: there is no program in the text.
    """
    bodies: dict[str, list[str]] = {}
    for line in hlo_text.splitlines():
        if found := _COMPUTATION.match(line):
            bodies[found[2]] = lines = []
            if found[1]:
                bodies[""] = lines
        elif line.startswith("  ") and bodies:
            lines.append(line)
    if "" not in bodies:
        raise ValueError("no ENTRY computation in the text: expected an XLA program")

    def trip_count(line: str, condition: str) -> int:
        if found := _TRIPS.search(line):
            return int(found[1])
        # TPU programs do not say it, but a counted loop compares its counter with a constant.
        text = "\n".join(bodies[condition])
        limit = _LIMIT.search(text)
        value = limit and re.search(rf"{re.escape(limit[1])} = s32\S+ constant\((\d+)\)", text)
        return int(value[1]) if value else unknown_trip_count

    def cost(name: str) -> collections.Counter:
        total: collections.Counter = collections.Counter()
        for line in bodies[name]:
            if found := _CYCLES.search(line):
                op = _OP_NAME.search(line)
                total[op[1] if op else ""] += int(found[1])
            if found := _WHILE.search(line):
                count = trip_count(line, found[1])
                once = cost(found[1]) + cost(found[2])
                total.update({op: count * cycles for op, cycles in once.items()})
            elif found := _BRANCHES.search(line):
                branches = (cost(x.strip(" %")) for x in found[1].split(","))
                total.update(max(branches, key=collections.Counter.total))
            elif found := _CALL.search(line):
                total.update(cost(found[1]))
        return total

    return cost("")
