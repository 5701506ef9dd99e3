"""Who talks with whom in a compiled program."""

import math
import re

import numpy as np

from seal_jax import sharding


def replica_groups(text):
    """Return the devices that talk with each other, in any of the three ways XLA writes them."""
    groups = [
        [int(i) for i in group.split(",")]
        for found in re.findall(r"replica_groups=\{(\{[\d,{}]+\})\}", text)
        for group in re.findall(r"[\d,]+", found.replace("},{", " "))
    ]
    for rows, size, dims, order in re.findall(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ):
        dims = [int(n) for n in dims.split(",")]
        devices = np.arange(np.prod(dims)).reshape(dims)
        if order:
            devices = devices.transpose([int(n) for n in order.split(",")])
        groups += devices.reshape(int(rows), int(size)).tolist()
    for sizes, axes in re.findall(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
        sizes = [int(size) for size in re.findall(r"=(\d+)", sizes)]
        names = re.findall(r"'(\w+)'", axes)
        places = [i for i, name in enumerate(sharding.AXES) if name in names]
        devices = np.moveaxis(
            np.arange(np.prod(sizes)).reshape(sizes), places, range(-len(places), 0)
        )
        groups += devices.reshape(-1, math.prod(sizes[i] for i in places)).tolist()
    return groups
