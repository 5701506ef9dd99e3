"""Where arrays live: the mesh, the table of logical axis rules, and the two ways across the border.

RULES is the only table that the code reads. config/table.py repeats its defaults, as the keys
`sharding.*`, and a test keeps them equal.

Strings live on the host, arrays on devices. `to_device` and `to_host` are the only crossings, and
they are explicit, so the loop runs under `jax.transfer_guard('disallow')`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from seal_jax.types import (
    STEP_FIELDS,
    Adapters,
    Context,
    InnerBatch,
    InnerState,
    ParamRules,
    Params,
)

# Logical axis -> axes of the mesh, as in the config's section `sharding`, which may have others:
# they are a ModelConfig's `rules`. Models never name the mesh.
RULES = {
    "adapter": "data",  # of a population
    "rows": "data",  # of texts that are written, or scored
    "batch": "data fsdp",  # of rows that train the policy
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
}
AXES = ("data", "fsdp", "tensor")  # of a mesh
PARAM_AXES = ("embed", "vocab", "heads", "mlp")
# The logical axes of each kernel [in out], by the name of its linear map.
KERNELS = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "heads"),
    "v_proj": ("embed", "heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "embed": ("vocab", "embed"),
    "lm_head": ("embed", "vocab"),
}


Population = TypeVar("Population", InnerState, Adapters)
# (params, state, batch, context) -> the state after all steps of the batch, and their losses
InnerSteps = Callable[
    [Params, InnerState, InnerBatch, Context | None], tuple[InnerState, jax.Array]
]


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Return the mesh (data, fsdp, tensor) over all devices; one size may be -1, the rest of them.

    Args:
      devices: all of this run by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    num_devices = jax.device_count() if devices is None else len(devices)
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if int(np.prod(sizes)) != num_devices or -1 in sizes:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {num_devices} devices"
        )
    # Auto: the compiler propagates shardings. Explicit axes, the default, refuse plain indexing.
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 3, devices=devices)


def mesh_axes(logical: str, rules: ParamRules = ()) -> tuple[str, ...]:
    """Return the axes of the mesh that divide a logical one; none leaves it whole."""
    return tuple(dict(rules).get(logical, RULES[logical]).split())


def num_parts(mesh: Mesh | AbstractMesh, logical: str, rules: ParamRules = ()) -> int:
    """Return into how many parts the mesh divides a logical axis."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical, rules))


def divided(
    mesh: Mesh | AbstractMesh, logical: str, size: int, rules: ParamRules = ()
) -> str | tuple | None:
    """Return the entry of a PartitionSpec: None, if the axes do not divide `size`."""
    axes = mesh_axes(logical, rules)
    if not axes or size % num_parts(mesh, logical, rules):
        return None
    return axes[0] if len(axes) == 1 else axes


def auto_axes(mesh: AbstractMesh) -> set[str]:
    """Return the axes over which the compiler divides: all, but within a `shard_map`."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in types if kind == AxisType.Auto}


def attention_specs(
    mesh: AbstractMesh, num_rows: int, num_heads: int, rules: ParamRules = ()
) -> tuple[PartitionSpec, PartitionSpec]:
    """Return how [B N ...] and [B ...] are divided over the axes of `auto_axes`."""
    entries = [
        divided(mesh, logical, size, rules)
        if auto_axes(mesh).issuperset(mesh_axes(logical, rules))
        else None
        for logical, size in (("rows", num_rows), ("heads", num_heads))
    ]
    return PartitionSpec(*entries), PartitionSpec(entries[0])


class LookupSpecs(NamedTuple):
    """How a table's lookup is divided."""

    table: PartitionSpec  # [V D]
    index: PartitionSpec  # [M]
    rows: PartitionSpec  # [M D]


def lookup_specs(
    mesh: AbstractMesh, shape: Sequence[int], rules: ParamRules = ()
) -> LookupSpecs | None:
    """Return how a lookup in the embedding is divided; None unless both of its axes are."""
    axes = KERNELS["embed"]
    entries = [divided(mesh, axis, size, rules) for axis, size in zip(axes, shape, strict=True)]
    if None in entries or 1 in (num_parts(mesh, axis, rules) for axis in axes):
        return None
    return LookupSpecs(PartitionSpec(*entries), PartitionSpec(), PartitionSpec(None, entries[1]))


def param_shardings(mesh: Mesh, params: Any, rules: ParamRules = ()) -> Any:
    """Return the sharding of every parameter, or of what an optimizer keeps for it.

    A size that its axis does not divide is whole. Kernels of S sequences, [S in out], are divided
    as adapters are, and by what that leaves of the mesh as other kernels.

    Args:
      rules: of `ModelConfig.rules`.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        names = [getattr(entry, "key", None) for entry in path]
        axes = next((KERNELS[name] for name in names if name in KERNELS), ())
        before = ("adapter",) * (len(leaf.shape) - len(axes))
        if not axes or len(before) > 1 or len(leaf.shape) < len(axes):
            return NamedSharding(mesh, PartitionSpec())
        spec, taken = [], set()
        for axis, size in zip((*before, *axes), leaf.shape, strict=True):
            entry = None
            if taken.isdisjoint(mesh_axes(axis, rules)):
                entry = divided(mesh, axis, size, rules)
            taken.update(() if entry is None else mesh_axes(axis, rules))
            spec.append(entry)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, params)


def platform() -> str:
    """Return 'cpu', 'gpu' or 'tpu': the mesh's, which may be compiled for without being here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def leading(
    mesh: Mesh, logical: str, size: int, rules: ParamRules = (), before: int = 0
) -> NamedSharding:
    """Return the sharding of arrays [... logical ...], whole where the axis does not divide it.

    Args:
      rules: of `ModelConfig.rules`.
      before: the number of axes before it.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * before, divided(mesh, logical, size, rules)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def to_device(tree: Any, sharding: Any) -> Any:
    """Put host arrays on the devices: the one way in.

    Of several processes, each puts the parts of its own devices, and all have the same arrays.

    Args:
      tree: of numpy arrays, or of arrays that are here as a whole.
      sharding: of all, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(_put_parts, tree, jax.tree.broadcast(sharding, tree))


def to_host(tree: Any) -> Any:
    """Return arrays as numpy: the one way out.

    Of several processes, all take the whole of what lies on the devices of all: they call it
    together.
    """
    leaves, treedef = jax.tree.flatten(tree)
    apart = [i for i, leaf in enumerate(leaves) if not _is_here(leaf)]
    if apart:
        (mesh,) = {leaves[i].sharding.mesh for i in apart}
        whole = jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))
        for i, leaf in zip(apart, whole([leaves[i] for i in apart]), strict=True):
            leaves[i] = leaf
    return jax.device_get(treedef.unflatten(leaves))


def _is_here(leaf: Any) -> bool:
    """Whether this process has every number of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _put_parts(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if not _is_here(leaf):  # it lies on the devices of all, and moves between them
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put_parts(jax.random.key_data(leaf), sharding))
    array = np.asarray(jax.device_get(leaf))
    with jax.transfer_guard("allow"):  # JAX takes a callback's arrays for a slip
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shaped(tree: Any, shardings: Any) -> Any:
    """Return the tree as ShapeDtypeStructs.

    Args:
      shardings: one for all, or a tree of them; each holds for all that the tree has in its place,
        which may be nothing.
    """

    def placed(sharding: Sharding, part: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(placed, shardings, tree)


def tree_bytes(tree: Any) -> int:
    """Return the bytes of arrays, or of ShapeDtypeStructs with a sharding, on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def num_shards(mesh: Mesh | None, rules: ParamRules = ()) -> int:
    """Return into how many parts a population is divided that train without one another.

    One, where the axes that divide it divide the base too. Over other axes the parts stay apart:
    the chips that share a base talk with each other, and with nobody else.
    """
    if mesh is None:
        return 1
    axes = {axis for name in PARAM_AXES for axis in mesh_axes(name, rules) if mesh.shape[axis] > 1}
    apart = axes.isdisjoint(mesh_axes("adapter", rules))
    return num_parts(mesh, "adapter", rules) if apart else 1


def _batch_specs(axes: tuple[str, ...]) -> Any:
    """Return how an InnerBatch is divided over axes of the mesh, as one of PartitionSpecs."""
    by_lane, by_adapter = PartitionSpec(None, axes), PartitionSpec(axes)
    names = InnerBatch._fields
    return InnerBatch._make(by_lane if name in STEP_FIELDS else by_adapter for name in names)


def batch_sharding(mesh: Mesh, rules: ParamRules = ()) -> Any:
    """Return where the inner loop wants a batch, as an InnerBatch of shardings."""
    if num_shards(mesh, rules) == 1:
        return InnerBatch._make([replicated(mesh)] * len(InnerBatch._fields))
    specs = _batch_specs(mesh_axes("adapter", rules))
    return InnerBatch._make(NamedSharding(mesh, spec) for spec in specs)


def place_state(state: Population, mesh: Mesh | None, rules: ParamRules = ()) -> Population:
    """Keep arrays [A ...] divided as the adapters are: else they are copied, or not donated."""
    if mesh is None:
        return state
    where = leading(mesh, "adapter", jax.tree.leaves(state)[0].shape[0], rules)
    return jax.lax.with_sharding_constraint(state, where)


def on_shards(run_steps: InnerSteps, mesh: Mesh | None, rules: ParamRules = ()) -> InnerSteps:
    """Return `run_steps` as every part of the mesh does it, with its own adapters and lanes.

    It raises ValueError for params with kernels of S sequences that the parts do not divide.
    """
    count = num_shards(mesh, rules)

    def run(
        params: Params, state: InnerState, batch: InnerBatch, context: Context | None = None
    ) -> tuple[InnerState, jax.Array]:
        parts = run_steps
        if count > 1:
            axes = mesh_axes("adapter", rules)
            by_adapter, by_batch = PartitionSpec(axes), _batch_specs(axes)
            parts = jax.shard_map(
                partial(_on_shard, run_steps, axes),
                mesh=mesh,
                in_specs=(_specs_of_parts(params, axes, count), by_adapter, by_batch, by_adapter),
                out_specs=(by_adapter, by_batch.lanes),
                axis_names=set(axes),
                check_vma=False,
            )
        state, losses = parts(params, state, batch, context)
        return place_state(state, mesh, rules), losses

    return run


def _specs_of_parts(params: Params, axes: tuple[str, ...], count: int) -> Any:
    """Return how params are divided: whole, but for kernels [S in out] of S sequences."""

    def one(leaf: jax.Array) -> PartitionSpec:
        if leaf.ndim != 3:
            return PartitionSpec()
        if leaf.shape[0] % count:
            raise ValueError(
                f"kernels of {leaf.shape[0]} sequences on {count} parts of the mesh: expected a"
                " multiple of these, as of adapters"
            )
        return PartitionSpec(axes)

    return jax.tree.map(one, params)


def _on_shard(
    run_steps: InnerSteps,
    axes: tuple[str, ...],
    params: Params,
    state: InnerState,
    batch: InnerBatch,
    context: Context | None,
) -> tuple[InnerState, jax.Array]:
    """Count adapters from the shard's first one, in a batch that counts those of all shards."""
    first = jax.lax.axis_index(axes) * state.step.shape[0]

    def own(lanes: Any) -> jax.Array:
        return jnp.where(lanes >= 0, lanes - first, -1)

    batch = batch._replace(
        lanes=own(batch.lanes),
        references=None if batch.references is None else own(batch.references),
    )
    return run_steps(params, state, batch, context)


def along(mesh: Mesh, rules: ParamRules = (), **sizes: int) -> NamedSharding:
    """Return the sharding of arrays whose first axes are logical ones, of these sizes.

    `along(mesh, rules, rows=8, heads=4)` is for [rows heads ...]; an axis whose size is not divided
    is whole.
    """
    entries = (divided(mesh, logical, size, rules) for logical, size in sizes.items())
    return NamedSharding(mesh, PartitionSpec(*entries))
