"""Benchmarks, each against named peers on the same work in one run: `seal-jax bench NAME`."""

import importlib
from typing import Any

BENCHES = ("inner", "sample", "learning", "tune", "continual")


def run_bench(name: str, **options: Any) -> dict[str, Any]:
    """Run a benchmark, print its table, and return its figures.

    Raises:
      ValueError: there is no such benchmark.
    """
    if name not in BENCHES:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(BENCHES)}")
    return importlib.import_module(f"seal_jax.bench.{name}").run(**options)
