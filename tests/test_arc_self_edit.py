"""ARC self-edits: the object and nothing else, or a reason."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.tasks.arc.grids import ArcTask, Example
from seal_jax.tasks.arc.self_edit import ArcSelfEdit, edit_prompt, num_steps, parse_self_edit

DATA = {f"use_{group}_augmentations": False for group in ("basic", "size", "chain", "repeat")}
TRAINING = {
    "strategy": "train_using_output_tokens",
    "learning_rate": 1e-4,
    "num_train_epochs": 2,
}


def text(data=None, training=None, **more):
    content = {"data_generation": DATA | (data or {}), "training": TRAINING | (training or {})}
    return json.dumps(content | more)


def test_a_good_one():
    edit = parse_self_edit(
        text({"use_basic_augmentations": True, "use_repeat_augmentations": True})
    )
    assert isinstance(edit, ArcSelfEdit)
    assert edit.groups == ("basic", "repeat")
    assert edit.outputs_only
    assert (edit.training.learning_rate, edit.training.num_train_epochs) == (1e-4, 2)
    everything = parse_self_edit("\n " + text(training={"strategy": "train_using_all_tokens"}))
    assert not everything.outputs_only
    assert everything.groups == ()


GOOD = text()


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("Sure! " + GOOD, "not one JSON object"),
        (GOOD + "\nThis will work.", "Extra data"),
        (f"```json\n{GOOD}\n```", "not one JSON object"),
        (GOOD + GOOD, "Extra data"),
        (GOOD[:-1], "not one JSON object"),
        ("[" * 100_000, "too long: 100,000 characters"),
        ("[" * 1999, "not one JSON object"),
        ('{"a":' * 399, "not one JSON object"),
        ("9" * 1999, "the whole"),
        ("[]", "the whole"),
        ("null", "the whole"),
        (text(extra=1), "extra: Extra inputs"),
        (text(data={"use_all": True}), "data_generation.use_all: Extra inputs"),
        (text(data={"use_basic_augmentations": "true"}), "use_basic_augmentations"),
        (text(data={"use_basic_augmentations": 1}), "use_basic_augmentations"),
        (text(data={"use_basic_augmentations": None}), "use_basic_augmentations"),
        (text(training={"strategy": "none"}), "training.strategy"),
        (text(training={"learning_rate": "1e-4"}), "training.learning_rate"),
        (text(training={"learning_rate": True}), "training.learning_rate"),
        (text(training={"learning_rate": float("nan")}), "NaN is not a number"),
        (text(training={"learning_rate": float("inf")}), "Infinity is not a number"),
        (GOOD.replace("0.0001", "1e999"), "training.learning_rate"),
        (text(training={"learning_rate": 0}), "training.learning_rate"),
        (text(training={"learning_rate": -1e-4}), "training.learning_rate"),
        (text(training={"learning_rate": 5}), "training.learning_rate"),
        (text(training={"num_train_epochs": 10_000}), "training.num_train_epochs"),
        (text(training={"num_train_epochs": 0}), "training.num_train_epochs"),
        (text(training={"num_train_epochs": 2.0}), "training.num_train_epochs"),
        (text(training={"num_train_epochs": True}), "training.num_train_epochs"),
        (GOOD.replace('"strategy"', '"learning_rate": 1, "strategy"'), "'learning_rate' twice"),
        (json.dumps({"training": TRAINING}), "data_generation: Field required"),
    ],
)
def test_malformed_ones_have_a_reason(written, reason):
    parsed = parse_self_edit(written)
    assert isinstance(parsed, str)
    assert reason in parsed


@settings(max_examples=100)
@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ).map(json.dumps)
)
def test_no_text_breaks_the_parser(written):
    assert isinstance(parse_self_edit(written), str)


@given(
    st.tuples(*[st.booleans()] * 4),
    st.booleans(),
    st.floats(1e-7, 0.1),
    st.integers(1, 375),
)
def test_every_object_in_range_is_read_as_written(switches, all_tokens, rate, epochs):
    strategy = "train_using_all_tokens" if all_tokens else "train_using_output_tokens"
    training = {"strategy": strategy, "learning_rate": rate, "num_train_epochs": epochs}
    edit = parse_self_edit(text(dict(zip(DATA, switches, strict=True)), training))
    assert edit.training.model_dump() == training
    assert tuple(edit.data_generation.model_dump().values()) == switches


def test_steps_count_the_last_small_batch():
    assert num_steps(250, 3) == 375
    assert num_steps(5, 2) == 6
    assert num_steps(1, 4) == 4


def test_the_prompt_shows_the_task_and_no_solution():
    examples = (Example(np.array([[1, 2]]), np.array([[3]])),)
    task = ArcTask("t", examples, (np.array([[4]]),), (np.array([[7, 7, 7]]),))
    prompt = edit_prompt(task)
    assert "[[1, 2]] -> [[3]]" in prompt
    assert "[[4]]" in prompt
    assert "[[7, 7, 7]]" not in prompt
    for word in [*DATA, *TRAINING, "train_using_all_tokens", "train_using_output_tokens", "375"]:
        assert word in prompt
