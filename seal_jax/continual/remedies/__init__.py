"""Ways to forget less, a file each: NAME.py has remedy(**options) -> Remedy.

What changes gradients or updates is an optax transformation, for any chain. What one needs is
closed over when it is made, or comes with every update under its keyword;
`continual/memory_gradients.py` computes it from a model.

  name        keyword       place             what it does                     parameters
  ewc         importance    1, in the loss    pulls back what earlier texts need   any
  o_lora      subspaces     1, in the loss    turns `a` from earlier adapters      adapters
  a_gem       memory_grads  2, the gradient   no step against the memory           any
  (clipping, then the optimizer)
  ogd         directions    3, the update     no step along stored directions      any
  null_space  projectors    3, the update     `a` does not see the memory          adapters

The penalties (1) add up, and come before A-GEM, which then looks at all of the gradient. After
A-GEM Adam still scales every number by itself, so its promise is about the gradient; OGD and the
null space project what is added to the parameters, and their promise is exact.

Imports no jax before a remedy is made: the config asks here which names there are.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from seal_jax.extensions import Found

if TYPE_CHECKING:
    import optax

    from seal_jax.continual.remedies.remedy import Remedy

# Pairs of which the second breaks what the first promises, and why.
_CONTRADICT = {
    ("a_gem", "ogd"): "without the stored directions, a step may go against the memory again",
    ("ogd", "null_space"): "projected into the null space, a step may have stored directions again",
}
# Where each stands in a chain: before the optimizer in this order, or after it.
_ORDER = ("ewc", "o_lora", "a_gem", "ogd", "null_space")
# Functions that return a Remedy.
REMEDIES = Found("continual.remedies", base="remedy", attribute="remedy")
# Places of an edit that only one remedy can have, and what it decides there.
_SINGLE = {
    "old": "what is trained on beside the new texts",
    "teach": "who teaches the new texts",
    "start": "how an adapter begins",
    "keep": "what is kept of an edit",
    "route": "who answers a question",
}


# How the values of options are called, by the type of their default.
_KINDS = {float: "number", int: "whole number", str: "word", bool: "bool", tuple: "tuple"}


def make_remedies(names: Sequence[str], options: Mapping[str, Any]) -> "dict[str, Remedy]":
    """Return remedies by their names in REMEDIES, in order.

    Args:
      options: of each, by name.

    Raises:
      KeyError: no remedy of that name, see config/check_continual.py.
      ValueError: no option of that name, a value that it cannot have, or two remedies that
        contradict each other.
    """
    remedies = {name: _make(name, options.get(name, {})) for name in names}
    for one, other in combinations(remedies, 2):
        if why := _contradiction(one, remedies[one], other, remedies[other]):
            raise ValueError(f"continual.remedies: {one!r} and {other!r} contradict: {why}")
    return remedies


def transformations(
    remedies: "Mapping[str, Remedy]",
) -> "tuple[list[optax.GradientTransformation], list[optax.GradientTransformation]]":
    """Return what stands before and behind the optimizer in its chain, each in its order."""
    known = [name for name in _ORDER if name in remedies]
    placed = [remedies[name] for name in [*known, *(x for x in remedies if x not in known)]]
    before = [one.before for one in placed if one.before is not None]
    return before, [one.after for one in placed if one.after is not None]


def _make(name: str, options: Mapping[str, Any]) -> "Remedy":
    make, where = REMEDIES[name], f"continual.remedy_kwargs: {name}"
    known = inspect.signature(make).parameters
    for option, value in options.items():
        if option not in known:
            nearest = difflib.get_close_matches(option, known, 1, 0.0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            has = ", ".join(known) or "none"
            raise ValueError(f"{where} has no option {option!r}{hint} (it has: {has})")
        kind = type(known[option].default)
        if not isinstance(value, (int, float) if kind is float else kind) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise ValueError(f"{where}: {option} = {value!r}: needs a {_KINDS.get(kind, kind)}")
    try:
        return make(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _contradiction(one: str, first: "Remedy", other: str, second: "Remedy") -> str:
    """Return why two remedies cannot work together, or ''."""
    for place, what in _SINGLE.items():
        if getattr(first, place) is not None and getattr(second, place) is not None:
            return f"both decide {what}"
    for pair in ((one, other), (other, one)):
        if pair in _CONTRADICT:
            return _CONTRADICT[pair]
    if {first.frame, second.frame} in ({"fixed", "fresh"}, {"fixed", "own"}):
        return "one needs adapters that begin alike in every edit, the other those that do not"
    if first.top and second.top and first.top != second.top:
        return f"teachers tell apart {first.top} tokens for the one, {second.top} for the other"
    return (
        "nothing that the one changes is there for the other" if first.alone or second.alone else ""
    )
