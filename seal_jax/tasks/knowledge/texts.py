"""Self-edits that somebody else wrote, from a file, and the problems that they are about.

Three forms of file are read:

    lines     {"problem": id, "title": ..., "edit": 0, "text": ...}    edits.jsonl of a run, or what
                                                                       `seal-jax generate` writes
    list      [{"title": ..., "context": ..., "completions": [text, ...]}]   the authors' files
    object    {id, title or passage: text or [text, ...]}

A record may be a line or an item of a list, and names its passage by `problem` (or `id`), `context`
or `title`: the first of them that it has. Only where a passage of the split has the title to itself
can a title name it. White space does not count.

What cannot be used is an error that names the file, the place in it and what was expected.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from seal_jax.hosts.json_text import parse_json, read_text
from seal_jax.tasks.knowledge.passages import describe
from seal_jax.tasks.task import Problem

_SHOWN = 5  # titles in a message
_NAMES = {"id": ("problem", "id"), "context": ("context",), "title": ("title",)}
_FORMS = (
    "expected lines of {problem, edit, text}, a list of {title, context, completions: [...]}, or an"
    " object {title or id: text or [texts]}"
)


class Texts(NamedTuple):
    """What a file has for some problems."""

    of: list[tuple[str, ...]]  # [P] in the file's order, () where there is none
    remarks: list[str]  # what people should know: which problems have none, and the like
    digest: str  # of the file


class _Entry(NamedTuple):
    """The texts that a file has under one name."""

    where: str
    names: Mapping[str, str]  # by which the passage may be found, the surest first; '' is any kind
    texts: tuple[str, ...]
    missing: int = 0  # texts that their writer could not give


def load_texts(
    source: str, problems: Sequence[Problem], num_texts: int, beside: Sequence[Problem] = ()
) -> Texts:
    """Return the first `num_texts` texts that a file has for each problem.

    Args:
      source: 'json:FILE', or a path that ends in .json or .jsonl. A .jsonl file has lines.
      beside: the others of the split, whose titles may be the same.

    Raises:
      ValueError: the file is not of a form above, has a passage twice or an empty text, names by
        a title that several problems have, or has nothing for any problem.
      FileNotFoundError: there is no such file.
    """
    path = path_of(source)
    text = read_text(path)
    entries = _entries(path, text)
    places = _match(entries, problems, beside, path)
    found = [() if i is None else entries[i].texts for i in places]
    missing = sum(entries[i].missing for i in places if i is not None)
    if not any(found):
        named = ", ".join(_say(next(iter(entry.names.items()))) for entry in entries[:_SHOWN])
        raise ValueError(
            f"{path}: has no text for any of {_named(problems)}. It has {len(entries)} entries"
            f"{f': {named}' if named else ''}; {_FORMS}"
        )
    used = [texts[:num_texts] for texts in found]
    others = len(entries) - len(set(places) - {None})
    return Texts(used, list(_remarks(problems, used, num_texts, missing, others)), digest_of(text))


def path_of(source: str) -> str:
    """Return the path of 'json:FILE'.

    Raises:
      ValueError: it is something else.
    """
    if source.startswith("json:") and len(source) > 5:
        return source.removeprefix("json:")
    if source.endswith((".json", ".jsonl")):
        return source
    raise ValueError(f"{source!r}: expected 'json:FILE', or a path that ends in .json or .jsonl")


def digest_of(text: str) -> str:
    """Return what tells one file's text from another's."""
    return hashlib.sha256(text.encode()).hexdigest()


def _entries(path: str, text: str) -> list[_Entry]:
    if path.endswith(".jsonl"):
        lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), start=1)]
        return _join((where, parse_json(line, where)) for where, line in lines if line.strip())
    content = parse_json(text, path)
    if isinstance(content, list):
        return _join((f"{path}: [{i}]", item) for i, item in enumerate(content))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: {_FORMS}; found {describe(content)}")
    return [
        _Entry(where, {"": key}, _texts(value, where))
        for key, value in content.items()
        for where in [f"{path}: {key[:60]!r}"]
    ]


def _join(records: Iterable[tuple[str, Any]]) -> list[_Entry]:
    """Return an entry for each passage of the records: lines of one passage are put together."""
    entries: dict[tuple[str, str], _Entry] = {}
    edits: dict[tuple[str, str], dict[int, tuple[str, str | None]]] = {}
    for where, item in records:
        names = _names(item, where)
        key = next(iter(names.items()))
        if "text" not in item:
            if key in entries:
                raise ValueError(f"{where}: {_say(key)} has texts at {entries[key].where} already")
            entries[key] = _Entry(where, names, _texts_of(item, where))
            continue
        edit, text = _edit(item, where), _line_text(item, where)
        if key in entries and key not in edits:
            raise ValueError(f"{where}: {_say(key)} has texts at {entries[key].where} already")
        entries.setdefault(key, _Entry(where, names, ()))
        before, written = edits.setdefault(key, {}).get(edit, (where, text))
        if None not in (written, text) and written != text:
            raise ValueError(
                f"{where}: {_say(key)} has another text of edit {edit} at {before}: expected one"
                " line for each edit, numbered from 0 in the field 'edit'"
            )
        # One that could not be had may have come later.
        edits[key][edit] = (where, text) if written is None else (before, written)
    for key, by_edit in edits.items():
        texts = [text for _, (_, text) in sorted(by_edit.items())]
        there = tuple(text for text in texts if text is not None)
        entries[key] = entries[key]._replace(texts=there, missing=len(texts) - len(there))
    return list(entries.values())


def _names(item: Any, where: str) -> dict[str, str]:
    """Return by what a record names its passage, the surest first."""
    found = {}
    if isinstance(item, Mapping):
        for kind, fields in _NAMES.items():
            for field in fields:
                if field in item and kind not in found:
                    found[kind] = _text(item[field], f"{where}: field {field!r}")
    if not found:
        raise ValueError(
            f"{where}: expected an object with 'problem', 'context' or 'title', found"
            f" {describe(item)}"
        )
    if len(found) > 1:  # another passage may have that title
        found.pop("title", None)
    return found


def _edit(item: Mapping[str, Any], where: str) -> int:
    edit = item.get("edit", 0)
    if type(edit) is not int or edit < 0:
        raise ValueError(f"{where}: field 'edit' is {describe(edit)}, expected a number from 0 on")
    return edit


def _line_text(item: Mapping[str, Any], where: str) -> str | None:
    """Return the text of a line; None where the line says that its writer could not give one.

    A self-edit that was rejected may be empty: it is one of those that a model wrote.
    """
    text, where = item["text"], f"{where}: field 'text'"
    if text is None and item.get("error"):
        return None
    rejected = item.get("rejected") or str(item.get("why", "")).startswith("rejected")
    return text if text == "" and rejected else _text(text, where)


def _texts_of(item: Mapping[str, Any], where: str) -> tuple[str, ...]:
    for field in ("completions", "texts"):
        if field in item:
            return _texts(item[field], f"{where}: field {field!r}")
    raise ValueError(f"{where}: no field 'text', 'texts' or 'completions'; found {describe(item)}")


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_text(value, where),)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {describe(value)}, expected text or a list of texts")
    return tuple(_text(one, f"{where}[{i}]") for i, one in enumerate(value))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {describe(value)}, expected text")
    if not value.strip():
        raise ValueError(f"{where} is empty, expected text")
    try:
        value.encode()  # JSON can spell half of a surrogate pair, which no tokenizer takes
    except UnicodeError as error:
        raise ValueError(f"{where} is not valid Unicode: {error}") from error
    return value


# --- which entry is whose ---


def _match(
    entries: Sequence[_Entry], problems: Sequence[Problem], beside: Sequence[Problem], path: str
) -> list[int | None]:
    """Return the entry of each problem, None where it has none."""
    index: dict[tuple[str, str], list[int]] = {}
    for p, problem in enumerate(problems):
        fields = {"id": problem.id, "context": problem.passage, "title": problem.title}
        for kind, value in fields.items():
            index.setdefault((kind, _plain(kind, value)), []).append(p)
    for p, problem in enumerate(beside, start=len(problems)):
        if same := index.get(("title", _plain("title", problem.title))):
            same.append(p)
    places: list[int | None] = [None] * len(problems)
    shared: dict[str, None] = {}
    for i, entry in enumerate(entries):
        found = _find(entry.names, index)
        if len(found) > 1:
            shared[problems[found[0]].title] = None
        for p in found[:1]:
            if (other := places[p]) is not None:
                raise ValueError(
                    f"{entry.where}: the passage {problems[p].id!r} has texts at"
                    f" {entries[other].where} already"
                )
            places[p] = i
    if shared:
        raise ValueError(
            f"{path}: what it names is shared by several problems of the split, of"
            f" {len(shared)} title(s): {_list(list(shared))}. Expected what tells them apart: their"
            " id (field 'problem'), or the passage (field 'context')"
        )
    return places


def _find(names: Mapping[str, str], index: Mapping[tuple[str, str], list[int]]) -> list[int]:
    """Return the problems that these names may mean, by the first that means any."""
    for kind, value in names.items():
        for one in [kind] if kind else _NAMES:
            if found := index.get((one, _plain(one, value))):
                return found
    return []


def _plain(kind: str, text: str) -> str:
    if kind == "title":  # SQuAD writes its titles as they stand in a URL: Super_Bowl_50
        text = unquote(text).replace("_", " ")
    return " ".join(text.split())


def _remarks(
    problems: Sequence[Problem],
    used: Sequence[Sequence[str]],
    num_texts: int,
    missing: int,
    others: int,
) -> Iterable[str]:
    without = [problem for problem, texts in zip(problems, used, strict=True) if not texts]
    if without:
        beside = f"; the file has {others} entries of other problems" if others else ""
        yield f"no text for {_named(without)}: left out of this row{beside}"
    fewer = [p for p, texts in zip(problems, used, strict=True) if 0 < len(texts) < num_texts]
    if fewer:
        yield f"fewer than {num_texts} texts for {_named(fewer)}: what there is is used"
    if missing:
        yield f"{missing} text(s) that their writer could not give, as the file says"


def _named(problems: Sequence[Problem]) -> str:
    return f"{len(problems)} held-out problem(s): {_list([p.title for p in problems])}"


def _list(titles: Sequence[str]) -> str:
    titles = list(dict.fromkeys(titles))
    shown = ", ".join(repr(title[:40]) for title in titles[:_SHOWN])
    return f"{shown}, ..." if len(titles) > _SHOWN else shown


def _say(name: tuple[str, str]) -> str:
    kind, value = name
    return f"{kind} {value[:60]!r}".strip()
