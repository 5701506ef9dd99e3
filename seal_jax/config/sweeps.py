"""What `seal-jax tune` tries: `--over` texts become settings, and the best one a config file.

A setting is a config with a few keys changed, and so it is checked as every config is. Imports no
jax.
"""

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from seal_jax.config.load import ConfigError, default_config, flatten, with_overrides
from seal_jax.config.table import FIELDS
from seal_jax.tasks import TASKS
from seal_jax.tasks.task import asks_once

# What may differ within one compiled program; what needs another; what needs other self-edits.
DATA = ("inner.learning_rate", "inner.num_epochs", "inner.schedule", "inner.batch_size")
PROGRAM = (
    *("inner.rank", "inner.alpha", "inner.targets", "inner.optax_name", "inner.grad_clip"),
    *("inner.dropout", "inner.accumulation", "inner.warmup_steps", "inner.pad_loss"),
    "inner.quantize",
)
TEXTS = ("task.style", "task.split_newlines", "sample.temperature")
KEYS = (*DATA, *PROGRAM, *TEXTS)
DEFAULT = (
    "inner.learning_rate=1e-4,2e-4,5e-4,1e-3,2e-3,3e-3,5e-3,1e-2",
    "inner.num_epochs=2,4,8,16",
)
NUM_SAMPLES = 32  # where a range is given


class Axis(NamedTuple):
    """The values that a key takes."""

    key: str
    values: tuple[str, ...] = ()  # of a list
    bounds: tuple[float, float] | None = None  # of a range, both above 0
    whole: bool = False  # integers


class Candidate(NamedTuple):
    """A config to try, and what of the given one it changes: as after --set."""

    overrides: tuple[str, ...]
    config: ConfigDict


def candidates(config: ConfigDict, over: Sequence[str], num_samples: int | None) -> list[Candidate]:
    """Return the settings to try, each once; the config's own is the first, or where it occurs.

    Lists alone make a grid, of which `num_samples` are drawn where that is given. With a range as
    many are drawn (NUM_SAMPLES by default): of every key each equal part of its range, in its
    logarithm, is drawn from once, and each value of a list about equally often.

    Raises:
      ConfigError: a key or a value that cannot be tried, or a task; the message names it.
    """
    if not asks_once(TASKS[config.task.name]):
        raise ConfigError(
            f"task.name = {config.task.name!r}: it asks each question in several ways, and its gold"
            " answers are not scored; a sweep is decided by their log-likelihood"
        )
    axes = [_read_axis(config, text) for text in over or DEFAULT]
    keys = [axis.key for axis in axes]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"--over {twice[0]}: given twice; expected once, with all its values")
    drawn = num_samples is not None or any(axis.bounds for axis in axes)
    if any(axis.bounds for axis in axes):
        rows = _sample(axes, num_samples or NUM_SAMPLES, config.seed)
    else:
        rows = list(itertools.product(*[axis.values for axis in axes]))
        if num_samples is not None:
            rng = np.random.default_rng([config.seed, len(rows)])
            chosen = sorted(rng.permutation(len(rows))[:num_samples].tolist())
            rows = [rows[i] for i in chosen]
    found: list[Candidate] = []
    for row in rows:
        overrides = tuple(f"{key}={value}" for key, value in zip(keys, row, strict=True))
        one = Candidate(overrides, with_overrides(config, overrides))
        same = [other for other in found if _same(other.config, one.config)]
        if not same:
            found.append(one)
        elif not drawn:
            raise ConfigError(f"--over: {_words(same[0])} and {_words(one)} are the same setting")
    if any(_same(one.config, config) for one in found):
        return found
    return [Candidate((), config), *found]


def own_index(config: ConfigDict, found: Sequence[Candidate]) -> int:
    """Return which of the settings is the config's own."""
    return next(i for i, one in enumerate(found) if _same(one.config, config))


def _same(one: ConfigDict, other: ConfigDict) -> bool:
    return one.to_dict() == other.to_dict()  # not of one lock, maybe


def _words(candidate: Candidate) -> str:
    return " ".join(candidate.overrides)


def _read_axis(config: ConfigDict, text: str) -> Axis:
    """Read KEY=LOW:HIGH or KEY=VALUE,VALUE,... of `--over`."""
    key, equals, given = (part.strip() for part in text.partition("="))
    if not equals or not given:
        raise ConfigError(
            f"--over {text}: expected KEY=VALUE,VALUE,... or KEY=LOW:HIGH, as"
            " inner.learning_rate=1e-4:1e-2"
        )
    if key not in KEYS:
        raise ConfigError(
            f"--over {text}: {key} is no key that a sweep can go over: {', '.join(KEYS)}."
            " Another key is changed for all settings by --set"
        )
    if key not in dict(flatten(config)):
        raise ConfigError(f"--over {text}: task {config.task.name!r} has no {key}")
    default = FIELDS[key].default
    if isinstance(default, int | float) and not isinstance(default, bool) and ":" in given:
        return _read_range(text, key, given, whole=isinstance(default, int))
    # A tuple is written with commas itself.
    separator = ";" if isinstance(default, tuple) else ","
    values = tuple(value.strip() for value in given.split(separator))
    if not all(values):
        raise ConfigError(f"--over {text}: an empty value between two {separator!r}")
    for value in values:
        with_overrides(config, [f"{key}={value}"])  # or what is wrong with it is said
    return Axis(key, values)


def _read_range(text: str, key: str, given: str, whole: bool) -> Axis:
    low, high, *rest = (*given.split(":"), "")
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = (math.nan, math.nan)
    if rest != [""] or not 0 < bounds[0] < bounds[1] < math.inf:
        raise ConfigError(f"--over {text}: expected LOW:HIGH with 0 < LOW < HIGH, found {given}")
    return Axis(key, bounds=bounds, whole=whole)


def _sample(axes: Sequence[Axis], count: int, seed: int) -> list[tuple[str, ...]]:
    """Return `count` draws, as a Latin hypercube (McKay, Beckman and Conover, 1979)."""
    rng = np.random.default_rng([seed, count])
    columns = []
    for axis in axes:
        part = rng.permutation(count)
        at = (part + rng.random(count)) / count
        if axis.bounds is None:
            columns.append([axis.values[int(x * len(axis.values))] for x in at])
            continue
        low, high = axis.bounds
        values = low * (high / low) ** at
        columns.append([f"{round(x)}" if axis.whole else f"{x:.3g}" for x in values])
    return list(zip(*columns, strict=True))


def config_source(config: ConfigDict, docstring: str) -> str:
    """Return a config file that makes this config and needs no other file.

    Raises:
      ConfigError: it has a function that only the given config file defines.
    """
    plain, defaults = dict(flatten(config)), dict(flatten(default_config()))
    lines, imports = [], {}
    for key, value in plain.items():
        value = _plain(value)
        if key in defaults and value == _plain(defaults[key]):
            continue
        if callable(value):
            module, name = value.__module__, value.__qualname__
            if module.startswith("seal_jax_config_") or "." in name:
                raise ConfigError(
                    f"--out: {key} is the function {name} of the given config file, which a file"
                    " that stands alone does not have: put it into a module"
                )
            imports[f"import {module}\n"] = None  # two functions may have one name
            value_text = f"{module}.{name}"
        else:
            value_text = repr(value)
        lines.append(f"    config.{key} = {value_text}\n")
    head = inspect.cleandoc(docstring).replace("\\", "\\\\").replace('"""', "'''")
    return (
        f'"""{head}\n"""\n\n'
        + "".join(imports)
        + "from seal_jax.config import default_config\n\n\ndef get_config():\n"
        + "    config = default_config()\n"
        + "".join(lines)
        + "    return config\n"
    )


def _plain(value: Any) -> Any:
    return (
        value.to_dict()
        if isinstance(value, ConfigDict)
        else (dict(value) if isinstance(value, Mapping) else value)
    )
