"""What the fitted grader looks at: features of (question, gold, prediction).

    question, gold -> Key        once per question (cached)
    Key, Text      -> features   recall of what the question does not give away, precision, numbers,
                                 names, polarity

Each feature is a number that means something alone, so that `points.json` can be read.
`NONE` says that the feature does not apply. Left out: any notion of who did what to whom, and
features that fit the passages they were fitted to and do not help on others.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from seal_jax.tasks.knowledge.grading.words import (
    LIGHT,
    NEGATIONS,
    STOP,
    YES_NO_STARTS,
    Text,
    fold,
    is_number,
    read,
    similarity,
    stem,
    trigrams,
)

NONE = -1.0
ALIKE = 0.6  # the similarity from which two stems count as the same word
_LETTERS = re.compile(r"[^\W\d_]+")
_ITEM = re.compile(r"[,;&]|\band/or\b|\band\b|\bor\b")
_AT_LEAST = frozenset("over more above least exceeding minimum".split())
_AT_MOST = frozenset("under less fewer below most maximum up".split())
_ABOUT = frozenset("about around approximately some nearly almost roughly circa c".split())


class Key(NamedTuple):
    """What a question and its gold answer ask of a prediction."""

    question: Text
    question_stems: frozenset[str]
    question_content: frozenset[str]  # without stop words
    gold: Text
    gold_stems: frozenset[str]
    content: tuple[str, ...]  # the gold's stems without stop words
    targets: tuple[str, ...]  # those that the question does not give away (all, where it gives all)
    readings: tuple[tuple[str, ...], ...]  # the gold with, without and inside its parentheses
    items: tuple[tuple[str, ...], ...]  # the gold split at commas, 'and', 'or'
    numbers: tuple[str, ...]  # the gold's numbers, the question's left out where others remain
    bounds: tuple[tuple[float, frozenset[str]], ...]  # 'over five' -> (5, {'over'})
    names: tuple[str, ...]  # capitalized words that the question does not give away
    initials: str
    short_forms: frozenset[str]  # 'HIV' -> 'hiv'
    letters: frozenset[str]  # trigrams
    is_yes_no: bool
    is_negative: bool


def capitalized(text: str) -> list[str]:
    """Return the stems of the capitalized words of `text`, initials left out."""
    return [stem(fold(w)) for w in _LETTERS.findall(text) if len(w) > 1 and w[0].isupper()]


def _bounds(words: tuple[str, ...]) -> tuple[tuple[float, frozenset[str]], ...]:
    marks = _AT_LEAST | _AT_MOST | _ABOUT
    found = []
    for i, word in enumerate(words):
        before = marks.intersection(words[max(0, i - 2) : i])
        if before and is_number(word) and len(word) < 16:
            found.append((float(word), before))
    return tuple(found[:1])


@functools.lru_cache(maxsize=4096)
def read_key(question: str, gold: str) -> Key:
    """Return what `question` and `gold` ask of a prediction."""
    q, g = read(question), read(gold)
    given = frozenset(q.stems)
    content = g.stems_without() or g.stems
    core = g.stems_without(STOP | LIGHT) or content
    numbers = tuple(w for w in g.words if is_number(w))
    readings = [gold, re.sub(r"\([^)]*\)", " ", gold), *re.findall(r"\(([^)]*)\)", gold)]
    items = (read(part).stems_without(STOP | LIGHT) for part in _ITEM.split(gold))
    return Key(
        question=q,
        question_stems=given,
        question_content=frozenset(q.stems_without()),
        gold=g,
        gold_stems=frozenset(g.stems),
        content=content,
        targets=tuple(s for s in core if s not in given) or core,
        readings=tuple(filter(None, (read(reading).stems_without() for reading in readings))),
        items=tuple(filter(None, items)),
        numbers=tuple(n for n in numbers if n not in q.words) or numbers,
        bounds=_bounds(g.words),
        names=tuple(s for s in capitalized(gold) if s not in given),
        initials="".join(w[0] for w in g.words if w not in STOP),
        short_forms=frozenset(w.lower() for w in re.findall(r"\b[A-Z]{2,6}\b", gold)),
        letters=frozenset(trigrams("".join(g.words)[:200])),
        is_yes_no=bool(q.words) and q.words[0] in YES_NO_STARTS,
        is_negative=not NEGATIONS.isdisjoint(g.words),
    )


class Match(NamedTuple):
    """Where a prediction meets the gold."""

    strength: dict[str, float]  # of each gold stem, in [0, 1]
    hits: frozenset[str]  # the prediction's stems that count as the gold's
    num_missed: int  # of the targets
    by_letter: dict[str, list[str]]  # the prediction's stems by their first letter


def _is_in(stem_: str, by_letter: dict[str, list[str]]) -> bool:
    return any(similarity(stem_, other) >= ALIKE for other in by_letter.get(stem_[0], ()))


def match(key: Key, text: Text) -> Match:
    """Find each stem of the gold in the prediction, allowing for typos and short forms."""
    by_letter: dict[str, list[str]] = {}
    for s in set(text.stems):
        by_letter.setdefault(s[0], []).append(s)
    strength, hits = {}, set()
    for s in key.gold_stems:
        near = [(similarity(s, other), other) for other in by_letter.get(s[0], ())]
        strength[s] = max(near)[0] if near else 0.0
        hits.update(other for score, other in near if score >= (ALIKE if s in key.targets else 1))
    initials = "".join(w[0] for w in text.words if w not in STOP)
    shortest = 2 if len(text.words) <= 6 else 3  # two letters meet by chance in a longer text
    if len(key.initials) >= shortest and key.initials in set(text.words) - STOP:
        strength = dict.fromkeys(strength, 1.0)
        hits.add(key.initials)
    for short in key.short_forms.intersection(strength):
        if strength[short] < 0.9 and len(short) >= shortest and short in initials:
            strength[short] = 0.9
    num_missed = sum(strength[s] < ALIKE for s in key.targets)
    return Match(strength, frozenset(hits), num_missed, by_letter)


def longest_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest run of words that both hold."""
    best, lengths = 0, {}
    for word in a:
        lengths = {j: lengths.get(j - 1, 0) + 1 for j, other in enumerate(b) if other == word}
        best = max(best, *lengths.values(), 0)
    return best


def features(key: Key, text: Text, prediction: str) -> dict[str, float]:
    """Return the features of a prediction that has at least one word."""
    found = match(key, text)
    strength, content = found.strength, text.stems_without()
    new = [s for s in content if s not in key.question_stems]
    overlap = [_is_in(s, found.by_letter) for s in key.question_content]
    overlap_share = sum(overlap) / max(1, len(overlap))
    is_hit = 2 * found.num_missed < len(key.targets)
    letters = f"^{''.join(text.words)}$"  # that hold a trigram of the gold's, or not
    num_found = sum(trigram in letters for trigram in key.letters)
    numbers = [w for w in text.words if is_number(w)]
    names = [strength.get(s, 0.0) >= ALIKE for s in key.names]
    others = set(capitalized(prediction.partition(" ")[2])) if names else set()
    starts_negative = not NEGATIONS.isdisjoint(text.words[:12])
    return {
        "recall_any_reading": max(
            sum(strength.get(s, 0.0) for s in reading) / len(reading)
            for reading in (key.targets, *key.readings)
        ),
        "recall_letters": 1.0 if key.initials in found.hits else num_found / len(key.letters),
        "longest_run": longest_run(key.content, content) / len(key.content),
        "precision": _share([s in found.hits for s in new]),
        "question_overlap": overlap_share,
        "question_overlap_if_hit": overlap_share if is_hit else NONE,
        "gold_in_question": _share([s in key.question_stems for s in key.content]),
        "number_recall": _share([n in numbers for n in key.numbers]),
        "number_bound": _meets_bound(key, numbers),
        "name_recall": _share(names),
        "num_stray_names": len(others - key.question_stems - key.gold_stems) if names else NONE,
        "same_polarity": (2.0 * (key.is_negative == starts_negative) - 1) * key.is_yes_no,
        "num_gold_items": len(key.items),
    }


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else NONE


def _meets_bound(key: Key, numbers: list[str]) -> float:
    """Return 1 where the first number satisfies 'over 5', 0.5 where a later one does, else -1."""
    values = [float(n) for n in numbers if len(n) < 16 and n not in key.question.words]
    if not key.bounds or not values:
        return 0.0
    bound, marks = key.bounds[0]
    meets = [
        bool(marks & _AT_LEAST and value >= bound)
        or bool(marks & _AT_MOST and value <= bound)
        or bool(marks & _ABOUT and abs(value - bound) <= 0.12 * abs(bound))
        for value in values
    ]
    return 1.0 if meets[0] else 0.5 if any(meets) else -1.0
