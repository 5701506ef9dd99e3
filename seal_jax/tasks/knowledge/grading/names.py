"""Whether the capitalized words around a gold name make another name of it, or the same.

    continues('Which city?', 'Washington', 'Washington Irving')  ->  True
    is_family_name('Who led?', 'John F. Kennedy', 'It was Kennedy.')  ->  True

Titles, companies' suffixes and words such as 'river' make no other name; the lists are in
`lexicon.json`.
"""

import re

from seal_jax.tasks.knowledge.grading.words import (
    COMPANIES,
    MONONYMS,
    PLACES,
    STOP,
    TITLES,
    fold,
    is_number,
    read,
)

_LINE = 4  # words of a name
_NAME = re.compile(r"(?:[A-Z][\w'’-]*\.? ){0,4}[A-Z][\w'’-]*")
_REGNAL = re.compile(r"(?:[A-Z]\w+ ){1,3}[IVX]+")
_ROMAN = re.compile("[ivx]+")
_ARTICLE = re.compile(r"^(?:the|a|an) ", re.IGNORECASE)
_FOLLOWING = re.compile(r" ([A-Z][a-z]+)")
_MAX_FRAME = 12  # words of an answer that is a name in a frame


def continues(question: str, gold: str, answer: str) -> bool:
    """Return whether each mention of a gold name goes on as another: Washington Irving."""
    name = _ARTICLE.sub("", gold.rstrip(" ."))
    if not _NAME.fullmatch(name) or name not in answer or name.count(" ") > 1:
        return False
    given = {*read(question).words, *read(gold).words}
    asks_who = "who" in given
    if "&" not in name and (f"{name} & " in answer or f"& {name}" in answer):
        return True
    ends = [found.end() for found in re.finditer(re.escape(name), answer)]
    return all(_goes_on(answer, end, name, given, asks_who) for end in ends)


def _goes_on(answer: str, end: int, name: str, given: set[str], asks_who: bool) -> bool:
    found = _FOLLOWING.match(answer, end)
    if not found:
        return False
    word = fold(found[1])
    is_frame = word in STOP or word in given or word in TITLES or word in COMPANIES
    if is_frame or (asks_who and fold(name) in MONONYMS):
        return False
    return asks_who or word not in PLACES


def swaps(question: str, gold: str, answer: str) -> bool:
    """Return whether an answer has the gold's first and last name, and others between: H. W. for W.

    Or it has the name of a Charles I without any number.
    """
    words = gold.split()
    if _REGNAL.fullmatch(gold):
        is_named = read(words[0]).stems[0] in read(answer).stems
        numerals = [w for w in read(answer).words if is_number(w) or _ROMAN.fullmatch(w)]
        return is_named and not numerals and words[-1] not in question
    if len(words) < 3 or not _NAME.fullmatch(gold):
        return False
    between = rf"{re.escape(words[0])} ((?:[A-Z]\w{{0,20}}\.? ?){{1,3}}) {re.escape(words[-1])}\b"
    found = re.search(between, answer)
    expected = [word[0] for word in words[1:-1]]
    return bool(found) and [word[0] for word in found[1].replace(".", " ").split()] != expected


def is_family_name(question: str, gold: str, answer: str) -> bool:
    """Return whether an answer is the last word of a gold that names one person, in a frame."""
    asked = read(question)
    words = gold.split()
    if {"who", "whom", "whose"}.isdisjoint(asked.words) or not 2 <= len(words) <= _LINE:
        return False
    if not _NAME.fullmatch(gold) or not re.search(rf"(?<![\w-]){re.escape(words[-1])}\b", answer):
        return False
    given = read(answer)
    frame = {*asked.stems, *read(gold).stems}
    others = [w for w, s in zip(given.words, given.stems, strict=True) if s not in frame]
    return len(given.words) <= _MAX_FRAME and all(
        w in STOP - {"not", "no", "or", "and"} or w in TITLES for w in others
    )
