"""Text to words for the grader: folded, numbers as digits, light stems, everyday synonyms.

Standard library only. Left out: embeddings, and a lexicon beyond a few dozen groups.
"""

import functools
import os.path
import re
import unicodedata
from collections.abc import Set
from typing import NamedTuple

STOP = frozenset(
    """a an the of in on at to for by with from as is are was were be been being it its this that
    these those and or but not no do does did has have had which who whom whose what when where why
    how than then there their they them he she his her him i you we our my your s into during also
    such so if can could will would may might must should name""".split()
)
# Words that qualify an answer without being it.
LIGHT = frozenset(
    """about around approximately roughly nearly almost over under more less least most some many
    several various other others certain since until up onwards onward just only very often usually
    mainly primarily main new people thing things area areas way ways kind type types form called
    known""".split()
)
NEGATIONS = frozenset(
    """not no never none neither nor without cannot cant didnt doesnt isnt wasnt arent werent dont
    wont couldnt unable""".split()
)
YES_NO_STARTS = frozenset(
    "is are was were do does did can could has have had will would should".split()
)

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
_ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
    thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ONES = {w: i for i, w in enumerate(_ONES)} | {w: i for i, w in enumerate(_ORDINALS, 1)}
TENS = dict(zip(_TENS, range(20, 100, 10), strict=True))
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# Short forms, written out.
EXPANSIONS = {
    short: tuple(long.split())
    for short, _, long in (
        pair.strip().partition(":")
        for pair in """uk:united kingdom|usa:united states|eu:europe union|un:united nations|bce:bc|
        ce:ad|nyc:new york city|%:percent|percentage:percent|km:kilometer|kilometre:kilometer|
        kilometres:kilometer|kg:kilogram|st:saint|dr:doctor|mt:mount|tv:television|tb:tuberculosis|
        ww2:world war 2|wwii:world war 2|vs:versus|jan:january|feb:february|aug:august|
        sept:september|oct:october|nov:november|dec:december|$:dollar|usd:dollar|€:euro|
        £:pound""".split("|")
    )
}
# Each group counts as its first word: peoples and faiths, then everyday synonyms.
SYNONYM_GROUPS = """france french|poland polish|germany german germans germanic|england english|
britain british|spain spanish|italy italian italians|russia russian russians|china chinese|
japan japanese|sweden swedish|switzerland swiss|denmark danish|netherlands dutch|
turkey turkish turks|greece greek greeks|ireland irish|scotland scottish scots|
wales welsh|norway norwegian|finland finnish|portugal portuguese|america american americans|
canada canadian|mexico mexican|india indian|egypt egyptian|israel israeli|iran iranian|
iraq iraqi|australia australian|europe european|asia asian|africa african|rome roman romans|
austria austrian|hungary hungarian|czechia czech|korea korean|vietnam vietnamese|brazil brazilian|
cuba cuban|argentina argentine|kenya kenyan|nigeria nigerian|
mongolia mongol mongolian mongols|belgium belgian|ukraine ukrainian|
catholic catholicism|protestant protestantism|christian christianity|islam islamic muslim muslims|
jews jewish judaism|buddhist buddhism|hindu hinduism|
decrease reduce decline shrink diminish drop lower fall fell reduction|
increase rise grow growth raise rose risen grew|begin start commence began begun onset beginning|
trade commerce trading|help aid assist assistance|kill murder slain slay killed|
die death died dead deceased|end finish conclude ended|large big huge vast|buy purchase bought|
create make made|build built construct construction|movie film|author writer|heat thermal|
doctor physician|teach taught teacher teaching|food nutrient nutrition|speed velocity|
rich wealthy wealth|poor poverty|sea ocean|city town|war conflict|fight fought battle|harm damage|
job employment occupation work|price cost|show display|law legal legislation|child children kid|
man men male|woman women female|sun solar|moon lunar|king monarch|ship vessel boat|car automobile|
sick ill illness disease|pagan paganism|write wrote written writing|speak spoke spoken|
give gave given|take took taken|go went gone|choose chose chosen choice|sell sold|send sent|
lose lost loss|fast quick rapid|illegal unlawful|allow permit|need require requirement|
stop halt prevent|worker labor laborer|soldier troop|religious religion|
pathogen microbe germ bacteria|thought idea"""
CANONICAL = {
    word: group.split()[0] for group in SYNONYM_GROUPS.split("|") for word in group.split()
}
_SUFFIXES = tuple(
    tuple(pair.split(":"))
    for pair in """ational:at ization:iz ations:at ation:at ities:it ments:ment iness:i ness: ingly:
    ings: ing: edly: ies:y ied:y ions: ion: ists:ist ism:ist ives:iv ive:iv ally:al ly: ers:er ed:
    es: e: s:""".split()
)

_WORD = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\d+(?:st|nd|rd|th|s)\b|\d+|[^\W\d_]+|[%$€£]")
_DOTTED = re.compile(r"\b(?:[a-z]\.){2,}")
_AMERICA = re.compile(r"\bUS(?:A\b|\b)|\bU\.S\.(?:A\.)?")
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
    text = fold(_AMERICA.sub(" united states ", text))
    text = _DOTTED.sub(lambda m: m.group().replace(".", "") + " ", text)
    words: list[str] = []
    value, is_ten = None, False  # the number being read, and whether it ends in a bare ten
    for word in _WORD.findall(_POSSESSIVE.sub("", text)):
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
    for suffix, rest in _SUFFIXES:
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


def trigrams(word: str) -> set[str]:
    """Return the runs of three letters in `word`, its ends marked."""
    padded = f"^{word}$"
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


@functools.lru_cache(maxsize=1 << 17)
def similarity(a: str, b: str) -> float:
    """Return how alike two stems are, in [0, 1]; numbers are equal or nothing."""
    if a == b:
        return 1.0
    if is_number(a) or is_number(b):
        return 0.0
    shared = len(os.path.commonprefix((a, b)))
    prefix = shared / max(len(a), len(b)) if shared >= 4 else 0.0
    start = 0.9 * shared / min(len(a), len(b)) if shared >= 5 else 0.0
    left, right = trigrams(a), trigrams(b)
    return max(2 * len(left & right) / (len(left) + len(right)), prefix, start)
