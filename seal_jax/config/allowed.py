"""What a config's key may hold: a sentence, a test, and how an override's text is read.

Imports no jax.
"""

import ast
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from seal_jax.tasks.knowledge.texts import path_of


class Allowed(NamedTuple):
    """What a key may hold."""

    text: str  # ends the sentence "KEY = VALUE: needs ..."
    test: Callable[[Any], bool]
    parse: Callable[[str], Any]  # an override's text to a value; raises ValueError or SyntaxError


# --- from an override's text to a value ---


def _unquote(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _parse_flag(text: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def _parse_names(text: str) -> tuple[str, ...]:
    inner = text.strip().strip("()[]")
    return tuple(_unquote(name.strip()) for name in inner.split(",") if name.strip())


def _import_name(text: str) -> Callable | None:
    """Import 'module:qualname'; 'None' is None."""
    if text.lower() == "none":
        return None
    module_name, _, qualname = text.partition(":")
    if not qualname:
        raise ValueError(f"{text!r} is not 'module:name'")
    value = _find(module_name, qualname)
    if (getattr(value, "__module__", None), getattr(value, "__qualname__", "")) == (
        module_name,
        qualname,
    ):
        return value
    return _under_name(module_name, qualname)


def _find(module_name: str, qualname: str) -> Any:
    try:
        value: Any = importlib.import_module(module_name)
        for name in qualname.split("."):
            value = getattr(value, name)
    except (ImportError, AttributeError) as error:
        where = f"{module_name}:{qualname}"
        raise ValueError(f"cannot import {where!r}: {error}") from error
    return value


@functools.cache
def _under_name(module_name: str, qualname: str) -> Callable:
    """Return a function that is found under a name of its own: by which a config is stored.

    Partial functions and methods have no such name, and wrapped functions another one's.
    """
    value = _find(module_name, qualname)
    if not callable(value):
        raise ValueError(f"'{module_name}:{qualname}' is no function: {type(value).__name__}")

    def function(*arguments: Any) -> Any:
        return value(*arguments)

    function.__module__, function.__qualname__ = module_name, qualname
    return function


def _imports_back(value: Any) -> bool:
    """Return whether a function is what its name says, so that a stored config has it again."""
    try:
        return _import_name(f"{value.__module__}:{value.__qualname__}") is value
    except (AttributeError, ValueError):
        return False


# --- what a value may be ---


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping | ConfigDict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


def integer(low: int, high: int | None = None, also: tuple[int, ...] = ()) -> Allowed:
    bounds = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    text = " or ".join([bounds, *map(str, also)])
    top = math.inf if high is None else high
    return Allowed(text, lambda v: _is_int(v) and (low <= v <= top or v in also), int)


def real(low: float | None = None, high: float | None = None, above: bool = False) -> Allowed:
    """Allow a finite number in [low, high], or in (low, high] with `above`."""
    left = "(-inf" if low is None else f"{'(' if above else '['}{low:g}"
    text = f"a finite number in {left}, {'inf)' if high is None else f'{high:g}]'}"

    def test(value: Any) -> bool:
        if not (_is_int(value) or isinstance(value, float)) or not math.isfinite(value):
            return False
        if low is not None and (value <= low if above else value < low):
            return False
        return high is None or value <= high

    return Allowed(text, test, float)


def choice(*choices: str) -> Allowed:
    """Allow one of `choices`."""
    text = f"one of {', '.join(map(repr, choices))}"
    return Allowed(text, lambda v: isinstance(v, str) and v in choices, _unquote)


def names(*choices: str) -> Allowed:
    """Allow a non-empty tuple of different names from `choices`."""

    def test(value: Any) -> bool:
        if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
            return False
        return 0 < len(value) == len(set(value)) and set(value) <= set(choices)

    return Allowed(f"a tuple of different names from {', '.join(choices)}", test, _parse_names)


def some_of(*choices: str) -> Allowed:
    """Allow a tuple of different names from `choices`, or none."""
    one = names(*choices)
    text = f"{one.text}, or ()"
    return Allowed(text, lambda v: isinstance(v, tuple) and not v or one.test(v), one.parse)


def weights(*terms: str) -> Allowed:
    """Allow a non-empty dict of finite weights for `terms`."""

    def test(value: Any) -> bool:
        if not isinstance(value, Mapping | ConfigDict) or not value or not _is_plain(value):
            return False
        return set(value) <= set(terms) and all(isinstance(w, int | float) for w in value.values())

    return Allowed(f"a dict of weights of {', '.join(terms)}", test, ast.literal_eval)


TEXT = Allowed("a non-empty string", lambda v: isinstance(v, str) and v != "", _unquote)
ANY_TEXT = Allowed("a string", lambda v: isinstance(v, str), _unquote)
PREFIX = Allowed(  # the answer follows behind a space
    "a string with no space or line end around it",
    lambda v: isinstance(v, str) and v == v.strip(),
    _unquote,
)
STRINGS = Allowed(
    "a tuple of non-empty strings",
    lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
    ast.literal_eval,
)
WORDS = STRINGS._replace(parse=_parse_names)  # as a,b in an override
FLAG = Allowed("True or False", lambda v: isinstance(v, bool), _parse_flag)
KEYWORDS = Allowed(  # of a library that checks them itself
    "a dict of finite numbers, strings, bools and None",
    lambda v: isinstance(v, Mapping | ConfigDict) and _is_plain(v),
    ast.literal_eval,
)
FUNCTION = Allowed(
    "None or a named function of the learning rate that is found by its name, as module:name",
    lambda v: v is None or (callable(v) and _imports_back(v)),
    _import_name,
)
PLAIN = Allowed(
    "a finite number, string, bool, None or a tuple of them", _is_plain, ast.literal_eval
)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")


def _is_files_of_texts(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    try:
        return all(_NAME.fullmatch(name) and path_of(at) for name, at in value.items())
    except (ValueError, TypeError, AttributeError):  # names and paths of another type
        return False


FILES_OF_TEXTS = Allowed(
    "a dict {'NAME': 'json:FILE'}; a name has at most 40 letters, digits and . _ + -",
    _is_files_of_texts,
    ast.literal_eval,
)


def rule_like(default: Any) -> Allowed:
    """Allow what a task's default suggests; the task itself checks the rest."""
    rules = {
        bool: FLAG,
        int: Allowed("an integer", _is_int, int),
        float: real(),
        str: ANY_TEXT,
    }
    return rules.get(type(default), PLAIN)
