"""Every source of problems, really read: files, `datasets`, and `tensorflow_datasets`."""

import json
import pathlib
import subprocess
import sys

import pytest

from seal_jax.tasks.knowledge.passages import load_passages, load_problems, make_problem
from seal_jax.tasks.knowledge.task import Knowledge
from seal_jax.tasks.task import Exam, Problem, Question, join_shares

LAKE = {
    "title": "Lake",
    "context": "The lake is deep.",
    "questions": [{"question": "How is it?", "answer": "deep"}],
}
HILL = {
    "title": "Hill_1",
    "context": "The hill is high and green.",
    "questions": [
        {"question": "How is it?", "answer": "high"},
        {"question": "What color?", "answer": "green"},
    ],
}
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Caf%C3%A9_au_lait",
            "paragraphs": [
                {
                    "context": " Milk and coffee. ",
                    "qas": [
                        {"question": " With what? ", "id": "1", "answers": [{"text": "Milk"}]},
                        {"question": "Tea?", "answers": [], "is_impossible": True},
                        {
                            "question": "Sugar?",
                            "answers": [{"text": "Milk"}],
                            "plausible_answers": [{"text": "coffee"}],
                            "is_impossible": True,
                        },
                    ],
                },
                {"context": "No answers.", "qas": [{"question": "Tea?", "answers": []}]},
                {"context": "No questions.", "qas": []},
            ],
        }
    ],
}
CAFE = [("Café au lait", "Milk and coffee.", [("With what?", "Milk")])]


def rows(split: str) -> list[dict]:
    """Return three questions about two passages, in SQuAD's shape."""
    questions = [("Old_Town", "A."), ("New", "B."), ("Old_Town", "A.")]
    return [
        {
            "id": str(index),
            "title": title,
            "context": f"{split} {context}",
            "question": f"q{index}?",
            "answers": {"text": [f"é{index}", "other"], "answer_start": [0, 1]},
        }
        for index, (title, context) in enumerate(questions)
    ]


def read_back(split: str) -> list:
    return [
        ("Old Town", f"{split} A.", [("q0?", "é0", ("other",)), ("q2?", "é2", ("other",))]),
        ("New", f"{split} B.", [("q1?", "é1", ("other",))]),
    ]


def _plain(question: Question) -> tuple:
    return question[:2] if not question.others else (question.question, *question[1:])


def brief(problems: list[tuple[Problem, Exam]]) -> list:
    """Return (title, passage, [(question, answer)]) and check the ids."""
    ids = [problem.id for problem, _ in problems]
    assert len(set(ids)) == len(ids) and ids == [exam.problem_id for _, exam in problems]
    return [
        (problem.title, problem.passage, [_plain(question) for question in exam.questions])
        for problem, exam in problems
    ]


def assert_shares_are_whole(source: str, split: str) -> None:
    """Check that what several processes read, put together, is what one reads."""
    whole = load_problems(source, split)
    for n in (1, 2, 3, 7):
        shares = [load_problems(source, split, (i, n)) for i in range(n)]
        assert join_shares(shares) == whole


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return str(path)


def test_builtin():
    train, evaluation = load_problems("builtin", "train"), load_problems("builtin", "eval")
    assert train and evaluation
    assert not {problem.id for problem, _ in train} & {problem.id for problem, _ in evaluation}


def test_json_list_serves_both_splits(tmp_path):
    path = write(tmp_path / "my.json", [HILL, LAKE])
    expected = [
        ("Hill_1", HILL["context"], [("How is it?", "high"), ("What color?", "green")]),
        ("Lake", LAKE["context"], [("How is it?", "deep")]),
    ]
    for source in (path, f"json:{path}"):
        for split in ("train", "eval"):
            assert brief(load_problems(source, split)) == expected
    assert load_problems(path, "train")[0] == (
        Problem("hill-1-1000fef550", "Hill_1", HILL["context"]),
        Exam(
            "hill-1-1000fef550", (Question("How is it?", "high"), Question("What color?", "green"))
        ),
    )


def test_json_with_splits_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "my.json", "\ufeff" + json.dumps({"train": [HILL], "eval": [LAKE]}))
    assert [p.title for p, _ in load_problems(path, "train")] == ["Hill_1"]
    assert [p.title for p, _ in load_problems(path, "eval")] == ["Lake"]


def test_squads_own_file(tmp_path, capsys):
    path = write(tmp_path / "train-v1.1.json", SQUAD)
    assert brief(load_problems(path, "eval")) == CAFE
    assert capsys.readouterr().err == (
        f"{path}, eval: passed over: 3 without an answer (questions),"
        " 1 without a question (passages)\n"
    )
    assert_shares_are_whole(path, "eval")


def test_duplicates_are_merged_in_order(tmp_path):
    again = {
        **LAKE,
        "questions": [{"question": "How is it?", "answer": "wet"}, HILL["questions"][1]],
    }
    path = write(tmp_path / "my.json", [LAKE, HILL, again, {**LAKE, "title": "Loch"}])
    assert brief(load_problems(path, "train")) == [
        ("Lake", LAKE["context"], [("How is it?", "deep"), ("What color?", "green")]),
        ("Hill_1", HILL["context"], [("How is it?", "high"), ("What color?", "green")]),
        ("Loch", LAKE["context"], [("How is it?", "deep")]),
    ]
    assert_shares_are_whole(path, "train")


@pytest.mark.parametrize(
    "answers",
    [
        {"answers": [{"text": "deep"}, {"text": " very deep "}, {"text": "deep"}]},
        {"answers": {"text": ["deep", "very deep", "deep"], "answer_start": [0, 1, 0]}},
        {"answers": ["deep", "very deep"], "is_impossible": False},
        {"answer": "deep", "answers": ["deep", "very deep"], "is_impossible": None},
    ],
)
def test_any_of_several_answers_counts(tmp_path, answers):
    entry = {"question": "How is it?", **answers}
    path = write(tmp_path / "my.json", [{**LAKE, "questions": [entry]}])
    ((_, exam),) = load_problems(path, "train")
    assert exam.questions == (Question("How is it?", "deep", ("very deep",)),)
    for answer, is_right in (("deep", True), ("It is very deep.", True), ("shallow", False)):
        assert Knowledge().grade(exam.questions[0], answer) is is_right


def test_ids_are_stable_unique_and_plain():
    assert make_problem("Übung 1!", "x").id == "bung-1-" + make_problem("Übung 1!", "x").id[-10:]
    assert make_problem("日本", "x").id == make_problem("日本", "x").id
    assert len({make_problem(t, p).id for t in ("a", "b", "日", "本") for p in ("x", "y")}) == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"my.json: not JSON: Expecting value at line 1, column 1"),
        ('[\n {"title": }]', r"my.json: not JSON: Expecting value at line 2, column 12"),
        ("[" * 200_000, r"my.json: not JSON that can be read: nested too deeply"),
        (5, r"my.json: expected a list .* found int 5"),
        ({"rows": []}, r"my.json: expected a list .*found an object with fields rows"),
        ([], r"the 'train' split holds no problem"),
        ({"eval": [LAKE]}, r"my.json: no split 'train'; found an object with fields eval"),
        ([LAKE, "x"], r"my.json: \[1\]: expected \{title, context, ...\}, found text"),
        ({"train": [{"title": "a"}]}, r"my.json: train\[0\]: no field 'context'; .* fields title"),
        ([{**LAKE, "context": " \n"}], r"\[0\]: field 'context' is empty"),
        ([{**LAKE, "title": 7}], r"\[0\]: field 'title' is int 7, expected text"),
        ([{**LAKE, "title": None}], r"\[0\]: field 'title' is null, expected text"),
        ([{**LAKE, "context": "a \ud800"}], r"\[0\]: field 'context' is not valid Unicode"),
        ([{**LAKE, "questions": []}], r"\[0\]: field 'questions' is empty"),
        ([{**LAKE, "questions": "a?"}], r"\[0\]: field 'questions' is text, expected a list"),
        ([{**LAKE, "questions": ["a?"]}], r"\[0\].questions\[0\]: expected .* found text"),
        (
            [{**LAKE, "questions": {"question": 1}}],
            r"questions: field 'question' is int 1, .* list",
        ),
        ([{**LAKE, "questions": {"a": [], "b": [1]}}], r"columns a, b differ in length"),
        (
            [{**LAKE, "questions": [{"question": "a?"}]}],
            r"\[0\].questions\[0\]: no field 'answer'; found an object with fields question",
        ),
        (
            [{**LAKE, "questions": [{"question": "a?", "answer": 1995}]}],
            r"questions\[0\]: field 'answer' is int 1995, expected text",
        ),
        (
            [{**LAKE, "questions": [{"question": "a?", "answers": "x"}]}],
            r"questions\[0\]: field 'answers' is text, expected \{text: \[...\]\} or",
        ),
        (
            [{**LAKE, "questions": [{"question": "a?", "answers": {"texts": ["x"]}}]}],
            r"questions\[0\]: field 'answers' is an object with fields texts, expected",
        ),
        (
            [{**LAKE, "questions": [{"question": "a?", "answers": [5]}]}],
            r"questions\[0\].answers\[0\]: expected \{text\}, found int 5",
        ),
        (
            [{**LAKE, "questions": [{"question": "a?", "answers": {"text": ["x", None]}}]}],
            r"questions\[0\].answers\[1\]: field 'text' is null, expected text",
        ),
        (
            [{**LAKE, "questions": [{"question": "a?", "answers": ["x", " "]}]}],
            r"questions\[0\].answers\[1\]: field 'text' is empty",
        ),
        (
            [{**LAKE, "questions": [{"question": "a?", "answers": [5]}]}],
            r"questions\[0\].answers\[0\]: expected \{text\}, found int 5",
        ),
        (
            [{**LAKE, "questions": [{"question": "a?", "answers": [], "is_impossible": False}]}],
            r"field 'answers' is empty and 'is_impossible' false: what is the answer to 'a\?'",
        ),
        (
            [{**LAKE, "questions": [{"question": "a?", "answer": "x", "is_impossible": "no"}]}],
            r"questions\[0\]: field 'is_impossible' is text, expected true or false",
        ),
        ([{**LAKE, "questions": [{"question": " ", "answer": "x"}]}], r"'question' is empty"),
        ([{"title": "a", "context": "b"}], r"\[0\]: no field 'questions'"),
        ({"data": 5}, r"my.json: data: expected a list, found int 5"),
        ({"data": [{"title": "a"}]}, r"data\[0\]: expected \{title, paragraphs\}"),
        ({"data": [{"title": "a", "paragraphs": 1}]}, r"data\[0\].paragraphs: expected a list"),
        (
            {"data": [{"title": "a", "paragraphs": [1]}]},
            r"paragraphs\[0\]: expected \{context, qas",
        ),
        (
            {"data": [{"title": "a", "paragraphs": [{"qas": []}]}]},
            r"data\[0\].paragraphs\[0\]: no field 'context'",
        ),
    ],
)
def test_json_errors_say_what_and_where(tmp_path, content, message):
    path = write(tmp_path / "my.json", content)
    with pytest.raises(ValueError, match=message):
        load_problems(path, "train")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such file"):
        load_problems("nowhere.json", "train")
    with pytest.raises(ValueError, match="a folder, expected a"):
        load_problems(f"json:{tmp_path}", "train")
    (tmp_path / "latin.json").write_bytes(b'[{"title": "Caf\xe9"}]')
    with pytest.raises(ValueError, match="not UTF-8 text, at byte 15"):
        load_problems(str(tmp_path / "latin.json"), "train")


@pytest.mark.parametrize("source", ["", "squad", "hf:", "tfds:", "csv:a.csv"])
def test_unknown_source(source):
    with pytest.raises(ValueError, match="unknown source .*expected 'builtin', 'json:PATH'"):
        load_problems(source, "train")


def test_unknown_split():
    with pytest.raises(ValueError, match="unknown split 'test': expected 'train' or 'eval'"):
        load_problems("builtin", "test")


def test_load_passages(tmp_path):
    bare = {"title": "Lake", "context": "The lake is deep."}
    lake, hill = (make_problem(p["title"], p["context"]) for p in (LAKE, HILL))
    assert load_passages(write(tmp_path / "a.json", [bare, HILL, LAKE])) == [lake, hill]
    assert load_passages(write(tmp_path / "The_lake.txt", " Deep.\n")) == [
        make_problem("The lake", "Deep.")
    ]
    with pytest.raises(ValueError, match=r"expected a list of \{title, context\}, found an object"):
        load_passages(write(tmp_path / "b.json", bare))
    with pytest.raises(ValueError, match=r"b.json: \[0\]: no field 'context'"):
        load_passages(write(tmp_path / "b.json", [{"title": "a"}]))
    with pytest.raises(ValueError, match="'context' is empty"):
        load_passages(write(tmp_path / "empty.txt", "\n"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_passages("nowhere.txt")


# ------------------------------------------------------------------------ datasets


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_hf_saved_to_disk(tmp_path, datasets):
    splits = {name: datasets.Dataset.from_list(rows(name)) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert brief(load_problems(f"hf:{tmp_path}/dict", "train")) == read_back("train")
    assert brief(load_problems(f"hf:{tmp_path}/dict", "eval")) == read_back("validation")
    assert_shares_are_whole(f"hf:{tmp_path}/dict", "train")

    splits["train"].save_to_disk(tmp_path / "single")
    for split in ("train", "eval"):
        assert brief(load_problems(f"hf:{tmp_path}/single", split)) == read_back("train")

    datasets.DatasetDict({"all": splits["train"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="looked for validation, eval, test, dev; it has all"):
        load_problems(f"hf:{tmp_path}/other", "eval")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_hf_files(tmp_path, datasets, suffix):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "test"):
        dataset = datasets.Dataset.from_list(rows(name))
        save = dataset.to_json if suffix == "jsonl" else dataset.to_parquet
        save(str(folder / f"{name}.{suffix}"))
    assert brief(load_problems(f"hf:{folder}", "train")) == read_back("train")
    assert brief(load_problems(f"hf:{folder}", "eval")) == read_back("test")
    assert brief(load_problems(f"hf:{folder}/test.{suffix}", "train")) == read_back("test")


def test_hf_grouped(tmp_path, datasets):
    datasets.Dataset.from_list([HILL, LAKE]).to_parquet(str(tmp_path / "a.parquet"))
    problems = load_problems(f"hf:{tmp_path}/a.parquet", "train")
    assert problems == load_problems(write(tmp_path / "a.json", [HILL, LAKE]), "train")


def test_hf_errors(tmp_path, datasets):
    for source in (f"hf:{tmp_path}/nowhere", "hf:./nowhere", "hf:nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_problems(source, "train")
    write(tmp_path / "a.txt", "text")
    with pytest.raises(ValueError, match="expected a file ending in .parquet"):
        load_problems(f"hf:{tmp_path}/a.txt", "train")
    write(tmp_path / "a.jsonl", '{"title": ')
    with pytest.raises(ValueError, match="a.jsonl: "):
        load_problems(f"hf:{tmp_path}/a.jsonl", "train")
    write(tmp_path / "b.jsonl", {"title": "a", "context": "b", "question": "c?"})
    with pytest.raises(ValueError, match=r"b.jsonl: train\[0\]: no field 'answer'"):
        load_problems(f"hf:{tmp_path}/b.jsonl", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="hf:.*empty: "):
        load_problems(f"hf:{tmp_path}/empty", "train")


# ------------------------------------------------------------------------ tensorflow_datasets

BUILDER = """
import json, sys
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets import features as f

folder, file_format = sys.argv[1:]
contents = json.load(open(folder + "/contents.json"))
text = f.Text()

class TinySquad(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    FEATURES = {
        **{name: text for name in ("id", "title", "context", "question")},
        "answers": f.Sequence({"text": text, "answer_start": np.int32}),
    }
    def _info(self):
        features = f.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)
    def _split_generators(self, dl_manager):
        splits = contents[self.name]
        return {name: self._generate_examples(rows) for name, rows in splits.items()}
    def _generate_examples(self, rows):
        return enumerate(rows)

class TinyGroups(TinySquad):
    questions = f.Sequence({"question": text, "answer": text})
    FEATURES = {"title": text, "context": text, "questions": questions}

for builder in (TinySquad, TinyGroups):
    builder(data_dir=folder, file_format=file_format).download_and_prepare()
"""


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_tfds_without_tensorflow(tmp_path, file_format):
    """Another process writes the dataset, so that only the files can be read here."""
    pytest.importorskip("tensorflow_datasets")
    folder = str(tmp_path)
    squad = {name: rows(name) for name in ("train", "validation")}
    write(tmp_path / "contents.json", {"tiny_squad": squad, "tiny_groups": {"train": [HILL, LAKE]}})
    command = [sys.executable, write(tmp_path / "build.py", BUILDER), folder, file_format]
    subprocess.run(command, check=True, timeout=120)

    assert brief(load_problems(f"tfds:tiny_squad@{folder}", "train")) == read_back("train")
    assert brief(load_problems(f"tfds:tiny_squad@{folder}", "eval")) == read_back("validation")
    assert_shares_are_whole(f"tfds:tiny_squad@{folder}", "train")
    grouped = load_problems(f"tfds:tiny_groups@{folder}", "train")
    assert grouped == load_problems(write(tmp_path / "a.json", [HILL, LAKE]), "train")
    with pytest.raises(ValueError, match="looked for validation, eval, test, dev; it has train"):
        load_problems(f"tfds:tiny_groups@{folder}", "eval")

    info = tmp_path / "tiny_squad" / "1.0.0" / "dataset_info.json"
    write(info, info.read_text().replace(f'"{file_format}"', '"tfrecord"'))
    with pytest.raises(ValueError, match="(?s)TFRECORD is not supported.*array_record"):
        load_problems(f"tfds:tiny_squad@{folder}", "train")


def test_tfds_squad_is_prepared_without_tensorflow(tmp_path, monkeypatch):
    """The library's own SQuAD, with only the download replaced."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")  # which it needs here and does not ask for
    answers = [{"text": "Milk", "answer_start": 0}]
    qas = [{"id": str(i), "question": f"q{i}?", "answers": answers} for i in range(3)]
    article = {"title": "Flat_white", "paragraphs": [{"context": "Milk.", "qas": qas}]}
    path = pathlib.Path(write(tmp_path / "squad.json", {"data": [article]}))
    monkeypatch.setattr(
        tfds.core.download.DownloadManager,
        "download_and_extract",
        lambda self, urls: dict.fromkeys(urls, path),
    )
    ((problem, exam),) = load_problems(f"tfds:squad@{tmp_path}", "eval")
    assert problem == make_problem("Flat white", "Milk.")
    assert sorted(exam.questions) == [Question(f"q{i}?", "Milk") for i in range(3)]


def test_tfds_errors(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError, match="no such folder: nowhere"):
        load_problems("tfds:squad@nowhere", "train")
    with pytest.raises(FileNotFoundError, match="tfds:no_such_thing@.*: .*no_such_thing"):
        load_problems(f"tfds:no_such_thing@{tmp_path}", "train")


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="hf:a/b: reading it needs datasets: pip install"):
        load_problems("hf:a/b", "train")
