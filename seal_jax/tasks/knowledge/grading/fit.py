"""Fits the offline grader's table to a judge's verdicts, and says how well it does elsewhere.

    python -m seal_jax.tasks.knowledge.grading.fit ANSWERS.jsonl --passages FILE ... [--write]

Each line of the file: {question, gold, prediction, yes, votes}; an answer is right where more than
half of its votes are yes. The model is a scorecard, a generalized additive model with step
functions: logit P(right) = intercept + sum over features of the points of the feature's bin, fitted
by Newton's method with an L2 penalty on the steps between neighboring bins, so that neighbors stay
alike. Printed: agreement and Cohen's kappa of the whole `grade`, on passages that the fit has not
seen (10 folds by a hash of the passage, so the same on every machine), and on those that it has.
The intervals resample passages. The rules and word lists are not refitted: they were written with
these passages in view, so answers on others may agree less. With `--write` the table goes to
`points.json`.
"""

import argparse
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from seal_jax.hosts.json_text import parse_json
from seal_jax.tasks.knowledge.grading import grader
from seal_jax.tasks.knowledge.passages import load_problems

MAX_EDGES = 4  # per feature
PENALTY = 30.0
NUM_FOLDS = 10
NUM_RESAMPLES = 2000
NUM_NEWTON_STEPS = 8
PARAMS_PATH = pathlib.Path(__file__).with_name("points.json")
ABOUT = (
    "The grader's table, written by fit.py: do not edit. A feature of features.py falls into one of"
    " its bins: below the first edge, ..., at or above the last. The bin's points are added; a sum"
    " over 0 is right."
)

Table = dict[str, tuple[tuple[float, ...], tuple[float, ...]]]  # feature -> edges, points


class Answers(NamedTuple):
    """Judged answers; N of them."""

    groups: list[str]  # the passage, or the question where passages are not known
    labels: np.ndarray  # bool[N]
    settled: np.ndarray  # f64[N]  1 or 0 where a rule decides, NaN where the table does
    values: np.ndarray  # f64[N F]  0 where settled
    names: list[str]  # of the F features
    self_agreement: float  # of the judge: how often two votes on the same answer are equal


def load(path: str, passages: Mapping[str, str] | None = None) -> Answers:
    """Read judged answers and compute what the grader sees of each.

    Args:
      path: the answers, JSON lines.
      passages: the passage of each question; without it every question is a group of its own.

    Raises:
      ValueError: a question has no passage, or several.
    """
    with open(path, encoding="utf-8") as file:
        rows = [parse_json(line, f"{path}:{i}") for i, line in enumerate(file, 1)]
    questions = [row["question"].strip() for row in rows]
    groups = questions if passages is None else [passages.get(q, "") for q in questions]
    if "" in groups:
        raise ValueError(
            f"{path}: expected one passage for each question; {groups.count(''):,} of"
            f" {len(rows):,} answers have none or several: {questions[groups.index('')]!r}"
        )
    settled, values = [], []
    for row in rows:
        texts = row["question"], row["gold"], row["prediction"]
        settled.append(grader.settle(*texts))
        values.append(grader.measure(*texts) if settled[-1] is None else {})
    names = list(max(values, key=len))
    yes, votes = np.array([(row["yes"], row["votes"]) for row in rows], float).T
    pairs = 1 - 2 * yes * (votes - yes) / np.maximum(1, votes * (votes - 1))
    return Answers(
        groups=groups,
        labels=2 * yes > votes,
        settled=np.array([np.nan if s is None else s for s in settled]),
        values=np.array([[float(v.get(name, 0)) for name in names] for v in values]),
        names=names,
        self_agreement=float(pairs[votes > 1].mean()) if (votes > 1).any() else float("nan"),
    )


def read_passages(paths: list[str]) -> dict[str, str]:
    """Return the id of each question's passage, '' where several passages have the question."""
    found: dict[str, str] = {}
    for path in paths:
        for problem, exam in load_problems(f"json:{path}", "train"):
            for question in exam.questions:
                text = question.question.strip()
                found[text] = problem.id if found.get(text, problem.id) == problem.id else ""
    return found


def choose_edges(values: np.ndarray) -> np.ndarray:
    """Return up to MAX_EDGES bin edges: between all values where few, else at quantiles."""
    distinct = np.unique(values)
    if len(distinct) > MAX_EDGES + 1:
        levels = np.unique(np.quantile(values, np.linspace(0, 1, 3 * MAX_EDGES + 2)[1:-1]))
        levels = levels[levels > distinct[0]]
        picks = np.linspace(0, len(levels) - 1, min(MAX_EDGES, len(levels))).round().astype(int)
        distinct = np.concatenate([distinct[:1], np.unique(levels[picks])])
    return np.floor(distinct[1:] * 1000) / 1000  # three decimals, and no value changes its bin


def newton(steps: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the penalized maximum-likelihood logistic regression: intercept, then one per column.

    Solves argmin_w  -log p(labels | steps, w) + PENALTY/2 |w[1:]|^2  by Newton's method.
    """
    inputs = np.column_stack([np.ones(len(steps)), steps])
    penalty = np.full(inputs.shape[1], PENALTY)
    penalty[0] = 0
    w = np.zeros(inputs.shape[1])
    for _ in range(NUM_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-inputs @ w))
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + np.diag(penalty)
        w += np.linalg.solve(curvature, inputs.T @ (labels - p) - penalty * w)
    return w


def fit(answers: Answers, rows: np.ndarray) -> tuple[float, Table]:
    """Fit the table to the answers in `rows` (bool[N]) that no rule settles."""
    rows = rows & np.isnan(answers.settled)
    values = answers.values[rows]
    edges = [choose_edges(column) for column in values.T]
    steps = [column >= edge for column, es in zip(values.T, edges, strict=True) for edge in es]
    w = newton(np.column_stack(steps).astype(float), answers.labels[rows].astype(float))
    table, start = {}, 1
    for name, es in zip(answers.names, edges, strict=True):
        points = np.concatenate([[0.0], np.cumsum(w[start : start + len(es)])])
        start += len(es)
        table[name] = (tuple(map(float, es)), tuple(round(float(p), 2) for p in points))
    return round(float(w[0]), 2), table


def predict(answers: Answers, intercept: float, table: Table) -> np.ndarray:
    """Return the verdicts, bool[N]: the rules' where they settle, else the table's."""
    scores = np.full(len(answers.labels), intercept)
    for name, column in zip(answers.names, answers.values.T, strict=True):
        edges, points = table[name]
        scores += np.array(points)[np.searchsorted(edges, column, side="right")]
    return np.where(np.isnan(answers.settled), scores.round(2) > 0, answers.settled == 1)


def agreement(labels: np.ndarray, verdicts: np.ndarray) -> tuple[float, float]:
    """Return the share of equal verdicts and Cohen's kappa."""
    observed = np.mean(labels == verdicts)
    a, b = labels.mean(), verdicts.mean()
    chance = a * b + (1 - a) * (1 - b)
    return float(observed), float((observed - chance) / (1 - chance))


def cross_validate(
    answers: Answers, num_folds: int = NUM_FOLDS
) -> tuple[np.ndarray, tuple[float, float]]:
    """Return verdicts by tables fitted to other groups, bool[N], and how those tables fit.

    The second are the mean agreement and kappa on the answers that a table was fitted to.
    """
    digests = [hashlib.md5(group.encode()).hexdigest() for group in answers.groups]
    fold = np.array([int(digest, 16) % num_folds for digest in digests])
    verdicts, on_train = np.zeros(len(answers.labels), bool), []
    for k in np.unique(fold):
        train = fold != k
        predicted = predict(answers, *fit(answers, train))
        verdicts[~train] = predicted[~train]
        on_train.append(agreement(answers.labels[train], predicted[train]))
    share, kappa = np.mean(on_train, axis=0)
    return verdicts, (float(share), float(kappa))


def interval(answers: Answers, verdicts: np.ndarray) -> np.ndarray:
    """Return the 95 % bootstrap interval of agreement and kappa, f64[2 2], groups resampled."""
    group = np.unique(answers.groups, return_inverse=True)[1]
    cells = np.zeros((group.max() + 1, 4))  # per group: how often label, verdict are 00 01 10 11
    np.add.at(cells, (group, 2 * answers.labels + verdicts), 1)
    picks = np.random.default_rng(0).integers(len(cells), size=(NUM_RESAMPLES, len(cells)))
    totals = cells[picks].sum(1)
    no, false_yes, false_no, yes = (totals / totals.sum(1, keepdims=True)).T
    chance = (false_no + yes) * (false_yes + yes) + (no + false_yes) * (no + false_no)
    both = np.stack([no + yes, (no + yes - chance) / (1 - chance)])
    return np.quantile(both, [0.025, 0.975], axis=1).T


def report(answers: Answers, grouped_by: str) -> str:
    """Return what cross-validation says, in lines."""
    verdicts, on_train = cross_validate(answers)
    figures = agreement(answers.labels, verdicts)
    lines = [f"{len(answers.labels):,} answers, {len(set(answers.groups)):,} {grouped_by}s"]
    for name, value, ends, fitted in zip(
        ("agreement", "kappa"), figures, interval(answers, verdicts), on_train, strict=True
    ):
        lines.append(
            f"{name} on unseen {grouped_by}s: {value:.4f} [{ends[0]:.4f}, {ends[1]:.4f}];"
            f" on those fitted to: {fitted:.4f}; gap {fitted - value:.4f}"
        )
    return "\n".join([*lines, f"agreement of the judge with itself: {answers.self_agreement:.4f}"])


def format_table(intercept: float, table: Table) -> str:
    """Return the content of `points.json`: a feature a line, its edges and its points."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(pair)}" for name, pair in table.items())
    head = f' "about": {json.dumps(ABOUT)},\n "intercept": {intercept}'
    return f'{{\n{head},\n "points": {{\n{rows}\n }}\n}}\n'


def main() -> None:
    """Print how well the grader agrees with the verdicts, and fit its table anew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", help="JSON lines of question, gold, prediction, yes, votes")
    parser.add_argument(
        "--passages", nargs="+", metavar="FILE", help="passages with their questions, to group by"
    )
    parser.add_argument("--write", action="store_true", help=f"write {PARAMS_PATH.name}")
    options = parser.parse_args()
    try:
        passages = read_passages(options.passages) if options.passages else None
        answers = load(options.path, passages)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(report(answers, "passage" if passages else "question"))
    table = format_table(*fit(answers, np.ones(len(answers.labels), bool)))
    if options.write:
        PARAMS_PATH.write_text(table, encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
