"""Numbers in a text: digits with separators, spelled numbers, fractions, scales.

    read_number(split('1.4 million'), 0)  ->  Number(1400000, 'cardinal', end=2)

A number is read as an English text means it: 1,200 is over a thousand and 1.200 is not; 1,5 can
only be a decimal comma. Values are exact.
"""

import functools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from seal_jax.tasks.knowledge.grading.words import ONES, SCALES, TENS

_SIZES = ONES | TENS | {"thirtieth": 30, "fortieth": 40, "fiftieth": 50, "hundredth": 100}
_ORDINALS = frozenset(w for w in _SIZES if w.endswith(("th", "first", "second", "third")))
_DENOMINATORS = {f"{w}{s}": n for w, n in _SIZES.items() if w in _ORDINALS for s in ("", "s")}
_DENOMINATORS |= {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
del _DENOMINATORS["second"], _DENOMINATORS["seconds"], _DENOMINATORS["first"]
_SCALES = SCALES | {f"{w}s": n for w, n in SCALES.items()} | {"dozen": 12, "crore": 10**7}
_SCALES |= {"mn": 10**6, "mio": 10**6, "M": 10**6, "bn": 10**9, "tn": 10**12, "lakh": 10**5}
_FIRST = frozenset(_SIZES) | frozenset(SCALES) | {"half", "quarter", "dozen", "a", "an"}
_DECADES = {f"{w.removesuffix('y')}ies": n for w, n in TENS.items()}  # the sixties
_GLUED_SCALES = {"k": 10**3, "b": 10**9}
_MAX_EXPONENT = 40
CURRENCIES = frozenset("$€£¥₹₽")

_TOKEN = re.compile(
    r"\d{4}-\d\d-\d\d(?!\d)|\d{1,2}/\d{1,2}/\d{4}(?!\d)|\d{1,2}:\d\d(?!\d)"
    r"|\d{1,3}(?: \d{3})+(?![\d.,]?\d)|\d+(?:[.,']\d+)*|(?<![\w.])\.\d+|[^\W\d_]+|\S"
)
_POWERS = str.maketrans({c: f"^{n}" for n, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-"))
_MINUS = re.compile(r"(?<![\w)])−\s?(?=[\d.])")
_VULGAR = re.compile(r"(?=[¼-¾⅐-⅞])")
_SHORT_FORMS = [  # what a text with the sign or word holds, and how it is read
    (sign, re.compile(pattern, re.IGNORECASE), word)
    for sign, pattern, word in (
        (".", r"\bb\.\s?c\.(?:\s?e\b\.?)?", " bc "),
        (".", r"\ba\.\s?d\.|\bc\.\s?e\.", " ad "),
        (".", r"\b([ap])\.\s?m\b\.?", r" \1m "),
        (".", r"\b(?:ca?|approx)\.\s?(?=\d)", "about "),
        ("before ", r"\bbefore (?:christ|the common era|our era)\b", " bc "),
        ("anno ", r"\banno domini\b", " ad "),
        ("per cent", r"\bper cent\b", "percent"),
        ("pct", r"\bpct\b", "percent"),
        ("sq", r"\bsq\b\.?", "square"),
        ("$", r"\bus ?\$|\bu\.s\. ?\$", "$"),
    )
]
_ROMAN = re.compile(
    r"\b(?:X{1,3}(?:IX|IV|VI{0,3}|I{1,3})|X{2,3}|IX|IV|VI{1,3}|I{2,3})\b"
    r"|(?<=[a-z] )(?:[VX]\b|I(?=[,.;)]|'s\b|\s*$))|(?<=War )I\b"
)
_ROMAN_DIGITS = {"I": 1, "V": 5, "X": 10}


class Words(NamedTuple):
    """A text's words, numbers and signs, in lower case but for 'M', and which touch the last."""

    words: list[str]
    glued: list[bool]

    def at(self, i: int) -> str:
        return self.words[i] if 0 <= i < len(self.words) else ""

    def touches(self, i: int) -> bool:
        return 0 <= i < len(self.words) and self.glued[i]

    def is_digits(self, i: int) -> bool:
        return self.at(i)[-1:].isdecimal()


class Number(NamedTuple):
    """A number, and the word behind it."""

    value: Fraction | str  # a text where separators make no number: '1.2.3'
    form: str  # 'cardinal', 'ordinal', 'fraction' or 'decade'
    end: int
    last: Fraction | None = None  # 1924 in 1923/24


@functools.lru_cache(maxsize=1024)
def split(text: str) -> Words:
    """Return the words, numbers and signs of `text`."""
    if not text.isascii():
        text = _MINUS.sub(" minus ", text).translate(_POWERS).translate(_DASHES)
        text = unicodedata.normalize("NFKD", _VULGAR.sub(" ", text)).replace("\u2044", "/")
        text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf"))
        text = text.replace("’", "'").replace("‘", "'")
    text = _ROMAN.sub(_ordinal, text)
    lower = text.lower()
    for sign, pattern, word in _SHORT_FORMS:
        if sign in lower:
            text = pattern.sub(word, text)
    words, glued, end = [], [], -1
    for found in _TOKEN.finditer(text):
        word = found.group()
        words.append(word if word == "M" else word.lower())
        glued.append(found.start() == end)
        end = found.end()
    return Words(words, glued)


def _ordinal(found: re.Match[str]) -> str:
    """Return the number of Henry VIII or World War II, with the ending of an ordinal."""
    digits = [_ROMAN_DIGITS[c] for c in found.group()]
    pairs = zip(digits, [*digits[1:], 0], strict=True)
    number = sum(-one if one < following else one for one, following in pairs)
    return f"{number}th" if found.start() else str(number)


def read_number(text: Words, i: int) -> Number | None:
    """Read the number that begins at word `i`, with what is added to it and what multiplies it."""
    if size := _DECADES.get(text.at(i)):
        return Number(Fraction(size), "decade", i + 1)
    if not text.is_digits(i) and text.at(i) not in _FIRST:
        return None
    number = _fraction(text, i)
    if number is None:
        number = _digits(text, i) if text.is_digits(i) else _spelled(text, i)
    if number is None or isinstance(number.value, str) or number.form in ("ordinal", "decade"):
        return number
    number = _with_fraction(text, number)
    while scale := _scale(text, i, number):
        size, end = scale
        value = number.value * size
        number = _with_fraction(text, number._replace(value=value, form="cardinal", end=end))
    return number


def _with_fraction(text: Words, number: Number) -> Number:
    """Add 'and a half' or the '1/2' of '2 1/2', times the scale that stands before it."""
    says_and = text.at(number.end) == "and"
    if number.form != "cardinal" or not (says_and or text.is_digits(number.end)):
        return number
    more = _fraction(text, number.end + says_and)
    if more is None or more.form != "fraction":
        return number
    whole, part = number.value, more.value
    if isinstance(whole, str) or isinstance(part, str) or part >= 1:
        return number
    size = _SCALES.get(text.at(number.end - 1), 1)
    return number._replace(value=whole + part * size, end=more.end)


def _scale(text: Words, start: int, number: Number) -> tuple[int, int] | None:
    """Return what multiplies a number, and the word behind it."""
    n = number.end
    if number.form == "fraction":  # half of a million, half a million
        n += text.at(n) == "of"
        n += text.at(n) in ("a", "an")
    n += text.at(n) == "-"
    if size := _SCALES.get(text.at(n)):
        return size, n + 1
    if text.touches(number.end):
        if size := _GLUED_SCALES.get(text.at(number.end)):
            return size, number.end + 1
        if text.at(number.end) == "m" and text.at(start - 1) in CURRENCIES:
            return 10**6, number.end + 1
    return None


def _small(word: str) -> int:
    """Return a whole number up to a hundred, else 0."""
    size = int(word) if word.isdecimal() and len(word) < 4 else 0
    size = size or ({} if word in _ORDINALS else _SIZES).get(word, 0)
    return size if size <= 100 else 0


def _fraction(text: Words, i: int) -> Number | None:
    """Read 'half', 'a third', 'two-thirds', '3/4', and 1923/24, which is two years."""
    word = text.at(i)
    n = i + 1 + (text.at(i + 1) == "out")
    if text.at(n) == "in" or (n > i + 1 and text.at(n) == "of"):  # one in five, 2 out of 3
        above, below = _small(text.at(i)), _small(text.at(n + 1))
        if 0 < above < below:
            return Number(Fraction(above, below), "fraction", n + 2)
    if text.is_digits(i):
        below = text.at(i + 2)
        if text.at(i + 1) != "/" or not (text.touches(i + 1) and text.touches(i + 2)):
            return None
        if not (word.isdecimal() and below.isdecimal() and int(below)):
            return None
        if int(word) >= 1000 and len(below) == 2:
            return Number(Fraction(int(word)), "cardinal", i + 3, Fraction(int(word[:-2] + below)))
        return Number(Fraction(int(word), int(below)), "fraction", i + 3)
    if word == "dozen":
        return Number(Fraction(12), "cardinal", i + 1)
    if word in ("half", "quarter"):
        return Number(Fraction(1, _DENOMINATORS[word]), "fraction", i + 1)
    above = 1 if word in ("a", "an") else _SIZES.get(word, 0)
    n = i + 1 + (text.at(i + 1) == "-")
    below = _DENOMINATORS.get(text.at(n))
    if below and 0 < above < 20 and word not in _ORDINALS:
        if above == 1 or text.at(n).endswith("s"):
            return Number(Fraction(above, below), "fraction", n + 1)
    return None


def _digits(text: Words, i: int) -> Number:
    """Read digits, and what is written close behind them: 3rd, 1920s, 1e6, 2 x 10^6."""
    value, end = _parse_digits(text.at(i)), i + 1
    if isinstance(value, str):
        return Number(value, "cardinal", end)
    after, power = text.at(end), ""
    if text.touches(end) and after in ("st", "nd", "rd", "th"):
        return Number(value, "ordinal", end + 1)
    if text.touches(end) and value % 10 == 0 and after == "s":
        return Number(value, "decade", end + 1)
    if text.touches(end) and after == "'" and text.at(end + 1) == "s" and value % 10 == 0:
        return Number(value, "decade", end + 2)
    if text.touches(end) and after == "e" and text.touches(end + 1):
        power, end = text.at(end + 1), end + 2
    elif text.touches(end) and after == "^" and value == 10 and text.is_digits(end + 1):  # 10^6
        power, value, end = text.at(end + 1), Fraction(1), end + 2
    elif after in ("×", "x", "*") and text.at(end + 1) == "10" and text.at(end + 2) == "^":
        power, end = text.at(end + 3), end + 4
    if power.isdecimal() and len(power) < 3 and int(power) <= _MAX_EXPONENT:
        return Number(value * 10 ** int(power), "cardinal", end)
    return Number(value, "cardinal", i + 1)


def _parse_digits(word: str) -> Fraction | str:
    """Return the value of digits with separators, or the text where they make no number."""
    word = word.replace(" ", "").replace("'", "")
    marks = [c for c in word if c in ",."]
    if not marks:
        return Fraction(int(word))
    groups = re.split("[,.]", word)
    tail = groups.pop() if marks[-1] != marks[0] else ""
    if marks[0] == "," or len(marks) > 1:  # a lone dot is a decimal point
        is_first = 0 < len(groups[0]) <= 3 and groups[0][0] != "0" and len(groups) > 1
        by_three = all(len(g) == 3 for g in groups[1:])
        by_two = all(len(g) == 2 for g in groups[1:-1]) and len(groups[-1]) == 3  # India's
        same = len(set(marks[: len(groups) - 1])) == 1
        if is_first and same and (by_three or (by_two and marks[0] == ",")):
            return Fraction("".join(groups) + (f".{tail}" if tail else ""))
    return word if len(marks) > 1 else Fraction("0" + word.replace(",", "."))


def _spelled(text: Words, i: int) -> Number | None:
    """Read 'two hundred and fifty', 'nineteen twenty-three' or 'twenty-third'."""
    total = current = 0
    n = i
    while n < len(text.words):
        joins = n > i and (text.at(n) == "-" or (text.at(n) == "and" and current % 100 == 0))
        word = text.at(n + joins)
        size, scale = _SIZES.get(word), SCALES.get(word)
        if scale == 100 and current < 100:
            current = (current or 1) * 100
        elif scale and scale != 100:
            total, current = total + (current or 1) * scale, 0
        elif size is None:
            break
        elif n == i or (size and current % 100 == 0):
            current += size
        elif 20 <= current % 100 and current % 10 == 0 and 0 < size < 10:
            current += size
        elif not total and 10 <= current < 100 and 10 <= size < 100:
            current = 100 * current + size  # a year
        else:
            break
        n += 1 + joins
        if word in _ORDINALS:
            return Number(Fraction(total + current), "ordinal", n)
    return Number(Fraction(total + current), "cardinal", n) if n > i else None
