"""Text to token ids and back: what a tokenizer is, and those of Hugging Face.

Text is untrusted: a user's or a model's text that spells a special token, say "<|im_start|>", is
encoded as the plain characters it is. Special tokens come only from the chat template.
"""

import copy
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from seal_jax.hosts.files import read_object
from seal_jax.models.byte_tokenizer import BYTE_FILE, ByteTokenizer
from seal_jax.models.chat_template import (
    Asked,
    ChatTemplate,
    answered,
    ask,
    check_arguments,
    default_template,
    render,
)
from seal_jax.models.thoughts import Thoughts, find_tags, state_of

# Tokens that end a turn or a text, in the families that are supported.
END_TOKENS = (
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    *("<end_of_turn>", "<eos>", "</s>"),
)


class Tokenizer(Protocol):
    """What the other stages ask of a tokenizer."""

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
        """Return the content of a tokenizer.json with the same ids, for libraries that want one."""
        ...


class _Around(NamedTuple):
    """What stands around a message of the user's: ids, text, (message), text, ids.

    The plain text next to the message is kept as text, since tokens can span the border.
    """

    head: list[int]
    before: str
    after: str
    tail: list[int]
    strips: bool  # whether the message's own spaces are dropped
    context: str  # the plain text that ends it, behind its last special token


class _Turn(NamedTuple):
    """How the chat template writes the answer to a message."""

    around: _Around  # of the message
    between: str  # the template's text between prompt and answer
    behind: str  # plain text behind the answer, before what ends it
    end: int | None  # the token that ends it; None where the template has no token for that
    strips: bool  # whether the answer's own spaces are dropped


class HFTokenizer:
    """A fast Hugging Face tokenizer whose special tokens cannot be spelled by text.

    Its methods are those of `Tokenizer`; with `chat` they raise ValueError where there is no chat
    template that takes one message.

    Args:
      fast: a `transformers.PreTrainedTokenizerFast`.
      stop_ids: ids that end an answer, beside the tokenizer's own eos, `END_TOKENS` and what ends
        an answer in the chat template.

    Raises:
      ValueError: no fast backend, no eos token, or plain text can produce special tokens.
    """

    def __init__(self, fast: Any, stop_ids: Iterable[int] = ()):
        from tokenizers import Tokenizer as Backend

        if not getattr(fast, "is_fast", False):
            raise ValueError(
                f"{type(fast).__name__} has no fast (Rust) backend; supported: a tokenizer.json."
            )
        self._fast = fast
        self._text = Backend.from_str(fast.backend_tokenizer.to_str())  # encodes untrusted text
        self._template = Backend.from_str(fast.backend_tokenizer.to_str())  # encodes the template
        for backend in (self._text, self._template):
            backend.no_truncation()
            backend.no_padding()
        self._text.encode_special_tokens = True
        self._model: str = fast.name_or_path or "this model"
        self._arguments: dict[str, Any] = {}  # of the chat template
        self.vocab_size = len(fast)
        self.stop_ids = self._stop_ids(stop_ids)
        self.pad_id = self.stop_ids[0] if fast.pad_token_id is None else fast.pad_token_id
        # Whether text starts with bos is known only to the tokenizer's post-processor.
        first = self._template.encode("").ids[:1]
        self.bos = fast.bos_token_id if first == [fast.bos_token_id] else None
        self._check_plain()

    def encode(self, text: str, start: bool = True) -> list[int]:
        ids = self._plain(text)
        return [self.bos, *ids] if start and self.bos is not None else ids

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        if not chat:
            return self.encode(text)
        around = self._around_asked
        text = text.strip() if around.strips else text
        return around.head + self._plain(around.before + text + around.after) + around.tail

    def encode_turn(
        self, parts: Sequence[tuple[str, bool]], answer: str, chat: bool
    ) -> tuple[list[int], list[bool]]:
        # Where the message's tokens lie is asked of the tokenizer: any template will do.
        message = "".join(text for text, _ in parts)
        marks = [is_marked for text, is_marked in parts for _ in text]
        if chat:
            around = self._turn.around
        else:
            head = [] if self.bos is None else [self.bos]
            around = _Around(head, "", "", [], False, "")
        if around.strips:
            marks = marks[len(message) - len(message.lstrip()) :]
            message = message.strip()
        text = (around.before + message + around.after).encode("utf-8", "replace").decode("utf-8")
        marks = [False] * len(around.before) + marks[: len(message)] + [False] * len(around.after)
        encoding = self._text.encode(text, add_special_tokens=False)
        inside = [any(marks[first:last]) for first, last in encoding.offsets]
        if chat:
            end = self._answer(answer, around.context if around.tail else text)
        else:
            end = [*self._plain(answer), self.stop_ids[0]]
        ids = [*around.head, *encoding.ids, *around.tail, *end]
        outside = [False] * len(around.head), [False] * len(around.tail)
        return ids, [*outside[0], *inside, *outside[1], *[True] * len(end)]

    def thoughts(self, chat: bool) -> Thoughts | None:
        if self._tags is None:
            return None
        return state_of(self._tags, self._asked.after if chat else "")

    def with_template(self, model: str, arguments: Mapping[str, Any]) -> "HFTokenizer":
        other = copy.copy(self)
        for name in ("_asked", "_around_asked", "_turn"):
            other.__dict__.pop(name, None)
        other._model, other._arguments = model, dict(arguments)
        if arguments:
            check_arguments(other._chat_template(), arguments)
        return other

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self._decoder.decode(known, skip_special_tokens=True)

    def save(self, folder: str | os.PathLike) -> None:
        self._fast.save_pretrained(folder)

    def to_json(self) -> str:
        return self._text.to_str()

    def _plain(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become '?'
        return self._text.encode(text, add_special_tokens=False).ids

    def _answer(self, answer: str, context: str) -> list[int]:
        """Return the tokens of an answer and its end, behind plain text that ends the prompt.

        The prompt's tokens are those that are asked with. What follows is split as it would be in
        one text with them, unless a token would span the border.
        """
        turn = self._turn
        end = self.stop_ids[0] if turn.end is None else turn.end
        answer = answer.strip() if turn.strips else answer
        last = self._last_special(turn.between)
        if last:
            ids = self._template.encode(turn.between[:last], add_special_tokens=False).ids
            return [*ids, *self._plain(turn.between[last:] + answer + turn.behind), end]
        text = turn.between + answer + turn.behind
        before, both = self._plain(context), self._plain(context + text)
        joined = both[: len(before)] == before
        return [*(both[len(before) :] if joined else self._plain(text)), end]

    def _stop_ids(self, more: Iterable[int]) -> tuple[int, ...]:
        ids = [] if self._fast.eos_token_id is None else [self._fast.eos_token_id]
        special = {*self._fast.all_special_ids, *self._special}
        ids += [i for i in map(self._text.token_to_id, END_TOKENS) if i in special]
        try:
            ids += [] if (end := self._turn.end) is None else [end]
        except ValueError:
            pass  # a template that nobody can use ends nothing; whoever asks through it is told
        ids = tuple(dict.fromkeys([*ids, *more]))
        if not ids:
            raise ValueError("the tokenizer has no eos token: no answer would ever end.")
        return ids

    def _check_plain(self) -> None:
        """Raise ValueError if the text of a special token can become that token."""
        control = {*self._special, *self._fast.all_special_ids} - {self._fast.unk_token_id}
        for token_id in control:
            token = self._text.id_to_token(token_id)
            if token is not None and control.intersection(self._plain(token)):
                raise ValueError(f"text can inject the special token {token!r} of this tokenizer.")

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        added = self._text.get_added_tokens_decoder()
        return {token_id: token.content for token_id, token in added.items() if token.special}

    @functools.cached_property
    def _tags(self) -> tuple[str, str] | None:
        found = self._fast.chat_template
        return find_tags(found.get("default") if isinstance(found, dict) else found)

    @functools.cached_property
    def _decoder(self) -> Any:
        """What decodes: with the tags of thoughts as plain tokens, where they are special."""
        tags = self._tags or ()
        if not set(tags) & {*self._special.values()}:
            return self._text
        content = json.loads(self._text.to_str())
        for token in content["added_tokens"]:
            token["special"] &= token["content"] not in tags
        return type(self._text).from_str(json.dumps(content))

    def _last_special(self, text: str) -> int:
        """Return where the last special token of a text ends; 0 without one."""
        return max((match.end() for match in self._pattern.finditer(text)), default=0)

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        return _any_of(self._special.values())

    @functools.cached_property
    def _asked(self) -> Asked:
        return ask(self._chat_template())

    @functools.cached_property
    def _around_asked(self) -> _Around:
        """The template around a message that is to be answered."""
        around, template = self._around(self._asked), self._chat_template()
        rendered = render(template, [("user", "Hello 1")], asks=True)
        expected = self._template.encode(rendered, add_special_tokens=False).ids
        head, before, after, tail, *_ = around
        if head + self._plain(f"{before}Hello 1{after}") + tail != expected:
            raise ValueError(
                f"{template.model}: the chat template cannot be split around a message."
            )
        return around

    def _around(self, asked: Asked) -> _Around:
        before, after, strips = asked
        last, match = self._last_special(before), self._pattern.search(after)
        first = len(after) if match is None else match.start()
        head = self._template.encode(before[:last], add_special_tokens=False).ids
        tail = self._template.encode(after[first:], add_special_tokens=False).ids
        context = after[self._last_special(after) :]
        return _Around(head, before[last:], after[:first], tail, strips, context)

    @functools.cached_property
    def _turn(self) -> _Turn:
        """How the template writes a message and its answer."""
        asked, around, template = self._asked, self._around_asked, self._chat_template()
        lead, behind, strips = answered(template, asked)
        ends = {t.content: i for i, t in self._text.get_added_tokens_decoder().items()}
        match = _any_of(ends).search(behind)
        end = None if match is None else ends[match.group()]
        behind = "" if match is None else behind[: match.start()]
        if lead.startswith(asked.after):
            return _Turn(around, lead.removeprefix(asked.after), behind, end, strips)
        # The prompt has opened a thought: an answer without thoughts does not follow it.
        return _Turn(self._around(asked._replace(after=lead)), "", behind, end, strips)

    def _chat_template(self) -> ChatTemplate:
        source = default_template(self._fast.chat_template, self._model)
        values = {**self._fast.special_tokens_map, **self._arguments}
        return ChatTemplate(self._model, source, values)


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    """Return what finds any of some tokens, of two the longer."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Load the tokenizer of a local folder; code that comes with a model is never run.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: the tokenizer is damaged or has no fast backend.
    """
    folder = Path(folder)
    if (folder / BYTE_FILE).is_file():
        return ByteTokenizer()
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.json, so no tokenizer to load.")
    # Not AutoTokenizer, which rebuilds some from their class and vocabulary, and drops the rest of
    # tokenizer.json: SmolLM2 would no longer split numbers into digits.
    fast_class = import_transformers().PreTrainedTokenizerFast
    try:
        fast = fast_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise ValueError(f"{folder}: cannot load the tokenizer: {error}") from error
    files = [folder / name for name in ("generation_config.json", "config.json")]
    ends = next(filter(None, map(_listed_stop_ids, files)), ())
    return HFTokenizer(fast, ends).with_template(str(folder), {})


def import_transformers() -> Any:
    """Import transformers without its advice to install PyTorch, which nothing here uses."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _listed_stop_ids(path: Path) -> tuple[int, ...]:
    """Return the eos ids of a config, of which chat models list several."""
    if not path.is_file():
        return ()
    eos = read_object(path).get("eos_token_id")
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) for i in found):
        raise ValueError(f"{path}: eos_token_id must be an id or a list of ids, found {eos!r}.")
    return tuple(found)
