"""The manifest tells what a folder has lost, and after a kill at any moment nothing false."""

import json
import os
import shutil

import pytest

from seal_jax.hosts import files, manifest
from seal_jax.hosts.replacing import remove_folder


def write_some(folder):
    """Do what a run does to its folder, the kinds of writes in the order of their coming."""
    adapter = folder / "adapters" / "0-a-0-0"
    manifest.begin(folder)
    files.write_json(folder / "config.json", {"manifest": "manifest.json"})
    manifest.update(folder)
    for step in range(2):
        files.write_json(folder / f"judged_{step}.json", {"scores": [step]})
        files.append_json(folder / f"pending_{step}.jsonl", {"name": step})
        (adapter / "position").mkdir(parents=True, exist_ok=True)
        files.write_json(adapter / "position" / "metadata", {"hash": "h"})
        manifest.update(folder)
        for name in ("metrics.jsonl", "edits.jsonl"):
            files.append_json(folder / name, {"step": step})
        manifest.update(folder)
        (folder / "checkpoints" / str(step + 1)).mkdir(parents=True)
        files.remove(folder / f"pending_{step}.jsonl")
    manifest.update(folder, settled=True)
    files.truncate_after(folder / "edits.jsonl", 0)  # as a run does that goes on
    files.write_json(folder / "config.json", {"manifest": "manifest.json", "placement": 2})
    manifest.forget(folder, ["adapters/0-a-0-0"])
    remove_folder(adapter)
    files.append_json(folder / "edits.jsonl", {"step": 1, "again": True})
    manifest.update(folder)


def test_a_kill_at_any_moment_makes_it_tell_of_no_loss(tmp_path, monkeypatch):
    """A kill is an end between any two moves, removals and appends on disk."""

    class Killed(BaseException):
        pass

    def killing(call):
        def counted(*arguments, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*arguments, **named)

        return counted

    for name in ("replace", "remove", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    monkeypatch.setattr(files, "append_json", killing(files.append_json))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for speed
    for moment in range(100):
        left, folder = 10, tmp_path / str(moment)
        folder.mkdir()
        left = moment
        try:
            write_some(folder)
        except Killed:
            left = 100
            assert manifest.losses(folder) == {}, moment
        else:
            break
    assert 30 < moment < 99
    left = 100
    assert manifest.losses(folder) == {} and manifest.not_entered(folder) == []
    (folder / "checkpoints" / "7").mkdir()
    assert manifest.not_entered(folder) == ["checkpoints/7"]
    (folder / "checkpoints" / "7").rmdir()
    write_again = manifest.read_manifest(folder)
    os.unlink(folder / manifest.MANIFEST)
    manifest.begin(folder)  # read anew from its first byte, a ledger has the same checksum
    assert manifest.read_manifest(folder) == write_again


def test_a_folder_whose_removal_is_killed_is_gone_under_its_name(tmp_path, monkeypatch):
    (tmp_path / "adapter" / "position").mkdir(parents=True)

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rmdir", kill)
        remove_folder(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    remove_folder(tmp_path / "adapter")  # and what is left of it goes with the next one
    assert not any(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    write_some(tmp_path)
    return tmp_path


def test_a_ledger_may_be_longer_than_its_entry_and_no_shorter(folder):
    ledger = folder / "edits.jsonl"
    whole = ledger.read_bytes()
    with ledger.open("ab") as file:
        file.write(b'{"step": 3}\n{"st')
    assert manifest.losses(folder) == {} and manifest.not_entered(folder) == ["edits.jsonl"]
    manifest.update(folder)
    assert manifest.read_manifest(folder).files["edits.jsonl"].num_bytes == len(whole) + 12
    ledger.write_bytes(whole)
    (why,) = manifest.losses(folder).values()
    assert why == f"has {len(whole)} bytes, {len(whole) + 12} were written"
    files.append_json(ledger, {"step": 3, "other": 1})  # a run that writes on hides no loss
    manifest.update(folder)
    assert "its checksum is not that of what was written" in manifest.losses(folder)["edits.jsonl"]


def test_what_is_lost_stays_told_when_the_run_writes_on(folder):
    (folder / "judged_1.json").write_text("{}")
    (folder / "metrics.jsonl").unlink()
    files.append_json(folder / "edits.jsonl", {"step": 3})
    manifest.update(folder)
    assert manifest.losses(folder).keys() == {"judged_1.json", "metrics.jsonl"}


def test_while_checkpoints_are_saved_only_the_newest_is_entered(folder):
    (folder / "checkpoints" / "4").mkdir()
    manifest.update(folder)
    assert manifest.read_manifest(folder).checkpoints == {4}
    (folder / "checkpoints" / "1").rmdir()  # Orbax does, once 4 is whole
    assert manifest.losses(folder) == {}
    (folder / "checkpoints" / "4").rmdir()
    assert manifest.losses(folder).keys() == {"checkpoints/4"}


def test_checkpoints_that_made_room_for_a_newer_one_are_no_loss(folder):
    steps = folder / "checkpoints"
    (steps / "4").mkdir()
    (steps / "1").rmdir()
    assert manifest.losses(folder) == {}
    (steps / "4").rmdir()
    (steps / "2").rmdir()
    gone = "was written and is not there"
    assert manifest.losses(folder) == {"checkpoints/1": gone, "checkpoints/2": gone}
    (steps / "2").mkdir()  # made again
    manifest.update(folder)
    assert manifest.losses(folder) == {"checkpoints/1": gone}


def test_a_manifest_that_is_damaged_or_lost_is_missed(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"bytes": 2', '"bytes": 3', 1))
    assert "its checksum does not verify" in manifest.losses(folder)["manifest.json"]
    with pytest.raises(ValueError, match="manifest.json: damaged"):
        manifest.update(folder)
    path.unlink()
    assert manifest.losses(folder) == {"manifest.json": "was written and is not there"}
    other = folder / "new"
    other.mkdir()
    for name in ("lock", "config.json"):  # a kill before there was a manifest
        (other / name).write_bytes((folder / "config.json").read_bytes())
    assert manifest.losses(other) == {}
    (folder / "config.json").write_text("{}")  # of a version that kept none
    assert manifest.losses(folder) == {}


def test_a_manifest_that_cannot_be_read_is_damaged(folder):
    path = folder / "manifest.json"
    path.unlink()
    path.symlink_to(path)
    assert "damaged: OSError: Too many levels" in manifest.losses(folder)["manifest.json"]
    path.unlink()
    path.mkdir()
    assert manifest.losses(folder).keys() == {"manifest.json"}
    for read in (manifest.read_manifest, manifest.update, manifest.lost_checkpoints):
        with pytest.raises(ValueError, match="manifest.json: damaged: IsADirectoryError: Is a dir"):
            read(folder)
    with pytest.raises(ValueError, match="manifest.json damaged: IsADirectoryError"):
        manifest.refuse_damaged(folder)
    path.rmdir()
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert manifest.losses(folder) == {}  # nothing says that there was one


def test_a_run_goes_on_without_what_it_makes_again_and_with_nothing_that_is_damaged(folder, capsys):
    for name in ("summary.json", "eval_own.jsonl", "pending_3.jsonl"):
        files.append_json(folder / name, {})
    manifest.begin(folder / "random")
    files.append_json(folder / "random" / "metrics.jsonl", {"step": 0})
    for place in (folder, folder / "random"):
        manifest.update(place)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    lost = [folder / name for name in ("summary.json", "eval_own.jsonl", "pending_3.jsonl")]
    for path in lost:
        path.unlink()
    manifest.refuse_damaged(folder)
    manifest.take_up(folder)
    assert all(
        f"{path}: was written and is not there" in capsys.readouterr().out for path in lost[:1]
    )
    assert manifest.losses(folder) == {}
    for path, content in before.items():
        if path in lost or path.name == "config.json":
            continue
        name = path.relative_to(folder).as_posix()
        path.write_bytes(content[:-3])
        with pytest.raises(ValueError, match=f"damaged since it was written: {name} "):
            manifest.refuse_damaged(folder)
        path.write_bytes(content)
    (folder / "edits.jsonl").unlink()
    with pytest.raises(ValueError, match="edits.jsonl was written and is not there.*Put it back"):
        manifest.refuse_damaged(folder)


def test_every_arm_that_is_trained_in_a_folder_of_its_own_is_known(folder, capsys):
    manifest.begin(folder / "grpo")
    files.append_json(folder / "grpo" / "metrics.jsonl", {"step": 0})
    other = folder / "other"  # a run of its own, which happens to be there
    manifest.begin(other)
    files.write_json(other / "config.json", {})
    for place in (folder / "grpo", other, folder):
        manifest.update(place)
    assert manifest.arm_names(folder) == ["grpo", "random"]
    assert "grpo" in manifest.read_manifest(folder).folders
    content = (folder / "grpo" / "metrics.jsonl").read_bytes()
    (folder / "grpo" / "metrics.jsonl").write_bytes(content[:-3])
    with pytest.raises(ValueError, match="grpo/metrics.jsonl has .*delete grpo/manifest.json"):
        manifest.refuse_damaged(folder)
    shutil.rmtree(folder / "grpo")
    assert manifest.losses(folder).keys() == {"grpo", "grpo/manifest.json"}
    manifest.refuse_damaged(folder)  # it is made again
    manifest.take_up(folder)
    assert f"{folder / 'grpo'}: was written and is not there" in capsys.readouterr().out
    assert manifest.losses(folder) == {}


def test_a_checkpoint_or_an_adapter_is_known_by_its_hash_until_it_is_made_again(folder):
    one, two, adapter = (folder / name for name in ("checkpoints/1", "checkpoints/2", "adapters/a"))
    for path in (one, two, adapter):
        (path / "position").mkdir(parents=True)
        files.write_json(path / "position" / "metadata", {"hash": path.name})
    assert manifest.refuted(two, "other") == ""  # not entered yet
    manifest.update(folder, settled=True)
    for path in (one, two, adapter):
        assert manifest.refuted(path, path.name) == ""
        assert "is not the one" in manifest.refuted(path, "other")
    shutil.rmtree(two)
    manifest.update(folder)
    manifest.forget_checkpoints(folder, above=1)
    assert manifest.losses(folder).keys() == {"checkpoints/2"}
    assert manifest.refuted(two, "other") == "" and manifest.refuted(one, "other")
    manifest.forget(folder, ["adapters/a"])
    assert manifest.refuted(adapter, "other") == ""


def test_only_names_of_a_run_are_entered(folder):
    (folder / "notes.txt").write_text("of the user")
    (folder / ".lock").write_text("")
    (folder / "my_adapter").mkdir()
    before = manifest.read_manifest(folder)
    manifest.update(folder)
    assert manifest.read_manifest(folder) == before
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {
        *("config.json", "metrics.jsonl", "edits.jsonl"),
        *("judged_0.json", "judged_1.json"),
    }
