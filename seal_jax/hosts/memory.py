"""How many bytes each device of this host has."""

import os

from jax.sharding import Mesh

# Of a device's memory, or of this host's: what we plan with. The rest is for fragments, for what
# waits to be freed, and on a CPU for the process itself.
SHARE = 0.9
# Where a container's own limit is written, if there is one.
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_bytes(mesh: Mesh) -> int:
    """Return how many bytes we plan to use on each device: SHARE of what it has.

    A GPU or TPU tells what it lends this process; CPU devices share the host's memory equally.
    """
    devices = mesh.local_devices
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(SHARE * stats["bytes_limit"])
    return int(SHARE * _host_bytes() / len(devices))


def _host_bytes() -> int:
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER:
        if os.path.exists(path):
            with open(path) as file:
                text = file.read().strip()
            found += [int(text)] if text.isdigit() else []  # 'max' is none
    return min(found)
