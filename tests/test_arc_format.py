"""Grids to text and back; prompts, and the many ways to ask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.inner.texts import encode_text
from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.tasks.arc import voting
from seal_jax.tasks.arc.augmentations import AUGMENTATIONS
from seal_jax.tasks.arc.format import (
    Undecodable,
    decode_grid,
    encode_grid,
    make_turn,
)
from seal_jax.tasks.arc.grids import ArcTask, Example, same
from seal_jax.tasks.arc.queries import TRANSFORMS, make_queries, read_answers


def grid(rows):
    return np.array(rows, np.int8)


EXAMPLES = tuple(Example(grid([[i, 0, 1]]), grid([[1], [i]])) for i in (2, 3, 4))
TASK = ArcTask("t", EXAMPLES, (grid([[5, 0, 1]]), grid([[6, 0, 1]])))


def test_a_turn_as_text():
    turn = make_turn(EXAMPLES[:2], EXAMPLES[2])
    assert turn.message.splitlines()[1:] == [
        "[[2, 0, 1]] -> [[1], [2]]#",
        "[[3, 0, 1]] -> [[1], [3]]#",
        "[[4, 0, 1]] ->",
    ]
    assert turn.answer == "[[1], [4]]#"
    assert [part.text for part in turn.prompt if part.is_output] == ["[[1], [2]]#", "[[1], [3]]#"]


@pytest.mark.parametrize("chat", [False, True])
def test_the_loss_is_on_all_tokens_or_on_output_grids(chat):
    tokenizer, turn = ByteTokenizer(), make_turn(EXAMPLES[:2], EXAMPLES[2])
    ids, mask = encode_text(tokenizer, turn, chat=chat)[:2]
    assert tokenizer.decode(ids) == turn.message + turn.answer
    assert mask == (False, *[True] * (len(ids) - 1))
    same_ids, mask = encode_text(tokenizer, turn, True, chat=chat)[:2]
    assert same_ids == ids
    chosen = [i for i, counts in zip(ids, mask, strict=True) if counts]
    assert tokenizer.decode(chosen) == "[[1], [2]]#[[1], [3]]#[[1], [4]]#"
    assert chosen[-1] == tokenizer.stop_ids[0]  # where to stop is learned too


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=30))
def test_a_grid_survives_its_text(rows):
    assert decode_grid(encode_grid(grid(rows)) + "# and more").tolist() == rows


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("#[[1]]", "empty"),
        ("The answer is [[1]]#", "not a list of lists"),
        ("[[1, 2], [3]]#", "ragged: row 1 has 1 cells, row 0 has 2"),
        ("[[1, 10]]#", "expected colors 0 to 9"),
        ("[[1, -1]]#", "expected colors"),
        ("[[NaN]]#", "expected colors"),
        ("[1, 2]#", "row 0 is int"),
        ("[[]]#", "row 0 is a list of 0"),
        ("{}#", "expected a list of rows"),
        ("[[1, 2]", "not a list of lists"),
        (str([[1] * 31]), "at most 30 x 30"),
        ("[" * 8000, "nested too deeply"),
        ("[" * 100_000, "too long: 100,000 characters"),
        ("9" * 5000, "limit"),
    ],
)
def test_what_is_no_grid_says_why(text, reason):
    decoded = decode_grid(text)
    assert isinstance(decoded, Undecodable)
    assert reason in decoded.reason


@settings(max_examples=100)
@given(st.text(alphabet='[]0123456789, #-.e\n\x00{}":', max_size=60) | st.text())
def test_no_text_breaks_the_decoder(text):
    decoded = decode_grid(text)
    assert isinstance(decoded, Undecodable) or decoded.dtype == np.int8


def test_answers_in_every_frame_come_back_to_one():
    queries = make_queries(TASK, num_permuted=1)
    assert {(q.test, q.transform) for q in queries} == {(t, n) for t in (0, 1) for n in TRANSFORMS}
    assert len(queries) == len(set(queries)) == 2 * 6 * 2
    truth = [grid([[1], [5]]), grid([[1], [6]])]
    answers = []
    for query in queries:
        change = AUGMENTATIONS[query.transform] if query.transform else np.asarray
        answers.append(encode_grid(change(truth[query.test])) + "#")
    answers[0], answers[3] = "no idea", "[[1], [2, 3]]#"
    predictions = read_answers(queries, answers)
    attempts = [voting.vote(made) for made in predictions.by_test]
    assert attempts == [[truth[0].tolist()], [truth[1].tolist()]]
    assert len(predictions.undecodable) == 2
    assert voting.pass_at(attempts, truth) == 1.0


def test_a_prompt_shows_the_transformed_grids_and_no_solution():
    solved = TASK._replace(solutions=(grid([[9, 9]]), grid([[9, 9]])))
    queries = make_queries(solved, transforms=["transpose"], num_permuted=0)
    assert [q.prompt.splitlines()[1:] for q in queries] == [
        [
            "[[2], [0], [1]] -> [[1, 2]]#",
            "[[3], [0], [1]] -> [[1, 3]]#",
            "[[4], [0], [1]] -> [[1, 4]]#",
            f"[[{color}], [0], [1]] ->",
        ]
        for color in (5, 6)
    ]
    assert queries == make_queries(TASK, transforms=["transpose"], num_permuted=0)


def test_contexts_with_examples_left_out():
    queries = make_queries(TASK, transforms=[None], left_out=(0, 1), num_permuted=0)
    shown = [q.prompt.count(" -> ") for q in queries if q.test == 0]
    assert shown == [3, 2, 2, 2]
    with pytest.raises(ValueError, match="nothing to ask with"):
        make_queries(TASK, left_out=(3,))
    with pytest.raises(ValueError, match="unknown transform 'repeat_rows_2'"):
        make_queries(TASK, transforms=["repeat_rows_2"])


def test_permutations_depend_on_the_seed():
    assert make_queries(TASK, seed=1) == make_queries(TASK, seed=1)
    assert make_queries(TASK, num_permuted=3, seed=1) != make_queries(TASK, num_permuted=3, seed=2)


def test_one_answer_for_each_query():
    with pytest.raises(ValueError, match="0 answers to 24 queries"):
        read_answers(make_queries(TASK, num_permuted=1), [])


def test_same_compares_shapes():
    assert same(grid([[1, 2]]), grid([[1, 2]]))
    assert not same(grid([[1, 1]]), grid([[1], [1]]))
