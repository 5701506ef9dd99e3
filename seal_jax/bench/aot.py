"""Inner loop and generation compiled for TPUs where there are none, and what XLA's model says.

`pip install libtpu` and set JAX_PLATFORMS=cpu: only its compiler is used. Figures are for
Qwen2.5-7B, rank 32 on q_proj and v_proj, and AdamW. Every chip has the whole base and 16 adapters
of its own, each with a row of 64 tokens in every step, without padding.

XLA for TPUs notes the clock cycles that it expects of nearly every instruction. Their sum is for
comparisons, and no measurement: gathers, scatters and sorts that are kernels of their own, copies
between memories, Pallas kernels, collectives and gaps are not in it.

  python -m seal_jax.bench.aot v6e            a decode step, every chip for itself
  python -m seal_jax.bench.aot v5e --tensor 4
"""

import argparse
import collections
import dataclasses
import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from seal_jax.bench.timing import matmul_params
from seal_jax.inner.packing import pack, useful_tokens
from seal_jax.inner.steps import TPU_LAYOUT
from seal_jax.inner.texts import Job, text_of
from seal_jax.inner.update import InnerSetup, make_inner_loop
from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.models.known_models import RANDOM
from seal_jax.models.quantize import quantize_params
from seal_jax.models.transformer import init_params
from seal_jax.optim import make_optimizer
from seal_jax.planning.program_text import cycles_of, executed
from seal_jax.sampling.decode import RowsShape, decode, prefill, rows_shapes
from seal_jax.sharding import AXES, batch_sharding, leading, param_shardings, replicated, shaped
from seal_jax.types import InnerBatch, Params

QWEN_7B = RANDOM["qwen2.5-7b"]
ADAPTERS, TOKENS, STEPS = 16, 1024, 8  # on a chip; a step has room for, on a chip; of one call


class Chip(NamedTuple):
    """A kind of TPU: its slice of 8 cores, and what one chip can do."""

    topology: str
    flops: float  # per second, bfloat16
    clock: float  # Hz
    bandwidth: float  # of its memory, bytes per second
    quantize: str = "none"  # the base, where it does not fit otherwise


CHIPS = {
    "v6e": Chip("v6e:2x4", 918e12, 1.75e9, 1638e9),
    "v5e": Chip("v5e:2x4", 197e12, 1.5e9, 819e9, "int8"),
    "v5p": Chip("v5p:2x2x1", 459e12, 1.75e9, 2765e9),  # 4 chips, each of two cores that work as one
}


def report(kind: str, config: ModelConfig = QWEN_7B) -> dict[str, Any]:
    """Return what a step costs a chip of a kind in CHIPS, by the compiler's model.

    Returns:
      ms: milliseconds a step.
      share_of_peak: what text needs, 4 operations for each parameter and token (the base has no
        gradient of its own), over what the chip could do in that time.
      argument_bytes, temp_bytes: on a chip; results take the place of arguments.
      collectives: instructions by which chips wait for one another.
    """
    chip, mesh = CHIPS[kind], topology_mesh(CHIPS[kind].topology)
    batch = make_batch(mesh.size)
    compiled = compile_inner_update(config, mesh, batch, quantize=chip.quantize)
    seconds = cycles_by_op(compiled.as_text(), ADAPTERS).total() / STEPS / chip.clock
    num_tokens = useful_tokens([batch])[0] / (mesh.size * STEPS)
    return {
        "ms": 1e3 * seconds,
        "share_of_peak": 4 * matmul_params(config) * num_tokens / (seconds * chip.flops),
        **_memory_and_collectives(compiled),
    }


def _memory_and_collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # libtpu's compiler has both
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "collectives": len(_COLLECTIVE.findall(text)),
    }


def decode_report(
    kind: str,
    config: ModelConfig = QWEN_7B,
    *,
    rows: int = 8,
    slots: int = 1024,
    tensor: int = 1,
    tries: int = 2,
) -> dict[str, Any]:
    """Return what a decode step with top_p costs a chip of a kind, by the compiler's model.

    Two models of few layers are compiled, and the others counted as the difference between them.

    Args:
      rows: of each group of `tensor` chips, which share a model in bfloat16.
      tries: how often a draw looks at the vocabulary: the slowest row's.

    Returns:
      estimate_ms: milliseconds a step, a token of every row, by the compiler's model. Params that
        are fetched ahead of their use are not in it: it may be below the roofline.
      roofline_ms: what reading the chip's part of the params and of all the cache's slots takes.
      ms: the larger of the two.
      share_of_roofline: the roofline's share of the estimate, at most 1.
      draw_ms, share_of_draw: what of it is drawing; top_k, which is optional, is left out.
      argument_bytes, temp_bytes, collectives: see `report`; of the larger of these models.
    """
    chip = CHIPS[kind]
    mesh = topology_mesh(chip.topology, tensor)
    few, more = 2, 4
    found = {}
    for num_layers in (few, more):
        some = dataclasses.replace(config, num_layers=num_layers)
        compiled = compile_decode(some, mesh, rows * mesh.size // tensor, slots)
        ops = {op: c for op, c in cycles_by_op(compiled.as_text()).items() if "/top_k/" not in op}
        draws = {op: c for op, c in ops.items() if "/draw/" in op}
        again = sum(c for op, c in draws.items() if "while/body" in op.split("/draw/")[-1])
        step = sum(c for op, c in ops.items() if "while/body" in op)
        extra = (tries - 1) * again
        found[num_layers] = step + extra, sum(draws.values()) + extra
    layers = (config.num_layers - few) / (more - few)
    cycles = found[few][0] + layers * (found[more][0] - found[few][0])
    seconds = cycles / chip.clock
    numbers = matmul_params(config) / tensor
    numbers += 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots * rows / tensor
    roofline = 2 * numbers / chip.bandwidth
    return {
        "estimate_ms": 1e3 * seconds,
        "roofline_ms": 1e3 * roofline,
        "ms": 1e3 * max(seconds, roofline),
        "share_of_roofline": min(1.0, roofline / seconds),
        "draw_ms": 1e3 * found[more][1] / chip.clock,
        "share_of_draw": found[more][1] / chip.clock / max(seconds, roofline),
        **_memory_and_collectives(compiled),
    }


def _params(config: ModelConfig, mesh: Mesh) -> Params:
    """Return the shapes of a model in bfloat16, divided over the mesh."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), jnp.bfloat16))
    return shaped(params, param_shardings(mesh, params))


def compile_decode(
    config: ModelConfig, mesh: Mesh, num_rows: int, num_slots: int
) -> jax.stages.Compiled:
    """Return the device call that lets rows write, compiled for a model in bfloat16.

    Args:
      num_slots: of a row, half of them its prompt's.
    """
    half = num_slots // 2
    shape = RowsShape(jnp.bfloat16, num_rows, num_rows, half, half, half, keep_seen=True)
    with jax.set_mesh(mesh):
        params, rows = _params(config, mesh), rows_shapes(config, shape, mesh)
        numbers = shaped((np.zeros(1, np.int32), np.int32()), replicated(mesh))  # see `decode`
        return decode.lower(config, params, None, rows, *numbers, mesh=mesh).compile()


def compile_prefill(
    config: ModelConfig, mesh: Mesh, num_prompts: int, num_slots: int
) -> jax.stages.Compiled:
    """Return the device call that reads prompts, compiled for a model in bfloat16."""
    prompts = np.zeros((num_prompts, num_slots), np.int32)
    with jax.set_mesh(mesh):
        read = shaped((prompts, prompts[:, 0]), leading(mesh, "rows", num_prompts))
        params = _params(config, mesh)
        return prefill.lower(config, params, None, *read, mesh=mesh).compile()


def topology_mesh(name: str, tensor: int = 1) -> Mesh:
    """Return a mesh of all chips of a topology, as 'v6e:2x4', `tensor` of which share a model."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return Mesh(np.reshape(devices, (-1, 1, tensor)), AXES, axis_types=(AxisType.Auto,) * 3)


def make_batch(num_chips: int) -> InnerBatch:
    """Return one device call's batch (numpy) for ADAPTERS on every chip, packed as any other."""
    row = (text_of(range(TOKENS // ADAPTERS)),)
    jobs = [Job((row,) * STEPS, learning_rate=1e-3)] * (ADAPTERS * num_chips)
    (batch,) = pack(
        jobs,
        tokens_per_step=TOKENS,
        steps_per_call=STEPS,
        num_shards=num_chips,
        layout=TPU_LAYOUT,  # wherever this is packed
    )
    return batch


def compile_inner_update(
    config: ModelConfig, mesh: Mesh, batch: InnerBatch, *, quantize: str = "none"
) -> jax.stages.Compiled:
    """Return `make_inner_update`'s device call, compiled; its base is bfloat16 or quantized."""
    optimizer = make_optimizer(optax_kwargs={"weight_decay": 0.0})
    loop = make_inner_loop(InnerSetup(config, optimizer, mesh=mesh))
    num_adapters = len(batch.num_steps)

    def init() -> tuple:
        params = init_params(config, jax.random.key(0), jnp.bfloat16)
        keys = jax.random.split(jax.random.key(0), num_adapters)
        targets = ("q_proj", "v_proj")
        adapters = lora.init_adapters(config, keys, rank=32, alpha=64.0, targets=targets)
        return quantize_params(params, quantize), adapters

    with jax.set_mesh(mesh):
        params, adapters = jax.eval_shape(init)
        traced = loop.trace(
            shaped(params, replicated(mesh)),
            shaped(adapters, leading(mesh, "adapter", num_adapters)),
            shaped(batch, batch_sharding(mesh)),
        )
        return traced.lower().compile()


_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COLLECTIVE = re.compile(r" (?:all-\w+|reduce-scatter|collective-permute|send)(?:-start)?\(")


def cycles_by_op(hlo_text: str | None, unknown_trip_count: int = 1) -> collections.Counter:
    """Return a compiled program's estimated cycles by op_name, which says what of JAX they are for.

    Loops count as often as they run, conditionals as their dearest branch. A fusion has its
    estimate itself: what is in it is not looked at.

    Args:
      unknown_trip_count: how often a loop runs whose count is data, as that over lanes.

    Raises:
      ValueError: there is no program in the text.
    """
    total: collections.Counter = collections.Counter()
    for line, count in executed(hlo_text or "", unknown_trip_count):
        if cycles := cycles_of(line):
            op = _OP_NAME.search(line)
            total[op[1] if op else ""] += count * cycles
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the estimate of a decode step.")
    parser.add_argument("kind", choices=CHIPS)
    for name, default in (("rows", 8), ("slots", 1024), ("tensor", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(json.dumps(decode_report(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
