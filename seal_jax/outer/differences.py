"""Means of the final table's arms, their paired differences, and how small a difference can show.

Intervals are of a paired bootstrap: problems are drawn with replacement, and all arms share each
draw. An arm may lack a value for a problem (nan): a mean is over the problems that have one, a
difference over those where both arms do. `describe_mean` has Student's t in place of the bootstrap,
which makes intervals of few values too narrow. Imports no jax.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

POWER, LEVEL = 0.8, 0.05  # of the smallest difference that can be shown
# What is measured of each problem: the share of right answers, and the gold answers' mean log p
# per token.
SCORES = ("accuracy", "log_likelihood")


class Mean(NamedTuple):
    """A mean over problems."""

    value: float
    interval: list[float]  # of 95 %
    count: int  # of problems


def mean_of(values: np.ndarray, num_samples: int, seed: int) -> Mean:
    """Return the mean of the values that are there, with its 95 % bootstrap interval."""
    known = values[~np.isnan(values)]
    means = known[_draws(len(known), num_samples, seed)].mean(axis=1)
    return Mean(float(known.mean()), np.percentile(means, [2.5, 97.5]).tolist(), len(known))


def describe_mean(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, its 95 % interval and the standard deviation; None where unknown.

    Two values have no interval: by Student's t it is twelve times as wide as they lie apart.
    """
    num = len(values)
    if not num or not np.isfinite(values).all():
        return {"mean": None, "interval": None, "sd": None}
    mean = float(np.mean(values))
    if num < 2:
        return {"mean": mean, "interval": None, "sd": None}
    sd = float(np.std(values, ddof=1))
    if num < 3:
        return {"mean": mean, "interval": None, "sd": sd}
    half = float(stdtrit(num - 1, 0.975)) * sd / math.sqrt(num)
    return {"mean": mean, "interval": [mean - half, mean + half], "sd": sd}


@lru_cache(maxsize=4)
def _draws(count: int, num_samples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, num_samples])
    return rng.integers(count, size=(num_samples, count))


def smallest_shown(spread: float, count: int) -> float:
    """Return the true difference that so many problems show with 80 % power at two-sided 5 %.

    (z(0.975) + z(0.8)) * spread / sqrt(count)

    Args:
      spread: standard deviation of the paired differences.

    References:
      Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, chapter 2.
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) * spread / count**0.5


def spread_of(differences: np.ndarray) -> float | None:
    """Return the standard deviation of the differences that are there; None if it is not known.

    Of fewer than two, or of equal ones, nobody can tell it.
    """
    known = differences[~np.isnan(differences)]
    spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    return spread if spread > 1e-12 else None


def bootstrap(
    scores: Mapping[str, Mapping[str, np.ndarray]], num_samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return a row for each arm: its means with their intervals, and the difference to 'own'.

    And the difference of 'seal' to 'random': what selection by reward is worth.

    Args:
      scores: f64[P] for each arm, of the same problems in the same order, for each of SCORES that
        was measured. Where an arm has not all of them, NAME_problems says how many.
    """
    accuracy = scores["accuracy"]
    rows: dict[str, dict[str, Any]] = {arm: {} for arm in accuracy}

    def enter(arm: str, name: str, interval: str, values: np.ndarray) -> None:
        found = mean_of(values, num_samples, seed)
        rows[arm] |= {name: found.value, interval: found.interval}
        if found.count < len(values):
            rows[arm][f"{name}_problems"] = found.count

    for arm, values in accuracy.items():
        enter(arm, "accuracy", "interval", values)
        if arm != "own":
            enter(arm, "minus_own", "minus_own_interval", values - accuracy["own"])
    if "seal" in accuracy and "random" in accuracy:
        minus = accuracy["seal"] - accuracy["random"]
        enter("seal", "minus_random", "minus_random_interval", minus)
    for arm, values in scores.get("log_likelihood", {}).items():
        if not np.isnan(values).all():
            enter(arm, "log_likelihood", "log_likelihood_interval", values)
    return rows


def pairs_of(arms: Sequence[str], external: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return the pairs (arm, minus arm) that the table compares.

    'seal' with every other arm, and 'own' with the passage alone and every external arm.
    """
    first = ("own", "random", "passage", "base")
    others = [*first, *(arm for arm in arms if arm not in ("seal", *first))]
    pairs = [("seal", arm) for arm in others]
    pairs += [("own", arm) for arm in ("passage", *external)]
    return [pair for pair in pairs if set(pair) <= set(arms)]


def read_pair(text: str, arms: Collection[str]) -> tuple[str, str] | None:
    """Return the pair that 'ARM-ARM' names; None where it names none of these arms, or several.

    Names may have hyphens themselves.
    """
    parts = text.split("-")
    cut = [("-".join(parts[:i]), "-".join(parts[i:])) for i in range(1, len(parts))]
    found = [pair for pair in cut if {*pair} <= {*arms} and pair[0] != pair[1]]
    return found[0] if len(found) == 1 else None


def compare_pairs(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    pairs: Sequence[tuple[str, str]],
    num_samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the paired difference of each pair, in each score that both arms have.

    Returns:
      Of each: arm and minus (their names), score, difference, its 95 % interval, num_problems that
      both have, and smallest_shown, None where it is not known.
    """
    found = []
    for one, other in pairs:
        for score in SCORES:
            values = scores.get(score, {})
            if not {one, other} <= values.keys():
                continue
            difference = values[one] - values[other]
            if np.isnan(difference).all():
                continue
            mean, spread = mean_of(difference, num_samples, seed), spread_of(difference)
            least = None if spread is None else smallest_shown(spread, mean.count)
            found.append(
                {
                    "arm": one,
                    "minus": other,
                    "score": score,
                    "difference": mean.value,
                    "interval": mean.interval,
                    "num_problems": mean.count,
                    "smallest_shown": least,
                }
            )
    return found
