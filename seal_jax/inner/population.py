"""How many adapters fit side by side: the compiler counts the bytes before anything runs.

  resident + program(A) <= device_bytes,    program(A) = program(0) + A * adapter_bytes

The program is a call of the inner loop with its largest step, compiled and never run. A step has a
fixed number of lanes, so its temporary memory is the same for any population: only adapters, the
copies that their training starts from, and optimizer states grow with A. All sizes are bytes on
one device.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from seal_jax.hosts.console import say
from seal_jax.hosts.exchange import least
from seal_jax.hosts.memory import device_bytes
from seal_jax.inner.packing import empty_batch
from seal_jax.inner.steps import Shape, step_shapes
from seal_jax.inner.update import InnerLoop, InnerSetup, start_state
from seal_jax.models import lora
from seal_jax.sharding import batch_sharding, leading, num_parts, num_shards, shaped, tree_bytes
from seal_jax.types import OF_ADAPTERS, Adapters, InnerBatch, InnerSettings, Params


class Population(NamedTuple):
    """How many adapters train side by side."""

    number: int
    longest: int = 0  # for rows of so many tokens, and for shorter ones


class Needs(NamedTuple):
    """What decides how many adapters fit."""

    loop: InnerLoop  # with a mesh
    inner: InnerSettings
    params: Params  # the frozen base, arrays or ShapeDtypeStructs with a sharding
    resident: int  # bytes of what else lies on each device meanwhile
    limit: int | None = None  # bytes to plan with on each device; `device_bytes` by default

    @property
    def mesh(self) -> Mesh:
        assert self.loop.setup.mesh is not None
        return self.loop.setup.mesh


def fit_population(needs: Needs, longest: int, previous: Population) -> Population:
    """Return how many adapters fit where the longest row that is to come has so many tokens.

    The number is counted, and printed, where a row is longer than any before. It never grows.

    Args:
      previous: what the last call returned; first, the most adapters that are wanted.

    Raises:
      ValueError: not even the fewest fit.
    """
    if longest <= previous.longest:
        return previous
    setup, inner = needs.loop.setup, needs.inner
    mesh, rules = needs.mesh, setup.config.rules
    room = least("memory", device_bytes(mesh) if needs.limit is None else needs.limit)
    # The population is divided over this axis where its size allows, see sharding.leading.
    multiple = num_parts(mesh, "adapter", rules)
    fewest = adapter_shapes(needs, multiple)
    each = adapter_bytes(fewest, setup) / multiple
    number = previous.number
    for shape in largest_shapes(longest, inner.tokens_per_step):
        number, used = fit_adapters(
            partial(_needed, needs, shape),
            partial(_estimate, shape, num_shards(mesh, rules), each, tree_bytes(fewest)),
            room=room,
            most=number,
            multiple=multiple,
        )
    say(
        f"inner loop: {number} adapters at once ({_say(used)} of the {_say(room)} to use on"
        f" each device; {_say(each)} an adapter)"
    )
    return Population(number, max(longest, shape.length))  # rows up to T take the same steps


def adapter_shapes(needs: Needs, num_adapters: int) -> Adapters:
    """Return adapters as ShapeDtypeStructs, divided as the inner loop wants them."""
    inner, setup = needs.inner, needs.loop.setup
    sizes = {"rank": inner.rank, "alpha": inner.alpha, "targets": inner.targets}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_adapters))
    adapters = jax.eval_shape(partial(lora.init_adapters, setup.config, **sizes), keys)
    return shaped(adapters, leading(needs.mesh, "adapter", num_adapters, setup.config.rules))


def _needed(needs: Needs, shape: Shape, num_adapters: int) -> float:
    """Return the bytes on each device while so many adapters take a step of that shape."""
    setup = needs.loop.setup
    mesh, rules = needs.mesh, setup.config.rules
    inner, shards = needs.inner, num_shards(mesh, rules)
    batch = empty_batch(
        shape, num_adapters, inner.steps_per_call, shards, num_taught=inner.num_taught
    )
    batch = shaped(batch, batch_sharding(mesh, rules))
    params = shaped(needs.params, jax.tree.map(lambda x: x.sharding, needs.params))
    adapters = adapter_shapes(needs, num_adapters)
    return needs.resident + program_bytes(needs.loop, params, adapters, batch)


def _estimate(shape: Shape, shards: int, each: float, copy: float, num_adapters: int) -> float:
    """Return the part of the needed bytes that grows with the adapters."""
    # Of an adapter that takes part in a step: itself, its gradient, and that stacked.
    return num_adapters * each + min(-(-num_adapters // shards), shape.num_chunks) * 3 * copy


def program_bytes(loop: InnerLoop, params: Params, adapters: Adapters, batch: InnerBatch) -> float:
    """Return what one call takes with all its arguments; infinite where the compiler refuses it.

    Args:
      params, adapters, batch: arrays or ShapeDtypeStructs.
    """
    try:
        with jax.set_mesh(loop.setup.mesh):  # for the attention kernels
            compiled = loop.trace(params, adapters, batch).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    memory = compiled.memory_analysis()
    return (
        tree_bytes(adapters)  # the caller's, from which the state was copied
        + memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def fit_adapters(
    needed: Callable[[int], float],
    estimate: Callable[[int], float],
    *,
    room: float,
    most: int,
    multiple: int = 1,
) -> tuple[int, float]:
    """Return the largest number of adapters that fits, a multiple of `multiple`, and its bytes.

    Where the compiler itself runs out of memory, it does not say how many bytes are needed, and the
    next try is half of that number. So then more might fit than is returned, about twice as many
    at most.

    Args:
      needed: how many bytes that number of adapters needs, which may take a compiler's time: it is
        asked once where `most` fit, and about once more where they don't.
      estimate: the part of it that grows with them. Where it is not exact, it should grow too fast
        and not too slowly: if it grows too slowly, adapters are given up that would fit.
      room: the bytes there are.
      most: no more than so many are wanted; rounded up.

    Raises:
      ValueError: not even the least number fits.
    """

    def largest(limit: int, fits: Callable[[int], bool]) -> int:
        return next(filter(fits, range(limit, multiple, -multiple)), multiple)

    number = max(1, -(-most // multiple)) * multiple
    # Not even adapters alone may fit: a compiler, too, runs out of memory.
    number = largest(number, lambda n: estimate(n) <= room)
    while (found := needed(number)) > room:
        if number == multiple:
            count = "one adapter needs" if number == 1 else f"{number} adapters need"
            has = "more than a device has" if found == math.inf else f"{_say(found)} a device"
            raise ValueError(
                f"the inner loop does not fit: {count} {has}, and there are {_say(room)} to use."
                " Lower inner.tokens_per_step, set inner.remat=full or inner.quantize=int8 or nf4,"
                " or divide the base over more devices (mesh.fsdp, mesh.tensor)"
            )
        if found == math.inf:
            number = largest(number - multiple, lambda n, half=number / 2: n <= half)
        else:
            most_bytes = estimate(number) - (found - room)
            number = largest(number - multiple, lambda n, most=most_bytes: estimate(n) <= most)
    return number, found


def adapter_bytes(adapters: Adapters, setup: InnerSetup) -> int:
    """Return what training keeps for adapters, as ShapeDtypeStructs with a sharding.

    Their first values, as the caller has them, the loop's state, and what a batch says of each.
    """
    scale: Any = adapters.scale
    where = scale.sharding
    state = shaped(jax.eval_shape(partial(start_state, setup), adapters, scale), where)
    numbers = 4 * len(OF_ADAPTERS)
    numbers *= where.shard_shape(scale.shape)[0]
    return tree_bytes(adapters) + tree_bytes(state) + numbers


def largest_shapes(longest: int, tokens_per_step: int) -> list[Shape]:
    """Return the steps that may need the most memory, one or two of them; the longest is last.

    Long rows need it for attention, and for their tokens; many lanes for their gradients.
    """
    shapes = step_shapes(longest, tokens_per_step)
    widest = max(shapes, key=lambda shape: (shape.num_chunks, shape.num_tokens, shape.length))
    return [widest] * (widest != shapes[-1]) + [shapes[-1]]


def _say(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
