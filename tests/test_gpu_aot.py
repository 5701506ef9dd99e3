"""What XLA makes of the programs for an NVIDIA H100, ahead of time: no GPU is here, nor needed."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from seal_jax.bench.aot import compile_decode, compile_inner_update, make_batch
from seal_jax.models.attention import attend
from seal_jax.models.known_models import KNOWN
from seal_jax.sharding import make_mesh, replicated

pytestmark = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="no jax-cuda plugin to compile with",
)

SMOLLM2 = dataclasses.replace(KNOWN["smollm2-135m"], num_layers=2)
# What the compiler has to know of the card (its data sheet, and XLA's own description of it).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def h100():
    """Return a mesh of one H100. Fusions are chosen by XLA's model: there is nothing to try."""
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=H100
    ).devices
    return make_mesh(devices=list(devices))


def instructions(text):
    """Return (opcode, line) of what a compiled program launches: of fusions, only the whole."""
    fused = set(re.findall(r"calls=%([\w.-]+)", text))
    found, inside = [], False
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", line):
            inside = head[1] in fused
        elif not inside and (op := re.search(r" (fusion|custom-call|copy)\(", line)):
            found.append((op[1], line))
    return found


def test_cudnn_s_attention_forward_and_backward(h100):
    config = dataclasses.replace(SMOLLM2, attention="cudnn")

    def shaped(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(h100))

    q = shaped(2, config.num_heads, 512, config.head_dim)
    k = shaped(2, config.num_kv_heads, 512, config.head_dim)
    segments = shaped(2, 512, dtype=jnp.int32)

    def total(q, k, v, segments):
        out = attend(config, q, k, v, segments, segments, local=False)
        return out.astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k, segments).compile().as_text()
    assert '"__cudnn$fmhaScaleBiasSoftmax"' in text
    assert '"__cudnn$fmhaScaleBiasSoftmaxBackward"' in text


def test_a_decode_step_launches_few_kernels(h100):
    """Of a small model they are what a step takes: about two microseconds each on an H100."""

    def launches(num_layers):
        config = dataclasses.replace(SMOLLM2, num_layers=num_layers)
        return len(instructions(compile_decode(config, h100, 8, 1024).as_text()))

    assert launches(4) - launches(2) <= 2 * 20


def test_an_inner_step_writes_adapters_where_they_lie(h100):
    """No copy of the population: there would be two for every adapter that takes part in a step."""
    batch = make_batch(1)
    text = compile_inner_update(SMOLLM2, h100, batch).as_text()
    population = f"f32[{len(batch.num_steps)},{SMOLLM2.num_layers},"
    assert population in text
    copies = [line for op, line in instructions(text) if op == "copy"]
    assert not [line for line in copies if population in line]
