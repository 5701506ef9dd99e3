"""What a run of self-edits one after another has shown: as JSON, text and picture.

  summary.json   everything, by name; it is written last: where it is, the run is done
  summary.md     a few sentences, then the figures, forgetting by age, and cost
  summary.png    the mean matrix: a row for the unedited model and one for each number of edits

`compare` puts several finished runs side by side, as remedies are compared.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax.continual.matrix import Record, differences, summarize
from seal_jax.hosts import manifest
from seal_jax.hosts.exchange import is_first
from seal_jax.hosts.files import read_object, write_json, write_text
from seal_jax.hosts.replacing import replacing

OTHERS = (
    "it had other sequences, so that no difference of the two is paired: expected the same problems"
    " in the same order (the same task, seed, number and length of sequences, and control set)"
)
KIND = "continual"  # of a summary, beside those of other commands
MOST_CELLS = 10  # edits up to which the picture has numbers in it
# How figures are shown: title, factor, digits, sign.
_SHOWN = {
    "unedited": ("unedited model, all questions, %", 100, 1, ""),
    "diagonal": ("right after each edit (diagonal), %", 100, 1, ""),
    "final": ("after all edits (final), %", 100, 1, ""),
    "diagonal_minus_unedited": ("diagonal minus unedited, points", 100, 1, "+"),
    "final_minus_unedited": ("final minus unedited, points", 100, 1, "+"),
    "backward_transfer": ("backward transfer, points", 100, 1, "+"),
    "forward_transfer": ("forward transfer, points", 100, 1, "+"),
    "control_unedited": ("control set, unedited, %", 100, 1, ""),
    "control_final": ("control set, after all edits, %", 100, 1, ""),
    "control_change": ("control set, change, points", 100, 1, "+"),
    "perplexity_unedited": ("perplexity of general text, unedited", 1, 2, ""),
    "perplexity_final": ("perplexity of general text, after all edits", 1, 2, ""),
    "log_perplexity_change": ("log perplexity of general text, change, nats per token", 1, 3, "+"),
}
_COMPARED = (
    *("final", "diagonal", "final_minus_unedited", "backward_transfer", "forward_transfer"),
    *("control_change", "log_perplexity_change"),
)


def write_report(
    record: Record, folder: str, name: str, notes: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """Write summary.md, summary.png and summary.json; return what the last holds.

    Args:
      name: of what was done against forgetting, as tables call it.
      notes: sentences that belong to the figures, such as how many edits a gate has refused.
      more: further values for summary.json, as JSON has them.

    Raises:
      ValueError: see `matrix.summarize`; or a name in `more` is one of the summary's own.
    """
    summary = summarize(record) | {"kind": KIND, "name": name, "notes": list(notes)}
    if twice := sorted(summary.keys() & more.keys()):
        raise ValueError(f"the summary has its own {', '.join(twice)}")
    summary |= more
    write_text(os.path.join(folder, "summary.md"), to_markdown(summary))
    plot(summary, os.path.join(folder, "summary.png"))
    write_json(os.path.join(folder, "summary.json"), summary)
    manifest.update(folder)
    return summary


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Return what the run shows in sentences, and its tables."""
    lines = [f"# {summary['name']}", "", *_sentences(summary), ""]
    figures = [
        (title, _text(summary["figures"][name], factor, digits, sign))
        for name, (title, factor, digits, sign) in _SHOWN.items()
    ]
    lines += [*_table(["figure", "mean over sequences"], figures), "", *_ages(summary), ""]
    head = ["cost of an edit, all sequences together", "median", "first half", "second half"]
    costs = []
    for name, title, factor in (("seconds", "seconds", 1), ("bytes", "MB", 1e-6)):
        parts = ("per_edit", "first_half", "second_half", "slope")
        cost = summary["cost"][name]
        costs.append([title, *(_number(cost[part], factor) for part in parts)])
    lines += _table([*head, "more with each edit"], costs)
    return "\n".join([*lines, "", *_explain(summary)]) + "\n"


def _ages(summary: Mapping[str, Any]) -> list[str]:
    """Return the table of forgetting by age of the edit."""
    head = ["edits made since", "problems", "score, %", "minus unedited, points"]
    head.append("minus right after the edit, points")
    rows = []
    for row in (summary["by_age"][age] for age in _some_ages(summary["num_edits"])):
        parts = (("score", ""), ("minus_unedited", "+"), ("minus_diagonal", "+"))
        cells = [_text(row[name], 100, 1, sign) for name, sign in parts]
        if row["age"] == 0:
            cells[-1] = ""  # it is the diagonal
        rows.append([str(row["age"]), str(row["num_problems"]), *cells])
    return _table(head, rows)


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    figures, N = summary["figures"], summary["num_edits"]

    def percent(name: str, sign: str = "") -> str:
        return _text(figures[name], 100, 1, sign)

    lines = [
        f"{summary['num_sequences']} sequence(s), in each {N} self-edit(s) one after another.",
        f"Unedited, the models answer {percent('unedited')} % of the questions right; right after"
        f" an edit {percent('diagonal')} % of those about it; after all edits"
        f" {percent('final')} % of all.",
    ]
    minus = percent("final_minus_unedited", "+")
    verdict = _verdict(figures["final_minus_unedited"])
    if verdict == "above":
        lines.append(f"So after all edits they know more than without any: {minus} points.")
    elif verdict == "below":
        lines.append(f"So after all edits they know less than without any: {minus} points.")
    else:
        lines.append(f"After all edits minus unedited: {minus} points; no difference is shown.")
    if N > 1:
        transfer = percent("backward_transfer", "+")
        lines.append(f"From right after an edit to the end: {transfer} points (backward transfer).")
    lines += _age_sentence(summary["by_age"])
    if figures["control_change"]["mean"] is None:
        lines.append("There is no control set, so what edits break elsewhere is not known.")
    else:
        change = percent("control_change", "+")
        lines.append(f"Control set, which no edit touches: {change} points.")
    return [*lines, *summary["notes"]]


def _verdict(found: Mapping[str, Any]) -> str:
    """Return 'above' or 'below' where the interval is so of 0, else ''."""
    low, high = found["interval"] or (0, 0)
    return "above" if low > 0 else "below" if high < 0 else ""


def _age_sentence(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say after how many further edits an edit's benefit is gone."""
    means = [(row["age"], row["minus_unedited"]["mean"]) for row in rows]
    known = [(age, mean) for age, mean in means if mean is not None]
    if not known or known[0][0] > 0:
        return []
    gone = next((age for age, mean in known if mean <= 0), None)
    if gone == 0:
        return ["On average an edit has no benefit, not even right after it."]
    if gone is None:
        age = known[-1][0]
        return [f"On average an edit's benefit is still there after {age} more edit(s)."]
    return [f"On average an edit's benefit is gone after {gone} more edit(s)."]


def _some_ages(num: int) -> list[int]:
    """Return all ages up to 16, and of more some: powers of two, and the last."""
    if num <= 16:
        return list(range(num))
    return sorted({0, *(2**i for i in range(num.bit_length())), num - 1} - {num})


def _explain(summary: Mapping[str, Any]) -> list[str]:
    rows = summary["num_edits"] - 1
    lines = [
        "In brackets: 95 % intervals of the mean over sequences, by Student's t; fewer than three"
        " sequences have none. Backward transfer: how the score of a problem changes from right"
        " after its edit to the end, over all problems but the last. Forward transfer: how that"
        " of problems whose edit is still to come changes against the unedited model, over"
        f" {summary['forward_rows']} of {rows} rows that were asked whole. At an age: over the"
        " problems that were asked so many edits after their own. General text: the passages of"
        " the control set.",
        "The cost of a half is its median over edits: the first ones compile programs.",
    ]
    if rows > MOST_CELLS:
        lines.append("summary.json has every age and the whole matrix.")
    return lines


def _text(found: Mapping[str, Any], factor: float = 1, digits: int = 2, sign: str = "") -> str:
    """Return a mean with its interval, or why there is none."""
    if found["mean"] is None:
        return found["why"]
    shown = f"{factor * found['mean']:{sign}z.{digits}f}"  # z: no -0.0
    if found["interval"] is None:
        return shown
    low, high = (f"{factor * x:{sign}z.{digits}f}" for x in found["interval"])
    return f"{shown} [{low}, {high}]"


def _number(value: float | None, factor: float = 1) -> str:
    return "" if value is None else f"{factor * value:,.4g}"


def plot(summary: Mapping[str, Any], path: str) -> None:
    """Draw the mean matrix as a PNG; gray is what was not asked.

    The stair runs between problems that were edited (below it) and those still to come. Of a long
    run only the rows are there of which most edited problems were asked.
    """
    if not is_first():
        return
    manifest.forget(os.path.dirname(path), [os.path.basename(path)])
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = summary["matrix"]["mean"]
    values = 100 * np.array([[np.nan if x is None else x for x in row] for row in rows])
    edits, N = np.arange(len(values)), values.shape[1]
    if N > MOST_CELLS:
        edits = edits[(edits == 0) | ((~np.isnan(values)).sum(axis=1) > edits / 2)]
    values = values[edits]
    known = values[~np.isnan(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    high = max(high, low + 1)
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colormaps["cividis"].with_extremes(bad="#d9d9d9"),  # for the colorblind, too
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    num = len(edits)
    axes.axhline(0.5, color="white", linewidth=3 if num <= 40 else 1)  # above: unedited
    stair = np.repeat(edits[1:], 2) - 0.5, np.arange(1, num)[:, None] + (-0.5, 0.5)
    axes.plot([-0.5, *stair[0]], [0.5, *stair[1].ravel()], color="#d55e00", linewidth=1.5)
    columns = np.arange(N)[_every(N) - 1 :: _every(N)]
    axes.set_xticks(columns, columns + 1)
    ticks = np.arange(num)[:: _every(num)]
    axes.set_yticks(ticks, ["unedited", *edits[ticks][1:]])
    axes.set(xlabel="questions about problem (left of the line: edited)", ylabel="self-edits made")
    axes.set_title(f"{summary['name']}: right answers, %, mean of {summary['num_sequences']}")
    if N <= MOST_CELLS:
        _annotate(axes, values, (low + high) / 2)
    figure.colorbar(image, ax=axes)
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _every(num: int) -> int:
    """Return the power of two that leaves at most 17 of so many labels."""
    return 2 ** max(0, math.ceil(math.log2(num / 17)))


def _annotate(axes: Any, values: np.ndarray, middle: float) -> None:
    """Write each known value into its cell, light on dark."""
    for (k, i), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if value < middle else "black"
            axes.text(i, k, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)


def compare(folders: Sequence[str], minus: str) -> tuple[str, dict[str, Any]]:
    """Return finished runs side by side, as a table and as JSON, with differences to one of them.

    Args:
      folders: of runs of the same sequences.
      minus: the one of these folders that the others are compared with.

    Raises:
      FileNotFoundError: a folder has no summary.json.
      ValueError: it is not of such a run, a folder is there twice, `minus` is none of them, or the
        runs had different sequences.
    """
    names = [os.path.normpath(folder) for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"asked for twice: {', '.join(twice)}")
    base = os.path.normpath(minus)
    if base not in names:
        raise ValueError(f"{minus}: expected one of the runs, {', '.join(names)}")
    runs = {name: read_summary(name) for name in names}
    rows = {}
    for name, run in runs.items():
        try:
            against = {} if name == base else differences(run, runs[base])
        except ValueError as error:
            raise ValueError(f"{name} and {base}: {error}") from error
        rows[name] = {
            "name": run["name"],
            "figures": run["figures"],
            "differences": against,
            "seconds_ratio": _ratio(run, runs[base], "seconds"),
            "bytes_ratio": _ratio(run, runs[base], "bytes"),
            "seconds_growth": run["cost"]["seconds"]["growth"],
            "bytes_growth": run["cost"]["bytes"]["growth"],
        }
    found = {"minus": base, "num_sequences": runs[base]["num_sequences"], "runs": rows}
    return _comparison_text(found, runs[base]), found


def check_against(folders: Sequence[str], workdir: str, sequences: Sequence[Sequence[str]]) -> None:
    """Refuse runs that a run of these sequences in `workdir` could not be compared with.

    Raises:
      ValueError: one is not finished, of other sequences, or there twice; see `compare`.
    """
    names = [os.path.normpath(folder) for folder in (*folders, workdir)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--against: asked for twice: {', '.join(twice)}")
    for folder in folders:
        if not os.path.exists(os.path.join(folder, "summary.json")):
            raise ValueError(f"--against {folder}: no summary.json: expected a finished run")
        if read_summary(folder)["sequences"] != [list(one) for one in sequences]:
            raise ValueError(f"--against {folder}: {OTHERS}")


def read_summary(folder: str) -> dict[str, Any]:
    """Return the summary of a finished run.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not of a run of self-edits one after another, or damaged.
    """
    manifest.refuse_damaged(folder, ("summary.json",))
    path = os.path.join(folder, "summary.json")
    found = read_object(path)
    needed = {"name", "figures", "per_sequence", "sequences", "num_sequences", "cost"}
    if found.get("kind") != KIND or needed - found.keys():
        raise ValueError(
            f"{path}: expected the summary of `seal-jax continual`, found one of kind"
            f" {found.get('kind')!r} without {sorted(needed - found.keys())}"
        )
    return found


def _ratio(run: Mapping[str, Any], base: Mapping[str, Any], name: str) -> float | None:
    mine, other = (one["cost"][name]["per_edit"] for one in (run, base))
    return mine / other if other > 0 else None


def _comparison_text(found: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    rows = found["runs"]
    titles = [_SHOWN[name][0] for name in _COMPARED]
    costs = ["time per edit", "bytes per edit", "growth of time", "growth of bytes"]
    lines = _table(["run", *titles, *costs], [_cells(name, rows[name]) for name in rows])
    others = [name for name in rows if name != found["minus"]]
    if others:
        head = [f"minus {base['name']}", *titles]
        lines += ["", *_table(head, [_cells(name, rows[name], minus=True) for name in others])]
    lines += [
        "",
        f"{found['num_sequences']} sequence(s), the same in all runs. In brackets: 95 % intervals"
        " of the mean over sequences, by Student's t; differences are paired by sequence. Time and"
        f" bytes per edit: medians, relative to {base['name']}. Growth: the second half of the"
        " edits over the first.",
    ]
    return "\n".join(lines) + "\n"


def _cells(folder: str, row: Mapping[str, Any], minus: bool = False) -> list[str]:
    """Return a run's row: its figures and costs, or its differences."""
    cells = [f"{row['name']} ({os.path.basename(folder)})"]
    for name in _COMPARED:
        _, factor, digits, sign = _SHOWN[name]
        found = row["differences" if minus else "figures"][name]
        cells.append(_text(found, factor, digits, "+" if minus else sign))
    if not minus:
        costs = ("seconds_ratio", "bytes_ratio", "seconds_growth", "bytes_growth")
        cells += [f"{row[one]:.2f} x" if row[one] is not None else "" for one in costs]
    return cells


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]
