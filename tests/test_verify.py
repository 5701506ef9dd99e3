"""A run is read back whole, what is damaged is named, and a full disk costs no finished step."""

import json
import shutil
import subprocess
import zlib

import pytest
from test_train import assert_same_run
from tiny_run import run_process, train_arguments

from seal_jax.commands import main as cli
from seal_jax.hosts import files, manifest
from seal_jax.runs.adapters import load_adapter
from seal_jax.runs.checkpoint import CheckpointError
from seal_jax.runs.leaf_records import hash_json
from seal_jax.runs.verify import unknown, verify_run
from seal_jax.sources import load_model

pytest_plugins = ["tiny_fixtures"]
MARK = {manifest.KEY: manifest.MANIFEST}  # in config.json


def test_a_finished_run_is_good(finished, capsys):
    assert cli.main(["verify", str(finished)]) == 0
    *lines, unknown = capsys.readouterr().out.splitlines()
    assert all(line.startswith("good ") for line in lines)
    assert unknown == (
        "Not known: what a killed run wrote after the last entry of manifest.json, and whether that"
        " was itself replaced."
    )
    names = {line.split()[1] for line in lines}
    assert {"config.json", "edits.jsonl", "checkpoints/2", "random/checkpoints/2"} <= names
    assert {"adapters/policy-0", "random/adapters/policy-1", "summary.json"} <= names
    files = {path.relative_to(finished) for path in finished.rglob("*") if path.is_file()}
    alone = {p.as_posix() for p in files if not {"checkpoints", "adapters"} & {*p.parts}}
    assert alone <= names and "model/config.json" in alone  # whatever a run writes is looked at


def test_what_is_damaged_is_named(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    largest = max((run / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    (run / "metrics.jsonl").write_text("no JSON\n")
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
    good, damaged = verify_run(str(tmp_path / "first"))
    assert "policy.json" in good and "eval_seal.jsonl" in good and not damaged
    assert "policy.json" in manifest.read_manifest(tmp_path / "first").files
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
    assert verify_run(str(run))[1] == ["summary.json: was written and is not there"]


def damages(data: bytes):
    """Yield what may have become of a file, and its content then; None if it is deleted."""
    for place in (0, len(data) // 2, len(data) - 1):
        yield f"byte {place}", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    yield "half", data[: len(data) // 2]
    yield "last line", data[: data[:-1].rfind(b"\n") + 1]
    yield "emptied", b""
    yield "deleted", None


def unnamed(run) -> tuple[int, set]:
    """Damage every file of a run in turn; return how often, and what `verify` does not name."""
    count, missed = 0, set()
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name, data = path.relative_to(run).as_posix(), path.read_bytes()
        for what, content in damages(data):
            path.unlink() if content is None else path.write_bytes(content)
            if not any(complaint.startswith(f"{name}: ") for complaint in verify_run(str(run))[1]):
                missed.add((name, what))
            count += 1
        path.write_bytes(data)
    return count, missed


def without_orbax(run, copy):
    """Copy a run without checkpoints and adapters, whose damage test_checkpoint.py looks at."""
    return shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "adapters"))


def test_no_damage_to_any_file_of_a_finished_run_goes_unnamed(finished, tmp_path):
    count, missed = unnamed(without_orbax(finished, tmp_path / "run"))
    assert count == 7 * 17 and missed == set()


def test_no_damage_to_any_file_of_a_killed_run_goes_unnamed(old_run, tmp_path):
    run = without_orbax(old_run, tmp_path / "run")
    files.write_json(run / "config.json", {**files.read_json(run / "config.json"), **MARK})
    manifest.begin(run)
    count, missed = unnamed(run)
    assert count == 7 * 9 and missed == set()


def test_a_checkpoint_or_an_adapter_that_is_gone_is_named(finished, tmp_path):
    run = without_orbax(finished, tmp_path / "run")
    lost = {complaint.partition(":")[0] for complaint in verify_run(str(run))[1]}
    assert {"checkpoints/1", "checkpoints/2", "adapters/policy-0", "random/checkpoints/2"} <= lost
    shutil.rmtree(run / "random")
    assert "random: was written and is not there" in verify_run(str(run))[1]


def test_a_run_without_a_manifest_is_read_and_what_cannot_be_known_is_said(old_run, capsys):
    (old_run / "edits.jsonl").write_text("")
    assert cli.main(["verify", str(old_run)]) == 0
    assert "there is no manifest.json to compare with" in capsys.readouterr().out


def test_what_is_damaged_is_not_used(finished, one_device, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    assert cli.main(["verify", str(run / "checkpoints")]) == 0
    shutil.rmtree(run / "checkpoints" / "2")
    config = (run / "model" / "config.json").read_text()
    (run / "model" / "config.json").write_text(config.replace("10000.0", "20000.0"))
    with pytest.raises(ValueError, match="model/config.json its checksum is not that"):
        load_model(str(run))
    (run / "model" / "config.json").write_text(config)
    with pytest.warns(UserWarning, match=r"checkpoints were written and are not there: \[2\]"):
        load_model(str(run))
    (run / "edits.jsonl").write_text("")
    capsys.readouterr()
    for command in (train_arguments(run), ["export", str(run), "--list"]):
        assert cli.main(command) == 2
        message = capsys.readouterr().err
        assert "damaged since it was written: edits.jsonl has 0 bytes, " in message
    assert cli.main(["verify", str(run)]) == 2
    assert "DAMAGED  edits.jsonl: has 0 bytes" in capsys.readouterr().out
    (run / "manifest.json").unlink()  # as the message says: take what is there
    (run / "checkpoints" / "1").rename(run / "checkpoints" / "2")
    assert cli.main(train_arguments(run)) == 0


def replace(old, new):
    shutil.rmtree(new)
    shutil.copytree(old, new)


def test_a_manifest_without_hashes_is_good_and_what_it_cannot_tell_is_said(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    content = json.loads((run / "manifest.json").read_text())
    del content["hashes"], content["crc32"]  # as of an older version
    checksum = zlib.crc32(json.dumps(content, indent=1, sort_keys=True).encode())
    files.write_json(run / "manifest.json", {**content, "crc32": f"{checksum:08x}"})
    assert verify_run(str(run))[1] == [] and "the other arm's" in unknown(str(run))
    assert "the other arm's" not in unknown(str(finished))


def swap(folder, one, other):
    (folder / one).rename(folder / "kept")
    (folder / other).rename(folder / one)
    (folder / "kept").rename(folder / other)


def test_what_is_whole_and_of_another_place_is_named_and_not_used(finished, tmp_path):
    """Its own hashes verify, but it is another step's, another arm's, or another adapter."""
    run = shutil.copytree(finished, tmp_path / "run")
    replace(run / "random" / "checkpoints" / "2", run / "checkpoints" / "2")
    swap(run / "random" / "checkpoints", "1", "2")
    swap(run / "adapters", "policy-0", "policy-1")
    replace(finished / "adapters" / "policy-1", run / "random" / "adapters" / "policy-1")
    _, damaged = verify_run(str(run))
    other = "is not the one that the run wrote there"
    assert dict(complaint.split(": ", 1) for complaint in damaged) == {
        "checkpoints/2": other,
        "random/checkpoints/1": "ValueError: it was saved as 2, not as 1",
        "random/checkpoints/2": "ValueError: it was saved as 1, not as 2",
        "adapters/policy-0": "ValueError: it was saved as policy-1, not as policy-0",
        "adapters/policy-1": "ValueError: it was saved as policy-0, not as policy-1",
        "random/adapters/policy-1": other,
    }
    with pytest.warns(UserWarning, match=f"damaged checkpoint .*/2: {other}"):
        config = load_model(str(run)).config  # the policy after step 1
    for folder in (run, run / "random"):
        with pytest.raises(CheckpointError, match="damaged: .*policy-1: "):
            load_adapter(str(folder), "policy-1", config)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no good checkpoint"):
        load_model(str(run / "random"))


def test_stray_files_are_neither_adapters_nor_checkpoints(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("adapters/notes.txt", "adapters/.DS_Store", "checkpoints/notes", "checkpoints/7"):
        (run / name).write_text("of the user")
    (run / "adapters" / ".Trash").mkdir()
    good, damaged = verify_run(str(run))
    assert not damaged and not any("notes" in name or "7" in name for name in good)
    load_model(str(run))
    assert "(here" not in unknown(str(run))
    assert cli.main(["export", str(run), "--list"]) == 0
    listed = capsys.readouterr().out
    assert "policy-1" in listed and "notes" not in listed and "Trash" not in listed


def test_what_was_added_to_a_finished_run_is_named(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    files.append_json(run / "edits.jsonl", {"step": 9, "problem": "p", "edit": 0})
    files.append_json(run / "random" / "metrics.jsonl", {"step": 9})
    files.append_json(run / "eval_fake.jsonl", {"step": 9})
    (run / "model" / "added.json").write_text("{}")
    shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "3")
    item = run / "checkpoints" / "3" / "position" / "metadata"
    record = json.loads(item.read_text())["record"] | {"name": "3"}  # another run's third step
    item.write_text(json.dumps({"record": record, "hash": hash_json(record)}))
    names = ("edits.jsonl", "eval_fake.jsonl", "model/added.json", "random/metrics.jsonl")
    _, damaged = verify_run(str(run))
    late = "was added after the run had ended"
    assert damaged == [f"{name}: {late}" for name in (*names[:3], "checkpoints/3", names[3])]
    assert "(here" not in unknown(str(run))
    with pytest.warns(UserWarning, match=f"checkpoint .*/3: {late}"):
        load_model(str(run))
    (run / "summary.json").unlink()  # as if it had been killed before its end
    manifest.forget(run, ["summary.json"])
    with (run / "edits.jsonl").open("a") as file:
        file.write('{"step": 1, "pro')  # a kill tears a last line; the next append drops it
    good, damaged = verify_run(str(run))
    assert not damaged and {*names, "checkpoints/3"} <= {*good, "model/added.json"}
    assert "(here: model/added.json, " in unknown(str(run))


def test_an_adapter_that_a_kill_left_unfinished_is_no_damage(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    left = run / "adapters" / "1-left-0-0"
    shutil.copytree(run / "adapters" / "policy-1", left)
    shutil.rmtree(left / "position")
    assert cli.main(["verify", str(run)]) == 0
    assert "unfinished  adapters/1-left-0-0: left by a kill" in capsys.readouterr().out
    shutil.rmtree(run / "adapters" / "policy-1" / "position")  # in the manifest: it was whole
    assert cli.main(["verify", str(run)]) == 2
    assert "DAMAGED  adapters/policy-1: ValueError: position/ is not" in capsys.readouterr().out


def test_an_evaluation_and_a_training_run_write_into_no_folder_of_the_other(
    finished, one_device, tmp_path, capsys
):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "summary.json").read_bytes()
    evaluation = ["eval", *train_arguments(run)[1:], "--policy", str(run)]
    assert cli.main(evaluation) == 2
    assert f"{run} is the folder of a training run (it has checkpoints)" in capsys.readouterr().err
    assert (run / "summary.json").read_bytes() == before and not (run / "policy.json").exists()
    for name in ("checkpoints", "adapters", "random"):
        shutil.rmtree(run / name)
    for name in ("metrics.jsonl", "edits.jsonl", "manifest.json"):
        (run / name).unlink()
    files.write_json(run / "policy.json", {"policy": str(finished)})
    assert cli.main(train_arguments(run)) == 2  # it would say that it is done, too
    assert f"{run} is the folder of an evaluation (it has policy" in capsys.readouterr().err
