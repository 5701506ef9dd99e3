"""Votes for a grid: the reference's first attempts, ties, a second attempt where none was made."""

import json
from pathlib import Path

import numpy as np
import pytest

from seal_jax.tasks.arc import voting

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "arc.json"
A, B, C = [[1, 2], [3, 4]], [[0, 2], [3, 4]], [[5]]


def predictions(*pairs):
    return [{"grid": grid, "inverse": inverse} for grid, inverse in pairs]


@pytest.mark.skipif(not GOLDEN.exists(), reason="the reference's results are not here")
def test_first_attempts_of_the_reference():
    cases = json.loads(GOLDEN.read_text())["voting"]
    assert cases
    for case in cases:
        assert voting.vote(case["predictions"])[0] == case["first_attempt"]


def test_most_votes_then_most_transforms_then_the_first_predicted():
    assert voting.vote(predictions((A, "x"), (B, "x"), (B, "x"))) == [B, A]
    assert voting.vote(predictions((A, "x"), (A, "x"), (B, "x"), (B, "y"))) == [B, A]
    assert voting.vote(predictions((C, "x"), (A, "y"), (B, "x")), num_attempts=2) == [C, A]
    assert voting.vote(predictions((C, "x"), (A, "y"), (B, "x")), num_attempts=1) == [C]


def test_tallies():
    made = predictions((A, "x"), (A, None), (B, "x"), (B, "x"), (B, "x"))
    overall = [(t.grid.tolist(), t.votes, t.transforms) for t in voting.overall_tally(made)]
    assert overall == [(B, 3, 1), (A, 2, 2)]
    each = voting.transform_tallies(made)
    assert list(each) == ["x", None]
    assert [(t.grid.tolist(), t.votes) for t in each["x"]] == [(B, 3), (A, 1)]
    assert [(t.grid.tolist(), t.votes) for t in each[None]] == [(A, 1)]


def test_rows_then_columns_fill_a_missing_attempt():
    # Every grid differs, but each row has a majority that no single grid holds in full.
    made = predictions(
        ([[1, 1], [2, 2], [9, 3]], "x"),
        ([[1, 1], [8, 2], [3, 3]], "x"),
        ([[7, 1], [2, 2], [3, 3]], "x"),
    )
    assert voting.vote(made, num_attempts=4)[3] == [[1, 1], [2, 2], [3, 3]]
    columns = [{"grid": np.array(p["grid"]).T.tolist(), "inverse": p["inverse"]} for p in made]
    assert [[1, 2, 3], [1, 2, 3]] in voting.vote(columns, num_attempts=5)


def test_too_few_different_grids_are_not_padded():
    assert voting.vote(predictions((A, "x"), (A, "y"))) == [A]
    assert voting.vote([]) == []


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_attempts is 0"):
        voting.vote([], num_attempts=0)
    with pytest.raises(ValueError, match="prediction 1: ragged"):
        voting.vote(predictions((A, None), ([[1], [2, 3]], None)))


def test_pass_at_two():
    solutions = [np.array(A), np.array(C)]
    assert voting.pass_at([[B, A], [C]], solutions) == 1.0
    assert voting.pass_at([[B, A], [[[5, 5]]]], solutions) == 0.5
    assert voting.pass_at([[], []], solutions) == 0.0
    with pytest.raises(ValueError, match="1 lists of attempts for 2"):
        voting.pass_at([[A]], solutions)
