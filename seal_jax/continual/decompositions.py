"""Decompositions of stacks of matrices, as `jnp.linalg.eigh` and `qr` make them."""

from collections.abc import Callable
from typing import Any

import jax

from seal_jax.sharding import platform
from seal_jax.types import Array


def of_each(decompose: Callable[[Array], Any], matrices: Array) -> Any:
    """Return what a decomposition makes of matrices [... m n], a pytree of [... any].

    On CPUs it takes one after another. A call of LAPACK on a stack waits, in a thread of XLA's, for
    others of these threads: where as many stacks as there are threads are taken at once, as those
    of several maps are, they wait for each other for ever (jaxlib 0.10.2).
    """
    if platform() != "cpu":
        return decompose(matrices)
    lead = matrices.shape[:-2]
    found = jax.lax.map(decompose, matrices.reshape(-1, *matrices.shape[-2:]))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)
