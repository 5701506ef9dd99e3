"""The knowledge task: the authors' parsing rules, prompts, and what is rejected."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.tasks import TASKS, make_task
from seal_jax.tasks.knowledge.passages import make_problem
from seal_jax.tasks.knowledge.task import PROMPT_STYLES, Knowledge, training_sequences
from seal_jax.tasks.task import Question, Rejected, SelfEdit

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "golden" / "self_edit_parsing.json"
PUBLISHED = SHARED / "data" / "self_edits"

PROBLEM = make_problem("Quillback", "The quillback is a boat. It has two masts.")


def parts(self_edit: str, split_newlines: bool = True) -> list[str]:
    """Return the texts without their title, and check the passage that ends them."""
    *texts, last = training_sequences(
        self_edit, title="T", passage=" P \n", split_newlines=split_newlines
    )
    assert last == "T\nP"
    assert all(text.startswith("T\n") for text in texts)
    return [text[2:] for text in texts]


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden cases are not here")
def test_training_sequences_are_the_authors():
    cases = json.loads(GOLDEN.read_text())
    assert len(cases) == 288
    for case in cases:
        found = training_sequences(
            case["self_edit"],
            title=case["title"],
            passage=case["context"],
            split_newlines=case["split_newlines"],
        )
        assert found == case["sequences"], (case["style"], case["split_newlines"])


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published self-edits are not here")
def test_no_published_self_edit_is_rejected():
    count = 0
    for path in sorted(PUBLISHED.glob("*.json")):
        for item in json.loads(path.read_text()):
            problem = make_problem(item["title"], item["context"])
            for text in item["completions"]:
                edit = Knowledge().parse(problem, text)
                assert isinstance(edit, SelfEdit) or not text.strip(), edit.reason
                count += 1
    assert count > 4000


@pytest.mark.parametrize(
    ("self_edit", "lines"),
    [
        ("", []),
        (" \n\t\n", []),
        ("one", ["one"]),
        ("  one \n\n\n two\t\n", ["one", "two"]),
        ("one\r\ntwo\rthree\u2028four\x0cfive", ["one", "two", "three", "four", "five"]),
        ("one\n---\ntwo --- three", ["one", "two", "three"]),
        ("one-----two", ["one", "--two"]),
        ("---", ["---"]),
        (" ---\n--- ", ["---", "---"]),
        # The first line is dropped where the second begins the numbered list, and only there.
        ("Here is a list:\n\n1. one\n2. two", ["1. one", "2. two"]),
        ("Here is a list: --- 1. one", ["1. one"]),
        ("0. nought\n1.one", ["1.one"]),
        ("Here it is\nindeed:\n1. one", ["Here it is", "indeed:", "1. one"]),
        ("Here is a list:\n10. ten", ["Here is a list:", "10. ten"]),
        ("Here is a list:\n1) one", ["Here is a list:", "1) one"]),
        ("1. one", ["1. one"]),
        # Questions stay whole where there are both a 'Question N:' and an 'Answer:'.
        (
            "Who?\nAnswer: He.\n\nQuestion 2: When?\nAnswer: Then.\n",
            ["Question 1: Who?\nAnswer: He.", "Question 2: When?\nAnswer: Then."],
        ),
        (
            "Question 1: A?\nAnswer : B\n\n\nQuestion  2: C?\nAnswer\n: D",
            ["Question 1: A?\nAnswer : B\n\n", "Question  2: C?\nAnswer\n: D"],
        ),
        ("Questions:\nQuestion 1: A?\nAnswer: B", ["Questions:", "Question 1: A?\nAnswer: B"]),
        ("A --- B\nQuestion 2: C? Answer: D", ["Question 1: A --- B", "Question 2: C? Answer: D"]),
        ("Sure.\n\nQuestion 1: A?\nAnswer: B", ["Question 1: Sure.", "Question 1: A?\nAnswer: B"]),
        ("A?\n Question 2: B? Answer: C", ["Question 1: A?\n Question 2: B? Answer: C"]),
        # Otherwise their lines are texts.
        ("Question 1: A?\nAnswer 1: B", ["Question 1: A?", "Answer 1: B"]),
        ("Question: A?\nAnswer: B", ["Question: A?", "Answer: B"]),
        ("question 1: A?\nanswer: B", ["question 1: A?", "answer: B"]),
        ("Question One: A?\nAnswer: B", ["Question One: A?", "Answer: B"]),
        ("A?\nAnswer: B", ["A?", "Answer: B"]),
    ],
)
def test_split_newlines(self_edit, lines):
    assert parts(self_edit) == lines


@pytest.mark.parametrize(
    ("self_edit", "whole"),
    [
        ("", [""]),
        (" \n", [""]),
        ("---", ["---"]),
        (" a\n\nb ", ["a\n\nb"]),
        ("a\n---\n\n---b", ["a", "b"]),
        ("Here is a list:\n1. one", ["Here is a list:\n1. one"]),
        ("A?\nAnswer: B\nQuestion 2: C?", ["A?\nAnswer: B\nQuestion 2: C?"]),
    ],
)
def test_without_split_newlines(self_edit, whole):
    assert parts(self_edit, split_newlines=False) == whole


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_prompts(style):
    task = Knowledge(style=style)
    problem = make_problem("A {title}", "With {passage} and {0} and \\1 in it.")
    prompt = task.edit_prompt(problem)
    assert prompt.count("A {title}\nWith {passage} and {0} and \\1 in it.") == 1
    assert prompt.count("{passage}") == 1
    others = {Knowledge(style=other).edit_prompt(problem) for other in PROMPT_STYLES}
    assert len(others) == len(PROMPT_STYLES) == 5

    asked = task.answer_prompt(problem, "How many?")
    assert "Topic: A {title}\n" in asked and "How many?" in asked
    assert problem.passage not in asked
    assert asked == asked.strip(), "a base model continues after the cue"


def test_self_edit_carries_prompt_text_and_training_texts():
    task = Knowledge()
    edit = task.parse(PROBLEM, "- a boat\n- two\x00 masts\ud800\x0b- fast")
    passage = "Quillback\nThe quillback is a boat. It has two masts."
    assert edit == SelfEdit(
        PROBLEM.id,
        task.edit_prompt(PROBLEM),
        "- a boat\n- two\x00 masts\ud800\x0b- fast",
        ("Quillback\n- a boat", "Quillback\n- two masts", "Quillback\n- fast", passage),
    )
    whole = Knowledge(split_newlines=False).parse(PROBLEM, "- a boat\n- two masts")
    assert whole.training_texts == ("Quillback\n- a boat\n- two masts", passage)
    assert task.passage_only(PROBLEM) == SelfEdit(PROBLEM.id, "", "", (passage,))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t\r\n", "empty"),
        ("\x00\x00\x01\ud800", "empty"),
        ("...\n---\n1. 2. 3.", "no words: not a single letter"),
        ("a" * 32_001, "too long: 32,001 characters, at most 32,000"),
        ("\n".join(map("a{}".format, range(300))), "too many texts: 301, at most 256"),
        ("It is red.\n" * 17, "repeats itself: one line 17 times, at most 16"),
    ],
)
def test_rejected_with_a_reason(text, reason):
    task = Knowledge()
    assert task.parse(PROBLEM, text) == Rejected(
        PROBLEM.id, task.edit_prompt(PROBLEM), text, reason
    )


def test_what_is_within_the_budget_is_not_rejected():
    for text in ["a", "é", "日本", "- - -\n" * 40 + "words", "It is red.\n" * 16, "a" * 32_000]:
        assert isinstance(Knowledge().parse(PROBLEM, text), SelfEdit), text[:40]


FRAGMENTS = st.sampled_from(
    [
        "Question 1:",
        "\nQuestion  2:",
        "Answer:",
        "Answer 1:",
        "---",
        "\n",
        "1.",
        " ",
        "\x00",
        "\x1c",
    ]
)


@settings(deadline=None)
@given(
    text=st.text() | st.lists(FRAGMENTS | st.text(max_size=5)).map("".join),
    split_newlines=st.booleans(),
)
def test_parse_takes_any_text(text, split_newlines):
    task = Knowledge(split_newlines=split_newlines, max_chars=200, max_training_texts=8)
    edit = task.parse(PROBLEM, text)
    assert edit.text == text and edit.problem_id == PROBLEM.id
    if isinstance(edit, Rejected):
        assert edit.reason
        return
    assert 2 <= len(edit.training_texts) <= 8
    assert edit.training_texts[-1] == f"{PROBLEM.title}\n{PROBLEM.passage}"
    for training_text in edit.training_texts:
        assert training_text.startswith(PROBLEM.title + "\n")
        assert "\x00" not in training_text
        training_text.encode()


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n"), min_size=1))
def test_parse_changes_nothing_in_clean_text(text):
    edit = Knowledge(max_repeats=10_000).parse(PROBLEM, text)
    if isinstance(edit, SelfEdit):
        raw = training_sequences(
            text, title=PROBLEM.title, passage=PROBLEM.passage, split_newlines=True
        )
        assert list(edit.training_texts) == raw


@pytest.mark.parametrize(
    "unit", ["\n", " ", "Question ", "Answer", "-", "1", "\nQuestion 1", "---"]
)
def test_time_is_linear(unit):
    task = Knowledge(max_chars=4_000_000)
    start = time.perf_counter()
    task.parse(PROBLEM, ("Question 1: Answer: a" + unit * 3_000_000)[:3_000_000])
    assert time.perf_counter() - start < 10, "quadratic time would take hours"


def test_bad_fields():
    with pytest.raises(ValueError, match="unknown style 'rewriting'.*implications"):
        Knowledge(style="rewriting")
    with pytest.raises(ValueError, match="max_chars is 0, expected at least 1"):
        Knowledge(max_chars=0)


def test_builtin_passages_can_be_asked_and_graded():
    task = Knowledge()
    for split in ("train", "eval"):
        for problem, exam in task.load(split):
            assert exam.problem_id == problem.id
            for question in exam.questions:
                assert question.question not in task.edit_prompt(problem)
                assert task.grade(question, question.answer)
    assert not task.grade(Question("What color is the boat?", "red"), "No idea.")


def test_make_task():
    assert make_task("knowledge", style="self-qa") == Knowledge(style="self-qa")
    for name, task_type in TASKS.items():
        assert make_task(name) == task_type()
    with pytest.raises(ValueError, match="unknown task 'knowlege'; did you mean 'knowledge'?"):
        make_task("knowlege")
    with pytest.raises(ValueError, match=r"unknown task '' \(known: arc, facts, knowledge"):
        make_task("")
    with pytest.raises(
        ValueError, match="'facts' has no field 'num_fact'; did you mean 'num_facts"
    ):
        make_task("facts", num_fact=2)
