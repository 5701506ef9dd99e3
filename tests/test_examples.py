"""Questions before and after: whose answers, and what untrusted text does to the table."""

import re

import pytest

from seal_jax.outer.examples import ArmRuns, describe_examples, examples_of, quote
from seal_jax.outer.rewards import Outcome
from seal_jax.tasks.task import Exam, Problem, Question, Rejected, SelfEdit

EDIT, REJECTED = SelfEdit("", "", "x", ("x",)), Rejected("", "", "", "empty")


class Task:
    """Two questions; a right answer is the gold one."""

    def grade(self, question, prediction):
        return prediction == question.answer


class Voting(Task):
    def queries(self, problem, exam):
        return ["?"] * 8


def outcome(*answers, loss=1.0):
    return Outcome(0.0, None, 2.0, loss, answers, 1)


QUESTIONS = (Question("who?", "Ann"), Question("when?", "1901"))
PROBLEMS = [(Problem(n, n.upper(), n), Exam(n, QUESTIONS)) for n in ("a", "b", "c", "d")]
NAN = float("nan")


@pytest.fixture
def arms():
    base = {(n, 0, 0): outcome("Ann", "no", loss=NAN) for n in "abcd"}
    passage = {(n, 0, 0): outcome("Ann", "1901") for n in "abcd"}
    # The second self-edit, another seed, and what policies wrote as questions are not shown.
    seal = {
        ("a", 0, 0): outcome("Bob", "1901", "to a question of its own"),
        ("a", 0, 1): outcome("Ann", "1901"),
        ("a", 1, 0): outcome("Ann", "1901"),
        ("c", 0, 0): outcome("Ann", "1901", loss=NAN),
        ("d", 0, 0): outcome("Ann", "1901"),
    }
    edits = [[EDIT, EDIT], [REJECTED, EDIT], [EDIT, EDIT], [EDIT, EDIT]]
    ones = [[EDIT]] * 4
    return {
        "base": ArmRuns(ones, base),
        "passage": ArmRuns(ones, passage),
        "seal": ArmRuns(edits, seal),
    }


def test_the_first_three_problems_before_and_after(arms):
    found = examples_of(Task(), PROBLEMS, arms)
    assert [(one["problem"], one["question"]) for one in found] == [
        (name, question.question) for name in "abc" for question in QUESTIONS
    ]
    first, second = found[:2]
    assert first["answers"] == {"base": "Ann", "passage": "Ann", "seal": "Bob"}
    assert first["right"] == {"base": True, "passage": True, "seal": False}
    assert second["right"] == {"base": False, "passage": True, "seal": True}
    text = "\n".join(describe_examples(found, "passages"))
    assert "The questions of the first 3 held-out passages" in text
    assert "| `A` | `who?` | `Ann` | + `Ann` | + `Ann` | - `Bob` |" in text
    assert "| `B` | `who?` | `Ann` | + `Ann` | + `Ann` | - (self-edit rejected) |" in text
    assert "| `C` | `who?` | `Ann` | + `Ann` | + `Ann` | - (training not finite) |" in text


def test_where_answers_are_voted_on_there_is_nothing_to_show(arms):
    assert examples_of(Voting(), PROBLEMS, arms) == describe_examples([], "tasks") == []


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a | b\n| c |", "`a \u00a6 b \u00a6 c \u00a6`"),
        ("`x` ``y``", "`'x' ''y''`"),
        ("<script>alert(1)</script>", "`<script>alert(1)</script>`"),  # code is no markup
        ("a\r\n\t\x00\x1b[31m b\u2028c\x85", "`a [31m b c`"),
        ("\u202eright to left\ud800", "`right to left`"),
        (" \n ", "(nothing)"),
        ("", "(nothing)"),
        ("x" * 500, f"`{'x' * 97}...`"),
    ],
)
def test_what_a_model_says_is_one_cell(text, shown):
    assert quote(text) == shown
    quote(text).encode()
    assert re.fullmatch(r"`[^`|\r\n]+`|\(nothing\)", quote(text))


def test_a_row_has_six_cells_whatever_a_model_says(arms):
    evil = "|x|\n|---|\n<b>`|` \\| **bold** \\"
    arms["seal"].outcomes["a", 0, 0] = outcome(evil, evil)
    lines = describe_examples(examples_of(Task(), PROBLEMS, arms), "passages")
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == 6 and not any("\n" in line for line in lines)
    assert all(row.count("|") == 7 for row in rows)
