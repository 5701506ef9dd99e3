"""Text to token ids and back: Hugging Face tokenizers, and bytes for tests.

Text is untrusted: a user's or a model's text that spells a special token, say "<|im_start|>", is
encoded as the plain characters it is. Special tokens come only from the chat template.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from seal_jax.hosts.files import read_object

# Tokens that end a turn or a text, in the families that are supported.
END_TOKENS = (
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    *("<end_of_turn>", "<eos>", "</s>"),
)
BYTE_FILE = "byte_tokenizer.json"
# Stands for the user's message while the chat template is rendered.
_MARK = "\ue000message\ue000"
# Llama 3's template prints the date; prompts must not depend on the day they are made.
_DATE = "26 Jul 2024"


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
        token that holds a character of a part whose second item is true, and the answer with the
        stop id behind it.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without special tokens and ids outside the vocabulary."""
        ...

    def save(self, folder: str | os.PathLike) -> None:
        """Write what `load_tokenizer` reads."""
        ...

    def to_json(self) -> str:
        """Return the content of a tokenizer.json with the same ids, for libraries that want one."""
        ...


class ByteTokenizer:
    """UTF-8 bytes and five special tokens: for tests, and for models trained from nothing.

    Its methods are those of `Tokenizer`.
    """

    vocab_size = 261
    pad_id = 256
    bos = 257
    stop_ids: tuple[int, ...] = (258,)
    user_id = 259
    assistant_id = 260

    def encode(self, text: str, start: bool = True) -> list[int]:
        return [self.bos] * start + list(text.encode("utf-8", "replace"))

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        if not chat:
            return self.encode(text)
        return [self.bos, self.user_id, *self.encode(text, start=False), self.assistant_id]

    def encode_turn(
        self, parts: Sequence[tuple[str, bool]], answer: str, chat: bool
    ) -> tuple[list[int], list[bool]]:
        ids, marked = ([self.bos, self.user_id] if chat else [self.bos]), [False] * (1 + chat)
        for text, is_marked in parts:
            piece = self.encode(text, start=False)
            ids, marked = ids + piece, marked + [is_marked] * len(piece)
        tail = [self.assistant_id] if chat else []
        end = [*self.encode(answer, start=False), self.stop_ids[0]]
        return [*ids, *tail, *end], [*marked, *[False] * len(tail), *[True] * len(end)]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", "replace")

    def save(self, folder: str | os.PathLike) -> None:
        Path(folder, BYTE_FILE).write_text(json.dumps({"tokenizer": "bytes"}) + "\n")

    def to_json(self) -> str:
        """Return a tokenizer.json of the 256 bytes, without a merge, and the special tokens."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        # Byte-level vocabularies write each byte as a character that can be seen.
        seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
        unseen = [byte for byte in range(256) if byte not in seen]
        written = dict(zip(seen, seen, strict=True))
        written |= {byte: 256 + i for i, byte in enumerate(unseen)}
        vocab = {chr(written[byte]): byte for byte in range(256)}
        backend = Tokenizer(models.BPE(vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        names = ("<pad>", "<bos>", "<end>", "<user>", "<assistant>")
        backend.add_special_tokens([AddedToken(name, special=True) for name in names])
        return backend.to_str()


class HFTokenizer:
    """A fast Hugging Face tokenizer whose special tokens cannot be spelled by text.

    Its methods are those of `Tokenizer`; with `chat` they raise ValueError where there is no chat
    template that takes one message.

    Args:
      fast: a `transformers.PreTrainedTokenizerFast`.
      stop_ids: ids that end an answer, beside the tokenizer's own eos and `END_TOKENS`.

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
        head, before, after, tail, strips = self._chat_parts
        return head + self._plain(before + (text.strip() if strips else text) + after) + tail

    def encode_turn(
        self, parts: Sequence[tuple[str, bool]], answer: str, chat: bool
    ) -> tuple[list[int], list[bool]]:
        # Where the message's tokens lie is asked of the tokenizer: any template will do.
        before = after = ""
        head, tail, strips = ([] if self.bos is None else [self.bos]), [], False
        if chat:
            head, before, after, tail, strips = self._chat_parts
        message = "".join(text for text, _ in parts)
        marks = [is_marked for text, is_marked in parts for _ in text]
        if strips:
            marks = marks[len(message) - len(message.lstrip()) :]
            message = message.strip()
        text = (before + message + after).encode("utf-8", "replace").decode("utf-8")
        marks = [False] * len(before) + marks[: len(message)] + [False] * len(after)
        encoding = self._text.encode(text, add_special_tokens=False)
        inside = [any(marks[first:last]) for first, last in encoding.offsets]
        end = [*self._plain(answer), self.stop_ids[0]]
        ids = [*head, *encoding.ids, *tail, *end]
        return ids, [*[False] * len(head), *inside, *[False] * len(tail), *[True] * len(end)]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self._text.decode(known, skip_special_tokens=True)

    def save(self, folder: str | os.PathLike) -> None:
        self._fast.save_pretrained(folder)

    def to_json(self) -> str:
        return self._text.to_str()

    def _plain(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become '?'
        return self._text.encode(text, add_special_tokens=False).ids

    def _stop_ids(self, more: Iterable[int]) -> tuple[int, ...]:
        ids = [] if self._fast.eos_token_id is None else [self._fast.eos_token_id]
        special = {*self._fast.all_special_ids, *self._special}
        ids += [i for i in map(self._text.token_to_id, END_TOKENS) if i in special]
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
    def _chat_parts(self) -> tuple[list[int], str, str, list[int], bool]:
        """The template around a message: ids, text, (message), text, ids; and if it is stripped.

        The plain text next to the message is kept as text, since tokens can span the border.
        """
        rendered = self._render(f" {_MARK} ")
        strips = f" {_MARK} " not in rendered
        before, mark, after = rendered.partition(_MARK if strips else f" {_MARK} ")
        if not mark or _MARK in after:
            raise ValueError("the chat template does not show a user message exactly once.")
        tokens = sorted(self._special.values(), key=len, reverse=True)
        pattern = "|".join(map(re.escape, tokens)) or "(?!)"
        last = max((match.end() for match in re.finditer(pattern, before)), default=0)
        match = re.search(pattern, after)
        first = len(after) if match is None else match.start()
        head = self._template.encode(before[:last], add_special_tokens=False).ids
        tail = self._template.encode(after[first:], add_special_tokens=False).ids
        parts = (head, before[last:], after[:first], tail, strips)
        expected = self._template.encode(self._render("Hello 1"), add_special_tokens=False).ids
        if head + self._plain(f"{parts[1]}Hello 1{parts[2]}") + tail != expected:
            raise ValueError("the chat template cannot be split around a user message.")
        return parts

    def _render(self, message: str) -> str:
        """Return the template's text for one user message, generation prompt included."""
        if not self._fast.chat_template:
            raise ValueError(
                "chat=True, but the tokenizer has no chat template; use chat=False for this model."
            )
        return self._fast.apply_chat_template(
            [{"role": "user", "content": message}],
            tokenize=False,
            add_generation_prompt=True,
            date_string=_DATE,
        )


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
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_object(folder / name)  # transformers names no file in what it raises
    # Not AutoTokenizer, which rebuilds some from their class and vocabulary, and drops the rest of
    # tokenizer.json: SmolLM2 would no longer split numbers into digits.
    fast_class = import_transformers().PreTrainedTokenizerFast
    try:
        fast = fast_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise ValueError(f"{folder}: cannot load the tokenizer: {error}") from error
    return HFTokenizer(fast, _generation_stop_ids(folder / "generation_config.json"))


def import_transformers() -> Any:
    """Import transformers without its advice to install PyTorch, which nothing here uses."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _generation_stop_ids(path: Path) -> tuple[int, ...]:
    """Return the eos ids of a generation_config.json, of which chat models list several."""
    if not path.is_file():
        return ()
    eos = read_object(path).get("eos_token_id")
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) for i in found):
        raise ValueError(f"{path}: eos_token_id must be an id or a list of ids, found {eos!r}.")
    return tuple(found)
