"""How large a difference a run can show, said before it starts: by the spread in a pilot.

A pilot is an earlier run on other problems, or a sweep. What counts is how much paired differences
vary from problem to problem.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from seal_jax.hosts.exchange import ask_first
from seal_jax.hosts.files import read_object
from seal_jax.outer.differences import SCORES, read_pair, smallest_shown, spread_of
from seal_jax.types import EvalSettings

ByProblem = dict[str, dict[str, float]]  # {arm: {problem id: value}}
_FILES = ("summary.json", "tune.json")  # of a pilot's folder
_FEWEST = 3  # problems that two arms must have in common
_UNITS = {"accuracy": (100, "points"), "log_likelihood": (1, "nats per token")}
_SHARED = " (settings of a sweep share self-edits and seeds: the arms of a run may vary more)"


class Pilot(NamedTuple):
    """What a pilot has measured."""

    scores: dict[str, ByProblem]
    is_sweep: bool


def describe_power(held: EvalSettings, num_problems: int, problems: str) -> list[str]:
    """Return lines on what is to be shown, and how small a difference so many problems can show.

    Raises:
      ValueError: there is no pilot where `eval.pilot` says, or it has no scores.
    """
    lines = []
    if held.primary:
        pairs = ", ".join(held.primary)
        lines.append(f"primary comparisons: {pairs}, by {held.primary_score}")
    head = f"what {num_problems} {problems} show in 80 % of cases, at 5 %"
    if not held.pilot:
        most = 100 * smallest_shown(1.0, num_problems)
        bound = f"{most:.1f} points" if most < 100 else "none"
        return [
            *lines,
            f"{head}: not known without an earlier run (eval.pilot). Differences of accuracy lie"
            f" in [-1, 1], so their spread is 1 at most: at worst {bound}",
        ]
    pilot = Pilot(*ask_first("eval.pilot", lambda: read_pilot(held.pilot)))
    wanted = held.primary or ("seal-own", "seal-random")
    said = [
        text
        for score in SCORES
        if score in pilot.scores
        for text in _shown(pilot.scores[score], wanted, num_problems, *_UNITS[score])
    ]
    if not said:
        raise ValueError(
            f"eval.pilot = {held.pilot!r}: no two arms whose scores differ on {_FEWEST} problems"
        )
    note = _SHARED if pilot.is_sweep else ""
    return [*lines, f"{head}, by {held.pilot}: {'; '.join(said)}{note}"]


def _shown(
    values: ByProblem, wanted: Sequence[str], count: int, scale: float, unit: str
) -> Iterator[str]:
    """Yield what can be shown of each wanted pair, or where the pilot lacks it, of its others."""
    least = {
        pair: scale * smallest_shown(spread, count)
        for pair, spread in paired_spreads(values).items()
    }
    digits, stated = 1 if unit == "points" else 3, []
    for text in wanted:
        pair = read_pair(text, list(values)) or ("", "")
        value = least.get(pair) or least.get(pair[::-1])
        stated.append(f"{text} {f'{value:.{digits}f} {unit}' if value else 'not in it'}")
    if not all(text.endswith("not in it") for text in stated):
        yield ", ".join(stated)
    elif least:
        low, median, high = np.percentile(list(least.values()), [0, 50, 100])
        yield (
            f"{median:.{digits}f} {unit} (its {len(least)} pairs of arms:"
            f" {low:.{digits}f} to {high:.{digits}f})"
        )


def paired_spreads(values: ByProblem) -> dict[tuple[str, str], float]:
    """Return the standard deviation of the paired differences of every two arms.

    Those with too few problems in common, or with equal differences only, are left out.
    """
    found = {}
    for one, other in combinations(values, 2):
        common = values[one].keys() & values[other].keys()
        differences = np.array([values[one][key] - values[other][key] for key in sorted(common)])
        spread = spread_of(differences) if len(common) >= _FEWEST else None
        if spread is not None:
            found[one, other] = spread
    return found


def read_pilot(path: str) -> Pilot:
    """Return the scores in a run's summary.json, in a sweep's tune.json, or in a folder with one.

    Raises:
      ValueError: there is none, or it has no scores of problems.
    """
    file = path
    if os.path.isdir(path):
        there = [name for name in _FILES if os.path.exists(os.path.join(path, name))]
        if not there:
            raise ValueError(f"eval.pilot = {path!r}: has no {' or '.join(_FILES)}: not finished?")
        file = os.path.join(path, there[0])
    try:
        content = read_object(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"eval.pilot = {path!r}: {error}") from error
    is_sweep = "settings" in content
    found = _scores(_of_sweep(content) if is_sweep else _of_run(content))
    if not found:
        raise ValueError(f"eval.pilot = {path!r}: has no scores of single problems")
    return Pilot(found, is_sweep)


def _of_run(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """Yield score, arm, problem and value of a summary's {problem id: {arm: value}}."""
    for score in SCORES:
        for problem, row in _items(content.get(f"{score}_by_problem")):
            for arm, value in _items(row):
                yield score, arm, problem, value


def _of_sweep(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """Yield the same of a sweep's base model and the settings that went through to its end."""
    settings = content["settings"] if isinstance(content["settings"], list) else []
    ended = {
        f"setting {i}": row
        for i, row in enumerate(settings)
        if isinstance(row, dict)
        and row.get("num_problems") == content.get("num_problems")
        and not row.get("diverged")
    }
    for arm, row in {"base": content.get("base"), **ended}.items():
        for one in dict(_items(row)).get("outcomes") or ():
            for score, value in _items(one):
                if score in SCORES:
                    yield score, arm, str(one.get("problem")), value


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    return iter(value.items() if isinstance(value, dict) else ())


def _scores(entries: Iterator[tuple[str, str, str, Any]]) -> dict[str, ByProblem]:
    found: dict[str, ByProblem] = {}
    for score, arm, problem, value in entries:
        if isinstance(value, int | float) and np.isfinite(value):
            found.setdefault(score, {}).setdefault(arm, {})[problem] = float(value)
    return found
