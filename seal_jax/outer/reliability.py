"""How far a reward can be trusted, and how seeds are spent where they tell most.

A self-edit's reward under one seed is its true worth plus noise. The variance between self-edits of
a problem is what selection lives on, the variance between a self-edit's seeds is what misleads it.
"""

from collections.abc import Sequence

import numpy as np


def reliability(rewards: Sequence[Sequence[Sequence[float]]]) -> dict[str, float]:
    """Return what one outer step's rewards tell of their own worth.

    Args:
      rewards: of each problem, of each self-edit, under each seed; nan and empty ones are left out.

    Returns:
      variance_within: between the seeds of a self-edit; variance_between: between the true rewards
      of a problem's self-edits (an unbiased estimate, which may be negative); reliability_of_one:
      the latter over their sum, which is the correlation of two seeds; reliability_of_mean: the
      same for the mean of as many seeds as there are on average; gain_apparent: mean over problems
      of the best self-edit's mean minus that of all; gain_cross_validated: the same, where a seed
      that did not take part in choosing says what the chosen one is worth. What cannot be told (no
      self-edit with two seeds, no problem with two self-edits) is left out.

    References:
      One-way analysis of variance with random effects: Searle, Casella and McCulloch, Variance
      Components, 1992, chapter 3. Spearman-Brown for the mean.
    """
    problems = [[_known(seeds) for seeds in edits] for edits in rewards]
    problems = [[seeds for seeds in edits if len(seeds)] for edits in problems]
    problems = [edits for edits in problems if len(edits) > 1]
    gains = [max(map(np.mean, edits)) - np.mean([*map(np.mean, edits)]) for edits in problems]
    report = {"gain_apparent": float(np.mean(gains))} if gains else {}
    free_within = sum(len(seeds) - 1 for edits in problems for seeds in edits)
    if not free_within:
        return report
    within = sum(((seeds - seeds.mean()) ** 2).sum() for edits in problems for seeds in edits)
    within /= free_within
    squares = size = 0.0  # between self-edits: sum of squares, and what one unit of variance adds
    free_between = 0
    for edits in problems:
        counts = np.array([len(seeds) for seeds in edits])
        means = np.array([seeds.mean() for seeds in edits])
        squares += (counts * (means - np.average(means, weights=counts)) ** 2).sum()
        size += counts.sum() - (counts**2).sum() / counts.sum()
        free_between += len(edits) - 1
    between = (squares - free_between * within) / size
    report |= {"variance_within": float(within), "variance_between": float(between)}
    signal, num_seeds = max(between, 0.0), np.mean([len(s) for edits in problems for s in edits])
    if signal + within > 0:
        report["reliability_of_one"] = float(signal / (signal + within))
        report["reliability_of_mean"] = float(signal / (signal + within / num_seeds))
    validated = [gain for edits in problems for gain in _validated_gains(edits)]
    if validated:
        report["gain_cross_validated"] = float(np.mean(validated))
    return report


def _known(seeds: Sequence[float]) -> np.ndarray:
    values = np.asarray(seeds, np.float64)
    return values[~np.isnan(values)]


def _validated_gains(edits: Sequence[np.ndarray]) -> list[float]:
    """Return, for each seed that all self-edits have, what choosing by the others gains on it."""
    num_seeds = min(map(len, edits))
    gains = []
    for e in range(num_seeds if num_seeds > 1 else 0):
        others = [np.delete(seeds, e).mean() for seeds in edits]
        held_out = np.array([seeds[e] for seeds in edits])
        best = np.flatnonzero(others == np.max(others))  # of equals, each with the same chance
        gains.append(float(held_out[best].mean() - held_out.mean()))
    return gains


def seed_rounds(num_edits: int, num_seeds: int) -> list[tuple[int, int]]:
    """Return rounds (self-edits of a problem that still compete, seeds that each has by its end).

    Successive halving: every round about the same number of inner runs, half as many self-edits.
    Together they are at most num_edits * num_seeds inner runs.

    References:
      Jamieson and Talwalkar, Non-stochastic Best Arm Identification, arXiv 1502.07943, figure 1.
    """
    budget = num_edits * num_seeds
    competing = [num_edits]
    while competing[-1] > 2:
        competing.append(-(-competing[-1] // 2))
    rounds: list[tuple[int, int]] = []
    seeds = 0
    for i, count in enumerate(competing):
        share = budget // (len(competing) - i) // count  # of what is left
        more = max(share, 0 if rounds else 1)
        if more == 0:
            continue
        seeds += more
        budget -= more * count
        rounds.append((count, seeds))
    return rounds
