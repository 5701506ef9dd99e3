"""Augmentations give the reference's results, and their inverses undo them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.tasks.arc.augmentations import (
    AUGMENTATIONS,
    GROUPS,
    INVERSES,
    augment_examples,
    color_permutation,
    permute_examples,
    translation,
)
from seal_jax.tasks.arc.grids import Example, same

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "arc.json"


@st.composite
def grids(draw, most=6):
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    cells = draw(st.lists(st.integers(0, 9), min_size=height * width, max_size=height * width))
    return np.array(cells, np.int8).reshape(height, width)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the reference's results are not here")
def test_results_of_the_reference():
    cases = json.loads(GOLDEN.read_text())["augmentations"]
    assert cases
    for case in cases:
        for name, expected in case["results"].items():
            assert AUGMENTATIONS[name](np.array(case["grid"])).tolist() == expected, name
        in_groups = {name for group in GROUPS.values() for name in group}
        assert in_groups == set(case["results"])


def test_a_small_grid_by_hand():
    grid = np.array([[1, 2], [3, 4]])
    expected = {
        "rotate_90": [[2, 4], [1, 3]],
        "flip_rows": [[3, 4], [1, 2]],
        "reflect_rows_reversed": [[3, 4], [1, 2], [1, 2], [3, 4]],
        "increase_width_2": [[1, 1, 2, 2], [3, 3, 4, 4]],
        "increase_height_3": [[1, 2]] * 3 + [[3, 4]] * 3,
        "repeat_rows_2": [[1, 2], [3, 4], [1, 2], [3, 4]],
        "repeat_columns_3": [[1, 2] * 3, [3, 4] * 3],
        "transpose_then_resolution_2": [[1, 1, 3, 3]] * 2 + [[2, 2, 4, 4]] * 2,
    }
    for name, result in expected.items():
        assert AUGMENTATIONS[name](grid).tolist() == result, name


@pytest.mark.parametrize("name", AUGMENTATIONS)
@settings(max_examples=15)
@given(grids())
def test_the_inverse_undoes_it(name, grid):
    before = grid.copy()
    assert same(INVERSES[name](AUGMENTATIONS[name](grid)), grid)
    assert same(grid, before)  # neither changes its argument


@settings(max_examples=30)
@given(grids(), st.integers(0, 1000))
def test_random_ones_can_be_undone_and_depend_on_the_seed_alone(grid, seed):
    for draw in (translation, color_permutation):
        forward, inverse = draw(np.random.default_rng(seed))
        again, _ = draw(np.random.default_rng(seed))
        assert same(inverse(forward(grid)), grid)
        assert same(forward(grid), again(grid))
        assert forward(grid).dtype == grid.dtype


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_the_background_keeps_its_color(seed):
    forward, _ = color_permutation(np.random.default_rng(seed))
    colors = forward(np.arange(10)).tolist()
    assert colors[0] == 0
    assert sorted(colors) == list(range(10))


def test_both_grids_of_an_example_change_alike_and_none_is_lost_in_a_permutation():
    examples = [Example(np.full((1, 2), i), np.full((2, 1), i)) for i in range(5)]
    turned = augment_examples(examples, AUGMENTATIONS["transpose"])
    assert [e.input.shape for e in turned] == [(2, 1)] * 5
    assert [e.output.shape for e in turned] == [(1, 2)] * 5
    permuted = permute_examples(examples, np.random.default_rng(1))
    assert [int(e.input[0, 0]) for e in permuted] != [0, 1, 2, 3, 4]
    assert sorted(int(e.input[0, 0]) for e in permuted) == [0, 1, 2, 3, 4]
    assert all(e.input[0, 0] == e.output[0, 0] for e in permuted)
