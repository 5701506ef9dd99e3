"""What cannot be written is said before the work, and looking at it leaves no trace."""

import os

import pytest
from tiny_run import CONFIG

from seal_jax.commands import main as cli
from seal_jax.hosts.outputs import check_output

FILES = {
    "no folder for it": ("nowhere/a.json", "cannot write in .*nowhere: No such file"),
    "a file above it": ("file/a.json", "cannot write in .*file: Not a directory"),
    "a folder": ("folder", "expected a file to write"),
    "a folder with a slash": ("folder/", "expected a file to write"),
    "a new file with a slash": ("new/", "expected a file to write"),
    "a file with a slash": ("file/", "expected a file to write"),
    "a file with a point": ("new/.", "expected a file to write"),
    "a broken link": ("link/a.json", "cannot write in .*link: No such file"),
    "a name too long": ("a" * 300, "File name too long"),
    "nobody may write": ("/proc/a.json", "cannot write in /proc"),
    "no name": ("", "expected a file to write"),
}
FOLDERS = {
    "a file": ("file", "expected a folder to write"),
    "a file above it": ("file/a/b", "cannot write in .*file: Not a directory"),
    "a broken link": ("link", "expected a folder to write"),
    "a broken link above it": ("link/a", "cannot write in .*link"),
    "a name too long": ("a" * 300, "File name too long"),
    "nobody may write": ("/proc/a/b", "cannot write in /proc"),
    "no name": ("", "expected a folder to write"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Be in a folder with a file, a folder and a broken link; it must be left as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nothing")
    yield tmp_path
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "kept" and not os.listdir(tmp_path / "folder")


@pytest.mark.parametrize(("path", "words"), FILES.values(), ids=FILES.keys())
def test_a_file_that_cannot_be_written(here, path, words):
    with pytest.raises(ValueError, match=f"--json {path}.*{words}"):
        check_output(path, "--json")


@pytest.mark.parametrize(("path", "words"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_that_cannot_be_made(here, path, words):
    with pytest.raises(ValueError, match=f"--to {path}.*{words}"):
        check_output(path, "--to", folder=True)


def test_a_zero_byte_is_no_part_of_a_path(here):
    for folder in (False, True):
        with pytest.raises(ValueError, match=r"--out 'a\\x00b': no path has a zero byte"):
            check_output("a\0b", "--out", folder)


def test_what_can_be_written_passes(here):
    for path in ("new", "file", "folder/new", os.devnull, here / "new"):
        check_output(path, "--json")
    for path in ("new", "new/", "new/.", "new/below", "folder", "folder/a/b", ".", here):
        check_output(path, "--to", folder=True)


# Each has something else wrong that would be found later.
NO_MODEL = ["--config", CONFIG, "--set", "model.source=no/such/model"]
COMMANDS = {
    "generate": (["generate", *NO_MODEL, "--passages", "passage.txt", "--out"], False),
    "bench": (["bench", "nothing", "--json"], False),
    "bench profile": (["bench", "nothing", "--profile"], True),
    "bench workdir": (["bench", "learning", "--workdir"], True),
    "view": (["view", "arc", "no task", "--out"], False),
    "export": (["export", "no run", "--to"], True),
    "eval": (["eval", *NO_MODEL, "--policy", "no policy", "--workdir"], True),
    "train": (["train", *NO_MODEL, "--workdir"], True),
    "doctor": (["doctor", *NO_MODEL, "--workdir"], True),
}


@pytest.mark.parametrize(("words", "folder"), COMMANDS.values(), ids=COMMANDS.keys())
def test_every_command_looks_first(here, tmp_path_factory, monkeypatch, capsys, words, folder):
    text = tmp_path_factory.mktemp("texts") / "passage.txt"
    text.write_text("zorbin color is red.")
    words = [str(text) if word == text.name else word for word in words]
    for path in ("file/a", "/proc/a"):
        assert cli.main([*words, path]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1, output
        assert f"{words[-1]} {path}: cannot write in " in output.err


def test_a_file_that_is_there_is_not_overwritten(here, tmp_path_factory, capsys):
    text = tmp_path_factory.mktemp("texts") / "passage.txt"
    text.write_text("zorbin color is red.")
    words = ["generate", *NO_MODEL, "--passages", str(text), "--out"]
    for path in ("file", "link"):
        assert cli.main([*words, path]) == 2
        assert f"{path} exists: choose another --out" in capsys.readouterr().err
