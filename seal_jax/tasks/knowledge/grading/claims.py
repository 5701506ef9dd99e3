"""What an answer claims of the gold: that it is so, that it is not, or that something near it is.

    misnames(key, 'her brother or Ada')  ->  'alternatives'

The gold is in the answer, but each time it is denied ('not X', 'rather than X'), it is one of
several ('X or Y'), it is part of another name ('New X', 'X Jr.'), or somebody is named by it ('X's
brother'). And whether an answer says yes or no. All is decided by the words next to the gold's.
"""

import functools
import re
from typing import NamedTuple

from seal_jax.tasks.knowledge.grading.features import ALIKE, Key, capitalized
from seal_jax.tasks.knowledge.grading.numerals import split
from seal_jax.tasks.knowledge.grading.words import (
    COMPOUNDS,
    COUNTRIES,
    HEDGES,
    IDENTITY_AFTER,
    IDENTITY_BEFORE,
    NEGATIONS,
    REGIONS,
    RELATIONS,
    ROLES_BEFORE,
    STOP,
    fold,
    is_number,
    is_same_name,
    read,
    similarity,
    stem,
)

_SURE = re.compile(r"\b(?:no|without (?:a |any )?)(?: ?doubt| ?question)\b", re.IGNORECASE)
_NO_NEGATION = re.compile(  # they say no 'no'
    r"\b(?:no wonder|not (?:only|just|merely|simply|solely)|(?:none|no) other than"
    r"|no ?(?:one|body) but|nothing (?:but|less than|other than)|not (?=until\b))",
    re.IGNORECASE,
)
_SAYS_NO = re.compile(
    r"\b(?:(?:of course|certainly|absolutely|definitely|surely|probably|i think|clearly) not"
    r"|not (?:at all|really|true|so|correct|right|the case)|by no means|in no way|no way"
    r"|on the contrary|under no circumstances)\b"
)
_NOT = re.compile(
    r"(?<=\w)n't\b|(?<=\bca)nnot\b"
    r"|(?:(?<=\bis)|(?<=\bwas)|(?<=\bare)|(?<=\bwere)|(?<=\bdo)|(?<=\bdoes)|(?<=\bdid))nt\b",
    re.IGNORECASE,
)
_DENIALS = frozenset("not never except neither nor unlike without excluding cannot no".split())
_DENYING_PAIRS = {
    ("rather", "than"),
    ("instead", "of"),
    ("opposed", "to"),
    ("other", "than"),
    ("far", "from"),
    ("place", "of"),
}
_DENYING_PAIRS |= {
    (w, "but")
    for w in "anyone anything anybody anywhere all everyone everything everywhere".split()
}
_HEDGING_PAIRS = {("may", "be"), ("some", "say"), ("others", "say")}
_WRONG = frozenset("wrong false incorrect untrue not never".split())
_REFUSES = frozenset("refused refuses failed fails declined declines lost loses".split())
_ASKS_DENIAL = _DENIALS | frozenset("forbidden prohibited avoid prevent refuse fail stop".split())
_NOT_NEAR = frozenset("but and or until till before".split())
_TO_BE = frozenset("is was are were".split())
_CLOSING = frozenset(") \" ' “ ” * _".split())
_OPENING = frozenset("( the a an either in of on at to by maybe perhaps possibly".split())
_ENDS_ITEM = STOP | frozenset("such including".split())
_JOINTS = frozenset("or / | vs versus alternatively".split())
_NO_CHOICE = frozenset("so more less fewer later earlier thereabouts greater higher older".split())
_ASKS_NAME = frozenset(
    "called call name names named term terms mean means known word words".split()
)
_RANKS = frozenset("younger second third fourth fifth sixth seventh eighth".split())
_TRIGGERS = _DENIALS | _WRONG | HEDGES | RELATIONS | ROLES_BEFORE | IDENTITY_BEFORE
_TRIGGERS |= _REFUSES | COMPOUNDS | {"than", "may", "some"}
_TRIGGERS |= IDENTITY_AFTER | _JOINTS | {pair[0] for pair in _DENYING_PAIRS} | {"city", "younger"}
_TRIGGER = re.compile(
    rf"[/|?&]|['’]s\b|n't|n’t|\b(?:{'|'.join(sorted(filter(str.isalpha, _TRIGGERS)))})",
    re.IGNORECASE,
)
_NUMERAL = frozenset(("th", *map(str, range(1, 40))))  # of Louis XIV
_ROMAN = re.compile(r"\b[IVX]+\b")
_MAX_ITEM = 4  # words of an alternative
_MAX_CHOICE = 16  # words and signs of an answer that chooses; a longer one tells a story
_FALSE_THAT = re.compile(
    r"^\W*(?:it is|it's|that is)? ?(?:false|untrue|wrong|incorrect|not (?:true|the case)) that\b"
    r"|^\W*(?:nobody|no one|no-one) (?:would|will|can|could) (?:say|claim|think)\b",
    re.IGNORECASE,
)
_NO_IDEA = re.compile(
    r"\bno (?:idea|clue|comment|answer|opinion)\b|\b(?:not |un)sure\b", re.IGNORECASE
)
_YES = frozenset(
    "yes yeah yep yup aye true correct indeed affirmative certainly definitely absolutely sure"
    " surely right undoubtedly course ok okay".split()
)
_NO = frozenset(
    "no nope nah nay false incorrect negative never untrue wrong hardly"
    " scarcely barely unlikely".split()
)
_FRAME = frozenset(
    "well oh the answer is it it's that this statement claim would be say s i think believe was"
    " are were does do did can could has have had will should may might so he she they we"
    " there am".split()
)
_AUXILIARIES = frozenset(
    "is are was were does do did can could has have had will would should may might".split()
)


@functools.lru_cache(maxsize=64)
def plain(text: str) -> str:
    """Return `text` without the negations that deny nothing: no doubt, not only, not until."""
    may_deny = "no" in (lower := text.lower()) or "without" in lower
    return _NO_NEGATION.sub(" ", _SURE.sub("certainly", text)) if may_deny else text


@functools.lru_cache(maxsize=1024)
def _tokens(text: str) -> tuple[str, ...]:
    """Return folded words and signs, 'isn't' as 'is not'."""
    text = _NOT.sub(" not", plain(text).replace("’", "'"))
    return tuple(split(text).words)


@functools.lru_cache(maxsize=4096)
def _may_lack(gold: str) -> bool:
    return not (IDENTITY_BEFORE | RELATIONS).isdisjoint(_tokens(gold))


class _Answer(NamedTuple):
    """An answer, and what the question and the gold have of it."""

    tokens: tuple[str, ...]
    stems: tuple[str, ...]
    raw: str
    asked: frozenset[str]  # tokens of the question
    golds: frozenset[str]  # tokens of the gold

    def at(self, i: int) -> str:
        return self.tokens[i] if 0 <= i < len(self.tokens) else ""

    def is_new(self, token: str) -> bool:
        return token not in self.asked and token not in self.golds

    def is_name(self, token: str) -> bool:
        """Return whether a word is written as part of a name: New York, new york."""
        return token.capitalize() in self.raw or self.raw.islower()


def misnames(key: Key, question: str, gold: str, raw: str) -> str | None:
    """Return why each mention of the gold in an answer is of something else.

    Returns:
      'denial', 'alternatives', 'name' or 'relation', or None, also where there is no mention.
    """
    if _names_another(key, raw):
        return "name"
    if not key.is_yes_no and _FALSE_THAT.search(raw):
        return "denial"
    if not any(s in key.targets for s in read(raw).stems):
        return None
    if not (_TRIGGER.search(raw) or _ROMAN.search(raw) or _may_lack(gold)):
        return None
    tokens = _tokens(raw)
    stems = tuple(stem(token) if token[0].isalnum() else token for token in tokens)
    places = {i for i, s in enumerate(stems) if s in key.targets}
    if not places:
        return None
    text = _Answer(tokens, stems, raw, frozenset(_tokens(question)), frozenset(_tokens(gold)))
    if reason := _lacks(gold, text):
        return reason
    if "and" in text.golds and "or" not in text.golds:
        for left, middle, right in zip(stems, stems[1:], stems[2:], strict=False):
            if middle == "or" and {left, right} <= key.gold_stems:
                return "alternatives"  # X or Y for X and Y
    reasons = []
    for start in sorted(i for i in places if i - 1 not in places):
        end = start
        while (
            end + 1 in places
            or text.at(end + 1) in text.golds & _NUMERAL
            or (len(text.at(end)) == 1 and text.at(end + 1) == "." and end + 2 in places)
        ):
            end += 1  # George W. Bush
        reason = (
            ("denial" if _is_denied(key, text, start, end) else None)
            or ("name" if _is_other(key, text, start, end) else None)
            or ("relation" if _is_relative(text, start, end) else None)
            or ("alternatives" if _is_choice(key, text, start, end) else None)
        )
        if reason == "denial" and "and" in text.golds:
            return reason  # X without Y for X and Y
        reasons.append(reason)
    return reasons[0] if all(reasons) else None


def _names_another(key: Key, raw: str) -> bool:
    """Return whether the gold is one name, and the answer has one that only begins alike."""
    if len(key.names) != 1 or len(key.content) != 1:
        return False
    name = key.names[0]
    if name in (stems := set(read(raw).stems)):
        return False
    near = [s for s in stems if s[0] == name[0] and similarity(name, s) >= ALIKE]
    return (
        bool(near)
        and not any(is_same_name(name, s) for s in near)
        and (raw.islower() or not set(near).isdisjoint(capitalized(raw)))
    )


def _lacks(gold: str, text: _Answer) -> str | None:
    """Return what an answer leaves out of the gold: North of Korea, brother of X's brother."""
    golds = _tokens(gold)
    for word, following in zip(golds, golds[1:], strict=False):
        if word in IDENTITY_BEFORE and following in text.tokens and word not in text.asked:
            is_name = f"{word.capitalize()} {following.capitalize()}" in gold
            if is_name and word not in text.tokens and word[0] not in text.tokens:
                return "name"
    owned = golds[-1] in RELATIONS and golds[-3:-1] == ("'", "s")
    of = RELATIONS.intersection(golds[:2]) and "of" in golds[:3]
    if (owned or of) and RELATIONS.isdisjoint(text.tokens):
        return None if RELATIONS.intersection(text.asked) else "relation"
    return None


def _is_denied(key: Key, text: _Answer, start: int, end: int) -> bool:
    """Return whether the gold is denied: not X, rather than X, X is not."""
    if (
        key.is_negative
        or not _ASKS_DENIAL.isdisjoint(text.asked)
        or not _DENIALS.isdisjoint(text.golds)
    ):
        return False
    for i in range(start - 1, max(-1, start - 6), -1):
        token = text.at(i)
        pair = (text.at(i - 1), token)
        if pair in _DENYING_PAIRS or token == "except":
            is_all_but = pair[0] == "other" or token in ("but", "except")  # not any other than X
            earlier = text.tokens[max(0, i - _MAX_CHOICE) : i - 1]
            return not is_all_but or NEGATIONS.isdisjoint(earlier)
        is_than = token == "than" and i == start - 1 and text.is_new(token)
        if token in _DENIALS or (is_than and not is_number(text.at(start))):
            return True
        is_near = i == start - 1 and token.isalnum() and token not in _NOT_NEAR
        is_known = token in STOP or text.stems[i] in key.gold_stems | key.question_stems
        is_joint = token in ("but", "and", "or") and token not in text.golds
        if not is_near and (not is_known or is_joint):
            break
    n = end + 1
    while text.at(n) in _CLOSING:
        n += 1
    after = text.tokens[n : n + 3]
    if after[:2] == ("?", "no") or after == ("not",) or after == ("not", "."):
        return True
    if after[1:2] == ("to",) and after[0] in _REFUSES and text.is_new(after[0]):
        return True
    is_not = len(after) > 1 and after[0] in _TO_BE and after[1] in _WRONG
    is_not |= len(after) > 1 and after[0] in _AUXILIARIES and after[1] in ("not", "never")
    return is_not and "until" not in text.tokens[n + 2 : n + 6]


def _is_other(key: Key, text: _Answer, start: int, end: int) -> bool:
    """Return whether the gold is part of another's name or title: New X, vice X, X Jr., X II."""
    before = text.at(start - 1 - (text.at(start - 1) in ("-", ".")))
    if before in ROLES_BEFORE and text.is_new(before):
        return True
    if text.at(end + 1) in COMPOUNDS and text.is_new(text.at(end + 1)):
        return True  # sodium chloride is no sodium
    if not key.names:
        return False
    is_region = text.stems[end] in REGIONS  # East Africa is in Africa
    if not is_region and before in IDENTITY_BEFORE and text.is_new(before) and text.is_name(before):
        return True
    n = end + 1 + (text.at(end + 1) in ("-", ","))
    after = text.at(n)
    if after in IDENTITY_AFTER and text.is_new(after):
        return True
    if after == "city" and text.stems[end] in COUNTRIES and text.is_new(after):
        return text.is_name(after)
    if after == "the" and text.at(n + 1) in _RANKS and n == end + 1:
        return text.is_new(text.at(n + 1))
    is_numbered = bool(after) and is_number(after) and len(after) < 3 and n == end + 1
    return is_numbered and text.is_new(after) and _ROMAN.search(text.raw) is not None


def _is_relative(text: _Answer, start: int, end: int) -> bool:
    """Return whether somebody is named by the gold: X's brother, the wife of X."""
    if not RELATIONS.isdisjoint(text.golds) or not RELATIONS.isdisjoint(text.asked):
        return False
    if "whose" in text.asked:
        return False
    after = text.tokens[end + 1 : end + 6]
    if after[:1] == ("'",):
        owned = after[1 + (after[1:2] == ("s",)) :][:2]
        if not RELATIONS.isdisjoint(owned):
            return True
        rest = [token for token in after[1:] if token not in ("s", ".")]
        if rest and len(rest) < 3 and "who" in text.asked and all(map(text.is_new, rest)):
            return len(text.tokens) <= end + 6  # X's team
    for i in range(start - 1, max(0, start - 4), -1):
        if text.at(i) in ("of", "to"):
            return text.at(i - 1) in RELATIONS
        if not text.at(i).isalpha():
            break
    return False


def _is_choice(key: Key, text: _Answer, start: int, end: int) -> bool:
    """Return whether the gold is one of several: X or Y, X/Y, perhaps X, perhaps Y."""
    if not (_JOINTS | {"and"}).isdisjoint(text.golds) or len(key.content) >= _MAX_ITEM:
        return False
    if len(text.tokens) > _MAX_CHOICE or (
        len(text.tokens) >= 2 * _MAX_ITEM and not _ASKS_NAME.isdisjoint(text.asked)
    ):
        return False
    pairs = zip(text.tokens, (*text.tokens[1:], ""), strict=True)
    if sum(pair[0] in HEDGES or pair[0] == "?" or pair in _HEDGING_PAIRS for pair in pairs) > 1:
        return True
    return _joins(key, text, end, 1) or _joins(key, text, start, -1)


def _joins(key: Key, text: _Answer, place: int, step: int) -> bool:
    """Return whether 'or' joins the words at a place to an item that is not the gold.

    It stands right beside the gold, or behind a comma and short items: X, Y or Z.
    """
    i, num_words, is_list = place + step, 0, False
    while 0 <= i < len(text.tokens) and num_words <= _MAX_ITEM:
        token = text.at(i)
        if token in _JOINTS:
            others = text.stems[i + 1 :] if step > 0 else text.stems[:i][::-1]
            words = [s for s in others[: _MAX_ITEM + 1] if s[0].isalnum() and s not in STOP]
            is_none = text.at(i + 1) in _NO_CHOICE or (is_list and token == "/")
            return bool(words) and not is_none and not set(key.content).issubset(words)
        if token == ",":
            is_list, num_words = True, 0
        elif token in _OPENING or token in _CLOSING or (token == "and" and text.at(i + 1) == "/"):
            pass
        elif not is_list or not token[0].isalnum() or token in _ENDS_ITEM:
            return False
        else:
            num_words += 1
        i += step
    return False


def says_yes(key: Key, answer: str) -> bool | None:
    """Return the polarity of an answer to a yes-no question, or None where it has none."""
    tokens = _tokens(_SAYS_NO.sub(" no ", fold(plain(answer))))
    words = [token for token in tokens if token.isalpha()]
    if not words or {"yes", "no"} <= set(words) or _NO_IDEA.search(answer):
        return None
    polar = [word for word in words if word not in _FRAME and word not in STOP - {"no", "not"}]
    if words[0] in _YES or words[0] in _NO:
        return words[0] in _YES
    is_negative = "not" in words
    if all(word in _YES or word in _NO or word == "not" for word in polar):
        if set(polar) - {"not"}:  # it is not true
            return (polar[-1] in _YES) != is_negative
        is_short = not _AUXILIARIES.isdisjoint(words) and len(words) < 5  # it is not
        return not is_negative if is_short or {"think", "so"} <= set(words) else None
    stems = frozenset(map(stem, words))
    if 2 * len(key.question_content & stems) < len(key.question_content):
        return None
    if not _WRONG.isdisjoint(words[:5]) and "that" in words[:6]:  # it is false that it is not
        is_negative = "not" in words[words.index("that") :]
        return is_negative != ("not" in words[: words.index("that")])
    return None if {"or", "not"} <= set(words) else NEGATIONS.isdisjoint(words)
