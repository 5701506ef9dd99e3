"""A run is read back whole, what is damaged is named, and a full disk costs no finished step."""

import json
import shutil
import subprocess

from test_train import assert_same_run
from tiny_run import run_process, train_arguments

from seal_jax.commands import main as cli
from seal_jax.runs.verify import verify_run

pytest_plugins = ["tiny_fixtures"]


def test_a_finished_run_is_good(finished, capsys):
    assert cli.main(["verify", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("good ") for line in lines)
    names = {line.split()[1] for line in lines}
    assert {"config.json", "edits.jsonl", "checkpoints/2", "random/checkpoints/2"} <= names
    assert {"adapters/policy-0", "random/adapters/policy-1", "summary.json"} <= names


def test_what_is_damaged_is_named(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    largest = max((run / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    (run / "metrics.jsonl").write_text("no JSON\n")
    with (run / "edits.jsonl").open("a") as file:
        file.write('{"step": 1, "pro')  # a kill tears a last line; the next append drops it
    shutil.rmtree(run / "adapters" / "policy-1" / "adapters")
    good, damaged = verify_run(str(run))
    assert len(damaged) == 3 and "edits.jsonl" in good and "checkpoints/1" in good
    found = dict(complaint.split(": ", 1) for complaint in damaged)
    assert found.keys() == {"checkpoints/2", "metrics.jsonl", "adapters/policy-1"}
    assert "its hash does not verify" in found["checkpoints/2"] and "policy[" in damaged[1]
    assert "metrics.jsonl:1: not JSON" in found["metrics.jsonl"]
    assert cli.main(["verify", str(run)]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("DAMAGED") == 3 and "3 of " in captured.err


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "no run: expected a folder with config.json" in capsys.readouterr().err


def test_one_checkpoint_of_several_is_a_policy(finished, one_device, tmp_path, capsys):
    """`--policy RUN/checkpoints/1` is the policy after the first outer step."""
    arguments = ["eval", *train_arguments(tmp_path / "first")[1:]]
    assert cli.main([*arguments, "--policy", str(finished / "checkpoints" / "1")]) == 0
    assert cli.main([*arguments, "--policy", str(finished / "checkpoints" / "3")]) == 2
    assert "has no step 3, only [2, 1]" in capsys.readouterr().err
    first = json.loads((tmp_path / "first" / "policy.json").read_text())
    arguments[-1] = str(tmp_path / "last")
    assert cli.main([*arguments, "--policy", str(finished / "checkpoints")]) == 0
    assert json.loads((tmp_path / "last" / "policy.json").read_text())["hash"] != first["hash"]


def test_a_full_disk_ends_the_run_and_costs_no_finished_step(finished, small_disk):
    run = small_disk / "run"
    # Step 1 is logged, and its checkpoint does not fit any more.
    ended = run_process(*train_arguments(run), fill=f"{run / 'edits.jsonl'}:5", check=False)
    assert ended.returncode == 2 and "No space left" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "checkpoints/1" in verify_run(str(run))[0]
    (small_disk / "filler").unlink()
    run_process(*train_arguments(run))
    assert_same_run(finished, run)


def test_a_disk_that_is_read_only_ends_the_run(finished, one_device, small_disk, capsys):
    run = shutil.copytree(finished, small_disk / "run")
    (run / "summary.json").unlink()  # as if it were not done
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert cli.main(train_arguments(run)) == 2
    assert "Read-only file system" in capsys.readouterr().err
    assert verify_run(str(run))[1] == []
