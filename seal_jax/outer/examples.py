"""The first held-out questions, before and after: what each model answered, and whether it counts.

What a model says is untrusted: it must not break the table, nor be read as Markdown or HTML.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from seal_jax.outer.ledger import Outcomes
from seal_jax.outer.problems import Batch, Pair
from seal_jax.outer.stages import Edits
from seal_jax.tasks.task import Rejected, Task, asks_once, marks_of

NUM_PROBLEMS = 3  # the first, so that nobody chooses them
SHOWN = ("base", "passage", "seal")  # arms


class ArmRuns(NamedTuple):
    """The self-edits [P][R] of an arm, and what their inner runs achieved."""

    edits: Edits
    outcomes: Outcomes


def examples_of(task: Task, problems: Batch, arms: Mapping[str, ArmRuns]) -> list[dict[str, Any]]:
    """Return the questions of the first problems: gold answers, and what the arms answered.

    An arm's answers are those of its first self-edit, under the first seed. A task that asks in
    several ways and votes has none.

    Returns:
      For each question: problem, title, question, gold, and by arm answers (None where there is
      none), right (whether it counts) and why (why there is none).
    """
    found: list[dict[str, Any]] = []
    if not asks_once(task):
        return found
    for p, (problem, exam) in enumerate(problems[:NUM_PROBLEMS]):
        shown = {
            name: _answers(task, (problem, exam), name, arms[name], p)
            for name in SHOWN
            if name in arms
        }
        for q, question in enumerate(exam.questions):
            found.append(
                {
                    "problem": problem.id,
                    "title": problem.title,
                    "question": question.question,
                    "gold": question.answer,
                    "answers": {n: a[q] if a else None for n, (a, _, _) in shown.items()},
                    "right": {n: bool(m[q]) if m else False for n, (_, m, _) in shown.items()},
                    "why": {n: why for n, (_, _, why) in shown.items() if why},
                }
            )
    return found


def _answers(
    task: Task, posed: Pair, name: str, arm: ArmRuns, p: int
) -> tuple[list[str], list[float], str]:
    """Return the answers to each question and their marks; or none, and why."""
    problem, exam = posed
    if not arm.edits[p]:
        return [], [], "no text"
    if isinstance(arm.edits[p][0], Rejected):
        return [], [], "self-edit rejected"
    outcome = arm.outcomes[problem.id, 0, 0]
    if name != "base" and not outcome.finite:
        return [], [], "training not finite"
    answers = list(outcome.answers[: len(exam.questions)])
    return answers, marks_of(task, problem, exam, answers), ""


def describe_examples(found: Sequence[Mapping[str, Any]], problems: str) -> list[str]:
    """Return a table of the examples; none without any."""
    if not found:
        return []
    count = len({one["problem"] for one in found})
    lines = [
        "",
        f"The questions of the first {count} held-out {problems}, before and after (of several"
        " self-edits or seeds the first; + counts as right, - does not):",
        "",
        "| title | question | gold answer | base model | trained on it alone | SEAL policy |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        cells = [quote(one["title"], 40), quote(one["question"]), quote(one["gold"])]
        for arm in SHOWN:
            answer = one["answers"].get(arm)
            said = f"({one['why'].get(arm, 'none')})" if answer is None else quote(answer)
            cells.append(f"{'+' if one['right'].get(arm) else '-'} {said}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def quote(text: str, most: int = 100) -> str:
    """Return untrusted text for a cell of a Markdown table: one line of code, cut.

    In code nothing is markup. What does not print (line ends, control and direction marks) becomes
    a space, a backtick ', a pipe \u00a6.
    """
    printed = "".join(char if char.isprintable() else " " for char in text)
    line = " ".join(printed.split()).replace("`", "'").replace("|", "\u00a6")
    if len(line) > most:
        line = line[: most - 3].rstrip() + "..."
    return f"`{line}`" if line else "(nothing)"
