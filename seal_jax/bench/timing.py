"""Timing: contestants take turns in one run, and the median of each counts."""

import contextlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.hosts.console import progress, say
from seal_jax.models.config import ModelConfig

_LONG = 10.0  # seconds of a first call that are worth a line


class TooLarge(Exception):
    """What a contestant raises that finds no memory beside the others."""


def interleave(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each contestant's call, after one call each to warm up.

    They take turns, so that what else the machine does hits all alike. One that is too large is
    left out. Interrupted, once all have been timed, it returns what there is.
    """
    contestants = dict(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    bar = progress((rounds + 1) * len(contestants), "bench", "call")
    try:
        for turn in range(rounds + 1):
            for name, call in list(contestants.items()):
                start = time.perf_counter()
                try:
                    jax.block_until_ready(call())
                except TooLarge as error:
                    say(f"bench: {name} is left out: {error}")
                    del contestants[name], seconds[name]
                    continue
                taken = time.perf_counter() - start
                if turn:
                    seconds[name].append(taken)
                elif taken > _LONG:
                    say(f"bench: {name}: {taken:.0f} s to compile and run once")
                bar.update(1)
    except KeyboardInterrupt:
        if not all(seconds.values()):
            raise
        say(f"bench: interrupted in round {turn} of {rounds}: the figures are those until then")
    bar.close()
    return {name: statistics.median(found) for name, found in seconds.items()}


def base_dtypes() -> tuple[str, ...]:
    """Return the dtypes of a frozen base that are worth a try here: float32 only on CPUs."""
    return ("float32", "bfloat16") if jax.default_backend() == "cpu" else ("bfloat16",)


def matmul(dtype: str) -> tuple[Callable[[], jax.Array], float]:
    """Return large square matrix products to time, with float32 sums, and their operations.

    Of random numbers: a GPU multiplies zeros faster.
    """
    size, count = (2048, 8) if jax.default_backend() == "cpu" else (8192, 20)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    out = jnp.float32 if jax.default_backend() == "cpu" else dtype
    product = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=out))
    return lambda: [product(x, x) for _ in range(count)][-1], count * 2.0 * size**3


def matmul_params(config: ModelConfig) -> int:
    """Return P, the parameters that a token is multiplied with: the output head, not the lookup."""
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    layer = 2 * config.embed_dim * heads + 3 * config.embed_dim * config.mlp_dim
    return config.num_layers * layer + config.vocab_size * config.embed_dim


def profiled(folder: str, call: Callable[[], Any]) -> None:
    """Write a JAX profile of a call into the folder."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would be most of the profile
    with jax.profiler.trace(folder, profiler_options=options):
        jax.block_until_ready(call())


@contextlib.contextmanager
def count_compiles() -> Generator[list[float]]:
    """Yield a list that gets the seconds of every program that JAX compiles within."""
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


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
