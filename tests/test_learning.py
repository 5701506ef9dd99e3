"""The benchmark that shows objectives learn: its model, its figures, and a short run that rises."""

import json

import numpy as np
import pytest
from tiny_run import run_process

from seal_jax.bench import learning
from seal_jax.commands import main as cli
from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.toys import tiny_facts
from seal_jax.tasks.facts import Facts
from seal_jax.tasks.task import SelfEdit

pytest_plugins = ["tiny_fixtures"]


def bench_quick(folder, model):
    """Run the command in a process of its own, which XLA's optimizations make twice as fast."""
    out = folder / "out.json"
    command = ["bench", "learning", "--quick", "--model", model, "--workdir", folder / "runs"]
    ended = run_process(*command, "--json", out, flags="")
    return json.loads(out.read_text()), ended


@pytest.mark.long
def test_a_short_run_rises(facts_model, tmp_path):
    figures, ended = bench_quick(tmp_path, facts_model)
    row = figures["rest_em"]
    assert 0.1 < row["start"] < 0.45 < row["best_possible"] <= 1
    assert row["end"] > 1.3 * row["start"] and row["end"] > row["start"] + 0.1
    assert len(row["mean"]) == 4 and row["mean"][0] == row["start"]
    assert row["per_seed"] == [row["end"]]
    assert (tmp_path / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "rest_em    held-out reward" in ended.stdout and "policy update" in ended.stderr
    # The same command trains nothing again.
    again, ended = bench_quick(tmp_path, facts_model)
    assert again == figures
    assert "policy update" not in ended.stderr


@pytest.mark.parametrize("style", tiny_facts.STYLES)
def test_every_style_is_a_self_edit(style):
    task = Facts()
    for problem, exam in task.load("eval"):
        edit = task.parse(problem, tiny_facts.notes(problem, style))
        assert isinstance(edit, SelfEdit)
        asked = {f"{q.question} {q.answer}" for q in exam.questions}
        num_asked = len(asked & set(edit.training_texts))
        assert num_asked == {"asked": 3, "one asked": 1}.get(style, 0)


def test_only_what_the_model_is_to_write_is_learned():
    tokenizer = ByteTokenizer()
    tokens, loss_mask = tiny_facts.make_documents(seed=1)()[0]
    for row, mask in zip(tokens, loss_mask, strict=True):
        start = int(mask.argmax())
        before, written = tokenizer.decode(row[:start]), tokenizer.decode(row[mask])
        assert before.endswith(("\nnotes:\n", "?")) and written
        assert before.endswith("?") or written.endswith("\n")
        assert row[mask][-1] in tokenizer.stop_ids and not mask[:start].any()
    lines = [tokenizer.decode(row[m]).count("\n") for row, m in zip(tokens, loss_mask, strict=True)]
    assert set(lines) == {0, 1, 3}  # answers, one line, three lines


@pytest.mark.parametrize("algorithm", learning.ALGORITHMS)
def test_every_objective_has_the_same_number_of_inner_runs(algorithm, tmp_path):
    config = learning.make_config(tmp_path, algorithm, seed=0, num_steps=4)
    other = learning.make_config(tmp_path, "rest_em", seed=0, num_steps=4)
    for section in ("sample", "inner", "eval", "reward"):
        assert config[section] == other[section]
    assert config.outer.problems_per_step == other.outer.problems_per_step


def test_figures_of_several_seeds():
    curves, errors = [[0.2, 0.6], [0.4, 0.8]], [[0.1, 0.1], [0.1, 0.1]]
    row = learning.summarize(curves, errors, 0.9)
    assert (row["start"], row["end"]) == pytest.approx((0.3, 0.7))
    assert row["per_seed"] == [0.6, 0.8] and row["start_per_seed"] == [0.2, 0.4]
    half = 1.96 * 0.1 / 2**0.5
    np.testing.assert_allclose(row["interval"][1], [0.3 + half, 0.7 + half])


def test_a_workdir_is_for_runs_only(capsys):
    assert cli.main(["bench", "inner", "--workdir", "x"]) == 2
    assert "--workdir is for learning" in capsys.readouterr().err
