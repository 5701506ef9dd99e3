"""TPU chips, and slices of them to compile for where there are none."""

import os
import re
from typing import NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
    """What one device can do. Of TPUs: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm"""

    name: str
    flops: float  # per second, bfloat16
    memory: float  # bytes that XLA gives a program
    bandwidth: float  # bytes per second from that memory
    link: float  # bytes per second between chips, all links of one together


CHIPS = {
    "v4": Chip("v4", 275e12, 30.75 * GIB, 1228e9, 300e9),
    "v5e": Chip("v5e", 197e12, 15.75 * GIB, 819e9, 200e9),
    "v5p": Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 600e9),
    "v6e": Chip("v6e", 918e12, 31.25 * GIB, 1640e9, 448e9),
}
# libtpu's names differ in the number of axes, and a v4's two cores are one device if so asked.
_AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


def find_slice(topology: str) -> tuple[Chip, list[jax.Device]]:
    """Return the chip and the devices, to compile for and not to run on, of 'v5e:4x4' or the like.

    Raises:
      ValueError: there is no such slice, or libtpu, which compiles for it, is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise ValueError(
            f"--topology {topology}: needs KIND:SHAPE with a kind of {', '.join(CHIPS)}, as v5e:4x4"
            " or v5p:2x2x1, or 'here'"
        )
    if shape.count("x") + 1 != _AXES[kind]:
        raise ValueError(f"--topology {topology}: a {kind} slice has {_AXES[kind]} axes")
    # Only the compiler is used: nobody else needs to be kept away from chips, or asked about them.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **_OPTIONS.get(kind, {})
        )
    except (RuntimeError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology {topology}: libtpu does not describe it ({reason}). Install"
            " libtpu with pip, and name a slice that exists"
        ) from error
    return CHIPS[kind], list(found.devices)
