"""Rewards: a number for each self-edit, from what its inner runs achieved and what it says.

A reward is a weighted sum of terms, for each seed; a self-edit's is the mean over its seeds. The
terms are in REWARDS, or another package's, see extensions.py. nan means that nobody could tell:
such a self-edit is dropped, and never counts as 0.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from seal_jax.extensions import load_plugin, plugin_names

# Exams beside a run's own: self-written questions, those of earlier problems, of any others.
OWN, EARLIER, ELSEWHERE = "own", "earlier", "elsewhere"


class Outcome(NamedTuple):
    """What one inner run, a self-edit with one seed, achieved."""

    accuracy: float  # share of the exam's questions answered rightly, without the passage
    log_likelihood: float | None  # mean over questions of the gold answer's mean log p per token
    loss_before: float  # mean training loss of the first epoch
    loss_after: float  # and of the last
    answers: tuple[str, ...]
    useful_tokens: int  # text tokens that the run trained on
    trained_tokens: float = 0.0  # its share of its wave's tokens, padding and idle lanes included
    others: Mapping[str, float] = {}  # accuracy in other exams, by their kind
    log_likelihood_elsewhere: float | None = None  # the same in those of ELSEWHERE

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss_before) and np.isfinite(self.loss_after))


class Evidence(NamedTuple):
    """What the reward of one self-edit is made of."""

    outcomes: Sequence[Outcome]  # one per seed; none where it was rejected
    text: str  # what the policy wrote
    passage: str
    length: float  # tokens written, as a share of those allowed
    baseline: float  # the unadapted policy's accuracy on the problem
    earlier_baseline: float = np.nan  # and on the questions of EARLIER; nan where there are none
    judged: float = np.nan  # the judge's score in [0, 1]; nan where it failed


def copying(text: str, passage: str, size: int = 4) -> float:
    """Return the share of the text's runs of `size` words that the passage has too, in [0, 1]."""

    def grams(text: str) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return list(zip(*(words[i:] for i in range(size)), strict=False))

    ours, theirs = grams(text), set(grams(passage))
    return sum(gram in theirs for gram in ours) / len(ours) if ours else 0.0


def _regression(evidence: Evidence, outcome: Outcome) -> float:
    """Return how much accuracy on earlier problems was lost; 0 where there are none yet."""
    if np.isnan(evidence.earlier_baseline):
        return 0.0
    return evidence.earlier_baseline - outcome.others[EARLIER]


def _log_likelihood(evidence: Evidence, outcome: Outcome) -> float:
    assert outcome.log_likelihood is not None  # measured where a reward has it
    return outcome.log_likelihood


# Of one seed. Costs take negative weights.
REWARDS: dict[str, Callable[[Evidence, Outcome], float]] = {
    "accuracy": lambda evidence, outcome: outcome.accuracy,
    "gain": lambda evidence, outcome: outcome.accuracy - evidence.baseline,
    "log_likelihood": _log_likelihood,
    "self_questions": lambda evidence, outcome: outcome.others.get(OWN, np.nan),
    "judge": lambda evidence, outcome: evidence.judged,
    "length": lambda evidence, outcome: evidence.length,
    "copying": lambda evidence, outcome: copying(evidence.text, evidence.passage),
    "regression": _regression,
}


def reward_names() -> list[str]:
    """Return the terms that a reward may have."""
    return [*REWARDS, *plugin_names("rewards")]


def find_reward(name: str) -> Callable[[Evidence, Outcome], float]:
    """Return a term by its name.

    Raises:
      ValueError: there is none, or another package's cannot be imported.
    """
    found = REWARDS.get(name) or load_plugin("rewards", name)
    if found is None:
        raise ValueError(f"reward {name!r}: expected one of {', '.join(reward_names())}")
    return found


def seed_rewards(evidence: Evidence, weights: Mapping[str, float]) -> list[float]:
    """Return the reward under each seed; nan where one of its terms is missing."""
    terms = [(weight, find_reward(name)) for name, weight in weights.items()]
    return [
        float(sum(weight * term(evidence, outcome) for weight, term in terms))
        for outcome in evidence.outcomes
    ]


def reward_of(evidence: Evidence, weights: Mapping[str, float], rejected: float) -> float:
    """Return a self-edit's reward: the mean over its seeds, or nan where it is missing.

    No outcome (the self-edit was rejected), or one whose training was not finite, earns `rejected`.
    """
    if not evidence.outcomes or not all(outcome.finite for outcome in evidence.outcomes):
        return rejected
    return float(np.mean(seed_rewards(evidence, weights)))
