"""Pictures of ARC tasks, in the terminal and as files."""

import json
import re

import pytest

from seal_jax.commands.main import main

TASK = {
    "train": [{"input": [[1, 0]], "output": [[0, 1]]}],
    "test": [{"input": [[2, 0]], "output": [[0, 2]]}],
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps({"swap": TASK}))
    return str(path)


def view(*arguments):
    return main(["view", "arc", *arguments])


def test_every_grid_is_printed(source, capsys):
    assert view("swap", "--source", source, "--augmentations", "repeat") == 0
    out = capsys.readouterr().out
    assert "example 0\n  input  1 x 2\n  1 0 \n  output  1 x 2\n  0 1 \n" in out
    assert "test 0\n  input  1 x 2\n  2 0 \n  solution  1 x 2\n  0 2 \n" in out
    assert "repeat_columns_2  1 x 4\n  1 0 1 0 \n" in out
    assert "\x1b" not in out  # not a terminal


def test_color_on_a_terminal_unless_asked_not_to(source, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    view("swap", "--source", source)
    out = capsys.readouterr().out
    backgrounds = set(re.findall(r"\x1b\[48;2;[\d;]+m\x1b\[38;5;\d+m(\d)", out))
    assert backgrounds == {"0", "1", "2"}
    monkeypatch.setenv("NO_COLOR", "1")
    view("swap", "--source", source)
    assert "\x1b" not in capsys.readouterr().out


def test_predictions_are_voted_and_judged(source, tmp_path, capsys):
    predictions = tmp_path / "predictions.json"
    made = [{"grid": [[0, 2]], "inverse": None}, {"grid": [[0, 2]], "inverse": "transpose"}]
    made.append({"grid": [[2, 2]], "inverse": None})
    predictions.write_text(json.dumps([made]))
    assert view("swap", "--source", source, "--predictions", str(predictions)) == 0
    out = capsys.readouterr().out
    assert "attempt 1: 2 of 3 votes, right  1 x 2\n  0 2 \n" in out
    assert "attempt 2: 1 of 3 votes, wrong  1 x 2\n  2 2 \n" in out


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture(source, tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"swap.{ending}"
    assert view("swap", "--source", source, "--augmentations", "size", "--out", str(path)) == 0
    head = path.read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if ending == "png" else b"<svg" in head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "no task 'none' among 1"),
        (["swap", "--augmentations", "sise"], "unknown group 'sise'"),
        (["swap", "--out", "swap.gif"], "ending in .png or .svg"),
    ],
)
def test_bad_arguments(source, capsys, arguments, message):
    assert view(*arguments, "--source", source) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "expected a list of"),
        ("[[], []]", "2 lists of predictions for 1 test"),
        ('[[{"grid": [[1]]}]]', r"[0][0]: expected a list"),
        ('[[{"grid": [[11]], "inverse": null}]]', "expected colors 0 to 9"),
        ('[[{"grid": [[1]], "inverse": 3}]]', "inverse: expected a name or null"),
    ],
)
def test_bad_predictions(source, tmp_path, capsys, content, message):
    path = tmp_path / "predictions.json"
    path.write_text(content)
    assert view("swap", "--source", source, "--predictions", str(path)) == 2
    assert message in capsys.readouterr().err
