"""Chat templates: rendered the same on every day, within bounds, and never as code of the model's.

A template is a program in Jinja that comes with a model. It is rendered here as transformers does
it, with the same filters and functions in the same sandbox, but for two things: the date is fixed,
for a resumed run must see the prompts that it saw before; and loops, calls and what is written are
counted. Not counted is what one filter does to one large value.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_DAY = datetime(2024, 7, 26)
# Llama 3's template knows the date as a string, others call `strftime_now`.
_DATES = dict.fromkeys(("date_string", "datetime"), f"{_DAY:%d %b %Y}")
# Stand for the user's message and the answer to it.
_MESSAGE, _ANSWER = "\ue000message\ue000", "\ue000answer\ue000"
_GIVEN = ("messages", "add_generation_prompt")
_MAX_STEPS, _MAX_CHARS = 100_000, 1_000_000
# These mark what is said by channels, of which thoughts are one.
_CHANNELS = ("<|channel|>", "<|channel>")


class ChatTemplate(NamedTuple):
    """A model's template, and what it is rendered with beside the messages."""

    model: str  # for messages
    source: str
    values: Mapping[str, Any]  # special tokens, and the config's `model.template_args`


class Asked(NamedTuple):
    """What a template writes around a message that the model is to answer."""

    before: str
    after: str


class Answered(NamedTuple):
    """What a template writes around the answer to a message."""

    lead: str  # from the message to the answer
    behind: str


class ChangedByTemplate(ValueError):
    """A template shows a text other than as it is, writes something else around it, or fails."""


def default_template(found: str | Mapping[str, str] | None, model: str) -> str:
    """Return the source of a model's template; of several that have names, of the default.

    Raises:
      ValueError: there is none.
    """
    if isinstance(found, Mapping) and "default" not in found:
        raise ValueError(
            f"{model}: chat=True, but of its chat templates ({', '.join(found)}) none is named"
            " 'default'; use chat=False for this model."
        )
    source = found["default"] if isinstance(found, Mapping) else found
    if not source:
        raise ValueError(
            f"{model}: chat=True, but the tokenizer has no chat template; use chat=False for this"
            " model."
        )
    return source


def check_arguments(template: ChatTemplate, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError where the template does not read one of `model.template_args`."""
    _, known = _compiled(template.model, template.source)
    for name in arguments:
        if name not in known or name in _GIVEN:
            raise ValueError(
                f"model.template_args has {name!r}, which the chat template of {template.model}"
                f" does not read; it reads {', '.join(sorted(known.difference(_GIVEN)))}"
            )


def ask(template: ChatTemplate) -> Asked:
    """Return how a template asks.

    Raises:
      ValueError: as `render`, or it does not show the message as it is.
    """
    rendered = render(template, [("user", _MESSAGE)], asks=True)
    return Asked(*_cut(template, rendered, _MESSAGE, "user message"))


def answered(template: ChatTemplate, asked: Asked) -> Answered:
    """Return how a template writes an answer.

    Raises:
      ValueError: as `ask`, or what comes before the message is no longer what was asked with.
    """
    messages = [("user", _MESSAGE), ("assistant", _ANSWER)]
    rendered = render(template, messages, asks=False)
    before, after = _cut(template, rendered, _MESSAGE, "user message")
    if before != asked.before:
        raise ValueError(
            f"{template.model}: its chat template writes {before[-200:]!r} before a message that is"
            f" answered, and {asked.before[-200:]!r} where an answer is asked for."
        )
    return Answered(*_cut(template, after, _ANSWER, "model's answer"))


def shown_message(template: ChatTemplate, asked: Asked, message: str) -> str:
    """Return a message as the template shows it: some drop spaces at its ends.

    Raises:
      ChangedByTemplate: the prompt is not `asked` around the message.
    """
    return _between(template, [("user", message)], asked, asks=True)


def shown_turn(
    template: ChatTemplate, asked: Asked, written: Answered, message: str, answer: str
) -> tuple[str, str]:
    """Return a message and its answer as the template shows them, like `shown_message`."""
    shown = shown_message(template, asked, message)
    around = Asked(asked.before + shown + written.lead, written.behind)
    messages = [("user", message), ("assistant", answer)]
    return shown, _between(template, messages, around, asks=False)


def _cut(template: ChatTemplate, text: str, mark: str, what: str) -> tuple[str, str]:
    """Return the text before and behind a mark."""
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise ValueError(
            f"{template.model}: the chat template does not show a {what} exactly once."
        )
    return before, after


def _between(
    template: ChatTemplate, messages: Sequence[tuple[str, str]], around: Asked, asks: bool
) -> str:
    """Return what stands within `around` in the rendering, which is to be the last message."""
    (before, after), (_, text) = around, messages[-1]
    try:
        rendered = render(template, messages, asks)
    except ValueError as error:  # it renders other messages
        raise ChangedByTemplate(f"of the text {text[:200]!r}: {error}") from error
    shown = rendered[len(before) : len(rendered) - len(after)]
    is_whole = before + shown + after == rendered
    if not is_whole or shown not in text or shown.strip() != text.strip():
        raise ChangedByTemplate(
            f"{template.model}: its chat template changes the text {text[:200]!r}, or what stands"
            f" around it: expected {before[-50:]!r}, the text and {after[:50]!r}, found"
            f" {shown[:200] if is_whole else rendered[-300:]!r}; use chat=False for this model, or"
            " leave that text out."
        )
    return shown


def render(template: ChatTemplate, messages: Sequence[tuple[str, str]], asks: bool) -> str:
    """Return a template's text for messages (role, content).

    Args:
      asks: whether it ends where the model is to answer.

    Raises:
      ValueError: the template refuses them, fails, or does more than a template needs.
    """
    if any(mark in template.source for mark in _CHANNELS):
        raise ValueError(
            f"{template.model}: its chat template marks thoughts by channels ({_CHANNELS[0]}),"
            " which is unsupported; use chat=False for this model."
        )
    make, _ = _compiled(template.model, template.source)
    given = [{"role": role, "content": content} for role, content in messages]
    values = {"tools": None, "documents": None, **_DATES, **template.values}
    written, size = [], -sum(len(content) for _, content in messages)
    try:
        for piece in make(values | {"messages": given, "add_generation_prompt": asks}):
            written.append(piece)
            size += len(piece)
            if size > _MAX_CHARS:
                raise TemplateError(f"it writes more than {_MAX_CHARS:,} characters")
    except Exception as error:  # whatever a program may raise
        roles = " and ".join(role for role, _ in messages)
        raise _failure(template.model, f"for messages of {roles}", error) from error
    return "".join(written)


def _failure(model: str, when: str, error: Exception) -> ValueError:
    said = " ".join(str(error).split())[:300]
    kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
    return ValueError(
        f"{model}: its chat template fails {when}: {kind}{said}; use chat=False for this model, or"
        " mend the template."
    )


@functools.lru_cache(maxsize=8)
def _compiled(model: str, source: str) -> tuple[Callable[[dict], Iterator[str]], frozenset[str]]:
    """Return what writes a template's text piece by piece, given its variables, and their names."""
    environment = _Counting(trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS)
    try:
        tree = environment.parse(source)
        known = frozenset(meta.find_undeclared_variables(tree))
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        template = environment.from_string(tree)
    except Exception as error:  # whatever a compiler may raise
        raise _failure(model, "to compile", error) from error

    def make(values: dict[str, Any]) -> Iterator[str]:
        environment.steps = 0
        return template.generate(values)

    return make, known


class _Counting(ImmutableSandboxedEnvironment):
    """A sandbox that counts calls, and what loops go through."""

    steps = 0
    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, **options: Any):
        super().__init__(**options)
        del self.globals["lipsum"]  # a text as long as one likes
        self.filters.update(tojson=_to_json, counted=self._counted)
        functions: dict[str, Any] = {
            "raise_exception": _raise,
            "strftime_now": _DAY.strftime,
            "dict": lambda *pairs, **items: dict(*pairs, **items),
            "namespace": _Namespace,
        }
        self.globals.update(functions)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self._count()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = [x for x in (left, right) if not isinstance(x, float)]
        sizes = [abs(x) if isinstance(x, int) else len(x) for x in sized]
        if math.prod(sizes) > _MAX_CHARS or (operator == "**" and max(sizes, default=0) > 100):
            raise TemplateError(f"{operator} makes more of a value than a template needs")
        return super().call_binop(context, operator, left, right)

    def _counted(self, items: Any) -> Iterator[Any]:
        for item in items:
            self._count()
            yield item

    def _count(self) -> None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise TemplateError(f"it takes more than {_MAX_STEPS:,} steps")


class _Namespace(Namespace):
    """Jinja's, without names that reach into Python."""

    def __init__(self, /, *pairs: Any, **items: Any):
        super().__init__()
        for name, value in dict(*pairs, **items).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """The tag that some templates put around what the model wrote; it writes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


_EXTENSIONS = (_Generation, "jinja2.ext.loopcontrols")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Return JSON without Jinja's escapes for HTML; options as indent and separators."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
