"""JSON that somebody wrote: what cannot be used is one message with the file in it."""

import json
import os
import struct

import pytest
from tiny_run import CONFIG

from seal_jax.commands.eval import claim_policy
from seal_jax.commands.view import run_predictions
from seal_jax.config import load_config
from seal_jax.config.workdir import check_workdir
from seal_jax.hosts.files import read_json, read_jsonl, read_object, truncate_after
from seal_jax.models.config import config_from_hf
from seal_jax.models.tensor_file import read_header
from seal_jax.models.tokenizer_folder import load_tokenizer
from seal_jax.models.weights import load_safetensors
from seal_jax.outer.ledger import read_ledger
from seal_jax.runs.adapters import list_kept
from seal_jax.runs.peft_config import read_settings
from seal_jax.tasks.arc.sources import load_tasks
from seal_jax.tasks.arc.view import read_predictions
from seal_jax.tasks.knowledge.passages import load_passages, load_problems

BAD = {
    "empty": b"",
    "cut off": b'{"a": [1, ',
    "no JSON": b"a: 1",
    "another encoding": '{"ä": 1}'.encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "NaN": b'{"a": NaN}',
    "minus infinity": b'[{"a": -Infinity}]',
    "a float too large": b'{"a": 1e999}',
    "an integer too large": b'{"a": 1' + b"0" * 400 + b"}",
    "an integer of 10,000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "a text": b'"a"',
    "null": b"null",
}


def in_folder(read, file, *beside):
    """Return a reader of `file`, given that of its folder, with empty files beside it."""

    def read_folder(path):
        for name in beside:
            (path.parent / name).touch()
        read(path.parent)

    return file, read_folder


def config():
    return load_config(CONFIG)


READERS = {
    "passages": ("a.json", lambda path: load_passages(str(path))),
    "problems": ("a.json", lambda path: load_problems(f"json:{path}", "train")),
    "arc": ("a.json", lambda path: load_tasks(str(path))),
    "arc folder": in_folder(lambda folder: load_tasks(str(folder)), "0a.json"),
    "predictions": ("a.json", lambda path: read_predictions(str(path))),
    "model": ("config.json", config_from_hf),
    "index": in_folder(
        lambda folder: load_safetensors(folder, None),
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    ),
    "tokenizer": in_folder(load_tokenizer, "tokenizer_config.json", "tokenizer.json"),
    "adapter": ("adapter_config.json", read_settings),
    "workdir": in_folder(lambda folder: check_workdir(config(), str(folder)), "config.json"),
    "view": in_folder(lambda folder: run_predictions(str(folder), "own", "a"), "config.json"),
    "policy": in_folder(lambda folder: claim_policy(str(folder), "p", "h"), "policy.json"),
    "own": ("a.json", read_json),
}
LINES = {
    "lines": ("a.jsonl", read_jsonl),
    "metrics": ("metrics.jsonl", lambda path: truncate_after(path, 1)),
    "ledger": ("pending_0.jsonl", lambda path: read_ledger(str(path), [])),
    "edits": in_folder(lambda folder: list_kept(str(folder)), "edits.jsonl"),
}


@pytest.mark.parametrize(("name", "read"), READERS.values(), ids=READERS.keys())
def test_bad_json_names_its_file(tmp_path, name, read):
    path = tmp_path / name
    places = str(path), f"{tmp_path}: task {path.stem}: "
    for kind, content in BAD.items():
        path.write_bytes(content)
        with pytest.raises(ValueError) as raised:
            read(path)
        message = str(raised.value)
        assert any(place in message for place in places), (kind, message)
        assert len(message) < 600 and "\n" not in message, (kind, message)
        assert type(raised.value) not in (UnicodeDecodeError, json.JSONDecodeError), kind


@pytest.mark.parametrize(("name", "read"), LINES.values(), ids=LINES.keys())
def test_a_bad_line_names_its_file_and_number(tmp_path, name, read):
    path = tmp_path / name
    for kind, content in BAD.items():
        path.write_bytes(content + b"\n{}\n")
        with pytest.raises(ValueError) as raised:
            read(path)
        assert f"{path}:1: " in str(raised.value), kind


def test_a_line_without_what_is_read_of_it_is_named(tmp_path):
    ledger = tmp_path / "pending_0.jsonl"
    ledger.write_text('{"name": ["a", 0, 0], "step": 0}\n')
    with pytest.raises(ValueError, match="pending_0.jsonl:1: has no text, accuracy"):
        read_ledger(str(ledger), [])


@pytest.mark.parametrize(
    "content", [BAD[name] for name in ("NaN", "deep lists", "a key twice", "another encoding")]
)
def test_a_bad_header_of_tensors_names_its_file(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(ValueError, match="model.safetensors: "):
        read_header(path)


def test_texts_may_hold_any_character_and_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\ud800", "b": 1e3, "c": -12345678901234567890}')
    assert read_json(path) == {"a": "\ud800", "b": 1000.0, "c": -12345678901234567890}


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="a folder, expected a file"):
        load_passages(f"{tmp_path}{os.sep}")
    with pytest.raises(FileNotFoundError, match="none.json: no such file"):
        load_passages(str(tmp_path / "none.json"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("{}")
    for name, words in {
        "loop": "loop: cannot be read: Too many levels of symbolic links",
        "file/a.json": "file/a.json: cannot be read: Not a directory",
        "a" * 300: "aaa: cannot be read: File name too long",
        "a\0b": "no file has a zero byte in its name",
    }.items():
        with pytest.raises(ValueError, match=words):
            read_object(f"{tmp_path}/{name}")
