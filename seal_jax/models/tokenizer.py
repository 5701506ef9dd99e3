"""Text to token ids and back: what a tokenizer is, and those of Hugging Face.

Text is untrusted: a user's or a model's text that spells a special token, say "<|im_start|>", is
encoded as the plain characters it is. Special tokens come only from the chat template.
"""

import copy
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from seal_jax.models.chat_template import (
    Answered,
    Asked,
    ChatTemplate,
    answered,
    ask,
    check_arguments,
    default_template,
    render,
    shown_message,
    shown_turn,
)
from seal_jax.models.template_tokens import (
    Around,
    Turn,
    Written,
    any_of,
    control_tokens,
    remarked,
)
from seal_jax.models.thoughts import Thoughts, find_tags, state_of

# Tokens that end a turn or a text, in the families that are supported.
END_TOKENS = (
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    *("<end_of_turn>", "<eos>", "</s>"),
)

# What a template's tokens are compared with transformers' on.
_CHECKED = ("Hello 1", " 'Aé'\n", '\n\n"b"  ')
# What with_template computes anew.
_OF_TEMPLATE = ("_asked", "_answered", "_written", "_end", "_control", "_around_asked", "_turn")


class TokenBeyondModel(ValueError):
    """A text has a token that the model has no row for."""


class Tokenizer(Protocol):
    """What the other stages ask of a tokenizer.

    What encodes raises TokenBeyondModel where a text has a token that the model has no row for.
    """

    vocab_size: int  # every id is below it; the model's V may be larger
    pad_id: int  # may equal a stop id: mask by length, not by value
    stop_ids: tuple[int, ...]  # the first one ends a text; any of them ends an answer

    @property
    def bos(self) -> int | None:
        """What is put in front of plain text, because the model was trained so."""
        ...

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Return the ids of plain text, `bos` in front where `start` and the model wants it."""
        ...

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        """Return the ids of a prompt, as one user message of the chat template if `chat`."""
        ...

    def encode_turn(
        self, parts: Sequence[tuple[str, bool]], answer: str, chat: bool
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a prompt and its answer, and which of them are marked.

        The prompt is the texts of `parts` joined, encoded as `encode_prompt` does. Marked is every
        token that holds a character of a part whose second item is true, and all that follows the
        prompt: the answer, and the one token behind it that ends it. With `chat` it is what the
        template writes for a message that is answered, as far as the template's own end token.
        """
        ...

    def thoughts(self, chat: bool) -> Thoughts | None:
        """Return how the model marks its thoughts behind a prompt; None where it has none."""
        ...

    def with_template(self, model: str, arguments: Mapping[str, Any]) -> "Tokenizer":
        """Return the same with a name for messages and arguments for the chat template.

        Raises:
          ValueError: the template does not read one of them, or there is none.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without ids outside the vocabulary and special tokens.

        The tags of thoughts stay.
        """
        ...

    def save(self, folder: str | os.PathLike) -> None:
        """Write what `load_tokenizer` reads."""
        ...

    def to_json(self) -> str:
        """Return a tokenizer.json for other libraries, with the ids that the model knows."""
        ...


class HFTokenizer:
    """A fast Hugging Face tokenizer whose special tokens cannot be spelled by text.

    Its methods are those of `Tokenizer`; with `chat` they raise ValueError where there is no chat
    template that takes one message.

    Args:
      fast: a `transformers.PreTrainedTokenizerFast`.
      stop_ids: ids that end an answer, beside the tokenizer's own eos, `END_TOKENS` and what ends
        an answer in the chat template.
      num_rows: the model's V. A tokenizer may have more tokens, which no text may then contain.

    Raises:
      ValueError: no fast backend, no eos token, or plain text can produce special tokens.
    """

    def __init__(self, fast: Any, stop_ids: Iterable[int] = (), num_rows: int | None = None):
        from tokenizers import Tokenizer as Backend

        if not getattr(fast, "is_fast", False):
            raise ValueError(
                f"{type(fast).__name__} has no fast (Rust) backend; supported: a tokenizer.json."
            )
        self._fast = fast
        self._template = Backend.from_str(fast.backend_tokenizer.to_str())  # encodes the template
        self._template.no_truncation()
        self._template.no_padding()
        self._more_stops = tuple(stop_ids)
        self._model: str = fast.name_or_path or "this model"
        self._arguments: dict[str, Any] = {}  # of the chat template
        limit = math.inf if num_rows is None else num_rows
        # Not how many there are: ids may have gaps.
        self.vocab_size = int(min(1 + max(fast.get_vocab().values(), default=-1), limit))
        self.stop_ids = self._stop_ids()
        if not self.stop_ids:
            raise ValueError("the tokenizer has no eos token: no answer would ever end.")
        pads = [i for i in (fast.pad_token_id,) if i is not None and i < limit]
        self.pad_id = (pads or self.stop_ids)[0]
        # Whether text starts with bos is known only to the tokenizer's post-processor.
        first = self._template.encode("").ids[:1]
        self.bos = fast.bos_token_id if first == [fast.bos_token_id] else None
        self._check_plain()

    def encode(self, text: str, start: bool = True) -> list[int]:
        ids = self._plain(text)
        return self._known([self.bos, *ids] if start and self.bos is not None else ids)

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        if not chat:
            return self.encode(text)
        around = self._around_asked
        message = shown_message(self._chat_template(), self._asked, text)
        plain = self._plain(around.before + message + around.after)
        return self._known(around.head + plain + around.tail)

    def encode_turn(
        self, parts: Sequence[tuple[str, bool]], answer: str, chat: bool
    ) -> tuple[list[int], list[bool]]:
        # Where the message's tokens lie is asked of the tokenizer: any template will do.
        message = "".join(text for text, _ in parts)
        marks = [is_marked for text, is_marked in parts for _ in text]
        if chat:
            around, template, whole = self._turn.around, self._chat_template(), message
            message, answer = shown_turn(template, self._asked, self._answered, whole, answer)
            marks = marks[whole.find(message) :]
        else:
            around = Around([] if self.bos is None else [self.bos], "", "", [], "")
        text = (around.before + message + around.after).encode("utf-8", "replace").decode("utf-8")
        marks = [False] * len(around.before) + marks[: len(message)] + [False] * len(around.after)
        encoding = self._text.encode(text, add_special_tokens=False)
        inside = [any(marks[first:last]) for first, last in encoding.offsets]
        if chat:
            end = self._answer(answer, around.context if around.tail else text)
        else:
            end = [*self._plain(answer), self.stop_ids[0]]
        ids = self._known([*around.head, *encoding.ids, *around.tail, *end])
        outside = [False] * len(around.head), [False] * len(around.tail)
        return ids, [*outside[0], *inside, *outside[1], *[True] * len(end)]

    def thoughts(self, chat: bool) -> Thoughts | None:
        if self._tags is None:
            return None
        return state_of(self._tags, self._asked.after if chat else "")

    def with_template(self, model: str, arguments: Mapping[str, Any]) -> "HFTokenizer":
        other = copy.copy(self)
        for name in _OF_TEMPLATE:
            other.__dict__.pop(name, None)
        other._model, other._arguments = model, dict(arguments)
        if arguments:
            check_arguments(other._chat_template(), arguments)
        if other._control or self._control:
            for name in ("_text", "_special", "_pattern", "_decoder"):
                other.__dict__.pop(name, None)
            other._check_plain()
        other.stop_ids = other._stop_ids()
        return other

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self._decoder.decode(known, skip_special_tokens=True)

    def save(self, folder: str | os.PathLike) -> None:
        self._fast.save_pretrained(folder)

    def to_json(self) -> str:
        content = json.loads(self._text.to_str())
        # A grammar that may choose a token takes the longest: those the model lacks must go.
        added = content["added_tokens"]
        content["added_tokens"] = [token for token in added if token["id"] < self.vocab_size]
        return json.dumps(content)

    def _plain(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become '?'
        return self._text.encode(text, add_special_tokens=False).ids

    def _known(self, ids: list[int]) -> list[int]:
        """Return ids that the model has rows for. Raises TokenBeyondModel: a gather would clamp."""
        if max(ids, default=0) < self.vocab_size:
            return ids
        beyond = next(i for i in ids if i >= self.vocab_size)
        raise TokenBeyondModel(
            f"a text has token {beyond}, {self._text.id_to_token(beyond)!r}, and the model has"
            f" rows for the first {self.vocab_size} tokens of its tokenizer only: resize its"
            " embedding to the tokenizer, or leave that token out."
        )

    def _answer(self, answer: str, context: str) -> list[int]:
        """Return the tokens of an answer and its end, behind plain text that ends the prompt.

        The prompt's tokens are those that are asked with. What follows is split as it would be in
        one text with them, unless a token would span the border.
        """
        turn = self._turn
        end = self.stop_ids[0] if turn.end is None else turn.end
        last = self._last_special(turn.between)
        if last:
            ids = self._template.encode(turn.between[:last], add_special_tokens=False).ids
            return [*ids, *self._plain(turn.between[last:] + answer + turn.behind), end]
        text = turn.between + answer + turn.behind
        before, both = self._plain(context), self._plain(context + text)
        joined = both[: len(before)] == before
        return [*(both[len(before) :] if joined else self._plain(text)), end]

    def _stop_ids(self) -> tuple[int, ...]:
        ids = [] if self._fast.eos_token_id is None else [self._fast.eos_token_id]
        special = {*self._fast.all_special_ids, *self._special}
        ids += [i for i in map(self._text.token_to_id, END_TOKENS) if i in special]
        ids += [] if self._end is None else [self._template.token_to_id(self._end.group())]
        return tuple(i for i in dict.fromkeys([*ids, *self._more_stops]) if i < self.vocab_size)

    def _check_plain(self) -> None:
        """Raise ValueError if the text of a special token can become that token."""
        control = {*self._special, *self._fast.all_special_ids} - {self._fast.unk_token_id}
        for token_id in control:
            token = self._text.id_to_token(token_id)
            if token is not None and control.intersection(self._plain(token)):
                raise ValueError(f"text can inject the special token {token!r} of this tokenizer.")

    @functools.cached_property
    def _text(self) -> Any:
        """What encodes untrusted text: special tokens, and those of `_control`, are plain there."""
        backend = remarked(self._template, dict.fromkeys(self._control, True))
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _added(self) -> dict[int, Any]:
        return self._template.get_added_tokens_decoder()

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        added = {i: t.content for i, t in self._added.items()}
        return {i: t for i, t in added.items() if self._added[i].special or t in self._control}

    @functools.cached_property
    def _control(self) -> frozenset[str]:
        """The tokens not called special that the template writes as control tokens.

        They are what ends an answer, and what is in brackets as <|user|>, but for tags of thoughts.
        """
        found = control_tokens(self._written.around, self._added.values())
        found |= set() if self._end is None else {self._end.group()}
        plain = {t.content for t in self._added.values() if not t.special}
        return frozenset((found & plain).difference(self._tags or ()))

    @functools.cached_property
    def _written(self) -> Written:
        around, lead, behind, fault = "", "", "", None
        try:
            around = "".join(self._asked)
            lead, behind = self._answered
        except ValueError as error:
            fault = error
        return Written(around + lead + behind, lead, behind, fault)

    @functools.cached_property
    def _end(self) -> re.Match | None:
        """The first token in what the template writes behind an answer."""
        tokens = [t.content for t in self._added.values() if t.content.strip()]
        return any_of(tokens).search(self._written.behind)

    @functools.cached_property
    def _tags(self) -> tuple[str, str] | None:
        found = self._fast.chat_template
        return find_tags(found.get("default") if isinstance(found, dict) else found)

    @functools.cached_property
    def _decoder(self) -> Any:
        """What decodes: tags of thoughts are text, what a template puts around answers is not."""
        tags = {*(self._tags or ())} & {t.content for t in self._added.values() if t.special}
        marks = [t for t in self._control if t in self._written.lead + self._written.behind]
        special = dict.fromkeys(tags, False) | dict.fromkeys(marks, True)
        return remarked(self._template, special) if special else self._template

    def _last_special(self, text: str) -> int:
        """Return where the last special token of a text ends; 0 without one."""
        return max((match.end() for match in self._pattern.finditer(text)), default=0)

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        return any_of(self._special.values())

    @functools.cached_property
    def _asked(self) -> Asked:
        return ask(self._chat_template())

    @functools.cached_property
    def _around_asked(self) -> Around:
        """The template around a message that is to be answered."""
        around, template = self._around(self._asked), self._chat_template()
        head, before, after, tail, _ = around
        for text in _CHECKED:
            rendered = render(template, [("user", text)], asks=True)
            expected = self._template.encode(rendered, add_special_tokens=False).ids
            shown = shown_message(template, self._asked, text)
            if head + self._plain(before + shown + after) + tail != expected:
                raise ValueError(
                    f"{template.model}: the chat template cannot be split around a message."
                )
        if fault := self._written.fault:
            warnings.warn(f"{fault} Answers end where the tokenizer says.", stacklevel=3)
        return around

    def _around(self, asked: Asked) -> Around:
        before, after = asked
        last, match = self._last_special(before), self._pattern.search(after)
        first = len(after) if match is None else match.start()
        head = self._template.encode(before[:last], add_special_tokens=False).ids
        tail = self._template.encode(after[first:], add_special_tokens=False).ids
        context = after[self._last_special(after) :]
        return Around(head, before[last:], after[:first], tail, context)

    @functools.cached_property
    def _answered(self) -> Answered:
        return answered(self._chat_template(), self._asked)

    @functools.cached_property
    def _turn(self) -> Turn:
        """How the template writes a message and its answer."""
        asked, (lead, behind), around = self._asked, self._answered, self._around_asked
        match = self._end
        end = None if match is None else self._template.token_to_id(match.group())
        behind = "" if match is None else behind[: match.start()]
        if lead.startswith(asked.after):
            return Turn(around, lead.removeprefix(asked.after), behind, end)
        # The prompt has opened a thought: an answer without thoughts does not follow it.
        return Turn(self._around(asked._replace(after=lead)), "", behind, end)

    def _chat_template(self) -> ChatTemplate:
        source = default_template(self._fast.chat_template, self._model)
        values = {**self._fast.special_tokens_map, **self._arguments}
        return ChatTemplate(self._model, source, values)
