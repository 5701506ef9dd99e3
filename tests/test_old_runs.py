"""A run folder that commit cb29795 wrote, killed within its second outer step, is read and resumed.

  KILL=FOLDER/pending_1.jsonl:3 python tests/tiny_run.py train --config tests/tiny_config.py \\
      --workdir FOLDER --set eval.random_control=False --set eval.num_problems=1 \\
      --set checkpoint.keep=1
"""

import json

import jax
from tiny_run import run_process, train_arguments

from seal_jax.commands import main as cli
from seal_jax.hosts.files import read_jsonl
from seal_jax.runs.checkpoint import tree_hash
from seal_jax.sources import load_model

pytest_plugins = ["tiny_fixtures"]
SETTINGS = ("eval.random_control=False", "eval.num_problems=1", "checkpoint.keep=1")


def test_it_is_whole_and_its_policy_is_a_model(old_run, capsys):
    assert cli.main(["verify", str(old_run)]) == 0
    assert "good     checkpoints/1" in capsys.readouterr().out
    with jax.transfer_guard("allow"):
        params = load_model(str(old_run)).params
    assert tree_hash(params) == "c00269340555fc13"


def test_it_is_resumed_where_it_was_killed(old_run):
    edits = (old_run / "edits.jsonl").read_text()
    finished = read_jsonl(old_run / "pending_1.jsonl")
    assert len(finished) == 2
    for run in finished:  # made again with the rest of its wave, it would not have this value
        run["log_likelihood"] -= 0.25
    lines = "".join(json.dumps(run) + "\n" for run in finished)
    (old_run / "pending_1.jsonl").write_text(lines)
    run_process(*train_arguments(old_run, *SETTINGS))
    assert (old_run / "edits.jsonl").read_text().startswith(edits)
    logged = {(row["problem"], row["edit"]): row for row in read_jsonl(old_run / "edits.jsonl")}
    assert {row["step"] for row in logged.values()} == {0, 1}
    for run in finished:  # what had ended is taken as it was, not made again
        problem, edit, seed = run["name"]
        assert logged[problem, edit]["log_likelihood"][seed] == run["log_likelihood"]
    assert json.loads((old_run / "summary.json").read_text())["num_problems"] == 1
    assert not list(old_run.glob("pending_*"))
