"""What a process does before it uses JAX: cache, other processes, no silent CPU fallback."""

import os

import jax
from jax._src import hardware_utils  # JAX has no public name for counting chips without using them

from seal_jax.hosts.group import find_group, join, timeout_seconds

# What a platform's devices are called once it runs.
_BACKENDS = {"cpu": "cpu", "tpu": "tpu", "cuda": "gpu", "rocm": "gpu", "gpu": "gpu"}

# Set where several processes share a host's chips.
_SHARED_HOST = ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES", "TPU_PROCESS_BOUNDS")


def start_jax() -> None:
    """Turn on JAX's cache on disk, and connect the processes of this run, if there are several.

    The cache is in $JAX_COMPILATION_CACHE_DIR (which may be gs://), or ~/.cache/seal_jax.

    Raises:
      ValueError: the host has TPU chips and JAX did not find them, or a process is missing.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser("~/.cache/seal_jax")
    jax.config.update("jax_compilation_cache_dir", folder)
    # By default small programs are not kept; ours are many and small on a CPU.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    timeout = timeout_seconds()
    group = find_group(timeout)
    if group is not None:
        join(group, timeout)
    elif problem := lost_devices():  # several compare first: commands/doctor/checks.py
        raise ValueError(problem)


def lost_devices() -> str:
    """Return what is wrong with the devices that JAX found on this host, or ''."""
    try:
        backend = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names devices that are not there
        return f"JAX finds no devices (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}): {error}"
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    # JAX passes over a platform that is named first and has no plugin here.
    if wanted and _BACKENDS.get(wanted, backend) != backend:
        return f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: asks for {wanted}, found {backend}"
    chips = hardware_utils.num_available_tpu_chips_and_device_id()[0]
    if chips and backend == "cpu" and wanted != "cpu":
        return (
            f"this host has {chips} TPU chips, and JAX runs on the CPU: install jax[tpu], or set"
            " JAX_PLATFORMS=cpu to run on the CPU on purpose"
        )
    shared = any(os.environ.get(name) for name in _SHARED_HOST)
    if backend == "tpu" and not shared and jax.local_device_count() < chips:
        return (
            f"this host has {chips} TPU chips, and JAX finds {jax.local_device_count()}: another"
            f" process may hold the others; to run on a part of them, set {_SHARED_HOST[0]}"
        )
    return ""
