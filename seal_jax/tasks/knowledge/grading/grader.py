"""The offline grader: does a prediction answer the question as the gold answer does?

    grade(question, gold, prediction) = exact match, or
                                        no rule rejects it, and the fitted probability is over 1/2

The rules (`rules.py`) reject what a policy might try instead of answering. The probability is that
of a sum of points, read off `points.json` feature by feature, which imitates GPT-4.1 (`fit.py`). It
knows words, not meaning: a paraphrase that shares no word with the gold is wrong here, and a right
word in a false sentence can pass.

`exact_match` and `token_f1` are SQuAD's (https://arxiv.org/abs/1606.05250).
"""

import bisect
import collections
import importlib.resources
import json
import math
import re
import string
from collections.abc import Sequence

from seal_jax.tasks.knowledge.grading.amounts import OPEN, SAME, compare_amounts
from seal_jax.tasks.knowledge.grading.claims import plain, says_yes
from seal_jax.tasks.knowledge.grading.contrasts import contradicts, denies_opposite
from seal_jax.tasks.knowledge.grading.features import Key, features, read_key
from seal_jax.tasks.knowledge.grading.names import continues, is_family_name, swaps
from seal_jax.tasks.knowledge.grading.rules import MAX_CHARS, answer_part, rejection
from seal_jax.tasks.knowledge.grading.words import read

_FILE = importlib.resources.files("seal_jax.tasks.knowledge.grading").joinpath("points.json")
_TABLE = json.loads(_FILE.read_text("utf-8"))
Golds = str | Sequence[str]  # a gold answer, or several of which any counts
INTERCEPT: float = _TABLE["intercept"]
POINTS: dict[str, tuple[list[float], list[float]]] = _TABLE["points"]  # edges, points
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SIGNS = re.compile(r"(?<=\w)[+#]+(?!\w)|(?<=\s)[a-z](?=\W*$)")  # C++, hepatitis A
_PARENTHESES = re.compile(r"\([^()]*\)")
_SHORT_FORM = re.compile(r"\(([A-Z]{2,6})\)")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize(text: str) -> str:
    """Lower `text` and drop punctuation, articles and extra whitespace, as SQuAD does."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(gold: Golds, prediction: str) -> bool:
    """Return whether the prediction equals a gold answer after `normalize`."""
    return normalize(prediction) in map(normalize, _each(gold))


def token_f1(gold: Golds, prediction: str) -> float:
    """Return SQuAD's F1 with the nearest gold answer, of bags of words; two empty ones score 1."""
    return max(_token_f1(one, prediction) for one in _each(gold))


def _each(gold: Golds) -> tuple[str, ...]:
    return (gold,) if isinstance(gold, str) else tuple(gold)


def _token_f1(gold: str, prediction: str) -> float:
    gold_words, words = normalize(gold).split(), normalize(prediction).split()
    if not gold_words or not words:
        return float(gold_words == words)
    shared = sum((collections.Counter(gold_words) & collections.Counter(words)).values())
    return 2 * shared / (len(gold_words) + len(words))


def grade(question: str, gold: Golds, prediction: str) -> bool:
    """Return whether `prediction` answers `question` as a gold answer does.

    Raises:
      ValueError: a gold answer is empty, or there is none, so nothing could be right.
    """
    golds = _each(gold)
    if not golds:
        raise ValueError(f"there is no gold answer to {question!r}: nothing could be right")
    return any(grade_probability(question, one, prediction) > 0.5 for one in golds)


def grade_probability(question: str, gold: str, prediction: str) -> float:
    """Return the estimated probability that GPT-4.1 says yes: 0 where a rule rejects."""
    settled = settle(question, gold, prediction)
    if settled is not None:
        return settled
    score = INTERCEPT
    for name, value in measure(question, gold, prediction).items():
        edges, points = POINTS[name]
        score += points[bisect.bisect_right(edges, value)]
    return 1 / (1 + math.exp(-round(score, 2)))  # a tie is exactly 0


def measure(question: str, gold: str, prediction: str) -> dict[str, float]:
    """Return the features of a prediction that `settle` leaves open."""
    answer = answer_part(prediction)
    key = read_key(question[:MAX_CHARS], gold[:MAX_CHARS])
    return features(key, read(plain(answer)), answer)


def settle(question: str, gold: str, prediction: str) -> float | None:
    """Return 1 or 0 where no table is needed, else None.

    Raises:
      ValueError: `gold` is empty, so nothing could be right.
    """
    if not gold.strip():
        raise ValueError(f"the gold answer to {question!r} is empty: nothing could be right")
    answer = answer_part(prediction)
    shown, gold = answer[:MAX_CHARS], gold.strip()
    amounts = compare_amounts(question[:MAX_CHARS], gold[:MAX_CHARS], shown)
    differs = amounts is not None and amounts.is_bare and amounts.says not in (SAME, OPEN)
    if shown == gold or (_is_exact(gold, shown) and not differs):
        return 1.0
    if _signs(gold) != _signs(shown):
        bare_gold, bare = (normalize(_SIGNS.sub(" ", text.lower())) for text in (gold, shown))
        if bare and bare_gold == bare:  # vitamin B for vitamin A
            return 0.0
    is_same = amounts is not None and amounts.is_bare and amounts.says == SAME
    if denies_opposite(gold, shown):
        return 1.0
    reason = rejection(question, gold, prediction)
    if is_same and reason in (None, "list", "alternatives"):  # '1 400 000', '2/3'
        return 1.0
    if reason is not None or differs or contradicts(question, gold, shown):
        return 0.0
    key = read_key(question[:MAX_CHARS], gold[:MAX_CHARS])
    if not key.targets:  # a gold of symbols only
        return 0.0
    if key.gold.words[0] in ("yes", "no", "true", "false"):
        return _settle_yes_no(key, answer)
    if continues(question, gold, shown) or swaps(question, gold, shown):
        return 0.0
    return 1.0 if is_family_name(question, gold, shown) else None


def _is_exact(gold: str, answer: str) -> bool:
    """Return whether the two are equal after `normalize`, but for what it drops and what matters.

    A gold may explain itself in parentheses: 'Human Immunodeficiency Virus (HIV)' is 'HIV', too.
    """
    short_forms = _SHORT_FORM.findall(gold)
    readings = [gold, _PARENTHESES.sub(" ", gold), *short_forms] if "(" in gold else [gold]
    return bool(normalize(answer)) and any(
        exact_match(reading, answer) and _signs(reading) == _signs(answer) for reading in readings
    )


def _signs(text: str) -> list[str]:
    """Return the signs and the last letter that `normalize` drops."""
    return _SIGNS.findall(text.lower())


def _settle_yes_no(key: Key, answer: str) -> float | None:
    """Return 1 or 0 where the polarity alone decides: the gold begins with yes or no."""
    expected = key.gold.words[0] in ("yes", "true")
    says = says_yes(key, answer)
    if len(key.gold.words) == 1:
        return float(says is expected)
    words = read(answer).words
    if words[0] in ("yes", "no") and says is not expected:
        return 0.0
    return 1.0 if words == key.gold.words[:1] else None
