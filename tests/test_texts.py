"""Texts that somebody else wrote: the forms of file, whose they are, and what is refused."""

import json
import re

import pytest
from tiny_run import train_arguments

from seal_jax.commands import main as cli
from seal_jax.config.load import ConfigError, default_config, from_json, to_json, validate
from seal_jax.hosts.files import read_jsonl
from seal_jax.tasks.facts import Facts
from seal_jax.tasks.knowledge.passages import load_problems, make_problem
from seal_jax.tasks.knowledge.texts import load_texts

pytest_plugins = ["tiny_fixtures"]

FERRY = make_problem("Orrin's Ferry", "The ferry at Orrin\nis red.")
MILL = make_problem("The Mill", "The mill is old.")
NIGHT = make_problem("The Mill", "The mill is shut at night.")


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file and returns its name."""

    def write(content, name="texts.json"):
        if not isinstance(content, str):
            lines = name.endswith(".jsonl")
            content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
        (tmp_path / name).write_text(content, "utf-8")
        return str(tmp_path / name)

    return write


def line(problem, edit, text, **more):
    return {"problem": problem.id, "title": problem.title, "edit": edit, "text": text, **more}


@pytest.mark.parametrize(
    "name, content",
    [
        ("texts.json", {"Orrin's Ferry": ["a", "b"], MILL.id: "c"}),
        ("texts.json", {"Orrin's  Ferry ": ["a", "b"], "The mill\n is old. ": ["c"]}),
        ("texts.json", {"Orrin%27s_Ferry": ["a", "b"], MILL.id: "c"}),
        (
            "texts.json",
            [
                {"title": "x", "context": "The mill is\n\nold.", "completions": ["c"]},
                {"title": "Orrin's Ferry", "texts": ["a", "b"]},
            ],
        ),
        ("texts.jsonl", [line(FERRY, 1, "b"), line(MILL, 0, "c"), line(FERRY, 0, "a")]),
        ("texts.jsonl", [line(FERRY, 0, "a"), line(MILL, 0, "c")] * 2 + [line(FERRY, 1, "b")]),
    ],
)
def test_texts_are_found_by_id_title_or_passage(write, name, content):
    path = write(content, name)
    assert load_texts(f"json:{path}", [FERRY, MILL], 2).of == [("a", "b"), ("c",)]
    assert load_texts(path, [MILL, FERRY], 1).of == [("c",), ("a",)]


def test_it_says_who_has_none_or_fewer(write):
    lines = [line(FERRY, 0, "a"), line(FERRY, 1, None, error="HTTP 500"), line(NIGHT, 0, "n")]
    found = load_texts(write(lines, "a.jsonl"), [FERRY, MILL], 2)
    assert found.of == [("a",), ()]
    assert found.remarks == [
        "no text for 1 held-out problem(s): 'The Mill': left out of this row; the file has 1"
        " entries of other problems",
        'fewer than 2 texts for 1 held-out problem(s): "Orrin\'s Ferry": what there is is used',
        "1 text(s) that their writer could not give, as the file says",
    ]
    assert load_texts(write({FERRY.id: "a"}), [FERRY], 1).remarks == []


def test_a_text_of_another_passage_with_the_same_title_is_not_taken(write):
    of_night = write([line(NIGHT, 0, "n"), line(FERRY, 0, "a")], "a.jsonl")
    assert load_texts(of_night, [MILL, FERRY], 1).of == [(), ("a",)]
    item = {"title": NIGHT.title, "context": NIGHT.passage, "completions": ["n"]}
    with pytest.raises(ValueError, match="no text for any of 1 held-out.*'The Mill'.*context 'The"):
        load_texts(write([item]), [MILL], 1)


def test_a_title_that_another_passage_of_the_split_has_names_nothing(write):
    """Its writer may have meant the passage that is not asked."""
    by_title = write({"The Mill": "m", FERRY.title: "a"})
    assert load_texts(by_title, [MILL, FERRY], 1).of == [("m",), ("a",)]
    with pytest.raises(ValueError, match="shared by several problems of the split.*'The Mill'"):
        load_texts(by_title, [MILL, FERRY], 1, [NIGHT])
    assert load_texts(write({MILL.id: "m"}), [MILL], 1, [NIGHT]).of == [("m",)]


def test_a_text_that_came_later_takes_the_place_of_an_error(write):
    error, text = line(FERRY, 0, None, error="HTTP 500"), line(FERRY, 0, "a")
    for lines in ([error, text], [text, error]):
        found = load_texts(write(lines, "a.jsonl"), [FERRY], 1)
        assert (found.of, found.remarks) == ([("a",)], [])


def test_an_empty_self_edit_that_a_model_wrote_counts(write):
    """`generate` and runs write down what was rejected, and their own rows count it as 0."""
    for more in ({"rejected": "empty"}, {"why": "rejected: empty"}):
        path = write([line(FERRY, 0, "", **more), line(FERRY, 1, "b")], "a.jsonl")
        assert load_texts(path, [FERRY], 1).of == [("",)]


BAD = {
    "no file": (None, "no such file"),
    "no JSON": ("[{", "texts.json: not JSON: .* line 1, column 3"),
    "a number": (3, "texts.json: expected lines of .* found int 3"),
    "a key twice": ('{"a": "x", "a": "y"}', "texts.json: .*key 'a' twice"),
    "an empty text": ({MILL.id: " "}, f"texts.json: '{MILL.id}' is empty, expected text"),
    "an empty list": ({MILL.id: []}, "is a list of 0, expected text or a list of texts"),
    "an empty one": ({MILL.id: ["a", ""]}, r"\[1\] is empty, expected text"),
    "no text": ({MILL.id: None}, "is null, expected text or a list"),
    "an object": ({MILL.id: {"a": "b"}}, "is an object with fields a, expected text or a list"),
    "half a pair": ('{"%s": "\\ud800"}' % MILL.id, "is not valid Unicode"),
    "nobody's": ({"somewhere": "a"}, "no text for any of 2 .*It has 1 entries: 'somewhere'"),
    "nothing": ({}, "no text for any of 2 .*It has 0 entries"),
    "an item": ([3], r"texts.json: \[0\]: expected an object with 'problem', .* found int 3"),
    "no name": ([{"completions": ["a"]}], r"\[0\]: expected an object with 'problem', 'context'"),
    "no texts": ([{"title": "a"}], r"\[0\]: no field 'text', 'texts' or 'completions'"),
    "texts of numbers": (
        [{"title": "a", "completions": ["x", 3]}],
        r"\[0\]: field 'completions'\[1\] is int 3, expected text",
    ),
    "a title twice": (
        [{"title": "a", "completions": ["x"]}, {"title": "a", "completions": ["x"]}],
        r"\[1\]: title 'a' has texts at .*texts.json: \[0\] already",
    ),
    "a passage twice": (
        {"Orrin's Ferry": "a", FERRY.id: "b"},
        f"'{FERRY.id}': the passage '{FERRY.id}' has texts at .*Ferry\" already",
    ),
    "two texts of one edit": (
        [line(FERRY, 0, "a"), line(FERRY, 0, "b")],
        r"\[1\]: id .* has another text of edit 0 at .*\[0\]: expected one line for each edit",
    ),
    "a bad edit": ([line(FERRY, "0", "a")], r"\[0\]: field 'edit' is text, expected a number"),
    "a null text": ([line(FERRY, 0, None)], r"\[0\]: field 'text' is null, expected text"),
    "an empty line's": ([line(FERRY, 0, "")], r"\[0\]: field 'text' is empty, expected text"),
}


@pytest.mark.parametrize("content, why", BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_one_clear_message(write, tmp_path, content, why):
    path = str(tmp_path / "texts.json") if content is None else write(content)
    with pytest.raises((ValueError, FileNotFoundError), match=why) as raised:
        load_texts(path, [FERRY, MILL], 1)
    assert path in str(raised.value) and "\n" not in str(raised.value)


def test_a_line_that_a_kill_tore_is_named(write):
    text = json.dumps(line(FERRY, 0, "a")) + '\n{"problem": "orr'
    with pytest.raises(ValueError, match=r"a.jsonl:2: not JSON"):
        load_texts(write(text, "a.jsonl"), [FERRY], 1)


def test_a_title_that_several_passages_share_is_no_name(write):
    with pytest.raises(ValueError, match="shared by several problems of the split.*'The Mill'"):
        load_texts(write({"The Mill": "a", FERRY.id: "b"}), [FERRY, MILL, NIGHT], 1)
    told_apart = write({MILL.id: "a", NIGHT.passage: "b"})
    assert load_texts(told_apart, [FERRY, MILL, NIGHT], 1).of == [(), ("a",), ("b",)]


@pytest.mark.parametrize("writer", ["round0", "round2", "gpt4_1"])
def test_the_authors_files_are_read_and_matched_to_squad(shared_data, writer):
    """Their 200 passages are of 47 titles; 1,867 paragraphs of SQuAD's are not among them."""
    problems = [p for p, _ in load_problems(f"json:{shared_data}/squad/val.json", "eval")]
    path = shared_data / "self_edits" / f"implications_val_{writer}.json"
    found = load_texts(f"json:{path}", problems, 3)
    assert sorted(map(len, found.of)) == [0] * 1867 + [3] * 200
    theirs = {item["context"].strip(): item["completions"] for item in json.loads(path.read_text())}
    for problem, texts in zip(problems, found.of, strict=True):
        assert list(texts) == theirs.get(problem.passage, [])[:3]
    with pytest.raises(ValueError, match="no text for any of 2067 held-out"):
        load_texts(f"{shared_data}/self_edits/implications_train_round0.json", problems, 1)


def test_a_configs_texts_may_have_any_name_and_are_stored():
    texts = {"gpt-4.1": "json:a.json", "by-hand": "b.jsonl"}
    config = default_config()
    config.eval.texts = texts
    validate(config)
    assert from_json(to_json(config)).eval.texts == texts
    assert default_config().eval.texts == {}
    old = json.loads(to_json(default_config()))
    del old["eval"]["texts"]
    assert from_json(json.dumps(old)).eval.texts == {}


@pytest.mark.parametrize(
    "texts",
    [
        {"a/b": "json:x"},
        {"a|b": "json:x"},
        {"": "json:x"},
        {"a b": "json:x"},
        {"x" * 41: "json:x"},
        {"a": "hf:x"},
        {"a": 3},
        "a",
    ],
)
def test_other_names_and_sources_are_refused(texts):
    config = default_config()
    with config.eval.ignore_type():
        config.eval.texts = texts
    with pytest.raises(ConfigError, match=r"eval.texts = .*: needs a dict {'NAME': 'json:FILE'}"):
        validate(config)


def test_a_row_may_be_stated_beforehand_but_takes_no_other_rows_name():
    config = default_config()
    config.eval.texts = {"gpt-4.1": "json:a.json"}
    config.eval.primary = ("seal-gpt-4.1",)
    validate(config)
    config.eval.texts = {"own": "json:a.json"}
    with pytest.raises(ConfigError, match="eval.texts has 'own': a run has another arm"):
        validate(config)


def problems_of(count):
    return [problem for problem, _ in Facts().load("eval")[:count]]


def run(capsys, *arguments):
    code = cli.main([str(word) for word in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", [pytest.param("train", marks=pytest.mark.long), "eval"])
def test_two_writers_are_two_rows_and_their_texts_are_part_of_the_run(
    finished, one_device, write, tmp_path, capsys, command
):
    first, second = problems_of(2)
    one = write({first.title: ["zorbin color? red", "b c"], second.id: ["!"]}, "one.json")
    write([line(second, 0, "red is a color")], "two.jsonl")
    texts = {"gpt-4.1": f"json:{one}", "by-hand": str(tmp_path / "two.jsonl")}
    folder, short = tmp_path / "run", ("outer.num_steps=1", "eval.random_control=False")
    words = [command, *train_arguments(folder, *short, f"eval.texts={texts}")[1:]]
    words += ["--policy", finished / "checkpoints"] if command == "eval" else []
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "'gpt-4.1' of json:" in out and "2 texts on 2 of 2 held-out problems; 1 rejected" in out
    assert f"no text for 1 held-out problem(s): '{first.title}': left out of this row" in out
    for name in texts:
        assert f"| passage + self-edit of {name} |" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rejected_self_edits"]["gpt-4.1"] == 1
    assert "by-hand" not in summary["accuracy_by_problem"][first.id]
    runs = {name: read_jsonl(folder / f"eval_{name}.jsonl") for name in texts}
    assert [row["name"] for row in runs["gpt-4.1"]] == [[first.id, 0, 0]]
    assert [row["name"] for row in runs["by-hand"]] == [[second.id, 0, 0]]

    assert run(capsys, *words)[0] == 0  # nothing has changed
    write({first.title: ["zorbin color? blue"]}, "one.json")
    code, _, err = run(capsys, *words)
    assert code == 2 and err.count("\n") == 1
    assert re.search("belongs to other texts of 'gpt-4.1': .*one.json has changed", err)


@pytest.mark.parametrize(
    "content, name, why",
    [
        ({"somewhere": "a"}, "gpt", "no text for any of 2 held-out"),
        ({"somewhere": ""}, "gpt", "'somewhere' is empty"),
        ({"somewhere": 3}, "gpt", "'somewhere' is int 3, expected text"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_bad_texts_end_a_run_before_a_model_is_loaded(
    one_device, write, tmp_path, capsys, content, name, why, command
):
    texts = f"eval.texts={{'{name}': '{write(content)}'}}"
    words = train_arguments(tmp_path / "run", texts, "model.source=no/such/model")[1:]
    more = ["--policy", "no/such/run"] if command == "eval" else []
    code, _, err = run(capsys, command, *words, *more)
    assert code == 2 and why in err
    assert not (tmp_path / "run").exists()
