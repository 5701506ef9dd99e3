"""Checks on the package's own passages: seal_jax/tasks/knowledge/passages.json."""

import json
import re
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "seal_jax" / "tasks" / "knowledge" / "passages.json"
DATA = json.loads(PATH.read_text(encoding="utf-8"))
TRAIN, EVAL = DATA["train"], DATA["eval"]
PASSAGES = TRAIN + EVAL

each_passage = pytest.mark.parametrize("item", PASSAGES, ids=lambda item: item["title"])


def contains(text, phrase, flags=re.IGNORECASE):
    """True where phrase stands in text as whole words."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, flags) is not None


def bare(answer):
    """The answer in lower case, without a leading article."""
    return re.sub(r"^(the|an?) ", "", answer.lower())


def full_text(item):
    questions = [q["question"] + " " + q["answer"] for q in item["questions"]]
    return " ".join([item["title"], item["context"], *questions])


def title_words(item):
    return item["title"].split()


def leaks(items, others):
    """Title words of items that occur, capitalized, anywhere in the other passages."""
    text = " ".join(full_text(other) for other in others)
    return [word for item in items for word in title_words(item) if contains(text, word, 0)]


def test_there_are_enough_passages():
    assert len(PASSAGES) >= 24
    assert TRAIN and EVAL


def test_the_file_says_what_it_is():
    assert DATA["license"] == "Apache-2.0"
    assert "invented" in DATA["about"]


def test_titles_and_contexts_are_unique():
    for key in ("title", "context"):
        values = [item[key].lower() for item in PASSAGES]
        assert len(set(values)) == len(values)


def test_questions_are_unique():
    questions = [q["question"].lower() for item in PASSAGES for q in item["questions"]]
    assert len(set(questions)) == len(questions)


def test_eval_subjects_never_occur_in_train():
    assert leaks(EVAL, TRAIN) == []


def test_train_subjects_never_occur_in_eval():
    assert leaks(TRAIN, EVAL) == []


@each_passage
def test_fields_are_clean_text(item):
    assert set(item) == {"title", "context", "questions"}
    texts = [item["title"], item["context"]]
    texts += [value for q in item["questions"] for value in q.values()]
    for text in texts:
        assert text and text.isascii() and text == " ".join(text.split())


@each_passage
def test_context_length(item):
    assert 80 <= len(item["context"].split()) <= 200


@each_passage
def test_context_names_its_subject(item):
    assert contains(item["context"], item["title"])


@each_passage
def test_exactly_five_questions(item):
    assert len(item["questions"]) == 5
    for question in item["questions"]:
        assert set(question) == {"question", "answer"}
        assert question["question"].endswith("?")


@each_passage
def test_answers_are_in_the_context_and_not_in_the_question(item):
    for question in item["questions"]:
        assert contains(item["context"], question["answer"])
        assert not contains(question["question"], bare(question["answer"]))


@each_passage
def test_answers_are_short_and_distinct(item):
    answers = [bare(question["answer"]) for question in item["questions"]]
    assert len(set(answers)) == len(answers)
    assert all(len(answer.split()) <= 4 for answer in answers)


@each_passage
def test_questions_name_the_subject(item):
    for question in item["questions"]:
        assert any(contains(question["question"], word) for word in title_words(item))
