"""What a compiled program needs of a device.

  peak = resident + arguments + temporaries + results - what results overwrite

"by shapes" is what the arguments would take without the compiler's padding. Times are rooflines:
the longest of what the products, the memory and the links between chips need at full speed.
"""

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from seal_jax.hosts.memory import SHARE
from seal_jax.planning.chips import Chip
from seal_jax.planning.program_text import collective_bytes, moved_bytes, product_flops
from seal_jax.planning.stage_programs import Program

KINDS = ("by shapes", "arguments", "temporaries", "results", "peak")  # of memory


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


def measure(program: Program, mesh: Mesh, chip: Chip, resident: float) -> Cost:
    """Compile a program and return what it needs; its peak is infinite if XLA refuses it."""
    limit = SHARE * chip.memory
    with jax.set_mesh(mesh):  # for the attention kernels
        traced = program.trace()
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            said = str(error).splitlines()[0]
            return Cost(program, dict.fromkeys(KINDS, math.inf), 0.0, 0.0, {}, 0.0, "-", 0, said)
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
    share = counted / max(product_flops(traced.jaxpr, once=True), 1)
    share = min(1.0, max(1 / mesh.size, share))
    flops = product_flops(traced.jaxpr, program.loops) * share / program.steps
    moved = moved_bytes(text, program.loops) / program.steps
    collectives = collective_bytes(text, program.loops)
    collectives = {kind: size / program.steps for kind, size in collectives.items()}
    times = {
        "compute": flops / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": sum(collectives.values()) / chip.link,
    }
    bound = max(times, key=times.__getitem__)
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
