"""Thoughts: what a reasoning model writes before what it has to say, between two tags.

Which tags a model has is read off its chat template: those of `TAGS` that the template mentions. A
model whose template mentions none has no thoughts, and its texts are taken as they are, whatever
stands in them. The template may have opened the thought in the prompt, so that the model writes the
closing tag alone.

As templates read earlier turns, so do we: all before the last closing tag is thoughts, opened or
not, and what follows it is the text. Behind an opening tag that nothing closes there is no text.
"""

from collections.abc import Sequence
from typing import NamedTuple

TAGS = (
    ("<think>", "</think>"),  # DeepSeek-R1 and its distillates, Qwen3, QwQ, SmolLM3
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere's Command
)


class Written(NamedTuple):
    """What a model wrote, apart from its thoughts."""

    text: str  # '' where it was still thinking
    thoughts: str
    is_cut: bool  # whether it ended inside a thought


class Thoughts(NamedTuple):
    """How a model marks thoughts, and where its prompts leave it."""

    start: str
    end: str
    is_open: bool  # the prompt has begun a thought
    is_closed: bool  # the prompt has begun and ended one: the model is not to think

    def read(self, text: str) -> Written:
        """Return the text without its thoughts; any text at all, in linear time."""
        before, tag, rest = text.rpartition(self.end)
        if self.start in rest or (self.is_open and not tag):
            return Written("", text.strip().removeprefix(self.start).strip(), True)
        thoughts = before.strip().removeprefix(self.start).strip()
        return Written(rest.lstrip() if tag else rest, thoughts, False)

    def text_start(self, text: str) -> int:
        """Return where stop strings count: behind the first thought; the text's end if in it.

        More of the same text never moves it, once it is not the end.
        """
        begun = text.lstrip()
        if not self.is_open and not begun.startswith(self.start):
            return len(text) if self.start.startswith(begun) else 0
        place = text.find(self.end)
        return len(text) if place < 0 else place + len(self.end)


def find_tags(template: str | None) -> tuple[str, str] | None:
    """Return the tags that a chat template mentions."""
    return next((tags for tags in TAGS if any(tag in (template or "") for tag in tags)), None)


def state_of(tags: tuple[str, str], prompt_end: str) -> Thoughts:
    """Return how a model with these tags begins to write behind the end of its prompts."""
    start, end = map(prompt_end.rfind, tags)
    return Thoughts(*tags, is_open=start > end, is_closed=end > start)


def read(thoughts: Thoughts | None, text: str) -> Written:
    """Return what was written; all of it is text where the model marks no thoughts."""
    return Written(text, "", False) if thoughts is None else thoughts.read(text)


def text_before(text: str, strings: Sequence[str], thoughts: Thoughts | None = None) -> str:
    """Return what stands before the string that is complete first; of two, before the longer.

    The strings are looked for behind the first thought.
    """
    first = 0 if thoughts is None else thoughts.text_start(text)
    places = [(text.find(s, first), len(s)) for s in strings]
    ends = [(place + size, place) for place, size in places if place >= 0]
    return text[: min(ends)[1]] if ends else text
