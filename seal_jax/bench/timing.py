"""Timing: contestants take turns in one run, and the median of each counts."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.metrics import progress


def interleave(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each contestant's call, after one call each to warm up.

    They take turns, so that what else the machine does hits all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    bar = progress((rounds + 1) * len(contestants), "bench", "call")
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - start)
            bar.update(1)
    bar.close()
    return {name: statistics.median(found) for name, found in seconds.items()}


def matmul(dtype: str, size: int = 2048) -> tuple[Callable[[], jax.Array], float]:
    """Return a large square matrix product to time, with float32 sums, and its operations."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32))

    def twice() -> jax.Array:
        product(x, x)
        return product(x, x)

    return twice, 2 * 2.0 * size**3


def machine() -> dict[str, Any]:
    """Return what the figures depend on: devices, cores, versions."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": platform.processor() or platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }
