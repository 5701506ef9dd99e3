"""Quantities in a text: value, sign, unit, bound and era, as the grader compares them.

    read_quantities('more than 1.4 million km').found  ->  (Quantity(1400000, km, bound '>'),)

A hyphen is a minus only where nothing stands right before it. What the words around a number make
of it is listed in `units.json`. Linear time.
"""

import functools
import importlib.resources
import json
from fractions import Fraction
from typing import NamedTuple

from seal_jax.tasks.knowledge.grading.numerals import CURRENCIES, Words, read_number, split
from seal_jax.tasks.knowledge.grading.words import SCALES

_FILE = importlib.resources.files("seal_jax.tasks.knowledge.grading").joinpath("units.json")
_LISTS = json.loads(_FILE.read_text("utf-8"))


class Unit(NamedTuple):
    """What a number counts: value * factor + offset, in the base unit of the dimension."""

    dimension: str
    factor: Fraction
    offset: Fraction = Fraction(0)


class Quantity(NamedTuple):
    """A number with all that is said about it."""

    value: Fraction | str  # a text where separators make no number: '1.2.3'
    form: str = "cardinal"  # or 'ordinal', 'fraction', 'decade', 'day', 'time' (in minutes)
    last: Fraction | str | None = None  # the other end of a range
    units: tuple[Unit, ...] = ()  # several where the word means several
    bound: str = ""  # '<', '>' or '~' for about
    era: str = ""  # 'bc' or 'ad'


class Quantities(NamedTuple):
    """The quantities of a text in order, and what is part of none."""

    found: tuple[Quantity, ...]
    others: tuple[str, ...]  # words and signs
    months: frozenset[int]  # that stand beside a number
    places: tuple[int, ...]  # how many of the others come before each quantity


def _read_units() -> dict[str, tuple[Unit, ...]]:
    units: dict[str, tuple[Unit, ...]] = {}
    for dimension, names in _LISTS["units"].items():
        for size, words in names.items():
            factor, _, offset = size.partition("+")
            unit = Unit(dimension, Fraction(factor), Fraction(offset or 0))
            for word in words.split():
                units[word] = (*units.get(word, ()), unit)
    return units


def _read_phrases(name: str) -> dict[tuple[str, ...], str]:
    return {tuple(p.split()): side for side, phrases in _LISTS[name].items() for p in phrases}


UNITS = _read_units()
MONTHS = {w: i for i, names in enumerate(_LISTS["months"], 1) for w in names.split()}
_BEFORE, _AFTER = _read_phrases("bounds_before"), _read_phrases("bounds_after")
BOUND_WORDS = frozenset(word for phrase in (*_BEFORE, *_AFTER) for word in phrase)
_BETWEEN = frozenset(_LISTS["between_bound_and_number"].split()) | CURRENCIES
_POINTS = frozenset(tuple(phrase.split()) for phrase in _LISTS["bounds_of_points"])
_UNTIL = (("until",), ("till",))
_NOT = frozenset(("not", "never", "t"))  # the last one of didn't
_MAX_BETWEEN = 8
_ERAS = {"bc": "bc", "bce": "bc", "ad": "ad", "ce": "ad"}
_TIMES = frozenset("h hr hour s sec second min minute day week month year".split())
_POWERS = {"square": 2, "cubic": 3, "squared": 2, "cubed": 3, "2": 2, "3": 3}
_PAIRS = frozenset("- to through thru till until : and".split())


@functools.lru_cache(maxsize=1024)
def read_quantities(text: str) -> Quantities:
    """Return the quantities of `text`."""
    words = split(text)
    found: list[Quantity] = []
    others: list[str] = []  # since the text began
    months: set[int] = set()
    places: list[int] = []
    i = edge = 0  # no word of a quantity is taken from before the edge
    while i < len(words.words):
        date = _date(words.words[i])
        if date:
            found += (Quantity(date[0], "day"), Quantity(date[2]))
            months.add(date[1])
            i += 1
        elif read := _quantity(words, i, others[max(edge, len(others) - 9) :], months):
            quantity, i, taken = read
            found.append(quantity)
            del others[len(others) - taken :]
        else:
            others.append(words.words[i])
            i += 1
            continue
        edge = len(others)
        places += [edge] * (len(found) - len(places))
    return Quantities(tuple(found), tuple(others), frozenset(months), tuple(places))


def _date(word: str) -> tuple[Fraction, int, Fraction] | None:
    """Return day, month and year of 2015-01-07 or 1/7/2015, which is in January where it can be."""
    if word.count("-") == 2:
        year, month, day = word.split("-")
    elif word.count("/") == 2:
        month, day, year = word.split("/")
        if int(month) > 12:
            day, month = month, day
    else:
        return None
    return Fraction(int(day)), int(month), Fraction(int(year))


def _quantity(
    words: Words, i: int, before: list[str], months: set[int]
) -> tuple[Quantity, int, int] | None:
    """Read the quantity that begins at word `i`: it, the word behind it, and how many before it
    are part of it."""
    if ":" in words.at(i) and len(words.at(i)) > 1:
        quantity, end = _clock(words, i)
        return _bounded(words, quantity, end, before)
    number = read_number(words, i)
    if number is None:
        return None
    if words.at(number.end) in ("am", "pm") and isinstance(number.value, Fraction):
        quantity, end = _clock(words, i)
        return _bounded(words, quantity, end, before)
    value, form, (units, end) = number.value, number.form, read_unit(words, number.end)
    if form == "fraction" and not units and (words.at(end) in ("a", "an", "of")):
        more = read_unit(words, end + 1 + (words.at(end) == "of"))
        form, (units, end) = ("cardinal", more) if more[0] else (form, (units, end))  # half a mile
    start = len(before)
    if _is_minus(words, i, before):
        value, start = _negative(value), start - 1
    if not units and before[:start][-1:] and before[start - 1] in CURRENCIES:
        units, start = UNITS[before[start - 1]], start - 1
        if before[:start][-1:] in (["-"], ["minus"]):  # -$5
            value, start = _negative(value), start - 1
    if words.at(end) == "below" and words.at(end + 1) in ("", "zero", ".", ","):
        value, end = _negative(value), end + 1 + (words.at(end + 1) == "zero")
    can_be_day = form in ("cardinal", "ordinal") and number.last is None
    if can_be_day and _names_month(words, i, end, months):
        form = "day" if isinstance(value, Fraction) and 0 < value < 32 else form
    last = number.last
    if last is None and (pair := _pair(words, end, before[:start])):
        value, last, end = _times(value, pair.scale), pair.last, pair.end
        units, start = units or pair.units, start - pair.num_before
    return _bounded(
        words, Quantity(value, form, last, units), end, before[:start], len(before) - start
    )


def _is_minus(words: Words, i: int, before: list[str]) -> bool:
    """Return whether the sign or word before a number makes it negative."""
    if before[-1:] == ["-"]:
        return words.touches(i) and not words.touches(i - 1)
    return before[-1:] in (["minus"], ["negative"])


def _negative(value: Fraction | str) -> Fraction | str:
    return -value if isinstance(value, Fraction) else f"-{value}"


def _times(value: Fraction | str, scale: int) -> Fraction | str:
    return value * scale if isinstance(value, Fraction) and value < 1000 else value


def _clock(words: Words, i: int) -> tuple[Quantity, int]:
    """Read 5:30, 5:30 pm or 5 pm, as minutes."""
    hour, _, minute = words.at(i).partition(":")
    end = i + 1
    minutes = 60 * int(hour) + int(minute or 0) if hour.isdecimal() else 0
    half = words.at(end)
    if half not in ("am", "pm"):
        return Quantity(Fraction(minutes), "time"), end
    minutes = minutes % 720 + 720 * (half == "pm")
    return Quantity(Fraction(minutes), "time", units=(Unit("clock", Fraction(1)),)), end + 1


def _names_month(words: Words, i: int, end: int, months: set[int]) -> bool:
    """Return whether a month stands beside the number, and remember it."""
    before = i - 2 if words.at(i - 1) == "of" else i - 1  # May of 1999
    near = words.at(before), words.at(end + (words.at(end) == "of"))
    named = {MONTHS[word] for word in near if word in MONTHS}
    months |= named
    return bool(named)


def read_unit(words: Words, end: int) -> tuple[tuple[Unit, ...], int]:
    """Return the unit that stands at a word, and the word behind it."""
    n = end + (words.at(end) == "-")
    n += words.at(n) in ("°", "degree", "degrees")
    if n > end and words.at(n - 1) != "-" or words.touches(n):
        scale = {"c": "celsius", "f": "fahrenheit"}.get(words.at(n))
        if scale:
            return UNITS[scale], n + 1
    power = _POWERS.get(words.at(n), 1) if words.at(n).isalpha() else 1
    units = UNITS.get(words.at(n + (power > 1)), ())
    if not units:
        return (), n if words.at(n - 1) in ("°", "degree", "degrees") and n > end else end
    if units[0].dimension == "percent":
        return units, n + 1 + (words.at(n + 1) in ("point", "points"))
    n += 1 + (power > 1)
    behind = n + (words.at(n) == "^")
    if power == 1 and units[0].dimension == "length" and words.touches(behind):
        power = _POWERS.get(words.at(behind), 1)
        n = behind + 1 if power > 1 else n
    if power > 1 and units[0].dimension == "length":
        dimension = "area" if power == 2 else "volume"
        return (Unit(dimension, units[0].factor ** power),), n
    if words.at(n) in ("per", "/", "an") and words.at(n + 1) in _TIMES:
        time = UNITS[words.at(n + 1)][0]
        rates = (Unit(f"{u.dimension}/time", u.factor / time.factor) for u in units)
        return tuple(rates), n + 2
    return units, n


class _Pair(NamedTuple):
    last: Fraction | str
    end: int
    num_before: int  # words before the range that belong to it
    units: tuple[Unit, ...]
    scale: int  # what multiplies the first number, too: 3 to 5 million


def _pair(words: Words, end: int, before: list[str]) -> _Pair | None:
    """Return the other end of a range whose first number ends at a word."""
    joint = words.at(end)
    if joint not in _PAIRS or (joint == "and" and before[-1:] != ["between"]):
        return None
    if joint == ":" and not (words.touches(end) and words.touches(end + 1)):
        return None
    number = read_number(words, end + 1 + (words.at(end + 1) in CURRENCIES))
    if number is None or number.last is not None or number.form != "cardinal":
        return None
    scale = SCALES.get(words.at(number.end - 1), 1) if words.is_digits(end - 1) else 1
    units, behind = read_unit(words, number.end)
    last = number.value
    if words.at(end - 1).isdecimal() and 1000 <= int(words.at(end - 1)[:5]) < 10000:
        first = int(words.at(end - 1))  # a year: 1914-18
        if isinstance(last, Fraction) and len(words.at(end + 1)) == 2 and first % 100 < last:
            last += first - first % 100
    num_before = int(before[-1:] in (["between"], ["from"]))
    return _Pair(last, behind, num_before, units, scale)


def _bounded(
    words: Words, quantity: Quantity, end: int, before: list[str], taken: int = 0
) -> tuple[Quantity, int, int]:
    """Add the era and the bound that stand around a quantity."""
    start = len(before)
    era = _ERAS.get(words.at(end), "")
    end += bool(era)
    if not era and before[-1:] and before[-1] in _ERAS:
        era, start = _ERAS[before[-1]], start - 1
    bound, start = _bound_before(quantity._replace(era=era), before[:start])
    for length in (3, 2, 1):
        phrase = tuple(words.words[end : end + length])
        if phrase in _AFTER:
            bound, end = bound.strip("~") or _AFTER[phrase], end + length
            break
    return quantity._replace(bound=bound, era=era), end, taken + len(before) - start


def _bound_before(quantity: Quantity, before: list[str]) -> tuple[str, int]:
    """Return the bound that the words before a quantity set, and where they begin."""
    bound, start = "", len(before)
    begin = start
    while start > max(0, len(before) - _MAX_BETWEEN):
        phrases = [tuple(before[max(0, start - n) : start]) for n in (3, 2, 1)]
        phrase = next((p for p in phrases if p in _BEFORE), None)
        if phrase in _UNTIL and not _NOT.isdisjoint(before[:start]):
            return "", start - 1  # it did not open until 1923
        if phrase and (phrase not in _POINTS or _is_point(quantity)):
            start = begin = start - len(phrase)
            if phrase == ("not", "until"):
                break
            bound = _BEFORE[phrase] or bound
            if bound in ("<", ">"):
                break
        elif before[start - 1] in _BETWEEN:
            start -= 1
        else:
            break
    return bound, begin


def _is_point(quantity: Quantity) -> bool:
    """Return whether a quantity is a point in time, such as a year."""
    if quantity.era or quantity.form in ("day", "time", "decade"):
        return True
    if quantity.units:
        return quantity.form == "ordinal" and quantity.units[0].dimension == "time"
    value = quantity.value
    return isinstance(value, Fraction) and value.denominator == 1 and 100 <= value <= 2100
