"""How many adapters fit side by side: the compiler counts the bytes before anything runs.

  resident + program(A) <= device_bytes,    program(A) = program(0) + A * adapter_bytes

The program is a call of the inner loop with its largest step, compiled and never run. A step has a
fixed number of lanes, so what it needs for a while is the same for any population: only adapters,
the copies that their training starts from, and optimizer states grow with A. All sizes are bytes on
one device.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seal_jax.hosts.console import say
from seal_jax.hosts.exchange import least
from seal_jax.hosts.memory import device_bytes
from seal_jax.inner.packing import Shape, Step, pack, step_shapes, to_arrays
from seal_jax.inner.texts import Job, text_of
from seal_jax.inner.update import batch_sharding
from seal_jax.inner.update import num_shards as inner_shards
from seal_jax.models import lora
from seal_jax.models.config import ModelConfig
from seal_jax.optim import Optimizer, accumulate
from seal_jax.sharding import leading, num_parts, shaped, tree_bytes
from seal_jax.types import Adapters, InnerBatch, Params


def program_bytes(
    inner_update: Callable, mesh: Mesh, params: Params, adapters: Adapters, batch: InnerBatch
) -> float:
    """Return what one call takes with all its arguments; infinite where the compiler refuses it.

    Args:
      params, adapters, batch: arrays or ShapeDtypeStructs, as `inner_update` takes them.
    """
    try:
        with jax.set_mesh(mesh):  # as evaluate does, for the attention kernels
            compiled = inner_update.trace_batch(params, adapters, batch).lower().compile()
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

    Where a compiler refused a larger number, it is about half of that at least.

    Args:
      needed: how many bytes that number of adapters needs, which may take a compiler's time: it is
        asked once where `most` fit, and about once more where they don't.
      estimate: the part of it that grows with them; rather too steep than too flat.
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


def make_at_once(
    config: ModelConfig,
    inner_update: Callable,
    optimizer: Optimizer,
    params: Params,
    *,
    mesh: Mesh,
    resident: int,
    most: int,
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
    accumulation: int,
    tokens_per_step: int,
    steps_per_call: int,
    limit: int | None = None,
) -> Callable[[int], int]:
    """Return `at_once(longest)`: how many adapters to train side by side.

    `longest` is the tokens of the longest row that is to come. The number is counted, and printed,
    where it is asked for first. Later it stays, or falls if a longer row asks for a larger step.

    Args:
      params: the frozen base, arrays or ShapeDtypeStructs with a sharding.
      resident: bytes of what else lies on each device meanwhile.
      most: no more adapters than so many.
      limit: bytes to plan with on each device; `device_bytes` by default.
    """
    # The population is divided over this axis where its size allows, see sharding.leading.
    rules = config.rules
    multiple, num_shards = num_parts(mesh, "adapter", rules), inner_shards(mesh, rules)
    params = shaped(params, jax.tree.map(lambda x: x.sharding, params))
    seen, number = 0, most

    def fresh(num_adapters: int) -> Adapters:
        init = partial(lora.init_adapters, config, rank=rank, alpha=alpha, targets=targets)
        adapters = jax.eval_shape(lambda: init(jax.random.split(jax.random.key(0), num_adapters)))
        return shaped(adapters, leading(mesh, "adapter", num_adapters, rules))

    def needed(shape: Shape, num_adapters: int) -> float:
        batch = empty_batch(shape, num_adapters, steps_per_call, num_shards)
        batch = shaped(batch, batch_sharding(mesh, rules))
        return resident + program_bytes(inner_update, mesh, params, fresh(num_adapters), batch)

    def at_once(longest: int) -> int:
        nonlocal seen, number
        if longest <= seen:
            return number
        total = least("memory", device_bytes(mesh) if limit is None else limit)
        least_adapters = fresh(multiple)
        each = adapter_bytes(least_adapters, optimizer, accumulation) / multiple
        # Of an adapter that takes part in a step: itself, its gradient, and that stacked.
        lane = 3 * tree_bytes(least_adapters)
        for shape in largest_shapes(longest, tokens_per_step):

            def estimate(n: int, most_lanes: int = shape.num_chunks) -> float:
                return n * each + min(-(-n // num_shards), most_lanes) * lane

            number, used = fit_adapters(
                partial(needed, shape), estimate, room=total, most=number, multiple=multiple
            )
        # Rows up to T take the same steps.
        seen = max(longest, shape.length)
        say(
            f"inner loop: {number} adapters at once ({_say(used)} of the {_say(total)} to use on"
            f" each device; {_say(each)} an adapter)"
        )
        return number

    return at_once


def adapter_bytes(adapters: Adapters, optimizer: Optimizer, accumulation: int) -> int:
    """Return what training keeps for adapters: their first values, as the caller has them, those
    that are trained, the state of their optimizer, and a few numbers.

    Args:
      adapters: a stack, arrays or ShapeDtypeStructs with a sharding.
    """

    def init(weights: Params) -> Any:
        return jax.vmap(accumulate(optimizer(jnp.float32(0)), accumulation, 1).init)(weights)

    states = shaped(jax.eval_shape(init, adapters.weights), adapters.scale.sharding)
    # A step, and what a batch says of each adapter: 4 bytes each.
    numbers = (len(InnerBatch._fields) - InnerBatch._fields.index("learning_rate") + 1) * 4
    numbers *= adapters.scale.sharding.shard_shape(adapters.scale.shape)[0]
    return 2 * tree_bytes(adapters) + tree_bytes(states) + numbers


def empty_batch(
    shape: Shape, num_adapters: int, steps_per_call: int, num_shards: int
) -> InnerBatch:
    """Return a batch (numpy) of steps of that shape, in which nobody trains."""
    one_step = Job(((text_of((0, 0)),),), 0.0)
    nobody = [Job((), 0.0)] * num_adapters
    batch = pack([one_step, *nobody[1:]], num_shards=num_shards)[0]
    arrays = to_arrays(nobody, [Step(shape, ((),) * num_shards)], steps_per_call, 0)
    # What pack gives for each adapter stays; what it gives for each step has another shape.
    return InnerBatch(*arrays, *batch[len(arrays) :])


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
