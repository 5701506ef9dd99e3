"""Bytes as tokens."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seal_jax.models.thoughts import Thoughts

BYTE_FILE = "byte_tokenizer.json"


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

    def thoughts(self, chat: bool) -> Thoughts | None:
        return None

    def with_template(self, model: str, arguments: Mapping[str, Any]) -> "ByteTokenizer":
        if arguments:
            raise ValueError(f"model.template_args: {model} has no chat template, expected {{}}")
        return self

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
