"""What the outer loop makes of rewards, one objective a file: NAME.py has NAME(**options).

Imports no jax before an objective is made: the config asks here which names there are.
"""

import difflib
import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from seal_jax.extensions import Found

if TYPE_CHECKING:
    from seal_jax.objectives.objective import Objective

# Functions that return an Objective.
OBJECTIVES = Found("objectives", base="objective")


def make_objective(name: str, **options: Any) -> "Objective":
    """Return an objective by its name in OBJECTIVES.

    Raises:
      ValueError: no objective or no option of that name, or a value that it cannot have.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    make = OBJECTIVES[name]
    known = list(inspect.signature(make).parameters)
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, 1, 0.0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{name} has no option {option!r}{hint} (it has: {', '.join(known)})")
    try:
        return make(**options)
    except TypeError as error:  # a word where a number belongs
        raise ValueError(f"{name}: {options}: {error}") from error


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    return getattr(importlib.import_module("seal_jax.objectives.objective"), name)


class _Folder(ModuleType):
    """Let `objectives.grpo` be what grpo.py holds: Python sets it to the file on its import."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name, value))


sys.modules[__name__].__class__ = _Folder
