"""A mesh of one of the tests' eight devices."""

import jax


def one_device_mesh():
    types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), types, devices=jax.devices()[:1])
