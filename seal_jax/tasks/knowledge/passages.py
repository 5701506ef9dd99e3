"""Where problems come from: the built-in passages, JSON files, `datasets`, `tensorflow_datasets`.

    load_problems('builtin', 'train')                      the passages that ship with the package
    load_problems('json:my.json', 'eval')                  also plain 'my.json'
    load_problems('hf:rajpurkar/squad', 'train')           the Hugging Face hub, or a local copy
    load_problems('tfds:squad@/data/tfds', 'eval')         TensorFlow Datasets, without TensorFlow

Every source is brought to items of one of two shapes, and items to problems:

    grouped   {title, context, questions: [{question, answer}]}     or answers: [...], any counts
    rows      {title, context, question, answers: {text: [...]}}      one question each, as SQuAD

Whoever brings their own file makes mistakes in it, so an error names the file, the index and the
field, and says what was expected.
"""

import hashlib
import importlib.resources
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from seal_jax.hosts.json_text import parse_json, read_text, read_value
from seal_jax.tasks.knowledge.libraries import SPLIT_NAMES, hf_items, part, tfds_items
from seal_jax.tasks.task import Exam, Problem, Question, join_shares


def load_problems(
    source: str, split: str, share: tuple[int, int] = (0, 1)
) -> list[tuple[Problem, Exam]]:
    """Load the problems of a split with their exams, in the order in which the source has them.

    Passages that occur more than once become one problem with all their questions; a question that
    is repeated keeps its first answers. Questions without an answer (SQuAD 2.0 has them) and
    SQuAD's paragraphs without a question are passed over: a line on stderr says how many.

    Args:
      source: 'builtin', 'json:PATH' (or a path ending in .json), 'hf:NAME_OR_PATH[:CONFIG]' or
        'tfds:NAME[@DATA_DIR]'. A JSON list, or a file without splits, serves both splits.
      split: 'train' or 'eval'. For a library, 'eval' is 'validation', else 'eval', 'test', 'dev'.
      share: (i, n), only what the i-th of n equal parts of the source's items has, which may be
        nothing, or some of a problem's questions; see `task.join_shares`.

    Raises:
      ValueError: the source, the split or an item is not what is described above.
      FileNotFoundError: there is no such file or dataset.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"unknown split {split!r}: expected 'train' or 'eval'")
    kind, _, rest = source.partition(":")
    items: Iterable[tuple[str, Any]]
    if kind == "hf" and rest:
        items = hf_items(rest, split, share)
    elif kind == "tfds" and rest:
        items = tfds_items(rest, split, share)
    elif source == "builtin":
        file = importlib.resources.files("seal_jax.tasks.knowledge").joinpath("passages.json")
        items = _json_items(parse_json(file.read_text("utf-8"), source), source, split, share)
    elif source.startswith("json:") or source.endswith(".json"):
        path = source.removeprefix("json:")
        items = _json_items(read_value(path), path, split, share)
    else:
        raise ValueError(
            f"unknown source {source!r}: expected 'builtin', 'json:PATH', "
            "'hf:NAME_OR_PATH[:CONFIG]' or 'tfds:NAME[@DATA_DIR]'"
        )
    problems, num_unanswerable, num_empty = _group(items)
    if share[0] == 0 and (num_unanswerable or num_empty):
        where = f"{source}, {split}" + (f", the first of {share[1]} parts" if share[1] > 1 else "")
        print(
            f"{where}: passed over: {num_unanswerable:,} without an answer (questions),"
            f" {num_empty:,} without a question (passages)",
            file=sys.stderr,
        )
    if not problems and share == (0, 1):
        raise ValueError(f"{source}: the {split!r} split holds no problem with a question")
    return problems


def load_passages(path: str) -> list[Problem]:
    """Load passages to write self-edits about: no questions needed.

    Args:
      path: a JSON file with a list of {title, context}, or a .txt file that holds one passage,
        which is then titled by its file name.

    Raises:
      ValueError: the file is not of that form.
      FileNotFoundError: there is no such file.
    """
    if path.endswith(".txt"):
        items = [{"title": Path(path).stem.replace("_", " "), "context": read_text(path)}]
    else:
        items = read_value(path)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: expected a list of {{title, context}}, found {describe(items)}")
    problems = (_problem(item, f"{path}: [{index}]") for index, item in enumerate(items))
    return list({problem.id: problem for problem in problems}.values())


def make_problem(title: str, passage: str) -> Problem:
    """Return a problem with an id made of its title and a hash of its text.

    The id is the same wherever the passage stands in a file, so results can be joined on it.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40]
    digest = hashlib.sha256(f"{title}\0{passage}".encode()).hexdigest()[:10]
    return Problem(f"{slug}-{digest}" if slug else digest, title, passage)


def _group(items: Iterable[tuple[str, Any]]) -> tuple[list[tuple[Problem, Exam]], int, int]:
    """Merge (where, item) pairs into problems, in the order in which they first appear.

    Returns:
      The problems, how many questions have no answer, and how many items have no question at all.
    """
    found, num_unanswerable, num_empty = [], 0, 0
    for where, item in items:
        problem, questions = _problem(item, where), list(_questions(item, where))
        answerable = tuple(question for question in questions if question is not None)
        num_unanswerable += len(questions) - len(answerable)
        num_empty += not questions
        if answerable:
            found.append((problem, Exam(problem.id, answerable)))
    return join_shares([found]), num_unanswerable, num_empty


def _problem(item: Any, where: str) -> Problem:
    title = _text(_object(item, where, "title, context, ..."), "title", where)
    if "answers" in item:  # SQuAD writes its titles as they stand in a URL: Super_Bowl_50
        title = unquote(title).replace("_", " ")
    return make_problem(title, _text(item, "context", where))


def _questions(item: Mapping[str, Any], where: str) -> Iterable[Question | None]:
    """Yield the questions of a grouped item or of a row; None for one that has no answer."""
    name = "qas" if "qas" in item else "questions"
    if name not in item:
        if "question" not in item:
            raise ValueError(f"{where}: no field 'questions'; found {describe(item)}")
        yield _question(item, where)
        return
    questions = item[name]
    if isinstance(questions, Mapping):
        questions = _records(questions, f"{where}.{name}")
    if not isinstance(questions, (list, tuple)):
        raise ValueError(f"{where}: field {name!r} is {describe(questions)}, expected a list")
    if not questions and name == "questions":  # SQuAD's own files have paragraphs without any
        raise ValueError(f"{where}: field 'questions' is empty, expected at least one question")
    for index, entry in enumerate(questions):
        yield _question(entry, f"{where}.{name}[{index}]")


def _question(entry: Any, where: str) -> Question | None:
    """Return the question of one entry, or None where it is said to have no answer.

    SQuAD 2.0 says so with `is_impossible`, also beside plausible answers, which are wrong ones; the
    libraries' copies of it say so with an empty list of answers alone.
    """
    question = _text(_object(entry, where, "question, answer"), "question", where)
    is_impossible = entry.get("is_impossible")
    if is_impossible not in (None, True, False):
        raise ValueError(
            f"{where}: field 'is_impossible' is {describe(is_impossible)}, expected true or false"
        )
    if is_impossible:
        return None
    answers = [_text(entry, "answer", where)] if "answer" in entry or "answers" not in entry else []
    if "answers" in entry:
        answers += _answers(entry["answers"], where)
        if not answers and is_impossible is not None:
            raise ValueError(
                f"{where}: field 'answers' is empty and 'is_impossible' false: what is the answer"
                f" to {question!r}?"
            )
    first, *others = dict.fromkeys(answers) or [""]
    return Question(question, first, tuple(others)) if first else None


def _answers(answers: Any, where: str) -> list[str]:
    """Return the texts of {text: [...]}, as rows have them, of [{text}] or of a list of texts."""
    found = answers
    if isinstance(answers, Mapping):
        found = answers.get("text", answers)
    if not isinstance(found, (list, tuple)):
        raise ValueError(
            f"{where}: field 'answers' is {describe(answers)}, "
            "expected {text: [...]} or [{text}]"
        )
    texts = []
    for index, one in enumerate(found):
        spot = f"{where}.answers[{index}]"
        one = {"text": one} if isinstance(answers, Mapping) or isinstance(one, str) else one
        texts.append(_text(_object(one, spot, "text"), "text", spot))
    return texts


def _object(value: Any, where: str, form: str, *fields: str) -> Mapping[str, Any]:
    """Return a value that must be an object with these fields; `form` describes it."""
    if not isinstance(value, Mapping) or not set(fields) <= value.keys():
        raise ValueError(f"{where}: expected {{{form}}}, found {describe(value)}")
    return value


def _records(columns: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return records for columns, into which both libraries can turn a list of records."""
    for name, column in columns.items():
        if not isinstance(column, (list, tuple)):
            raise ValueError(f"{where}: field {name!r} is {describe(column)}, expected a list")
    if len(set(map(len, columns.values()))) > 1:
        raise ValueError(f"{where}: the columns {', '.join(columns)} differ in length")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _text(item: Mapping[str, Any], field: str, where: str) -> str:
    """Return a field that must hold text, without the white space around it."""
    if field not in item:
        raise ValueError(f"{where}: no field {field!r}; found {describe(item)}")
    value = item[field]
    try:
        if isinstance(value, bytes):  # tensorflow_datasets hands out bytes
            value = value.decode()
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {field!r} is {describe(value)}, expected text")
        value.encode()  # JSON can spell half of a surrogate pair, which no tokenizer takes
    except UnicodeError as error:
        raise ValueError(f"{where}: field {field!r} is not valid Unicode: {error}") from error
    if not value.strip():
        raise ValueError(f"{where}: field {field!r} is empty")
    return value.strip()


def describe(value: Any) -> str:
    """Say what a value is, briefly, in JSON's words."""
    if isinstance(value, Mapping):
        return f"an object with fields {', '.join(map(str, list(value)[:8])) or '(none)'}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return "text"
    if value is None:
        return "null"
    return f"{type(value).__name__} {str(value)[:40]}"


def _json_items(
    content: Any, where: str, split: str, share: tuple[int, int]
) -> list[tuple[str, Any]]:
    """Return (where, item) pairs of a JSON file of any of the three accepted forms."""
    name = ""
    if isinstance(content, Mapping) and "data" in content:
        items = _squad_items(content["data"], where)
        return [items[index] for index in part(len(items), share)]
    if isinstance(content, Mapping) and SPLIT_NAMES.keys() & content.keys():
        if split not in content:
            raise ValueError(f"{where}: no split {split!r}; found {describe(content)}")
        name, content = split, content[split]
    if not isinstance(content, list):
        raise ValueError(
            f"{where}: expected a list of {{title, context, questions}}, an object with 'train' "
            f"and 'eval' lists of them, or SQuAD's {{data: [...]}}; found {describe(content)}"
        )
    return [(f"{where}: {name}[{index}]", content[index]) for index in part(len(content), share)]


def _squad_items(data: Any, where: str) -> list[tuple[str, Any]]:
    """Flatten SQuAD's own files: data[].paragraphs[].qas[]."""
    items = []
    for i, article in enumerate(_list(data, f"{where}: data")):
        there = f"{where}: data[{i}]"
        _object(article, there, "title, paragraphs", "paragraphs")
        title = unquote(_text(article, "title", there)).replace("_", " ")
        for j, paragraph in enumerate(_list(article["paragraphs"], f"{there}.paragraphs")):
            spot = f"{there}.paragraphs[{j}]"
            _object(paragraph, spot, "context, qas", "qas")
            item = {"title": title, "qas": paragraph["qas"]}
            if "context" in paragraph:
                item["context"] = paragraph["context"]
            items.append((spot, item))
    return items


def _list(value: Any, where: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, found {describe(value)}")
    return value
