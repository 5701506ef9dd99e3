"""Words of which a text means one and not the other: north and south, early and late.

    contradicts('Where?', 'the north of France', 'the south of France')  ->  True
    denies_opposite('illegal', 'It is not legal.')  ->  True

The gold has a word of a group in `lexicon.json`, and the answer has only others of the group that
the question does not give.
"""

import functools
import re

from seal_jax.tasks.knowledge.grading.words import CONTRASTS, STOP, read

_PREFIX = re.compile("(?:un|in|im|il|ir|non)-?")
_COMPASS = re.compile(r"\b(north|south)[- ](east|west)", re.IGNORECASE)
_MAX_WORDS = 14  # a longer answer tells more


@functools.lru_cache(maxsize=4096)
def _members(text: str) -> dict[int, frozenset[int]]:
    """Return which members of each group are in a text."""
    found: dict[int, frozenset[int]] = {}
    for word in read(_COMPASS.sub(r"\1\2", text)).words:
        if word in CONTRASTS:
            group, member = CONTRASTS[word]
            found[group] = found.get(group, frozenset()) | {member}
    return found


def contradicts(question: str, gold: str, answer: str) -> bool:
    """Return whether an answer has a word that contrasts with one of the gold's, and lacks that."""
    expected = _members(gold)
    if not expected or len(read(answer).words) > _MAX_WORDS:
        return False
    asked, given = _members(question), _members(answer)
    for group, members in expected.items():
        others = given.get(group, frozenset())
        if members.isdisjoint(others) and others - asked.get(group, frozenset()):
            return True
    return False


def denies_opposite(gold: str, answer: str) -> bool:
    """Return whether an answer is 'not legal' for a gold of 'illegal', or the other way around."""
    words = [w for w in read(answer).words if w not in STOP or w == "not"]
    golds = read(gold).words
    if len(words) != 2 or words[0] != "not" or len(golds) != 1:
        return False
    other = words[1]
    return any(
        long.endswith(short) and bool(_PREFIX.fullmatch(long.removesuffix(short)))
        for long, short in ((golds[0], other), (other, golds[0]))
    )
