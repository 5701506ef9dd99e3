"""Training texts from a task's own examples: left out, augmented, limited, reproducible."""

import numpy as np
import pytest

from seal_jax.tasks.arc.augmentations import GROUPS
from seal_jax.tasks.arc.format import decode_grid
from seal_jax.tasks.arc.grids import ArcTask, Example, grid_key
from seal_jax.tasks.arc.training_data import leave_out, make_training_data


def example(number, side=3):
    grid = np.zeros((side, side), np.int8)
    grid[0, : number + 1] = range(1, number + 2)
    return Example(grid, grid.T)


TASK = ArcTask("t", tuple(example(i) for i in range(3)), (np.zeros((1, 1), np.int8),))


def count_chars(turn):
    return len(turn.message) + len(turn.answer)


def make(task=TASK, groups=(), seed=0, **options):
    return make_training_data(task, groups, seed=seed, count_tokens=count_chars, **options)


def test_leave_one_and_two_out():
    assert leave_out("abc", 1) == [("b", "c", "a"), ("a", "c", "b"), ("a", "b", "c")]
    assert leave_out("abc", 2) == [
        ("c", "a"),
        ("b", "a"),
        ("c", "b"),
        ("a", "b"),
        ("b", "c"),
        ("a", "c"),
    ]
    assert leave_out("ab", 2) == []
    assert leave_out("a", 1) == []
    with pytest.raises(ValueError, match="count is 3"):
        leave_out("abcd", 3)


def test_without_groups_only_the_left_out_and_their_permutations():
    plain = make(num_permuted=0)
    assert len(plain.turns) == 3 + 6
    assert {decode_grid(turn.answer).tobytes() for turn in plain.turns} == {
        e.output.tobytes() for e in TASK.examples
    }
    permuted = make(num_permuted=1)
    assert len(permuted.turns) + permuted.duplicates == 2 * 9


def test_every_augmentation_of_a_group_appears():
    for group, names in GROUPS.items():
        made = make(groups=(group,), num_permuted=0, max_turns=1000)
        # Every task comes plain and by each name; in 'basic' by a translation too.
        assert len(made.turns) + made.duplicates == 9 * (1 + len(names) + (group == "basic"))
        shapes = {decode_grid(turn.answer).shape for turn in made.turns}
        grown = {"basic": {(6, 3), (3, 6)}, "size": {(6, 6), (6, 3), (3, 6)}}
        assert shapes - {(3, 3)} == grown.get(group, {(6, 6), (6, 3), (3, 6)} & shapes)
        assert shapes != {(3, 3)}


def test_no_text_twice_and_the_cap():
    made = make(groups=tuple(GROUPS), num_permuted=3)
    assert len(made.turns) == 250
    assert len(set(made.turns)) == 250
    assert len(make(groups=tuple(GROUPS), max_turns=7).turns) == 7
    dots = [Example(np.full((1, 1), i), np.full((1, 1), 9 - i)) for i in range(3)]
    made = make(ArcTask("dots", tuple(dots), TASK.tests), groups=("basic",), num_permuted=0)
    # Nothing turns a single cell into another one; each reflection makes the same pair of it.
    assert len(made.turns) == len(set(made.turns)) == 9 * 3
    assert made.duplicates == 9 * (1 + len(GROUPS["basic"]) + 1) - 9 * 3


def test_one_seed_one_result_and_another_task_another():
    first = make(groups=("basic",), seed=1)
    assert first == make(groups=("basic",), seed=1)
    assert first != make(groups=("basic",), seed=2)
    assert first.turns != make(TASK._replace(id="u"), groups=("basic",), seed=1).turns


def test_too_large_and_too_long_are_dropped_and_counted():
    large = ArcTask("l", tuple(example(i, side=20) for i in range(2)), TASK.tests)
    made = make(large, groups=("size",), num_permuted=0, max_tokens=10_000)
    # 2 tasks; resolution, height and width all exceed 30.
    assert (len(made.turns), made.too_large) == (2, 6)
    shortest = min(map(count_chars, make().turns))
    made = make(max_tokens=shortest)
    assert made.too_long > 0
    assert {count_chars(turn) for turn in made.turns} == {shortest}


def test_the_test_grids_are_never_in_the_training_texts():
    secret = np.full((2, 2), 9, np.int8)
    task = TASK._replace(tests=(secret,), solutions=(secret,))
    assert make(task, groups=tuple(GROUPS)) == make(groups=tuple(GROUPS))


def test_context_and_query_share_colors():
    # The rule here: every grid's output is its transpose; it must hold in each training text.
    made = make(groups=(), num_permuted=4)
    for turn in made.turns:
        grids = [decode_grid(part.text) for part in turn.prompt if part.is_output]
        inputs = [decode_grid(p.text.rstrip("-> ")) for p in turn.prompt if "->" in p.text]
        outputs = [*grids, decode_grid(turn.answer)]
        assert [grid_key(i.T) for i in inputs] == [grid_key(o) for o in outputs]
        # Every example has the same color at the same place, where it has one.
        assert all(len({int(grid[0, j]) for grid in inputs} - {0}) <= 1 for j in range(3))


def test_unknown_group():
    with pytest.raises(ValueError, match="unknown group 'colour'"):
        make(groups=("colour",))
