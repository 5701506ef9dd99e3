"""What a matrix of scores says about learning and forgetting, with intervals over sequences.

  M[k, i]              score on problem i after k self-edits; row 0 is the unedited model
  diagonal             mean over i of M[i+1, i], right after the edit
  final                mean over i of M[N, i]
  backward transfer    mean over i < N-1 of M[N, i] - M[i+1, i]
  forward transfer     mean over k of 1..N-1 of the mean over i >= k of M[k, i] - M[0, i]
  at age a             mean over i of M[i+1+a, i], and this minus M[0, i], and minus M[i+1, i]

Every figure is computed of each sequence; its interval is of the mean over sequences, by Student's
t: of few sequences a bootstrap's would be too narrow. Two runs of the same sequences are compared
by their paired differences. Imports no JAX.

An entry may not have been asked (NaN), the same ones in all sequences. A figure that needs one of
them is not known, and never the mean of the others; but forward transfer is over the rows k that
were asked whole, and an age over the problems that were asked at that age: both say how many.

References:
  Lopez-Paz and Ranzato, Gradient Episodic Memory, arXiv 1706.08840, section 2. Their forward
  transfer asks the next problem alone, and not all that are still to come.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from seal_jax.outer.differences import describe_mean


class Record(NamedTuple):
    """What S sequences of N self-edits left behind; NaN stands for what was not asked."""

    sequences: Sequence[Sequence[str]]  # [S][N] ids of problems
    scores: np.ndarray  # f[S N+1 N]
    control: np.ndarray  # f[S N+1] scores on the control set
    perplexity: np.ndarray  # f[S N+1] of general text; inf of a model that is not finite any more
    seconds: np.ndarray  # f[N] of each edit, all sequences together
    num_bytes: np.ndarray  # f[N] that each edit took, all sequences together


def summarize(record: Record) -> dict[str, Any]:
    """Return all figures, as JSON has them; the unknown is None, with the reason in 'why'.

    Raises:
      ValueError: shapes do not fit, a score is infinite, or sequences lack different entries.
    """
    check(record)
    found = {**figures(record), **_by_age(record.scores)}
    S, _, N = record.scores.shape
    return {
        "sequences": [list(one) for one in record.sequences],
        "num_sequences": S,
        "num_edits": N,
        "figures": {name: _describe(x) for name, x in found.items() if "/" not in name},
        "by_age": [_age_row(record.scores, found, age) for age in range(N)],
        "forward_rows": _forward(record.scores)[1],
        "matrix": _mean_matrix(record.scores),
        "control": [_describe(x) for x in record.control.T],
        "perplexity": [_describe(x) for x in record.perplexity.T],
        "cost": {"seconds": _growth(record.seconds), "bytes": _growth(record.num_bytes)},
        "per_sequence": {name: _plain(x) for name, x in found.items()},
    }


def check(record: Record) -> None:
    """Refuse a record whose parts do not fit together.

    Raises:
      ValueError: see `summarize`.
    """
    S, N = len(record.sequences), len(record.sequences[0]) if record.sequences else 0
    if not S or not N or any(len(one) != N for one in record.sequences):
        lengths = sorted({len(one) for one in record.sequences})
        raise ValueError(f"expected sequences of one length, found {S} of lengths {lengths}")
    shapes = {
        **{"scores": (S, N + 1, N), "control": (S, N + 1), "perplexity": (S, N + 1)},
        **{"seconds": (N,), "num_bytes": (N,)},
    }
    for name, shape in shapes.items():
        values = np.asarray(getattr(record, name))
        if values.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {values.shape}")
        if name != "perplexity" and np.isinf(values).any():
            raise ValueError(f"{name}: found an infinite value")
        if len(shape) == 1:
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: expected a number for every edit, found {values}")
            continue
        missing = np.isnan(values)
        if (missing != missing[0]).any():
            at = tuple(map(int, np.argwhere(missing != missing[0])[0]))
            raise ValueError(
                f"{name}{list(at)}: asked in sequence {at[0]} or in sequence 0, not in both. NaN is"
                " for what no sequence was asked; of a model that is not finite any more give score"
                " 0 and perplexity inf"
            )


def figures(record: Record) -> dict[str, np.ndarray]:
    """Return each sequence's figures, f64[S]; NaN where an entry they need was not asked."""
    M = np.asarray(record.scores, np.float64)
    N = M.shape[2]
    unedited, final, right_after = M[:, 0], M[:, N], diagonal(M)
    found = {
        "unedited": unedited.mean(axis=1),
        "final": final.mean(axis=1),
        "diagonal": right_after.mean(axis=1),
        "final_minus_unedited": (final - unedited).mean(axis=1),
        "diagonal_minus_unedited": (right_after - unedited).mean(axis=1),
        "backward_transfer": np.full(len(M), np.nan),
        "forward_transfer": _forward(M)[0],
        "control_unedited": record.control[:, 0],
        "control_final": record.control[:, N],
        "control_change": record.control[:, N] - record.control[:, 0],
        "perplexity_unedited": record.perplexity[:, 0],
        "perplexity_final": record.perplexity[:, N],
    }
    if N > 1:
        found["backward_transfer"] = (final - right_after)[:, :-1].mean(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(np.asarray(record.perplexity, np.float64))
        found["log_perplexity_change"] = logs[:, N] - logs[:, 0]
    return found


def diagonal(scores: np.ndarray) -> np.ndarray:
    """Return each problem's score right after its edit, f[S N]."""
    return np.diagonal(scores, offset=-1, axis1=1, axis2=2)


def _forward(M: np.ndarray) -> tuple[np.ndarray, int]:
    """Return forward transfer, f64[S], and over how many rows it is."""
    N = M.shape[2]
    rows = [(M[:, k, k:] - M[:, 0, k:]).mean(axis=1) for k in range(1, N)]
    asked = [row for row in rows if not np.isnan(row).any()]
    return (np.mean(asked, axis=0) if asked else np.full(len(M), np.nan)), len(asked)


def _at_age(M: np.ndarray, age: int) -> np.ndarray:
    """Return the scores on the N - age problems whose edit is so old at some time, f[S N-age]."""
    return np.diagonal(M, offset=-1 - age, axis1=1, axis2=2)


def _by_age(scores: np.ndarray) -> dict[str, np.ndarray]:
    M = np.asarray(scores, np.float64)
    found = {}
    for age in range(M.shape[2]):
        aged = _at_age(M, age)
        asked = ~np.isnan(aged[0])
        num = aged.shape[1]
        parts = {
            "score": aged,
            "minus_unedited": aged - M[:, 0, :num],
            "minus_diagonal": aged - diagonal(M)[:, :num],
        }
        for name, values in parts.items():
            known = values[:, asked]
            mean = known.mean(axis=1) if asked.any() else np.full(len(M), np.nan)
            found[f"age_{age}/{name}"] = mean
    return found


def _age_row(scores: np.ndarray, found: Mapping[str, np.ndarray], age: int) -> dict[str, Any]:
    names = ("score", "minus_unedited", "minus_diagonal")
    num = int((~np.isnan(_at_age(scores, age)[0])).sum())
    described = {name: _describe(found[f"age_{age}/{name}"]) for name in names}
    return {"age": age, "num_problems": num, **described}


def _mean_matrix(scores: np.ndarray) -> dict[str, Any]:
    """Return the mean over sequences and the half width of its 95 % interval, [N+1][N]."""
    S = len(scores)
    mean, half = scores.mean(axis=0), np.full(scores.shape[1:], np.nan)
    if S > 2:
        half = float(stdtrit(S - 1, 0.975)) * scores.std(axis=0, ddof=1) / math.sqrt(S)
    return {"mean": [*map(_plain, mean)], "half_width": [*map(_plain, half)]}


def _growth(values: np.ndarray) -> dict[str, Any]:
    """Return the cost of an edit, and how it grows from the first half of the edits to the second.

    A half's cost is its median: the first edits compile programs, and a mean would hide growth
    behind that. 'slope' is what each further edit costs more; 'growth' is second over first half.
    """
    values = np.asarray(values, np.float64)
    N = len(values)
    if N < 2:
        half = dict.fromkeys(("first_half", "second_half", "slope", "growth"))
        return {"total": float(values.sum()), "per_edit": float(np.median(values)), **half}
    first, second = (float(np.median(x)) for x in (values[: N // 2], values[-(N // 2) :]))
    return {
        "total": float(values.sum()),
        "per_edit": float(np.median(values)),
        "first_half": first,
        "second_half": second,
        "slope": (second - first) / (N - N // 2),
        "growth": second / first if first > 0 else None,
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return one summary's figures minus another's, by age too, paired by sequence.

    Raises:
      ValueError: they are not of the same sequences.
    """
    if one["sequences"] != other["sequences"]:
        raise ValueError(
            "these runs had different sequences, so that no difference of them is paired: expected"
            " the same problems in the same order (the same task, seed, number and length)"
        )
    mine, others = one["per_sequence"], other["per_sequence"]
    return {
        name: _describe(_numbers(mine[name]) - _numbers(others[name]), "not known of both")
        for name in mine
        if name in others
    }


def _describe(values: np.ndarray, unknown: str = "not asked") -> dict[str, Any]:
    """Return a mean with its interval; where there is none, 'why' says so."""
    values = np.asarray(values, np.float64)
    found = describe_mean(values.tolist())
    if found["mean"] is None:
        found["why"] = unknown if np.isnan(values).any() else "not finite"
    return found


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(x) if math.isfinite(x) else None for x in values]


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if x is None else x for x in values], np.float64)
