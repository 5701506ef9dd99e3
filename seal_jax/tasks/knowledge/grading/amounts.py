"""Whether a prediction states the gold answer's quantity: value, sign, unit, bound, era and range.

    compare_amounts(question, '5.6 %', '56 %')  ->  Verdict('number', is_bare=True)

A bare answer, which is a quantity and hardly more than the question's words, is decided by its
verdict. In any other the quantity stands among other facts: the fitted table decides.
"""

import functools
from fractions import Fraction
from typing import NamedTuple

from seal_jax.tasks.knowledge.grading.features import capitalized
from seal_jax.tasks.knowledge.grading.numerals import split
from seal_jax.tasks.knowledge.grading.quantities import (
    BOUND_WORDS,
    MONTHS,
    UNITS,
    Quantities,
    Quantity,
    Unit,
    read_quantities,
    read_unit,
)
from seal_jax.tasks.knowledge.grading.words import LIGHT, NEGATIONS, STOP, stem

SAME, OPEN = "same", "open"  # the other verdicts say what differs
_FRAME = (
    STOP
    | LIGHT
    | BOUND_WORDS
    | frozenset(
        "answer total exactly precisely number year years yes equal sometime latest"
        " earliest".split()
    )
)
_CHOICE = frozenset("or and either perhaps maybe possibly , ; / ?".split())
_ASKS_BOUND = frozenset(
    "least most minimum maximum up limit before after since until till exceed over under more less"
    " fewer above below by start starting started begin beginning began about approximately"
    " roughly".split()
)
_ASKS_SHARE = frozenset("percent percentage share proportion fraction rate portion part".split())
_MONTH_STEMS = frozenset(map(stem, MONTHS))
_MAX_BARE = 400  # characters; a longer answer is never bare
_OUTSIDE = frozenset("before after prior following".split())
_MAX_SHORT = 10  # words around the quantities of a short sentence
_CENTURY = 3155760000
_NEAR = Fraction(1, 8)  # of a gold that says about how many; the table decides
_ROUNDED = Fraction(1, 64)  # 33 % for a third


class Verdict(NamedTuple):
    """Whether a quantity is the gold's."""

    says: str  # 'same', 'open' where no rule decides, or what differs
    is_bare: bool  # the answer is a quantity and hardly more


class _Asked(NamedTuple):
    """What a question and its gold answer expect of a quantity."""

    gold: Quantities
    question: Quantities
    words: frozenset[str]  # of the question
    stems: frozenset[str]  # of the question and the gold
    units: tuple[Unit, ...]  # that the question names
    counts: bool  # how many
    is_alone: bool  # the gold is a quantity, and of what
    rest: frozenset[str]  # stems of the gold beside the quantity
    is_bare: bool  # the gold is a number and nothing else
    is_outside: bool  # the gold is before or after a time


@functools.lru_cache(maxsize=4096)
def _read_asked(question: str, gold: str) -> _Asked:
    quantities, asked = read_quantities(gold), read_quantities(question)
    given = frozenset(map(stem, asked.others))
    rest = [w for w in quantities.others if w.isalpha() and w not in _FRAME]
    new = [w for w in rest if stem(w) not in given]
    begins = quantities.places[:1] == (0,) and len(new) <= 2 and "and" not in quantities.others
    first = quantities.found[0] if quantities.found else None
    if first and all(_is_converted(first, other) for other in quantities.found[1:]):
        quantities = quantities._replace(found=(first,))  # 120 km (75 mi)
    return _Asked(
        gold=quantities,
        question=asked,
        words=frozenset(asked.others),
        stems=given.union(map(stem, rest)),
        units=_asked_units(question),
        counts={"how", "many"}.issubset(asked.others),
        is_alone=not new or (begins and not capitalized(gold)),
        rest=frozenset(map(stem, rest)),
        is_bare=not rest,
        is_outside=not _OUTSIDE.isdisjoint(gold.lower().split()[:3])
        and _OUTSIDE.isdisjoint(asked.others),
    )


def _is_converted(first: Quantity, other: Quantity) -> bool:
    """Return whether two quantities are one in two units."""
    pairs = [(a, b) for a in first.units for b in other.units if a.dimension == b.dimension]
    if not pairs or not isinstance(first.value, Fraction) or not isinstance(other.value, Fraction):
        return False
    a, b = pairs[0]
    value = (other.value * b.factor + b.offset - a.offset) / a.factor
    return a != b and first.last == other.last and _equal(first.value, value, False)


def _asked_units(question: str) -> tuple[Unit, ...]:
    """Return the unit of 'how many square miles', 'how long in miles' or 'what percentage'."""
    words = split(question)
    if "how old" in question.lower():
        return UNITS["years"]
    for i, word in enumerate(words.words):
        units, end = read_unit(words, i)
        after_many = "many" in words.words[max(0, i - 2) : i]
        if units and (after_many or word.startswith("percent")):
            return units
        if units and words.at(i - 1) == "in" and len(words.at(end - 1)) > 3:
            return units
    return ()


def compare_amounts(question: str, gold: str, answer: str) -> Verdict | None:
    """Compare an answer with a gold that holds a quantity.

    Returns:
      None where one of them has no quantity, or the answer is too long to be bare.
    """
    if len(answer) > _MAX_BARE or not read_quantities(gold).found:
        return None
    asked = _read_asked(question, gold)
    given = read_quantities(answer)
    if not given.found:
        return None
    frame = _FRAME | MONTHS.keys() if given.months else _FRAME
    is_bare = all(stem(w) in asked.stems for w in given.others if w.isalpha() and w not in frame)
    if asked.gold.months and given.months and not asked.gold.months & given.months:
        return Verdict("number", is_bare)
    if len(asked.gold.found) > 1:
        return Verdict(_compare_many(asked, given, is_bare), is_bare)
    gold_quantity = asked.gold.found[0]
    verdicts = [_compare(asked, gold_quantity, quantity) for quantity in given.found]
    if "percent" in {unit.dimension for unit in gold_quantity.units}:
        verdicts = ["unit" if _counts_noun(asked, given, i) else v for i, v in enumerate(verdicts)]
    if SAME in verdicts:
        return Verdict(_among_others(asked, given, verdicts), is_bare)
    new = [
        says
        for says, quantity in zip(verdicts, given.found, strict=True)
        if quantity not in asked.question.found and (quantity.form != "ordinal" or is_bare)
    ]
    if OPEN in verdicts or not new:
        return Verdict(OPEN, is_bare)
    is_short = new[0] != "range" and asked.is_alone and len(given.others) <= _MAX_SHORT
    return Verdict(new[0], is_bare or is_short)


def _counts_noun(asked: _Asked, given: Quantities, i: int) -> bool:
    """Return whether a quantity counts what the question names: 45 students, 12 of them."""
    if given.found[i].units or given.found[i].form != "cardinal":
        return False
    after = given.others[given.places[i] : given.places[i] + 2]
    return after == ("of", "them") or (
        len(after) > 0 and after[0] in asked.words and after[0][-1] == "s"
    )


def _among_others(asked: _Asked, given: Quantities, verdicts: list[str]) -> str:
    """Return the verdict on an answer that has the gold's quantity, perhaps beside others."""
    place = verdicts.index(SAME)
    if not NEGATIONS.isdisjoint(given.others):
        return OPEN
    for i, says in enumerate(verdicts):
        if says in (SAME, OPEN) or abs(i - place) != 1 or given.found[i] in asked.question.found:
            continue
        i = max(i, place)
        between = given.others[given.places[i - 1] : given.places[i]]
        if _CHOICE.issuperset(between) and "or" not in asked.gold.others:
            a, b = given.found[i - 1 : i + 1]
            is_kind = a.form == b.form and {u.dimension for u in a.units} == {
                u.dimension for u in b.units
            }
            if "day" not in (a.form, b.form) and (is_kind or "or" in between):
                return "number"  # 12 or 13
    new = [
        says
        for says, quantity in zip(verdicts, given.found, strict=True)
        if quantity not in asked.question.found and quantity.form != "day"
    ]
    has_rest = asked.rest.issubset(map(stem, given.others))
    return (
        SAME
        if (asked.is_alone or has_rest) and set(new) <= {SAME} and "or" not in given.others
        else OPEN
    )


def _compare_many(asked: _Asked, given: Quantities, is_bare: bool) -> str:
    """Compare an answer with a gold of several quantities, such as a date."""
    missing, wrong = set(asked.gold.found), []
    for quantity in given.found:
        verdicts = [_compare(asked, one, quantity) for one in asked.gold.found]
        if SAME in verdicts:
            missing.discard(asked.gold.found[verdicts.index(SAME)])
        elif OPEN not in verdicts and quantity.last is None:
            wrong.append((quantity.form, verdicts[0]))
    forms = {quantity.form for quantity in missing}
    wrong = [says for form, says in wrong if form in forms and (is_bare or form == "day")]
    if wrong:
        return wrong[0]
    if (
        is_bare
        and "day" in forms
        and "or" not in asked.gold.others
        and asked.words.isdisjoint(("month", "year"))
    ):
        return "number"  # March 1991 for 3 March 1991
    is_date = asked.rest <= _MONTH_STEMS and given.months == asked.gold.months
    return OPEN if missing or not is_date or "or" in given.others else SAME


def _compare(asked: _Asked, gold: Quantity, given: Quantity) -> str:
    value = _compare_values(asked, gold, given)
    if value != SAME:
        return value
    if (gold.era == "bc") != (given.era == "bc") and asked.words.isdisjoint(("bc", "bce")):
        return "era"
    bounds = gold.bound.strip("~"), given.bound.strip("~")
    if bounds[0] == bounds[1]:
        return SAME
    if all(bounds):
        return "bound"
    if bounds[0] and asked.is_outside:
        return "bound"  # 1900 for before 1900
    return "bound" if bounds[1] and _ASKS_BOUND.isdisjoint(asked.words) else OPEN


def _compare_values(asked: _Asked, gold: Quantity, given: Quantity) -> str:
    ends = (gold.value, gold.last), (given.value, given.last)
    if (gold.last is None) != (given.last is None):
        one, both = (gold.value, ends[1]) if gold.last is None else (given.value, ends[0])
        return "range" if one in both else "number"
    if any(isinstance(end, str) for pair in ends for end in pair):
        return SAME if ends[0] == ends[1] else "number"
    is_century = _is_century(gold) and (gold.form == "ordinal" or not given.units)
    if "decade" in (gold.form, given.form) or is_century:
        return _compare_times(gold, given)
    if "ordinal" in (gold.form, given.form) and gold.form != given.form:
        if asked.counts:
            return "number"  # how many are not the twelfth
        if not asked.is_alone:
            return OPEN
        if gold.form == "ordinal" and not gold.units and not given.units and asked.is_bare:
            return "number"  # three for third
    if _counts_other(asked, gold, given):
        return "unit"
    golds = [end for end in ends[0] if isinstance(end, Fraction)]
    pairs = [_in_unit(asked, gold, given, end) for end in ends[1] if isinstance(end, Fraction)]
    if "time" in (gold.form, given.form) and not (gold.units and given.units):
        pairs = [(golds[0] if (a - golds[0]) % 720 == 0 else a, exact) for a, exact in pairs]
    if all(_equal(a, *pair) for a, pair in zip(golds, pairs, strict=True)):
        return SAME
    value = pairs[0][0]
    if gold.bound == (">" if value > golds[0] else "<") and given.bound in ("", "~", gold.bound):
        return OPEN  # 620 for 'over 500'
    is_vague = gold.bound == "~" or gold.form == "fraction"
    is_near = abs(value - golds[0]) <= abs(golds[0]) * _NEAR
    return OPEN if is_vague and is_near else "number"


def _is_century(quantity: Quantity) -> bool:
    return bool(quantity.units) and quantity.units[0].factor >= _CENTURY


def _compare_times(gold: Quantity, given: Quantity) -> str:
    """Compare two of which one is a decade, or the gold a century."""
    a, b = gold.value, given.value
    if isinstance(a, str) or isinstance(b, str):
        return "number"
    if _is_century(gold) and gold.form == "ordinal":
        if given.form == "ordinal":
            return SAME if a == b else "number"
        if given.form == "decade" and b % 100 == 0:
            return SAME if b == 100 * (a - 1) else "number"  # the 1800s are the 19th century
        return OPEN if 0 <= b - 100 * (a - 1) <= 100 else "number"
    if _is_century(gold):
        return OPEN
    if given.form == "ordinal" and _is_century(given):
        return SAME if a == 100 * (b - 1) else "number"
    if gold.form == "decade" and given.form == "cardinal" and a == b and not given.units:
        return "number"  # 1990 for the 1990s
    if gold.form == given.form:
        is_short = min(a, b) < 100  # the 90s
        return SAME if a == b or (is_short and (a - b) % 100 == 0) else "number"
    return OPEN if gold.form == "decade" and a <= b < a + 10 else "number"


def _counts_other(asked: _Asked, gold: Quantity, given: Quantity) -> bool:
    """Return whether the two count other things: miles and pounds, or shares and people."""
    dimensions = {unit.dimension for unit in given.units}
    expected = {unit.dimension for unit in gold.units or asked.units}
    is_share = "percent" in dimensions and gold.form == "fraction"
    if not dimensions or dimensions & expected or is_share:
        return False
    if expected:
        return not (given.form == "fraction" and "percent" in expected)
    if "percent" in dimensions:
        return _ASKS_SHARE.isdisjoint(asked.words)
    return asked.counts and "times" not in asked.words


def _in_unit(
    asked: _Asked, gold: Quantity, given: Quantity, value: Fraction
) -> tuple[Fraction, bool]:
    """Return a value in the gold's unit, and whether it is so exactly."""
    expected = gold.units or asked.units
    is_percent = [bool(us) and us[0].dimension == "percent" for us in (expected, given.units)]
    if is_percent[1] and gold.form == "fraction" and not gold.units:
        return value / 100, False
    is_share = given.form == "fraction" or 0 < value < 1
    if is_percent[0] and is_share and not given.units and asked.gold.found[0].value != value:
        return value * 100, False
    pairs = [(a, b) for a in expected for b in given.units if a.dimension == b.dimension]
    if not pairs or any(a == b for a, b in pairs):
        return (abs(value) if {"below", "zero"} <= asked.words else value), True
    unit, other = pairs[0]
    return (value * other.factor + other.offset - unit.offset) / unit.factor, False


def _equal(gold: Fraction, value: Fraction, is_exact: bool) -> bool:
    return gold == value if is_exact else abs(gold - value) <= abs(gold) * _ROUNDED
