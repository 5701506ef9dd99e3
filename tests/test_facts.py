"""The synthetic task: deterministic, disjoint, short, gradable."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.tasks.facts import ATTRIBUTES, Facts, facts_of
from seal_jax.tasks.task import Problem, Question, Rejected, SelfEdit

SENTENCES = ("big is tromun's size.", "monday is tromun's day.", "corn is tromun's food.")
PROBLEM = Problem("tromun", "tromun", " ".join(SENTENCES))
QUESTIONS = (
    Question("tromun size?", "big"),
    Question("tromun day?", "monday"),
    Question("tromun food?", "corn"),
)


def test_a_problem_in_full():
    problem, exam = Facts().load("train")[0]
    assert problem == PROBLEM
    assert exam.problem_id == problem.id
    assert exam.questions == QUESTIONS


def test_deterministic_disjoint_and_independent_of_the_counts():
    train, evaluation = Facts(num_train=300).load("train"), Facts(num_eval=200).load("eval")
    assert (len(train), len(evaluation)) == (300, 200)
    names = [problem.title for problem, _ in train + evaluation]
    assert len(set(names)) == 500
    values = {value for values in ATTRIBUTES.values() for value in values}
    assert not set(names) & (values | set(ATTRIBUTES))
    assert Facts(num_train=10).load("train") == train[:10]
    assert Facts(seed=1).load("train") != Facts().load("train")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        Facts().load("test")


def test_everything_is_short_ascii():
    task = Facts(num_train=500, num_facts=6)
    for problem, exam in task.load("train"):
        assert len(exam.questions) == 6
        assert all(answer in ATTRIBUTES[q.split()[1][:-1]] for q, answer, _ in exam.questions)
        texts = task.passage_only(problem).training_texts
        texts += tuple(task.answer_prompt(problem, q) for q, *_ in exam.questions)
        assert all(text.isascii() and len(text) <= 64 for text in texts)
        assert " ".join(task.passage_only(problem).training_texts) == problem.passage
        assert not any(q in task.edit_prompt(problem) for q, *_ in exam.questions)


def test_lines_become_training_texts_before_the_passage():
    edit = Facts().parse(PROBLEM, " one\n\ntwo\x00 é lines\r\n")
    assert edit == SelfEdit(
        PROBLEM.id,
        f"{PROBLEM.passage}\nnotes:\n",
        " one\n\ntwo\x00 é lines\r\n",
        ("one", "two  lines", *SENTENCES),
    )
    assert Facts().passage_only(PROBLEM).training_texts == SENTENCES


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("\n \x00é", "empty"),
        ("1, 2, 3?", "no words: not a single letter"),
        ("a\n" * 33, "too many texts: 33, at most 32"),
        ("a\n" + "b" * 65, "too long: a line of 65 bytes, at most 64"),
    ],
)
def test_rejected_with_a_reason(text, reason):
    edit = Facts().parse(PROBLEM, text)
    assert edit == Rejected(PROBLEM.id, Facts().edit_prompt(PROBLEM), text, reason)


@settings(deadline=None)
@given(st.text())
def test_parse_takes_any_text(text):
    edit = Facts().parse(PROBLEM, text)
    if isinstance(edit, SelfEdit):
        assert all(line.isascii() and line.isprintable() for line in edit.training_texts)
    else:
        assert edit.reason


@pytest.mark.parametrize(
    ("prediction", "verdict"),
    [
        ("red", True),
        (" Red.\n", True),
        ("\nred red", True),
        ("red\nblue", True),
        ("blue red", False),
        ("reddish", False),
        ("re", False),
        ("", False),
        ("?!", False),
    ],
)
def test_the_first_word_is_graded(prediction, verdict):
    assert Facts().grade(Question("x color?", "red"), prediction) is verdict


@pytest.mark.parametrize("field", ["num_train", "num_eval", "num_facts", "max_texts", "max_bytes"])
def test_bad_fields(field):
    with pytest.raises(ValueError, match=f"{field} is 0, expected 1 to"):
        Facts(**{field: 0})


def test_the_largest_task_is_found():
    assert len(Facts(num_eval=4000).load("eval")) == 4000


def test_facts_are_read_back_from_their_passage():
    for problem, exam in Facts(num_facts=6).load("eval"):
        asked = [(f"{problem.title} {a}?", v) for a, v in facts_of(problem.passage)]
        assert asked == [(q, answer) for q, answer, _ in exam.questions]
