"""summary.md: the final table, the differences between its arms, and what it can show."""

from collections.abc import Mapping, Sequence
from typing import Any

from seal_jax.outer.differences import SCORES
from seal_jax.outer.examples import describe_examples

# What the table calls the arms, and what was asked; a task may have `titles` of its own.
TITLES = {
    "base": "base model",
    "passage": "trained on the passage",
    "own": "passage + own self-edit",
    "seal": "passage + self-edit of the SEAL policy",
    "random": "passage + self-edit of the random-control policy",
    "objective": "passage + self-edit of the policy trained by {}",
    "external": "passage + self-edit of {}",
    "problems": "passages",
    "questions": "questions asked without the passage",
}
_SCORE_NAMES = {"accuracy": "accuracy", "log_likelihood": "log-likelihood of the gold answers"}
_UNITS = {"accuracy": "points", "log_likelihood": "nats per token"}


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Return the table, with what it can and cannot show."""
    titles, arms = TITLES | summary.get("titles", {}), summary["arms"]
    num, problems = summary["num_problems"], titles["problems"]
    lines = [*_describe_primary(summary, titles), *_table(arms, titles, num)]
    seal = arms.get("seal", {})
    if "minus_random" in seal:
        versus = _percent(seal["minus_random"], seal["minus_random_interval"], "+")
        lines += [
            "",
            f"SEAL policy minus random control (what selection is worth): {versus} points",
        ]
    lines += _differences(summary.get("differences", []), titles)
    lines += [
        "",
        f"{num} held-out {problems}, {summary['num_questions']} {titles['questions']};"
        f" {summary['num_edits']} self-edit(s) x {summary['num_seeds']} seed(s) for each."
        f" Intervals: paired bootstrap over {problems}.",
    ]
    if summary.get("differences"):
        lines.append(
            "Could have shown: the true difference that so many"
            f" {problems} show in 80 % of cases (two-sided 5 %, by the spread found here)."
        )
    if not summary.get("primary"):
        for minus in ("own", "random"):
            lines += _verdict(summary, ("seal", minus), "accuracy", titles)
    if num < 50:
        lines.append(
            f"With {num} {problems} the intervals are wide, and a bootstrap over so few"
            " still makes them too narrow: a difference whose interval includes 0, or barely not,"
            " is not shown."
        )
    lines += describe_reliability(summary.get("reward_reliability", {}))
    lines.append(_rejected(summary))
    lines += describe_examples(summary.get("examples", []), problems)
    return "\n".join(lines) + "\n"


def _table(arms: Mapping[str, Any], titles: Mapping[str, str], num: int) -> list[str]:
    """Return a row for each arm."""
    dense = any("log_likelihood" in row for row in arms.values())
    head = ["method", "accuracy, % [95 % interval]", "minus own self-edit, points"]
    head += ["log p of gold answers, nats per token [95 % interval]"] if dense else []
    lines = [_row(head), "|" + "---|" * len(head)]
    for arm, row in arms.items():
        cells = [
            titles[arm],
            _percent(row["accuracy"], row["interval"]) + _of(row, "accuracy", num),
        ]
        versus = ""
        if "minus_own" in row:
            versus = _percent(row["minus_own"], row["minus_own_interval"], "+")
            versus += _of(row, "minus_own", num)
        cells.append(versus)
        if dense:
            found = ""
            if "log_likelihood" in row:
                found = _nats(row["log_likelihood"], row["log_likelihood_interval"])
                found += _of(row, "log_likelihood", num)
            cells.append(found)
        lines.append(_row(cells))
    return lines


def _of(row: Mapping[str, Any], name: str, num: int) -> str:
    """Return over how many problems a mean is, where it is not all."""
    count = row.get(f"{name}_problems", num)
    return "" if count == num else f" ({count} of {num})"


def _differences(found: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """Return the table of paired differences: a row for each pair."""
    if not found:
        return []
    scores = [score for score in SCORES if any(one["score"] == score for one in found)]
    head = ["difference", titles["problems"]]
    for score in scores:
        head += [f"{_SCORE_NAMES[score]}, {_UNITS[score]} [95 % interval]", "could have shown"]
    lines = ["", _row(head), "|" + "---|" * len(head)]
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for one in found:
        rows.setdefault((one["arm"], one["minus"]), {})[one["score"]] = one
    for (arm, minus), row in rows.items():
        counts = dict.fromkeys(str(one["num_problems"]) for one in row.values())
        cells = [f"{_short(titles, arm)} minus {_short(titles, minus)}", " / ".join(counts)]
        for score in scores:
            one = row.get(score)
            cells += [_value(one), _least(one)] if one else ["", ""]
        lines.append(_row(cells))
    return lines


def _describe_primary(summary: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """Return the comparisons that were stated before the run; none where none were."""
    lines = []
    for one in summary.get("primary") or []:
        pair = one["pair"]
        said = _verdict(summary, tuple(pair), one["score"], titles) if pair else []
        lines += [f"- **{line}**" for line in said or [f"{one['stated']}: not in this table."]]
    return ["**Primary comparisons, stated before the run:**", "", *lines, ""] if lines else []


def _verdict(
    summary: Mapping[str, Any], pair: tuple[str, ...], score: str, titles: Mapping[str, str]
) -> list[str]:
    """Return a sentence on a pair: its difference, and whether one is shown; none without it."""
    for found in summary.get("differences", []):
        if (found["arm"], found["minus"], found["score"]) != (*pair, score):
            continue
        low, high = found["interval"]
        if low > 0 or high < 0:
            verdict = f"the interval is {'above' if low > 0 else 'below'} 0"
        else:
            verdict = "the interval includes 0, so no difference is shown"
            if found["smallest_shown"] is not None:
                verdict += f"; one of {_least(found)} could have been"
        name = f"{_short(titles, pair[0])} minus {_short(titles, pair[1])}"
        count = f"{found['num_problems']} {titles['problems']}"
        value = f"{_value(found)} {_UNITS[score]}"
        return [f"{name}, {_SCORE_NAMES[score]}: {value}, {count}; {verdict}."]
    return []


def _rejected(summary: Mapping[str, Any]) -> str:
    text = f"Rejected self-edits (counted as 0): {summary['rejected_self_edits']}"
    if not any("log_likelihood" in row for row in summary["arms"].values()):
        return text
    return (
        f"{text}. In log p they, and what was trained to infinity"
        f" ({summary.get('not_finite') or 'none'}), count as the base model, which is what is left."
    )


def mean_reliability(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean over outer steps of the reliability report in their metrics."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("reliability/") and value is not None:  # null: not finite
                found.setdefault(name.removeprefix("reliability/"), []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def describe_reliability(report: Mapping[str, float]) -> list[str]:
    """Return a line on how far the training rewards could be trusted; none without a report."""
    parts = []
    if "reliability_of_mean" in report:
        parts.append(f"reliability {report['reliability_of_mean']:.2f}")
        parts.append(f"{report['reliability_of_one']:.2f} of one seed")
    if "accuracy/reliability_of_mean" in report:
        parts.append(
            "accuracy alone, on the same inner runs, would have had reliability"
            f" {report['accuracy/reliability_of_mean']:.2f},"
            f" {report['accuracy/reliability_of_one']:.2f} of one seed"
        )
    elif "accuracy/variance_within" in report:
        parts.append("accuracy alone, on the same inner runs, did not vary at all")
    if "gain_apparent" in report:
        gain = f"the best self-edit looks {report['gain_apparent']:+.3f} better than the mean"
        if "gain_cross_validated" in report:
            gain += f" and is {report['gain_cross_validated']:+.3f}, cross-validated"
        parts.append(gain)
    return [f"Rewards in training (mean over outer steps): {'; '.join(parts)}."] if parts else []


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _short(titles: Mapping[str, str], arm: str) -> str:
    return titles.get(arm, arm).removeprefix("passage + ").removeprefix("self-edit of the ")


def _value(one: Mapping[str, Any]) -> str:
    write = _percent if one["score"] == "accuracy" else _nats
    return write(one["difference"], one["interval"], "+")


def _least(one: Mapping[str, Any]) -> str:
    """Return the smallest difference that could have been shown."""
    if one["smallest_shown"] is None:
        return "not known"
    least = one["smallest_shown"]
    return f"{100 * least:.1f}" if one["score"] == "accuracy" else f"{least:.3f}"


def _percent(value: float, interval: Sequence[float], sign: str = "") -> str:
    low, high = (f"{100 * x:{sign}.1f}" for x in interval)
    return f"{100 * value:{sign}.1f} [{low}, {high}]"


def _nats(value: float, interval: Sequence[float], sign: str = "") -> str:
    low, high = (f"{x:{sign}.3f}" for x in interval)
    return f"{value:{sign}.3f} [{low}, {high}]"
