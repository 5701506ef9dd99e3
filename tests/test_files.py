"""Files of a run survive kills and NaN."""

import json
import math

import numpy as np
import pytest

from seal_jax.hosts import files


def test_metrics_round_trip_and_nonfinite_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.append_metrics(path, 1, {"reward": np.float32(0.5), "count": 3, "one": np.ones((1,))})
    files.append_metrics(path, 2, {"loss": math.nan, "norm": -math.inf, "reward": 0.25})
    first, second = files.read_jsonl(path)
    assert first.pop("time") > 0 and second.pop("time") > 0
    assert first == {"step": 1, "reward": 0.5, "count": 3, "one": 1.0}
    assert second == {
        "step": 2,
        "loss": None,
        "norm": None,
        "reward": 0.25,
        "nonfinite": ["loss", "norm"],
    }
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


@pytest.mark.parametrize("tail", ['{"step": 2, "rew', '{"step": 2}', "\x00\x00\x00"])
def test_a_torn_last_line_is_skipped_then_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    files.append_metrics(path, 1, {"reward": 0.5})
    with open(path, "a") as file:
        file.write(tail)
    assert [row["step"] for row in files.read_jsonl(path)] == [1]
    files.append_metrics(path, 3, {"reward": 0.5})
    assert [row["step"] for row in files.read_jsonl(path)] == [1, 3]
    assert tail not in path.read_text()


def test_a_file_with_only_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st')
    assert files.read_jsonl(path) == []
    files.append_metrics(path, 1, {})
    assert [row["step"] for row in files.read_jsonl(path)] == [1]


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not JSON"):
        files.read_jsonl(path)
    path.write_text('{"step": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON object"):
        files.read_jsonl(path)


LEDGER = {"step": 0, "name": ["a", 0, 0], "text": "f3"}
EDIT = {"step": 0, "problem": "a", "edit": 0, "text": "A note."}


@pytest.mark.parametrize(
    ("row", "other", "result"),
    [
        ({"step": 0, "reward": 0.5}, {"step": 1}, {"reward": 0.6}),
        (EDIT, {"edit": 1}, {"text": "Another note."}),
        (LEDGER, {"text": "f4"}, {"accuracy": 1.0}),
    ],
    ids=["metrics", "edits", "ledger"],
)
def test_a_result_that_is_there_twice_counts_once_and_two_results_are_refused(
    tmp_path, row, other, result
):
    path = tmp_path / "log.jsonl"

    def read(*rows):
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return files.read_jsonl(path)

    assert read(row, row | other, row) == [row, row | other]
    # Two runs at once may find the same at another time.
    again = row | {"time": 1.0, "seconds/inner": 2.0}
    assert read(row, again) == [row]
    with pytest.raises(ValueError, match="log.jsonl: lines 1 and 3 differ, and both are the"):
        read(row, row | other, row | result)


def test_truncate_after_drops_the_steps_that_will_be_redone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.truncate_after(path, 3)
    assert not path.exists()
    for step in range(5):
        files.append_metrics(path, step, {"reward": step / 4})
    files.truncate_after(path, 2)
    assert [row["step"] for row in files.read_jsonl(path)] == [0, 1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["step", "time", "nonfinite"])
def test_reserved_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        files.append_metrics(tmp_path / "metrics.jsonl", 1, {name: 1.0})


@pytest.mark.parametrize("value", ["0.5", None, [1.0, 2.0], {"a": 1}, np.zeros(0)])
def test_only_numbers_are_metrics(tmp_path, value):
    with pytest.raises(TypeError, match="'reward'"):
        files.append_metrics(tmp_path / "metrics.jsonl", 1, {"reward": value})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_write_json_is_whole_sorted_and_never_nan(tmp_path):
    path = tmp_path / "state.json"
    files.write_json(path, {"b": 1, "a": [0.1]})
    assert path.read_text() == '{\n  "a": [\n    0.1\n  ],\n  "b": 1\n}\n'
    with pytest.raises(ValueError):
        files.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": [0.1], "b": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
