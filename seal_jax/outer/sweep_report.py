"""What a sweep has found, as JSON, as a table with intervals, and as a picture.

Intervals are of means over passages, by Student's t. Differences are paired by passage: all
settings had the same self-edits, questions and random numbers there.
"""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from seal_jax.hosts import manifest
from seal_jax.hosts.exchange import is_first
from seal_jax.hosts.files import write_json, write_text
from seal_jax.outer.differences import describe_mean
from seal_jax.outer.sweep import Found, Scores, Sweep, elsewhere

_MARKERS = "osDv^<>PXp"


def write_report(sweep: Sweep, found: Found, where: str) -> dict[str, Any]:
    """Write tune.md, tune.png and tune.json; return what the last holds.

    Args:
      where: a sentence on which passages these are.
    """
    summary = summarize(sweep, found)
    write_text(os.path.join(sweep.folder, "tune.md"), to_markdown(summary, where))
    plot(summary, os.path.join(sweep.folder, "tune.png"))
    # tune.json last: where it is, the sweep is done.
    write_json(os.path.join(sweep.folder, "tune.json"), summary)
    manifest.update(sweep.folder)
    return summary


def summarize(sweep: Sweep, found: Found) -> dict[str, Any]:
    """Return what tune.json holds."""
    settings = [_row(sweep, found, i, scores) for i, scores in enumerate(found.settings)]
    kept = [i for i, row in enumerate(settings) if row["num_problems"] == len(sweep.problems)]
    unharmed = [i for i in kept if not settings[i]["forgets"] and not settings[i]["diverged"]]
    return {
        "best": found.best,
        "best_that_forgets_nothing": max(
            unharmed, key=lambda i: settings[i]["log_likelihood"]["mean"], default=None
        ),
        "own": sweep.own,
        "rounds": [list(pair) for pair in sweep.rounds],
        "num_edits": sweep.num_edits,
        "num_others": len(elsewhere(sweep, 0)),
        "num_problems": len(sweep.problems),
        "base": _scores_of(found.base) | {"outcomes": [*map(_outcome, found.base)]},
        "settings": settings,
    }


def _row(sweep: Sweep, found: Found, i: int, scores: Sequence[Scores]) -> dict[str, Any]:
    base, own = found.base[: len(scores)], found.settings[sweep.own][: len(scores)]
    beside = _minus(scores, base, "log_likelihood_elsewhere")
    return {
        "set": list(sweep.settings[i].overrides),
        "learning_rate": sweep.settings[i].settings.inner.learning_rate,
        "num_epochs": sweep.settings[i].settings.inner.num_epochs,
        "program": found.groups[i],
        "num_problems": len(scores),
        "num_steps": float(np.mean([one.num_steps for one in scores])),
        "num_rejected": sum(one.num_rejected for one in scores),
        "diverged": not all(math.isfinite(one.log_likelihood) for one in scores),
        "forgets": beside["interval"] is not None and beside["interval"][1] < 0,
        **_scores_of(scores),
        "log_likelihood_minus_base": _minus(scores, base, "log_likelihood"),
        "log_likelihood_minus_own": _minus(scores, own, "log_likelihood"),
        "accuracy_minus_base": _minus(scores, base, "accuracy"),
        "accuracy_minus_own": _minus(scores, own, "accuracy"),
        "accuracy_elsewhere_minus_base": _minus(scores, base, "accuracy_elsewhere"),
        "log_likelihood_elsewhere_minus_base": beside,
        "outcomes": [*map(_outcome, scores)],
    }


def _scores_of(scores: Sequence[Scores]) -> dict[str, Any]:
    names = ("accuracy", "log_likelihood", "accuracy_elsewhere", "log_likelihood_elsewhere")
    return {name: describe_mean([getattr(one, name) for one in scores]) for name in names}


def _minus(scores: Sequence[Scores], others: Sequence[Scores], name: str) -> dict[str, Any]:
    pairs = zip(scores, others, strict=True)
    with np.errstate(invalid="ignore"):  # -inf minus -inf
        return describe_mean([np.subtract(getattr(a, name), getattr(b, name)) for a, b in pairs])


def _outcome(one: Scores) -> dict[str, Any]:
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in one._asdict().items()
    }


def to_markdown(summary: Mapping[str, Any], where: str) -> str:
    """Return the table, with what it can and cannot show.

    Args:
      where: a sentence on which passages these are.
    """
    rows, base = summary["settings"], summary["base"]
    order = sorted(
        range(len(rows)),
        key=lambda i: (-rows[i]["num_problems"], -(rows[i]["log_likelihood"]["mean"] or -1e9)),
    )
    lines = [
        "| setting | passages | steps | dense score | minus base | minus the config's own |"
        " accuracy, % | others, score minus base | |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| base model | {summary['num_problems']} | 0 | {_text(base['log_likelihood'])} | | |"
        f" {_text(base['accuracy'], 100, 1)} | | |",
    ]
    for i in order:
        row = rows[i]
        lines.append(
            f"| {_name(row)} | {row['num_problems']} | {row['num_steps']:.0f} |"
            f" {_text(row['log_likelihood'])} |"
            f" {_text(row['log_likelihood_minus_base'], sign='+')} |"
            f" {'' if i == summary['own'] else _text(row['log_likelihood_minus_own'], sign='+')} |"
            f" {_text(row['accuracy'], 100, 1)} |"
            f" {_text(row['log_likelihood_elsewhere_minus_base'], sign='+')} |"
            f" {_notes(summary, i)} |"
        )
    return "\n".join([*lines, "", *_explain(summary), where]) + "\n"


def _text(found: Mapping[str, Any], factor: float = 1, digits: int = 2, sign: str = "") -> str:
    if found["mean"] is None:
        return "not finite"
    shown = f"{factor * found['mean']:{sign}.{digits}f}"
    if found["interval"] is None:
        return shown
    low, high = (f"{factor * x:{sign}.{digits}f}" for x in found["interval"])
    return f"{shown} [{low}, {high}]"


def _name(row: Mapping[str, Any]) -> str:
    return " ".join(text.partition(".")[2] for text in row["set"]) or "the config's own"


def _notes(summary: Mapping[str, Any], i: int) -> str:
    row = summary["settings"][i]
    named = ((i == summary["best"], "**best**"), (i == summary["own"], "the config's own"))
    found = ((row["diverged"], "diverged"), (row["forgets"], "forgets"))
    found += ((row["num_rejected"], f"{row['num_rejected']} rejected"),)
    return ", ".join(word for holds, word in (*named, *found) if holds)


def _explain(summary: Mapping[str, Any]) -> list[str]:
    """Return what the columns mean, and what was counted how."""
    rounds = [
        f"{count} settings on {seen - before} passages"
        for (_, before), (count, seen) in pairwise([(0, 0), *summary["rounds"]])
    ]
    return [
        "The dense score is the mean log-likelihood per token of the gold answers, asked without"
        " the passage; it decides. In brackets: 95 % intervals of the mean over passages, by"
        " Student's t; differences are paired by passage.",
        f"Others: {summary['num_others']} questions about other passages, of every adapted model;"
        " 'forgets' says that their score fell by more than chance. Accuracy on them:"
        f" {_text(summary['base']['accuracy_elsewhere'], 100, 1)} % of the base model,"
        f" {_text(summary['settings'][summary['best']]['accuracy_elsewhere'], 100, 1)} % with the"
        " best setting.",
        f"Successive halving: {', then '.join(rounds)} more; the config's own setting stays"
        " throughout. Settings that saw fewer passages are compared on those alone. The best is"
        " chosen on what it is measured on: its figures are somewhat too good.",
        f"{summary['num_edits']} self-edit(s) for each passage, the same for all settings of a"
        " style. Those that were rejected count as the base model.",
    ]


def plot(summary: Mapping[str, Any], path: str) -> None:
    """Draw dense score and accuracy over learning rate and steps, as a PNG."""
    if not is_first():
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for column, (name, title, factor) in enumerate(
        (
            ("log_likelihood_minus_base", "dense score minus base", 1),
            ("accuracy", "accuracy, %", 100),
        )
    ):
        _panel(figure, column, summary, name, title, factor)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)


def _panel(
    figure: Any, column: int, summary: Mapping[str, Any], name: str, title: str, factor: float
) -> None:
    from matplotlib.ticker import LogLocator

    rows, most = summary["settings"], summary["num_problems"]
    axes = figure.add_subplot(1, 2, column + 1)
    kinds = list(dict.fromkeys(map(_kind, rows)))
    values = [row[name]["mean"] for row in rows]
    known = [factor * x for x in values if x is not None] or [0.0]
    low, high = min(known), max(known)
    shown = None
    for k, kind in enumerate(kinds):
        mine = [i for i, row in enumerate(rows) if _kind(row) == kind and values[i] is not None]
        # Those of one place stand side by side.
        shift = 1.3 ** (k / (len(kinds) - 1) - 0.5) if len(kinds) > 1 else 1.0
        shown = axes.scatter(
            [rows[i]["learning_rate"] * shift for i in mine],
            [max(rows[i]["num_steps"], 1) for i in mine],
            s=[40 + 160 * rows[i]["num_problems"] / most for i in mine],
            c=[factor * values[i] for i in mine],
            vmin=low,
            vmax=high if high > low else low + 1,
            marker=_MARKERS[k % len(_MARKERS)],
            edgecolors=["#d62728" if rows[i]["forgets"] else "#333" for i in mine],
            linewidths=[2.2 if rows[i]["forgets"] else 0.6 for i in mine],
            label=kind or "settings",
        )
        _mark(axes, summary, mine, shift)
        gone = [row for row in rows if _kind(row) == kind and row["diverged"]]
        axes.scatter(
            [row["learning_rate"] * shift for row in gone],
            [max(row["num_steps"], 1) for row in gone],
            marker="x",
            color="#d62728",
        )
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="steps of an inner run")
    axes.margins(0.12)
    steps = sorted({max(round(row["num_steps"]), 1) for row in rows})
    axes.set_yticks(steps if len(steps) <= 8 else steps[:: -(-len(steps) // 8)])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_title(title)
    figure.colorbar(shown, ax=axes)
    if column == 0:
        note = "size: passages seen; red edge: forgets; x: diverged"
        axes.annotate(note, (0, -0.2), xycoords="axes fraction", fontsize=8)
    if len(kinds) > 1:
        axes.legend(frameon=False, fontsize=7)


def _mark(axes: Any, summary: Mapping[str, Any], members: Sequence[int], shift: float) -> None:
    """Name the best setting and the config's own, where they are among the members."""
    for i, text, below in ((summary["best"], "best", False), (summary["own"], "own", True)):
        if i in members:
            row = summary["settings"][i]
            at = row["learning_rate"] * shift, max(row["num_steps"], 1)
            axes.annotate(
                text,
                at,
                (0, -17 if below else 11),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                weight="bold",
            )


def _kind(row: Mapping[str, Any]) -> str:
    """Return what a setting changes beside what the axes show."""
    shown = ("inner.learning_rate=", "inner.num_epochs=")
    return " ".join(text.partition(".")[2] for text in row["set"] if not text.startswith(shown))
