"""What a chat template writes, as tokens, and which of them are control tokens."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_IN_BRACKETS = re.compile(r"[^\w\s].*\w.*[^\w\s]")


class Around(NamedTuple):
    """What stands around a message of the user's: ids, text, (message), text, ids.

    The plain text next to the message is kept as text, since tokens can span the border.
    """

    head: list[int]
    before: str
    after: str
    tail: list[int]
    context: str  # the plain text that ends it, behind its last special token


class Turn(NamedTuple):
    """How the chat template writes the answer to a message."""

    around: Around  # of the message
    between: str  # the template's text between prompt and answer
    behind: str  # plain text behind the answer, before what ends it
    end: int | None  # the token that ends it; None where the template has no token for that


class Written(NamedTuple):
    """What the template writes by itself, as far as it can be rendered."""

    around: str  # all of it
    lead: str  # from the message to the answer
    behind: str  # the answer
    fault: ValueError | None  # whoever asks through the template is told


def control_tokens(text: str, added: Iterable[Any]) -> set[str]:
    """Return those of some AddedTokens in a template's text that are in brackets, as <|user|>."""
    found = any_of(token.content for token in added).findall(text)
    return {token for token in found if _IN_BRACKETS.fullmatch(token)}


def remarked(backend: Any, special: Mapping[str, bool]) -> Any:
    """Return a copy of a `tokenizers.Tokenizer` in which some tokens are special, or are not."""
    content = backend.to_str()
    if special:
        parsed = json.loads(content)
        for token in parsed["added_tokens"]:
            token["special"] = special.get(token["content"], token["special"])
        content = json.dumps(parsed)
    return type(backend).from_str(content)


def any_of(tokens: Iterable[str]) -> re.Pattern:
    """Return what finds any of some tokens, of two the longer."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
