"""Ways to forget less, a file each: NAME.py has remedy(**options) -> Remedy.

Imports no jax before a remedy is made: the config asks here which names there are.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from seal_jax.extensions import Found

if TYPE_CHECKING:
    from seal_jax.continual.remedies.remedy import Remedy

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


def make_remedies(names: Sequence[str], options: Mapping[str, Any]) -> "dict[str, Remedy]":
    """Return remedies by their names in REMEDIES, in order.

    Args:
      options: of each, by name.

    Raises:
      ValueError: no remedy or no option of that name, a value that it cannot have, or two that
        contradict each other.
    """
    for name in options:
        if name not in names:
            raise ValueError(f"continual.remedy_kwargs has {name!r}: continual.remedies has not")
    remedies = {name: _make(name, options.get(name, {})) for name in names}
    for one, other in combinations(remedies, 2):
        if why := _contradiction(one, remedies[one], other, remedies[other]):
            raise ValueError(f"continual.remedies: {one!r} and {other!r} contradict: {why}")
    return remedies


def _make(name: str, options: Mapping[str, Any]) -> "Remedy":
    if name not in REMEDIES:
        raise ValueError(f"remedy {name!r}: expected one of {', '.join(REMEDIES)}")
    make = REMEDIES[name]
    known = list(inspect.signature(make).parameters)
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, 1, 0.0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{name} has no option {option!r}{hint} (it has: {', '.join(known)})")
    try:
        return make(**options)
    except TypeError as error:  # a word where a number belongs
        raise ValueError(f"{name}: {dict(options)}: {error}") from error


def _contradiction(one: str, first: "Remedy", other: str, second: "Remedy") -> str:
    """Return why two remedies cannot work together, or ''."""
    for place, what in _SINGLE.items():
        if getattr(first, place) is not None and getattr(second, place) is not None:
            return f"both decide {what}"
    if {first.frame, second.frame} == {"fixed", "fresh"}:
        return "one needs adapters that begin alike in every edit, the other fresh ones"
    for name, remedy, excluded in ((one, second, second.excludes), (other, first, first.excludes)):
        del remedy
        if name in excluded or "*" in excluded:
            return "nothing that the one changes is there for the other"
    return ""
