"""How a config is read: config files, overrides and stored JSON, and the checks of all three.

A config file is one experiment, a short Python function:

    from seal_jax.config import default_config

    def get_config():
      config = default_config()
      config.inner.learning_rate = 2e-3
      return config

`load_config` runs it, applies `inner.rank=16` overrides and validates. Everything wrong with a
config stops the run here, before jax is imported. setup.py turns a checked config into NamedTuples,
and the stages never see a ConfigDict.
"""

import copy
import difflib
import hashlib
import inspect
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from seal_jax.config.allowed import PLAIN, Allowed, choice, rule_like, some_of, weights
from seal_jax.config.check_arms import arm_conflicts
from seal_jax.config.check_continual import remedy_conflicts
from seal_jax.config.check_inner import inner_conflicts
from seal_jax.config.table import FIELDS, Field
from seal_jax.hosts.endpoint import check_url
from seal_jax.hosts.json_text import parse_json
from seal_jax.objectives import OBJECTIVES
from seal_jax.outer.rewards import find_reward, reward_names
from seal_jax.tasks import GIVEN, TASKS


class ConfigError(ValueError):
    """A config that cannot run; the message names the key, its value and what it may hold."""


_FREE = tuple(key for key in FIELDS if key.endswith(("_kwargs", "_args", ".weights")))
_ADDED = {key: field.default for key, field in FIELDS.items() if field.added}


def default_config() -> ConfigDict:
    """Return every key with its default, locked, so that assigning an unknown key raises.

    Only `task`, `reward.weights`, `model.template_args` and the sections named `*_kwargs` take new
    ones.
    """
    config = _to_config({key: field.default for key, field in FIELDS.items()})
    config.lock()
    for key in ("task", *_FREE):
        if isinstance(section := _section(config, key), ConfigDict):
            section.unlock()
    return config


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Run the config file at `path`, apply overrides in order, validate, and lock.

    Args:
      path: a Python file with `get_config() -> ConfigDict`.
      overrides: 'inner.learning_rate=1e-3' strings, read by the type of the key; a tuple is
        'q_proj,v_proj', a function 'module:name', a dict a Python literal.

    Raises:
      ConfigError: the file is missing or fails (with file and line), or the config is invalid.
    """
    config = _run_file(path)
    validate(config)
    return with_overrides(config, overrides)


def with_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Return a copy of a config with overrides applied in order, validated and locked.

    Raises:
      ConfigError: an override is none, or the config is invalid with them.
    """
    config = copy.deepcopy(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r}: needs KEY=VALUE")
        _override(config, key.strip(), text.strip())
    validate(config)
    config.lock()
    return config


def validate(config: ConfigDict) -> None:
    """Raise a ConfigError that lists everything wrong with `config`; return if nothing is."""
    values = dict(flatten(config))
    complaints = []
    missing = [key for key in FIELDS if key not in values]
    if missing:
        complaints.append(f"missing keys: {', '.join(missing)}")
    fields = _fields_for(values.get("task.name"))
    for key, value in values.items():
        if key not in fields:
            complaints.append(_unknown_key(key, fields))
        elif not fields[key].allowed.test(value):
            complaints.append(f"{key} = {value!r}: needs {fields[key].allowed.text}")
    if not complaints:
        complaints += _conflicts(values)
    if complaints:
        raise ConfigError("\n".join(complaints))


def task_arguments(config: ConfigDict) -> dict[str, Any]:
    """Return the `task` section as the keyword arguments of `tasks.make_task`.

    A default that the task does not take (facts have no `style`) is left out; `validate` refuses
    any other value of such a key.
    """
    taken = {"name", *_task_defaults(config.task.name)}
    return {key: value for key, value in config.task.items() if key in taken}


def to_json(config: ConfigDict) -> str:
    """Return `config` as JSON: sorted, one text per config, a function as 'module:qualname'."""
    plain = config.to_dict()
    text = json.dumps(plain, default=_name_of, indent=2, sort_keys=True, allow_nan=False)
    return text + "\n"


def from_json(text: str, where: str = "config") -> ConfigDict:
    """Return the locked, validated config that `to_json` wrote.

    Raises:
      ConfigError: not JSON, invalid, or a function cannot be imported (one defined in a config
        file can be only after `load_config` ran that file).
    """
    values = _ADDED | _parse_json(text, where)
    for key, field in FIELDS.items():
        if field.default is None and isinstance(values.get(key), str):
            values[key] = _parse(key, field.allowed, values[key])
    config = _to_config(values)
    validate(config)
    config.lock()
    return config


def fingerprint(config: ConfigDict | str) -> str:
    """Return 16 hex digits that name the experiment; keys of mere placement do not count."""
    text = json.dumps(_experiment(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def diff(old: ConfigDict | str, new: ConfigDict | str, where: str = "config") -> str:
    """Return one line 'key: old -> new' for each key that makes another experiment, or ''.

    Either is a config, or the text that `to_json` wrote (possibly by another version) and `where`
    names in complaints.
    """
    before, after = _experiment(old, where), _experiment(new, where)
    return "\n".join(
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    )


# --- the table's reading of a config ---


def _to_config(values: Mapping[str, Any]) -> ConfigDict:
    nested = _nest(values)
    for name in ("eval", "continual"):
        if isinstance(section := nested.get(name), dict):
            # The names in eval.texts may have dots, which a ConfigDict's may not: dicts stay dicts.
            section = {k: dict(v) if isinstance(v, Mapping) else v for k, v in section.items()}
            nested[name] = ConfigDict(section, convert_dict=False)
    return ConfigDict(nested)


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return nested


def flatten(
    config: ConfigDict | Mapping, prefix: str = "", whole: Container[str] = FIELDS
) -> Iterator[tuple[str, Any]]:
    """Yield a config's dotted keys and their values; a dict of a key in `whole` is a value."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, ConfigDict | Mapping) and key not in whole:
            yield from flatten(value, f"{key}.", whole)
        else:
            yield key, value


def _section(config: ConfigDict, name: str) -> ConfigDict | dict[str, Any]:
    """Return a section; '' is the whole."""
    for part in filter(None, name.split(".")):
        config = config[part]
    return config


def _fields_for(task_name: Any) -> dict[str, Field]:
    """Return the table with the task's own keys, and with what is found by name."""
    own = {
        f"task.{name}": Field(default, rule_like(default))
        for name, default in _task_defaults(task_name).items()
    }
    found = {
        "task.name": choice(*TASKS),
        "outer.objective": choice(*OBJECTIVES),
        "reward.weights": weights(*reward_names()),
        "eval.objectives": some_of(*OBJECTIVES),
    }
    return own | FIELDS | {key: FIELDS[key]._replace(allowed=one) for key, one in found.items()}


def _task_defaults(name: Any) -> dict[str, Any]:
    """Return a task's keys and their defaults; none for a name that is no task's."""
    parameters = inspect.signature(TASKS[name]).parameters if name in TASKS else {}
    return {key: p.default for key, p in parameters.items() if key not in GIVEN}


# Two axes of one array: of a kernel, of logits, of a cache.
_MEETING = (
    *(("embed", other) for other in ("vocab", "heads", "mlp")),
    *(("rows", other) for other in ("vocab", "heads")),
)


def _conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong between keys that are right one by one."""
    axes = [key for key in FIELDS if key.startswith("mesh.") and values[key] == -1]
    if len(axes) > 1:
        yield f"{' and '.join(axes)} = -1: only one axis can take the devices that are left"
    for one, other in _MEETING:
        one, other = f"sharding.{one}", f"sharding.{other}"
        for axis in sorted(set(values[one].split()) & set(values[other].split())):
            yield f"{one} and {other} = {axis!r}: one axis cannot divide both axes of an array"
    yield from inner_conflicts(values)
    if values["model.template_args"] and not values["model.chat"]:
        yield "model.template_args: there is no template to read them with model.chat = False"
    if values["checkpoint.best"] and not values["eval.every"]:
        yield (
            f"checkpoint.best = {values['checkpoint.best']}: the best are those of the highest"
            " eval/reward, which is measured only with eval.every > 0"
        )
    yield from arm_conflicts(values)
    yield from remedy_conflicts(values)
    name = values["task.name"]
    taken = _task_defaults(name)
    given = {k.removeprefix("task."): v for k, v in values.items() if k.startswith("task.")}
    for leaf, value in given.items():
        if leaf not in {"name", *taken} and value != FIELDS[f"task.{leaf}"].default:
            yield f"task.{leaf} = {value!r}: task {name!r} takes only {', '.join(taken)}"
    try:
        TASKS[name](**{leaf: value for leaf, value in given.items() if leaf in taken})
    except ValueError as error:
        yield f"task: {error}"
    try:
        check_url(values["reward.judge_url"], "reward.judge_url")
    except ValueError as error:
        yield str(error)
    try:
        list(map(find_reward, values["reward.weights"]))
    except ValueError as error:
        yield f"reward.weights: {error}"


def _unknown_key(key: str, valid: Mapping[str, Any]) -> str:
    leaf = key.rpartition(".")[2]
    same = [other for other in valid if other.rpartition(".")[2] == leaf]
    pool = same or list(valid)
    if not same and "." not in key:
        leaves = {other.rpartition(".")[2]: other for other in reversed(list(valid))}
        pool = [leaves[name] for name in difflib.get_close_matches(key, leaves, 1, 0.0)]
    nearest = difflib.get_close_matches(key, pool, 1, 0.0)[0]
    return f"unknown key {key!r}; nearest valid key: {nearest!r}"


# --- overrides and config files ---


def _override(config: ConfigDict, key: str, text: str) -> None:
    section, _, leaf = key.rpartition(".")
    if section in _FREE:
        allowed = PLAIN
    else:
        fields = _fields_for(config.task.name)
        if key not in fields:
            raise ConfigError(f"override {key}={text}: {_unknown_key(key, fields)}")
        allowed = fields[key].allowed
    parent = _section(config, section)
    if isinstance(parent, dict):  # see `_to_config`
        parent[leaf] = _parse(key, allowed, text)
        return
    with parent.unlocked(), parent.ignore_type():
        parent[leaf] = _parse(key, allowed, text)


def _parse(key: str, allowed: Allowed, text: str) -> Any:
    try:
        return allowed.parse(text)
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"{key} = {text}: needs {allowed.text} ({error})") from error


def _run_file(path: str) -> ConfigDict:
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    # In sys.modules, so that a function of the file can be found again by its name.
    name = f"seal_jax_config_{os.path.splitext(os.path.basename(path))[0]}"
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"{path}: has no function get_config()")
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_explain(error, path)) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not ConfigDict")
    return config


def _explain(error: Exception, path: str) -> str:
    """Word an exception of a config file: file, line, the line's text, and what is wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(frame.lineno, frame.line or "") for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [(error.lineno, (error.text or "").strip())]
    number, line = lines[-1] if lines else (1, "")
    what = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
    if isinstance(error, AttributeError | KeyError) and "ml_collections" in frames[-1].filename:
        known = {*FIELDS, *(key.rpartition(".")[0] for key in FIELDS)}
        keys = [key for key in re.findall(r"\b[A-Za-z_]\w*\.([\w.]+)", line) if key not in known]
        if keys:
            what = _unknown_key(keys[0], FIELDS)
    return f"{path}:{number}: {line}\n  {what}"


# --- plain values, JSON ---


def _name_of(function: Any) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_tuples(item) for key, item in value.items()}
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = parse_json(text, where)
        if not isinstance(parsed, dict):
            raise ValueError(f"{where}: {type(parsed).__name__}, not an object")
        parsed.pop("manifest", None)  # see workdir.py
        return {key: _to_tuples(value) for key, value in flatten(parsed)}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not a config's JSON: {error}") from error


def _experiment(config: ConfigDict | str, where: str = "config") -> dict[str, str]:
    text = config if isinstance(config, str) else to_json(config)
    values = _ADDED | _parse_json(text, where)
    return {
        key: json.dumps(value, sort_keys=True)
        for key, value in values.items()
        if not (key in FIELDS and FIELDS[key].placement)
    }
