"""Progress is readable without a terminal."""

import pytest

from seal_jax.hosts.console import progress


@pytest.mark.parametrize("total", [1, 7, 1000])
def test_progress_without_a_terminal_is_a_few_plain_lines(capsys, total):
    assert sum(1 for _ in progress(range(total), "answer", "question")) == total
    with progress(total, "decode", "token") as bar:
        for _ in range(total):
            bar.update(1)
    with progress((n for n in range(total)), "stream") as bar:
        assert len(list(bar)) == total
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 6 and all(lines) and "\r" not in "".join(lines)
    assert any(line.startswith(f"answer: {total}/{total} question, 00:00 so far") for line in lines)
    assert any(line.startswith(f"decode: {total}/{total} token") for line in lines)
