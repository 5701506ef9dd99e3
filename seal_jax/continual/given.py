"""What a remedy is given: closed over when it is made, or as an extra argument of `update`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from seal_jax.optim import OtherShapes
from seal_jax.types import Array, Params

# Of each adapted map: {block: {target: f32[L D D]}}, D the map's inputs.
Maps = dict[str, dict[str, Array]]
Change = Callable[..., Params]  # (updates, params, what is given) -> updates


def transformation(
    name: str, keyword: str, closed_over: Any, change: Change, check: Callable[[Any, Params], None]
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation without a state that changes updates by one thing it is given.

    Args:
      keyword: by which `update` gets what is not closed over.
      check: raises where what is given does not fit the parameters.

    Raises:
      TypeError: from `update`, where it is given neither way, or both; OtherShapes (a TypeError)
        where it has other shapes than the parameters.
    """

    def init(params: Any) -> optax.EmptyState:
        if closed_over is not None:
            check(closed_over, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        found = _one_of(name, keyword, closed_over, extra)
        check(found, updates)
        return change(updates, params, found), state

    return optax.GradientTransformationExtraArgs(init, update)


def _one_of(name: str, keyword: str, closed_over: Any, extra: Mapping[str, Any]) -> Any:
    passed = extra.get(keyword)
    if (closed_over is None) == (passed is None):
        how = "has neither" if passed is None else "has both"
        raise TypeError(
            f"{name} takes {keyword} when it is made, {name}({keyword}=...), or in every update,"
            f" update(..., {keyword}=...); it {how}"
        )
    return passed if closed_over is None else closed_over


def present(name: str, params: Params | None) -> Params:
    """Return the parameters.

    Raises:
      TypeError: update was not given them.
    """
    if params is None:
        raise TypeError(f"{name} takes the parameters, update(updates, state, params)")
    return params


def check_alike(name: str, found: Any, params: Params, leading: int = 0) -> None:
    """Refuse a pytree that is not, behind `leading` axes, shaped as the parameters.

    Raises:
      OtherShapes: naming the first array in which they differ.
    """
    shapes = [
        {jax.tree_util.keystr(path): jnp.shape(x)[skip:] for path, x in _named(tree)}
        for tree, skip in ((found, leading), (params, 0))
    ]
    _compare(name, *shapes)


def check_maps(name: str, found: Maps, weights: Params) -> None:
    """Refuse what is not [L D D] of every map that the adapter adapts, `a` being [L r D].

    Raises:
      OtherShapes: naming the first map in which they differ.
      TypeError: the weights are not an adapter's.
    """
    if not is_adapter(weights):
        raise TypeError(
            f"{name} takes an adapter's weights, {{block: {{target: {{'a', 'b'}}}}}}; got"
            f" {jax.tree.structure(weights)}"
        )
    expected = {}
    for block, targets in weights.items():
        for target, ab in targets.items():
            L, _, D = jnp.shape(ab["a"])
            expected[f"{block}/{target}"] = (L, D, D)
    shapes = {f"{b}/{t}": jnp.shape(x) for b, targets in found.items() for t, x in targets.items()}
    _compare(name, shapes, expected)


def is_adapter(weights: Any) -> bool:
    """Return whether weights are those of one adapter, {block: {target: {'a', 'b'}}}."""
    blocks = weights.values() if isinstance(weights, dict) else [None]
    targets = [x for b in blocks for x in (b.values() if isinstance(b, dict) else [None])]
    return bool(targets) and all(isinstance(x, dict) and set(x) == {"a", "b"} for x in targets)


def map_a(function: Callable[..., Array], weights: Params, maps: Maps, *others: Params) -> Params:
    """Return the weights with function(a, its map's, the others' a) in the place of every `a`."""
    new: Params = {}
    for block, targets in weights.items():
        new[block] = {}
        for target, ab in targets.items():
            of_others = [other[block][target]["a"] for other in others]
            new[block][target] = ab | {"a": function(ab["a"], maps[block][target], *of_others)}
    return new


def zero_maps(weights: Params) -> Maps:
    """Return the store of no edit yet: zeros, f32[... D D] where `a` is [... r D]."""
    return {
        block: {
            target: jnp.zeros((*ab["a"].shape[:-2], ab["a"].shape[-1], ab["a"].shape[-1]))
            for target, ab in targets.items()
        }
        for block, targets in weights.items()
    }


def _named(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _compare(name: str, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    for where in [*expected, *found]:
        if found.get(where) != expected.get(where):
            has, asks = found.get(where, "nothing"), expected.get(where, "nothing")
            raise OtherShapes(f"{name}: {has} for {where}, expected {asks}, after the parameters")
