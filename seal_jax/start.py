"""What a process sets before it uses JAX: the compilation cache; no silent CPU fallback."""

import glob
import os

import jax


def start_jax() -> None:
    """Turn on the persistent compilation cache, and refuse a TPU host that fell back to the CPU.

    The cache is in $JAX_COMPILATION_CACHE_DIR, or ~/.cache/seal_jax.

    Raises:
      ValueError: the host has TPU chips and JAX did not find them.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser("~/.cache/seal_jax")
    jax.config.update("jax_compilation_cache_dir", folder)
    # By default small programs are not kept; ours are many and small on a CPU.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    asked_for_cpu = os.environ.get("JAX_PLATFORMS", "") == "cpu"
    if glob.glob("/dev/accel*") and not asked_for_cpu and jax.default_backend() == "cpu":
        raise ValueError(
            "this host has TPU chips, and JAX runs on the CPU: install jax[tpu], or set"
            " JAX_PLATFORMS=cpu to run on the CPU on purpose"
        )
