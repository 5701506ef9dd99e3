"""Fits the offline grader's table to a judge's verdicts.

    python -m seal_jax.tasks.knowledge.grading.fit graded_answers.jsonl [--write]

Each line of the file: {question, gold, prediction, yes, votes}; an answer is right where more than
half of its votes are yes. The model is a scorecard, a generalized additive model with step
functions: logit P(right) = intercept + sum over features of the points of the feature's bin, fitted
by Newton's method with an L2 penalty on the steps between neighboring bins, so that neighbors stay
alike. Printed: agreement and Cohen's kappa of the whole `grade`, on questions that the fit has not
seen (5 folds by a hash of the question, so the same on every machine). With `--write` the table
goes to `points.json`.
"""

import argparse
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from seal_jax.tasks.knowledge.grading import grader

MAX_EDGES = 6  # per feature
PENALTY = 10.0
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

    questions: list[str]
    labels: np.ndarray  # bool[N]
    settled: np.ndarray  # f64[N]  1 or 0 where a rule decides, NaN where the table does
    values: np.ndarray  # f64[N F]  0 where settled
    names: list[str]  # of the F features


def load(path: str) -> Answers:
    """Read judged answers and compute what the grader sees of each."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    settled, values = [], []
    for row in rows:
        texts = row["question"], row["gold"], row["prediction"]
        settled.append(grader.settle(*texts))
        values.append(grader.measure(*texts) if settled[-1] is None else {})
    names = list(max(values, key=len))
    return Answers(
        questions=[row["question"] for row in rows],
        labels=np.array([2 * row["yes"] > row["votes"] for row in rows]),
        settled=np.array([np.nan if s is None else s for s in settled]),
        values=np.array([[float(v.get(name, 0)) for name in names] for v in values]),
        names=names,
    )


def question_hash(question: str) -> int:
    """Return a number that depends on the question alone, to split by."""
    return int(hashlib.md5(question.encode()).hexdigest(), 16)


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


def cross_validate(answers: Answers, num_folds: int = 5) -> list[tuple[float, float]]:
    """Return the agreement and kappa of each fold, fitted to the other folds' questions."""
    fold = np.array([question_hash(q) % num_folds for q in answers.questions])
    results = []
    for k in range(num_folds):
        verdicts = predict(answers, *fit(answers, fold != k))
        results.append(agreement(answers.labels[fold == k], verdicts[fold == k]))
    return results


def format_table(intercept: float, table: Table) -> str:
    """Return the content of `points.json`: a feature a line, its edges and its points."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(pair)}" for name, pair in table.items())
    head = f' "about": {json.dumps(ABOUT)},\n "intercept": {intercept}'
    return f'{{\n{head},\n "points": {{\n{rows}\n }}\n}}\n'


def main() -> None:
    """Print how well the grader agrees with the verdicts, and fit its table anew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", help="JSON lines of question, gold, prediction, yes, votes")
    parser.add_argument("--write", action="store_true", help=f"write {PARAMS_PATH.name}")
    options = parser.parse_args()
    answers = load(options.path)
    folds = np.array(cross_validate(answers))
    for name, column in zip(("agreement", "kappa"), folds.T, strict=True):
        print(f"{name} on unseen questions: {column.mean():.4f} +- {column.std():.4f} over folds")
    everything = np.ones(len(answers.labels), bool)
    fitted = fit(answers, everything)
    share, kappa = agreement(answers.labels, predict(answers, *fitted))
    print(f"agreement and kappa on all: {share:.4f} {kappa:.4f}")
    if options.write:
        PARAMS_PATH.write_text(format_table(*fitted), encoding="utf-8")
    else:
        print(format_table(*fitted))


if __name__ == "__main__":
    main()
