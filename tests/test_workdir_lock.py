"""One run at a time in a folder: who is refused, who is told, and what a kill leaves."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from loopback import finish, launch
from tiny_run import CONFIG, TESTS, train_arguments

from seal_jax.commands import main as cli
from seal_jax.config.load import load_config
from seal_jax.config.workdir import check_workdir
from seal_jax.hosts import folder_lock
from seal_jax.hosts.folder_lock import hold
from seal_jax.hosts.preemption import stop_if_told

pytest_plugins = ["tiny_fixtures"]

# Holds a folder, and leaves a child behind, as a data loader may be.
HOLD = """
import os, signal, sys
from seal_jax.hosts.folder_lock import hold
with hold(sys.argv[1]):
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    print(os.getpid(), flush=True)
    signal.pause()
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Refuse without waiting for a holder that may just have been killed."""
    monkeypatch.setattr(folder_lock, "_PATIENCE", 0.0)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_second_run_is_refused_until_the_first_is_killed(one_device, tmp_path, capsys, command):
    run, pipe = tmp_path / "run", subprocess.PIPE
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=pipe, stdout=pipe, text=True, cwd=TESTS.parent
    )
    try:
        assert holder.stdout.readline() == f"{holder.pid}\n"
        before = files_in(run)
        arguments = [command, *train_arguments(run)[1:]]
        policy = [] if command == "train" else ["--policy", "random:byte-tiny"]
        assert cli.main([*arguments, *policy]) == 2
        said = capsys.readouterr().err
        who = f"process {holder.pid} on {socket.gethostname()} since 20"
        assert f"{run}: another run writes there: {who}" in said
        assert f"(-c {run})" in said and "Traceback" not in said  # its command
        assert files_in(run) == before and [*before] == ["lock"]
        holder.kill()
        holder.wait()
        check_workdir(load_config(CONFIG), str(run))  # what a kill leaves is no one's
        with hold(run):  # though its child lives
            assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
    finally:
        holder.kill()
        holder.communicate()
    assert os.listdir(run) == []


def test_what_was_made_for_the_lock_goes_and_nothing_else(tmp_path):
    (tmp_path / "runs").mkdir()
    with hold(tmp_path / "runs" / "new" / "run"):
        assert os.listdir(tmp_path / "runs" / "new" / "run") == ["lock"]
    assert os.listdir(tmp_path) == ["runs"] and os.listdir(tmp_path / "runs") == []
    with hold(tmp_path / "runs" / "new"):
        (tmp_path / "runs" / "new" / "config.json").write_text("{}")
    assert os.listdir(tmp_path / "runs" / "new") == ["config.json"]


def test_a_claim_that_a_kill_cut_short_leaves_a_folder_for_the_same_command(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / ".config.json.4711.tmp").write_text('{"inner')
    check_workdir(load_config(CONFIG), str(tmp_path))
    (tmp_path / "locks").write_text("")
    with pytest.raises(ValueError, match=r"not empty and has no config\.json"):
        check_workdir(load_config(CONFIG), str(tmp_path))


def test_without_locks_there_is_a_warning_and_no_refusal(tmp_path, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)  # as on NFS whose server keeps none
    with hold(tmp_path):
        said = capsys.readouterr().err
        assert f"{tmp_path} cannot be locked ([Errno 37] No locks available)" in said
        assert said.count("warning") == 1
        with hold(tmp_path):
            assert f"the run before did not say that it ended: process {os.getpid()}" in (
                capsys.readouterr().err
            )


def test_where_locks_do_not_reach_the_last_to_begin_goes_on(tmp_path, capsys):
    other = {"host": "elsewhere", "pid": 7, "since": "2026-11-29", "command": "seal-jax train"}
    (tmp_path / "lock").write_text(json.dumps(other))  # its own machine's lock is not seen here
    with hold(tmp_path):
        said = capsys.readouterr().err
        assert "process 7 on elsewhere since 2026-11-29 (seal-jax train)" in said
        stop_if_told()
        for nothing in ("", '{"ho', "[]"):  # is about to be written
            (tmp_path / "lock").write_text(nothing)
            stop_if_told()
        (tmp_path / "lock").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="another run has begun there .* 7 on elsewhere"):
            stop_if_told()
    assert json.loads((tmp_path / "lock").read_text()) == other  # it is that run's
    stop_if_told()


SHARE = """
import os, sys
from seal_jax.hosts.start_jax import start_jax
start_jax()
from seal_jax.hosts.exchange import ask_first
from seal_jax.hosts.folder_lock import hold
free, held = sys.argv[1:]
with hold(free):
    named = '"pid": %d,' % ask_first("pid", os.getpid) in open(free + "/lock").read()
    ask_first("read", lambda: None)
try:
    with hold(held):
        pass
except ValueError as error:
    print(named, error)
"""


def test_the_first_of_several_processes_holds_for_all(port, tmp_path):
    with hold(tmp_path / "held"):
        command = [sys.executable, "-c", SHARE, str(tmp_path / "free"), str(tmp_path / "held")]
        for code, out, err in finish(*(launch(command, port, index) for index in range(2))):
            assert code == 0, err
            assert f"True process 0: {tmp_path / 'held'}: another run writes there" in out
            assert f"process {os.getpid()} on " in out
    assert os.listdir(tmp_path) == []


# `seal-jax` that says "ready" at a point, and then computes for ever.
WAIT = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from seal_jax.commands import main as cli
def wait(*arguments, **named):
    print("ready", flush=True)
    threading.Event().wait()
if sys.argv[1] == "reading the config":
    from seal_jax.commands import train
    train.read_config = wait
elif sys.argv[1] == "loading the model":
    from seal_jax import train
    train.make_stages = wait
sys.exit(cli.main(sys.argv[2:]))
"""


def start(folder, point, index=None, port=None):
    """Start `seal-jax train` and return it once it is at the point."""
    command = [sys.executable, "-c", WAIT, point, *train_arguments(folder)]
    if port is not None:
        return launch(command, port, index, timeout="60")
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=TESTS.parent)


@pytest.mark.parametrize(
    ("point", "number", "code", "words"),
    [
        ("reading the config", signal.SIGTERM, 0, "got SIGTERM before the run began"),
        ("loading the model", signal.SIGTERM, 0, "got SIGTERM before the run began"),
        ("reading the config", signal.SIGINT, 130, "interrupted: the same command resumes the run"),
    ],
)
def test_a_signal_before_the_run_begins_ends_it_at_once(tmp_path, point, number, code, words):
    run = tmp_path / "run"
    process = start(run, point)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    ((found, out, err),) = finish(process)
    assert (found, out) == (code, "") and words in err and "Traceback" not in err, err
    if run.exists():  # nobody's
        check_workdir(load_config(CONFIG), str(run))
        with hold(run):
            pass


@pytest.mark.long
def test_one_that_is_told_before_the_run_begins_ends_all(port, tmp_path):
    """Process 0 waits meanwhile for what process 1 says, which no Python code interrupts."""
    first, second = (
        start(tmp_path / "run", point, index, port)
        for index, point in enumerate(("nowhere", "loading the model"))
    )
    assert second.stdout.readline() == "ready\n"
    second.send_signal(signal.SIGTERM)
    ended = finish(first, second)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "as another process was told to: process 1 on " in ended[0][2]
    assert not (tmp_path / "run" / "config.json").exists()


FORK = """
import multiprocessing, signal
from seal_jax.hosts.preemption import listening
with listening():
    def wait():
        print("forked", flush=True)
        signal.pause()
    child = multiprocessing.get_context("fork").Process(target=wait)
    child.start()
    input()
    child.terminate()  # as a pool does with its own
    child.join()
    print(child.exitcode)
"""


def test_a_child_that_is_ended_does_not_end_the_run():
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", FORK], stdin=pipe, stdout=pipe, text=True, cwd=TESTS.parent
    )
    assert process.stdout.readline() == "forked\n"
    assert process.communicate("go on\n") == (f"{-signal.SIGTERM}\n", None)
    assert process.returncode == 0


TWICE = """
import threading
from seal_jax.hosts.preemption import Stopped, listening, stop_if_told
with listening():
    stop_if_told()
    print("begun", flush=True)
    try:
        while True:
            stop_if_told()
    except Stopped as stopped:
        print(stopped, flush=True)
    threading.Event().wait()
"""


def test_a_second_signal_ends_a_run_at_once():
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE], stdout=pipe, stderr=pipe, text=True, cwd=TESTS.parent
    )
    for line in ("begun\n", "process 0 got SIGTERM\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGTERM)
    assert finish(process) == [(128 + signal.SIGTERM, "", "")]
