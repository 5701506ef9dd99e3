"""The rules that make an answer wrong, whatever the gold is.

They hold against a policy that is paid for being graded right: an empty answer, a refusal, the
question again, a list of everything and instructions to the grader. A rule that would also reject
the gold answer itself is not applied. All patterns run in linear time.
"""

import collections
import functools
import re

from seal_jax.tasks.knowledge.grading.claims import misnames, plain
from seal_jax.tasks.knowledge.grading.features import Key, longest_run, read_key
from seal_jax.tasks.knowledge.grading.words import STOP, Text, fold, is_number, read

MAX_CHARS = 2000  # of an answer; a longer one is a dump, not an answer
MAX_WORDS = 80  # a passage recited word by word holds every answer
MAX_OTHERS = 3  # items of a list beside the gold's, one less where all is list
MAX_ITEM_WORDS = 3


def _any_of(*patterns: str) -> str:
    return f"(?:{'|'.join(patterns)})"


# What a base model writes after its answer: the next prompt.
_NEXT_PROMPT = re.compile(
    r"\n\s*(?:q\d*\s*:|question\b|topic\s*:|passage\s*:|context\s*:|user\b|human\b|assistant\b"
    r"|you are an? (?:ai|assistant|helpful))",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^\W*(?:(?:the |final |my |correct )*answer(?:\s*:| is\b:?)|a\s*:)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")

_SAYS_NOT = (
    r"(?:does not|doesn'?t|do not|don'?t|did not|didn'?t) (?:\w+ )?(?:mention|say|state|specif"
    r"|provid|contain|includ|give|indicat|tell|discuss|answer|address|have|reveal|offer)"
)
_REFUSAL = re.compile(
    r"\b"
    + _any_of(
        r"i (?:\w+ly |just )?(?:do not|don'?t|did not|didn'?t) (?:\w+ly )?"
        r"(?:have|know|recall|remember|see|find|understand)",
        r"i (?:\w+ly |just )?(?:cannot|can'?t|can not|could not|couldn'?t|won'?t|will not"
        r"|have no|must decline|decline|refuse)\b",
        r"(?:i am|i'?m|we are|we're) (?:\w+ly )?(?:unable|not able|not sure|not certain|sorry"
        r"|afraid|not aware|unsure)",
        r"(?:passage|text|context|document|article|excerpt|source|paragraph|material"
        r"|information|question|answer|data|topic)s?(?: \w+)? " + _SAYS_NOT,
        r"(?:is|are|was|were|has|have)(?: not|n'?t)(?: been)?(?: \w+ly)? (?:mentioned|stated"
        r"|specified|provided|given|disclosed|discussed|available|answered|indicated)"
        r"(?: (?:in|by|from|within|here|anywhere)\b|\W*$)",
        r"(?:unable|impossible|not possible|cannot be|can'?t be|could not be)(?: to)?"
        r"(?: \w+ly)? (?:answer|determin|provid|find|say|tell|identif|know|verif|confirm)",
        r"(?:there (?:is|was|are|were)|ha(?:ve|s)|with|gives?|provides?|contains?) (?:no|not"
        r" enough|insufficient|not any) (?:\w+ )?(?:information|context|details?|mention)\b",
        r"as an? (?:ai|artificial|language model|assistant)\b",
        r"answer (?:is|remains) (?:unknown|unclear|uncertain|not known|not clear)\b",
        r"needs? more (?:\w+ )?(?:information|context|details?)\b",
        r"(?:please|could you|can you) (?:provide|clarify|specify|rephrase|give)\b",
    )
    + r"|^\W*"
    + _any_of(
        r"(?:nobody|no ?one) (?:really )?knows\b",
        r"(?:sorry|no idea|not sure|unsure|idk|dunno|unanswerable|no answer|not enough)\b",
        r"not (?:\w+ly )?(?:mentioned|stated|specified|provided|given|available|known"
        r"|applicable|clear)\b",
        r"(?:(?:it|this|that|the answer) (?:is|remains) )?(?:unknown|unclear|unspecified"
        r"|n/?a|none|null|nil|undefined|uncertain|not known|not clear)\W*$",
        r"(?:no|insufficient) (?:\w+ )?(?:information|context|details?|mention|answer)\b",
    )
)
_RIGHT = r"(?:correct|right|accepted|accurate|valid|true|acceptable|equivalent|approved|perfect)"
_ANSWER = r"(?:answer|response|prediction|submission|reply|output)"
_INSTRUCTION = re.compile(
    r"\b"
    + _any_of(
        r"(?:ignore|disregard|forget|override|bypass)\b[^.!?\n]{0,40}\b(?:instruction|prompt"
        r"|rubric|guideline|previous|prior|above|criteria)",
        r"(?:grade|mark|score|rate|evaluate|label|accept)\b[^.!?\n]{0,20}\b(?:this|it|me|my"
        rf"|{_ANSWER})\b[^.!?\n]{{0,30}}\b(?:{_RIGHT}|yes|pass(?:ed)?|100|10/10|1)\b",
        r"(?:judge|count|treat|consider|deem|regard|assume)\b[^.!?\n]{0,20}\b(?:this|my"
        rf"|{_ANSWER})\b[^.!?\n]{{0,30}}\b(?:{_RIGHT}|yes)\b",
        rf"(?:accept|approve) (?:this|my|the|any) {_ANSWER}",
        rf"(?:this|my|the|above|given|provided|following)(?: \w+)? {_ANSWER}"
        r"(?: (?:given|above|here|below))? (?:is|was|should be|must be|shall be|has been"
        r"|will be|counts? as)(?: (?:marked|graded|scored|judged|considered|deemed|accepted))?"
        rf"(?: as)?(?: \w+ly| 100%| also)? {_RIGHT}"
        r"(?=\W*(?:$|[.,;:!]|and\b|because\b|as\b|by\b|so\b))",
        r"(?:this|it|that|which|everything (?:here|above)) is (?:the )?(?:\w+ly |100% )?"
        r"(?:correct|right)(?: answer)?(?=\W*(?:$|[.,;!]))",
        r"(?:say|answer|output|respond|reply|print|return|choose|select)"
        r"(?: with| only| just| simply| exactly)* \W?(?:yes|correct|true)\b",
        r"(?:grade|score|verdict|rating|judge?ment|evaluation|mark|result|label|is_correct"
        r"|correct|assessment|grading)\W{0,3}[:=]\W{0,3}(?:yes|correct|true|right|pass|full"
        r"|accept|100%|(\d+) ?/ ?\1\b)",
        r"(?:full|maximum|perfect) (?:marks?|credit|points|score|grade)\b",
        r"(?:dear|attention|note to|hello|hey)(?: the)? (?:judge|examiner)\b",
        r"(?:grader|evaluator|autograder)s?\b|grading\b",
        r"(?:gold|reference|ground.truth|expected)(?: \w+)? answer\b|ground.truth\b",
        r"(?:gold|prediction|reference|expected) ?:",
        r"you (?:must|should|will|have to|shall|are (?:required|told|instructed) to)"
        r" (?:now )?(?:grade|accept|mark|say|answer|respond|score|output|judge|reply|ignore)\b",
        r"(?:system|new) (?:prompt|instructions?)\b",
    )
    + r"|\[/?inst\]|<\|\w{1,20}\|>|<</?sys>>|</?system>"
)
_ASSENT = frozenset("yes correct right true accepted accept pass passed ok".split())
_MAX_ADDED = 8  # words
_MAX_NUMBERED = 120  # characters of a numbered list of short items
_ASKING = frozenset("what who whom whose which when where why how".split())
_EVERYTHING = re.compile(
    r"\b(?:all|any|each|every one|either|both|none) of the (?:above|options|choices|listed)\b"
    r"|^(?:\W*(?:the |it |they |answer |is |are )*)(?:all|any|each|every one|either|both|none) of"
    r" (?:them|these|those)\W*$"
    r"|^\W*(?:anything|everything|everyone|everybody|all|any|whatever|anyone)\W*$"
    r"|\b(?:every|all|any) possible (?:answers?|options?|names?|words?)\b"
)
_POLAR = (("yes",), ("no",), ("true",), ("false",))
_SEPARATOR = re.compile(
    r"[,;|/\n•?]|\s-\s|\band\b|\bor\b|\d\.\s|(?<=[a-z]{3})[.!](?:\s|$)"
    r"|(?:\boption )?(?:\(|\b)[a-h](?:\)|:\s)"
)
_FIRST_ITEM = re.compile(r"\W*(?:1[.)]|(?:option )?\(?a[):.])\s")
_SECOND_ITEM = re.compile(r"\s(?:2[.)]|(?:option )?\(?b[):.])\s")
_ALTERNATIVES = re.compile(r"\b(?:or|could|might|may|maybe|perhaps|possibly|either|one of|any)\b")


@functools.lru_cache(maxsize=64)
def answer_part(prediction: str) -> str:
    """Return `prediction` without a leading 'Answer:' and the next prompt that it rambles into."""
    return _LABEL.sub("", _before_next_prompt(prediction), count=1).strip()


def _before_next_prompt(prediction: str) -> str:
    text = prediction.strip()[: 2 * MAX_CHARS].replace("\0", " ")
    found = _NEXT_PROMPT.search(text)
    return text[: found.start()] if found else text


def rejection(question: str, gold: str, prediction: str) -> str | None:
    """Return the rule that makes `prediction` wrong whatever the gold is, or None.

    Returns:
      'empty', 'too long', 'instruction', 'refusal', 'everything', 'echo', 'list', or what
      `misnames` returns.
    """
    answer = answer_part(prediction)
    if len(answer) > MAX_CHARS or len(answer.split()) > MAX_WORDS:
        return "too long"
    text = read(plain(answer))
    if not text.words:
        return "empty"
    key = read_key(question[:MAX_CHARS], gold[:MAX_CHARS])
    folded = fold(answer)
    if len(text.words) > 1 and _ASSENT.issuperset(text.words):
        return "instruction"
    with_label = fold(_before_next_prompt(prediction))
    if _INSTRUCTION.search(with_label) and not _INSTRUCTION.search(fold(f"{question} {gold}")):
        return "instruction"
    if not key.is_negative and _refuses(folded) and not _refuses(fold(gold[:MAX_CHARS])):
        return "refusal"
    if _EVERYTHING.search(folded) and not _EVERYTHING.search(fold(gold[:MAX_CHARS])):
        return "everything"
    if answer.rstrip(" \"'”").endswith("?") and text.words[0] in _ASKING:
        return "echo"  # another question
    is_statement = answer[-1:] != "?" and text.words[:1] != key.question.words[:1]
    states = key.is_yes_no and key.gold.words[:1] in _POLAR and is_statement
    if _is_echo(key, text, answer) and not states:
        return "echo"
    if _is_list(key, text, folded) or _is_numbered(key, folded) or _adds_items(key, text, folded):
        return "list"
    return misnames(key, question, gold[:MAX_CHARS], answer)


def _refuses(folded: str) -> bool:
    """Return whether the first sentence refuses; later ones may hedge."""
    end = _SENTENCE_END.search(folded.lstrip())
    return bool(_REFUSAL.search(folded.lstrip()[: end.end() if end else None]))


def _is_echo(key: Key, text: Text, answer: str) -> bool:
    """Return whether `text` says the question again, whole or in part, and nothing else."""
    labels = {"question", "answer", "q", "asked", "ask"}
    words = text.stems_without(STOP | labels)
    if len(words) < 2 or not key.question_content.issuperset(words):
        return False
    left = collections.Counter(words) - collections.Counter(key.question.stems)
    if answer.endswith("?") and not left:
        return True
    if not key.question_content.issubset(words):
        return False
    if max(left.values(), default=0) > 1:  # again and again
        return True
    names_both = "or" in text.words and key.question_stems.issuperset(key.content)
    run = longest_run(key.question.stems, text.stems)
    return not left and (names_both or run >= 0.7 * len(text.stems))


def _is_numbered(key: Key, folded: str) -> bool:
    """Return whether an answer numbers its items where the gold is one: 1. X 2. Y, or a) X b) Y."""
    is_one = len(key.items) == 1 and not key.numbers and len(folded) < _MAX_NUMBERED
    return is_one and bool(_FIRST_ITEM.match(folded) and _SECOND_ITEM.search(folded))


def _adds_items(key: Key, text: Text, folded: str) -> bool:
    """Return whether an answer is the gold's one item and two more, and no more: X, Y and Z."""
    if len(key.items) != 1 or len(text.words) > _MAX_ADDED or "and" not in text.words:
        return False
    items = [set(read(part).stems_without()) for part in _SEPARATOR.split(folded)]
    known = key.question_stems | key.gold_stems
    others = [item for item in items if item and known.isdisjoint(item)]
    return set(key.content) in items and len(others) > 1 and len(others) == len(items) - 1


def _lists_numbers(key: Key, text: Text) -> bool:
    """Return whether the gold's number is one of many, or one of 'this or that'."""
    numbers = {w for w in text.words if is_number(w) and w not in key.question.words}
    others = numbers - set(key.numbers)
    if not key.numbers or not others:
        return False
    num_words = sum(w not in STOP and not is_number(w) for w in text.words)
    either = "or" not in key.gold.words + key.question.words and any(
        middle == "or" and {left, right} <= numbers
        for left, middle, right in zip(text.words, text.words[1:], text.words[2:], strict=False)
    )
    return either or len(others) > 6 or (len(others) > 2 and len(others) >= num_words)


def _is_list(key: Key, text: Text, folded: str) -> bool:
    """Return whether the gold is at most one of many short items, numbers or bare names.

    What most items have is their frame, and no part of them: 'The capital is Oslo. The capital is'.
    """
    if _lists_numbers(key, text):
        return True
    known = key.question_stems | key.gold_stems
    may_be = _ALTERNATIVES.search(folded) is not None
    allowed = MAX_OTHERS + len(key.items) - 1 - may_be
    if len(set(text.stems) - known) < allowed:
        return False
    parts = _SEPARATOR.split(folded)
    items = [t for part in parts if (t := read(part)).words] if len(parts) >= allowed else []
    if len(parts) == 1 and STOP.isdisjoint(text.words):  # names without commas
        return len(set(text.stems) - known) > allowed + 1
    times = collections.Counter(s for item in items for s in set(item.stems))
    bare = [[s for s in item.stems if 2 * times[s] <= len(items)] for item in items]
    num_total = sum(map(len, bare))
    allowed -= all(len(stems) <= MAX_ITEM_WORDS for stems in bare)
    num_others, num_words, has_gold = 0, 0, False  # of the chain of short items being read
    for stems in filter(None, bare):
        if len(stems) <= MAX_ITEM_WORDS:
            num_others += known.isdisjoint(stems)
            num_words += len(stems)
            has_gold |= not key.gold_stems.isdisjoint(stems)
        else:  # a chain of alternatives may begin at the end of a clause
            has_gold = may_be and stems[-1] in key.gold_stems
            num_others, num_words = 0, 0
        if has_gold and num_others > allowed and (may_be or 2 * num_words > num_total):
            return True
    return False
