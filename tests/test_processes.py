"""One run on several processes is the run of one process with as many devices, bit for bit."""

import json
import sys

import jax
import numpy as np
import pytest
from loopback import finish, launch
from test_train import assert_same_run
from tiny_run import TESTS, run_process, train_arguments

from seal_jax.hosts import exchange
from seal_jax.hosts.files import read_jsonl
from seal_jax.runs import checkpoint
from seal_jax.sharding import leading, make_mesh

pytest_plugins = ["tiny_fixtures"]
TIMEOUT = "300"  # seconds: they compile, one perhaps from the other's cache


def train(folder, port, count, *overrides, **variables):
    """Run `seal-jax train` on processes of one device each; returns how each ended."""
    command = [sys.executable, str(TESTS / "tiny_run.py"), *train_arguments(folder, *overrides)]
    return finish(
        *(
            launch(command, port, index, count, TIMEOUT, **variables.get(f"on_{index}", {}))
            for index in range(count)
        )
    )


def final_hash(folder):
    """Return the hash of all that the last checkpoint holds: values, paths, position."""
    steps = [path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
    last = max(steps, key=lambda path: int(path.name))
    return json.loads((last / "position" / "metadata").read_text())["hash"]


@pytest.fixture(scope="module")
def on_two_devices(compiled, tmp_path_factory):
    """Return the folder of a run of one process with two devices."""
    folder = tmp_path_factory.mktemp("two_devices") / "run"
    run_process(*train_arguments(folder, "eval.random_control=False"), num_devices=2)
    return folder


def test_two_processes_one_of_them_stopped_are_one(on_two_devices, port, tmp_path):
    run, overrides = tmp_path / "run", ("eval.random_control=False",)
    tell = {"TELL": f"{run / 'pending_1.jsonl'}:2"}  # within a wave of step 1
    for code, out, err in train(run, port, 2, *overrides, on_1=tell):
        assert code == 0, err
        assert "process 1 got SIGTERM: the same command resumes the run" in err
        assert "| method |" not in out
    # The wave was finished, and the first process alone wrote it.
    assert len(read_jsonl(run / "pending_1.jsonl")) == 4
    assert len(read_jsonl(run / "metrics.jsonl")) == 1
    assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} == {"1"}
    first, second = train(run, port, 2, *overrides)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "| method |" in first[1] and "| method |" not in second[1]
    assert_same_run(on_two_devices, run)
    assert final_hash(run) == final_hash(on_two_devices)


@pytest.mark.long
def test_a_full_disk_ends_all(small_disk, port):
    run = small_disk / "run"
    fill = {"FILL": f"{run / 'edits.jsonl'}:1"}  # before the first checkpoint
    for code, _, err in train(run, port, 2, "eval.random_control=False", on_0=fill):
        assert code == 2 and "Traceback" not in err, err
        assert "No space left for a checkpoint: needs" in err


@pytest.mark.long
def test_four_processes_are_one_and_another_number_goes_on(port, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_process(*train_arguments(whole), num_devices=4)
    tell = {"TELL": f"{run / 'pending_1.jsonl'}:2"}
    for code, _, err in train(run, port, 4, on_2=tell):
        assert code == 0 and "process 2 got SIGTERM" in err
    run_process(*train_arguments(run), num_devices=4)
    assert_same_run(whole, run)
    assert final_hash(run) == final_hash(whole)


@pytest.mark.long
def test_one_that_hangs_in_a_wave_does_not_hold_the_others(port, tmp_path):
    """They wait for its numbers there, not for its words: JAX misses its heartbeat."""
    run, timeout = tmp_path / "run", 40
    command = [sys.executable, str(TESTS / "tiny_run.py"), *train_arguments(run)]
    halt = {"HALT": f"{run / 'pending_0.jsonl'}:2"}
    waits, hangs = (
        launch(command, port, index, 2, str(timeout), **(halt if index else {}))
        for index in range(2)
    )
    _, err = waits.communicate(timeout=200)
    assert waits.returncode != 0 and "heartbeats" in err, err
    assert hangs.poll() is None
    hangs.kill()
    hangs.communicate()


FAIL = """
import sys
from seal_jax.runs import train_state
from seal_jax.commands import main as cli
from seal_jax.hosts.exchange import is_first
write = train_state.append_metrics
def fail(*arguments):
    if is_first():
        raise {}
    write(*arguments)
train_state.append_metrics = fail
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("OSError(28, 'No space left on device')", 2, "No space left on device"),
        pytest.param(
            "KeyError('a mistake of ours')",
            1,
            "KeyError: 'a mistake of ours'",
            marks=pytest.mark.long,
        ),
    ],
)
def test_one_that_fails_alone_ends_the_others_with_its_message(
    port, tmp_path, compiled, error, code, words
):
    """The first alone writes files; the other waits for it in the next computation."""
    arguments = train_arguments(tmp_path / "run", "eval.random_control=False")
    command = [sys.executable, "-c", FAIL.format(error), *arguments]
    first, second = finish(*(launch(command, port, i, 2, TIMEOUT) for i in range(2)))
    assert first[0] == code and words in first[2], first[2]
    assert second[0] == 2, second[2]
    (said,) = [line for line in second[2].splitlines() if "as another process failed" in line]
    assert "process 0 on " in said and words in said
    assert "heartbeat" not in second[2] and "Check failure" not in first[2] + second[2]


def test_work_is_spread_by_its_cost(monkeypatch):
    monkeypatch.setattr(exchange.distributed.global_state, "num_processes", 3)
    costs = [1, 9, 2, 5, 3, 4, 3]
    owners = exchange.spread(costs)
    load = [sum(c for c, o in zip(costs, owners, strict=True) if o == p) for p in range(3)]
    assert sorted(load) == [9, 9, 9]
    assert exchange.spread([]) == []
    # Two places each: what is short goes where the long ones are, once the others are full.
    assert exchange.spread([9, 1, 1, 1], count=2, most=2) == [0, 1, 1, 0]


SPEAK = """
import sys
from seal_jax.hosts.start_jax import start_jax
start_jax()
from seal_jax.outer.problems import read_problems
from seal_jax.hosts.exchange import ask_first, exchange_shares, is_first, least
from seal_jax.tasks import make_task
size = 8_000_000
assert ask_first("text", lambda: "x" * size if is_first() else None) == "x" * size
numbers = [1.5, float("inf"), None, 0.1]
assert ask_first("numbers", lambda: numbers) == numbers
for turn in range(50):
    shares = exchange_shares("shares", [1, 0, 0, 1], lambda mine: [10 * i for i in mine])
    assert shares == [0, 10, 20, 30]
assert least("room", 3.25 if is_first() else 0.1) == 0.1
task = make_task("knowledge")
for split in ("train", "eval"):
    assert read_problems(task, split) == task.load(split)
try:
    read_problems(make_task("facts", seed=int(is_first())), "train")
except ValueError as error:
    assert "processes read different 'train' problems" in str(error), error
else:
    sys.exit("no error")
def fail(mine):
    raise OSError("no such thing") if mine == [1] else ValueError("nobody's")
try:
    exchange_shares("failing", [0, 1], lambda mine: fail(mine) if mine == [1] else mine)
except ValueError as error:
    assert str(error) == "process 1: no such thing", error
else:
    sys.exit("no error")
print("heard")
"""


def test_what_one_says_all_hear(port):
    command = [sys.executable, "-c", SPEAK]
    for code, out, err in finish(*(launch(command, port, index, 2) for index in range(2))):
        assert (code, out) == (0, "heard\n"), err


def test_a_workdir_that_is_not_shared_is_refused(port, tmp_path):
    """Each process has a folder of its own under the same name."""
    arguments = train_arguments("run")
    command = [sys.executable, str(TESTS / "tiny_run.py"), *arguments]
    group = []
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        group.append(launch(command, port, index, 2, "100", cwd=tmp_path / str(index)))
    for code, _, err in finish(*group):
        assert code == 2
        assert "--workdir run: process 1 does not see what process 0 writes there" in err
    assert not (tmp_path / "1" / "run" / "config.json").exists()


def test_a_mesh_that_does_not_divide_the_heads_ends_every_process(port, tmp_path):
    for code, _, err in train(tmp_path / "run", port, 3, "mesh.tensor=3"):
        assert code == 2 and "Traceback" not in err
        assert err.startswith("seal-jax train: process 0 on ")
        assert err.count(": mesh.tensor = 3 does not divide the 4 heads\n") == 3
    assert not (tmp_path / "run").exists()


SAVE = """
import sys
from seal_jax.hosts.start_jax import start_jax
start_jax()
import jax.numpy as jnp
from seal_jax.runs import checkpoint
from seal_jax.sharding import leading, make_mesh, replicated, to_device
mesh, value = make_mesh(), jnp.arange(64.0).reshape(16, 4)
where = {"split": leading(mesh, "rows", 16), "whole": replicated(mesh)}
tree = {name: to_device(value, sharding) for name, sharding in where.items()}
with checkpoint.make_manager(sys.argv[1], keep=2) as manager:
    checkpoint.save(manager, 1, {"tree": tree}, {"step": 1})
print(checkpoint.tree_hash(tree))
"""


def test_what_two_processes_save_is_restored_by_one(port, tmp_path):
    command = [sys.executable, "-c", SAVE, str(tmp_path)]
    said = finish(*(launch(command, port, index) for index in range(2)))
    assert [code for code, _, _ in said] == [0, 0], said
    value = np.arange(64, dtype=np.float32).reshape(16, 4)
    expected = checkpoint.tree_hash({"split": value, "whole": value})
    assert {out.split()[-1] for _, out, _ in said} == {expected}  # behind what Gloo says
    for num_devices in (1, 8):
        mesh = make_mesh(devices=jax.devices()[:num_devices])
        leaf = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=leading(mesh, "rows", 16))
        step, trees, _ = checkpoint.restore(tmp_path, {"tree": {"split": leaf, "whole": leaf}})
        assert step == 1 and checkpoint.tree_hash(trees["tree"]) == expected
        assert len(trees["tree"]["split"].sharding.device_set) == num_devices


@pytest.mark.long
def test_a_model_that_lies_on_two_processes_goes_on_on_one(port, tmp_path):
    """Its parts are of two processes, and so are its checkpoints; the sums have another order."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    overrides = ("mesh.fsdp=2", "eval.random_control=False")
    run_process(*train_arguments(whole, *overrides), num_devices=2)
    tell = {"TELL": f"{run / 'pending_1.jsonl'}:2"}
    for code, _, err in train(run, port, 2, *overrides, on_0=tell):
        assert code == 0 and "process 0 got SIGTERM" in err, err
    run_process(*train_arguments(run, *overrides[1:]))
    found, expected = (read_jsonl(folder / "edits.jsonl") for folder in (run, whole))
    for edit, other in zip(found, expected, strict=True):
        assert (edit["text"], edit["kept"]) == (other["text"], other["kept"])
        assert edit["reward"] == pytest.approx(other["reward"], rel=1e-4)
