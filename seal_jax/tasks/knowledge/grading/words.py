"""Text to words for the grader: folded, numbers as digits, light stems, everyday synonyms.

Standard library only. The word lists are in `lexicon.json`. Left out: embeddings, and a lexicon
beyond a few dozen groups.
"""

import functools
import importlib.resources
import json
import os.path
import re
import unicodedata
from collections.abc import Set
from typing import NamedTuple

_FILE = importlib.resources.files("seal_jax.tasks.knowledge.grading").joinpath("lexicon.json")
_LEXICON = json.loads(_FILE.read_text("utf-8"))


def _words(name: str) -> list[str]:
    return " ".join(_LEXICON[name]).split()


STOP = frozenset(_words("stop"))
LIGHT = frozenset(_words("light"))  # they qualify an answer without being it
NEGATIONS = frozenset(_words("negations"))
RELATIONS = frozenset(_words("relations"))
IDENTITY_BEFORE = frozenset(_words("identity_before"))
TITLES = frozenset(_words("titles"))
COMPANIES = frozenset(_words("companies"))  # behind a name, which stays the same
PLACES = frozenset(_words("places"))
MONONYMS = frozenset(_words("mononyms"))  # first names by which somebody is known
COMPOUNDS = frozenset(_words("compounds"))
ROLES_BEFORE = frozenset(_words("roles_before"))
IDENTITY_AFTER = frozenset(_words("identity_after"))
HEDGES = frozenset(_words("hedges"))
YES_NO_STARTS = frozenset(_words("yes_no_starts"))
ONES = {w: i for i, w in enumerate(_words("ones"))}
ONES |= {w: i for i, w in enumerate(_words("ordinals"), 1)}
TENS = {w: 10 * i for i, w in enumerate(_words("tens"), 2)}
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
EXPANSIONS = {short: tuple(long.split()) for short, long in _LEXICON["expansions"].items()}
# Each group of synonyms counts as its first word.
CANONICAL = {word: group.split()[0] for group in _LEXICON["synonyms"] for word in group.split()}
CONTRASTS = {  # word -> its group, and which of the group it is
    word: (group, member)
    for group, words in enumerate(_LEXICON["contrasts"])
    for member, names in enumerate(words.split("|"))
    for word in names.split()
}
_INFLECTIONS = frozenset("s es n an ian ean ese ish i ic er".split())  # of a name
_SUFFIXES = dict(pair.split(":") for pair in _words("suffixes"))  # and what takes their place

_WORD = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\d+(?:st|nd|rd|th|s)\b|\d+|[^\W\d_]+|[%$€£]")
_ROMAN = re.compile("[ivx]+")
_ROMAN_ONES = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
_DOTTED = re.compile(r"\b(?:[a-z]\.){2,}")
_AMERICA = re.compile(r"\bUS(?:A\b|\b)|\bU\.S\.(?:A\.)?")
_REGNAL = re.compile(r"(?<=[a-z] )the ((?:[A-Z][a-z]+-)?[A-Z][a-z]+(?:st|nd|rd|th))\b(?! [A-Z])")
_POSSESSIVE = re.compile(r"'s?\b|'")


class Text(NamedTuple):
    """A text in words; `stems` runs in parallel to `words`."""

    words: tuple[str, ...]
    stems: tuple[str, ...]

    def stems_without(self, ignored: Set[str] = STOP) -> tuple[str, ...]:
        """Return the stems of all words but the ignored ones."""
        return tuple(s for w, s in zip(self.words, self.stems, strict=True) if w not in ignored)


def fold(text: str) -> str:
    """Return `text` in lower case without accents and invisible characters."""
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf"))
        text = text.replace("’", "'").replace("‘", "'")
    return text.lower()


def _as_roman(found: re.Match[str]) -> str:
    """Return the numeral of Henry the Eighth."""
    number = ONES.get(found[1].lower(), 0)
    return number // 10 * "X" + _ROMAN_ONES[number % 10] if 0 < number < 20 else found[0]


def is_number(word: str) -> bool:
    return word[0].isdecimal()


def _format_number(value: float) -> str:
    value = round(value, 6)
    return str(int(value)) if value == int(value) else repr(value)


def _parse_number(word: str) -> float | None:
    if is_number(word):  # beyond 15 characters a float is not exact
        return float(word.rstrip("stndrh").replace(",", "")) if len(word) < 16 else None
    value = ONES.get(word, TENS.get(word))
    return None if value is None else float(value)


def split_words(text: str) -> list[str]:
    """Split `text` into folded words; 'twenty-five', '1.4 million' and '9,430' become digits."""
    if " the " in text:
        text = _REGNAL.sub(_as_roman, text)
    text = fold(_AMERICA.sub(" united states ", text) if "US" in text or "U.S" in text else text)
    if "." in text:
        text = _DOTTED.sub(lambda m: m.group().replace(".", "") + " ", text)
    words: list[str] = []
    value, is_ten = None, False  # the number being read, and whether it ends in a bare ten
    for word in _WORD.findall(_POSSESSIVE.sub("", text) if "'" in text else text):
        if value is not None:
            scale = SCALES.get(word) or SCALES.get(word.rstrip("s"))
            if scale and value < 1000:
                value, is_ten = value * scale, False
                continue
            if is_ten and 0 < ONES.get(word, 0) < 10:
                value, is_ten = value + ONES[word], False
                continue
            words.append(_format_number(value))
        value, is_ten = _parse_number(word), word in TENS
        if value is None:
            words.extend(EXPANSIONS.get(word, (word,)))
    if value is not None:
        words.append(_format_number(value))
    return words


def _strip_suffix(word: str) -> str:
    if len(word) <= 3 or is_number(word):
        return word
    for suffix, rest in _SUFFIXES.items():
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word.removesuffix(suffix) + rest
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    if len(word) > 3 and word[-1] == "y":
        word = word[:-1] + "i"
    return word[:-1] if len(word) > 4 and word[-1] == "e" else word


_CANONICAL_STEMS = {_strip_suffix(w): _strip_suffix(c) for w, c in CANONICAL.items()}


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """Return a light stem, the same for the words of one synonym group."""
    stripped = _strip_suffix(CANONICAL.get(word, word))
    return _CANONICAL_STEMS.get(stripped, stripped)


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Text:
    """Split `text` into words and their stems."""
    words = split_words(text)
    return Text(tuple(words), tuple(map(stem, words)))


REGIONS = frozenset(map(stem, ("africa", "asia", "europe")))
COUNTRIES = frozenset(map(stem, _words("countries")))


def trigrams(word: str) -> set[str]:
    """Return the runs of three letters in `word`, its ends marked."""
    padded = f"^{word}$"
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


@functools.lru_cache(maxsize=1 << 17)
def similarity(a: str, b: str) -> float:
    """Return how alike two stems are, in [0, 1]; numbers and countries are equal or nothing."""
    if a == b:
        return 1.0
    if is_number(a) or is_number(b) or (a in COUNTRIES and b in COUNTRIES):
        return 0.0
    if _ROMAN.fullmatch(a) and _ROMAN.fullmatch(b):
        return 0.0
    shared = len(os.path.commonprefix((a, b)))
    prefix = shared / max(len(a), len(b)) if shared >= 4 else 0.0
    start = 0.9 * shared / min(len(a), len(b)) if shared >= 5 else 0.0
    left, right = trigrams(a), trigrams(b)
    return max(2 * len(left & right) / (len(left) + len(right)), prefix, start)


@functools.lru_cache(maxsize=1 << 16)
def is_same_name(a: str, b: str) -> bool:
    """Return whether the stems of two names are of one: a people and its land, or a typo.

    A name that only begins as another does is another: Victor, Victoria.
    """
    if a == b or not similarity(a, b):
        return a == b
    short, long = sorted((a, b), key=len)
    if long.startswith(short):
        rest = long[len(short) :]
        return rest in _INFLECTIONS or (rest == "ia" and len(short) > 6)  # Yugoslav, Yugoslavia
    start = len(os.path.commonprefix((short, long)))
    end = len(os.path.commonprefix((short[start:][::-1], long[start:][::-1])))
    return len(short) > 5 and len(long) - start - end < 2 + (len(short) > 8)
