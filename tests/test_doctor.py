"""What stops a run in its first seconds, on one process and on two real ones on loopback."""

import json
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from loopback import finish, launch
from tiny_run import CONFIG, TESTS

from seal_jax.commands import main as cli
from seal_jax.commands.doctor import checks
from seal_jax.config.load import load_config, to_json
from seal_jax.hosts import group as group_lib
from seal_jax.hosts import start_jax as start
from seal_jax.hosts.exchange import exchange

DOCTOR = [sys.executable, str(TESTS / "tiny_run.py"), "doctor", "--config", CONFIG]


def test_two_processes_that_agree_may_run(port, tmp_path):
    command = [*DOCTOR, "--workdir", str(tmp_path / "run")]
    for code, out, err in finish(*(launch(command, port, index) for index in range(2))):
        assert code == 0, err
        assert "2 process(es), 2 x cpu" in out and f"jax {jax.__version__}" in out
    assert not (tmp_path / "run").exists()


def test_what_differs_stops_both_with_both_sides(port, tmp_path):
    command = [*DOCTOR, "--workdir", str(tmp_path / "run")]
    group = (
        launch([*command, "--set", "inner.rank=5"], port, 0, SEAL_JAX_COMMIT="a1"),
        launch([*command, "--set", "mesh.data=1"], port, 1, SEAL_JAX_COMMIT="b2"),
    )
    host = socket.gethostname()
    for code, out, err in finish(*group):
        assert (code, out) == (2, "")
        lines = [line for line in err.splitlines() if "process" in line]
        assert lines == [
            f"seal-jax doctor: process 1 on {host}: mesh data=1 fsdp=1 tensor=1 does not fit"
            " 2 devices",
            f'processes differ in commit: "a1" on process 0 ({host}); "b2" on process 1 ({host})',
            f"processes differ in inner.rank: 5 on process 0 ({host}); 4 on process 1 ({host})",
            f"processes differ in mesh.data: -1 on process 0 ({host}); 1 on process 1 ({host})",
        ]


def test_train_begins_with_the_same_look(port, tmp_path):
    command = [*DOCTOR[:2], "train", "--config", CONFIG, "--workdir"]
    group = [launch([*command, str(tmp_path / name)], port, i) for i, name in enumerate("ab")]
    for code, _, err in finish(*group):
        assert code == 2 and "seal-jax train: processes differ in workdir" in err
    assert os.listdir(tmp_path) == []


def test_another_runs_folder_stops_both(port, tmp_path):
    (tmp_path / "config.json").write_text(to_json(load_config(CONFIG, ("inner.rank=5",))))
    command = [*DOCTOR[:2], "train", "--config", CONFIG, "--workdir", str(tmp_path)]
    for code, out, err in finish(*(launch(command, port, index) for index in range(2))):
        assert (code, out) == (2, "") and "Traceback" not in err
        for index in range(2):
            words = f"process {index} on {socket.gethostname()}: {tmp_path} belongs to another"
            assert words in err
        assert err.count("inner.rank: 5 -> 4") == 2
    assert os.listdir(tmp_path) == ["config.json"]


def test_the_missing_are_named(port, tmp_path):
    command = [*DOCTOR, "--workdir", str(tmp_path / "run")]
    group = [launch(command, port, index, count=4, timeout="5") for index in (0, 2)]
    for code, _, err in finish(*group):
        assert code == 2 and "Traceback" not in err
        assert f"missing at 127.0.0.1:{port}: process 1, 3 of 4; here are 0 on" in err


def test_a_coordinator_that_does_not_answer_is_named(port, tmp_path):
    command = [*DOCTOR, "--workdir", str(tmp_path / "run")]
    ((code, _, err),) = finish(launch(command, port, 1, timeout="1"))
    assert code == 2
    assert f"process 1 of 2 on {socket.gethostname()}: nobody answers at 127.0.0.1:{port}" in err


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([(2, 1)], None),
        ([(3, 1)], "process 0 expects 2 processes, process 1 3"),
    ],
    ids=["agree", "another count"],
)
def test_a_roll_call_tells_all_the_same(port, others, words):
    address = f"127.0.0.1:{port}"
    groups = [group_lib.Group(address, *one) for one in [(2, 0), *others]]
    with ThreadPoolExecutor(len(groups)) as pool:
        futures = [pool.submit(group_lib.roll_call, group, 20) for group in groups]
    errors = [future.exception() for future in futures]
    assert [error and str(error) for error in errors] == [words] * len(groups)


def test_a_port_that_is_taken_is_named(port):
    words = f"process 0 on .* cannot listen at port {port} .*name another port"
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(ValueError, match=words):
            group_lib.roll_call(group_lib.Group(f"127.0.0.1:{port}", 2, 0), 5)


def test_two_with_the_same_number_are_named(port):
    address, host = f"127.0.0.1:{port}", socket.gethostname()
    groups = [group_lib.Group(address, 3, index) for index in (0, 1, 1)]
    with ThreadPoolExecutor(len(groups)) as pool:
        futures = [pool.submit(group_lib.roll_call, group, 20) for group in groups]
    errors = {str(future.exception()) for future in futures}
    assert errors == {f"two processes are number 1: on {host} and on {host}"}


SILENT = (
    "import sys; from seal_jax.hosts.exchange import exchange;"
    "from seal_jax.hosts.start_jax import start_jax; start_jax(); {}"
)


def test_one_who_says_nothing_is_named_and_holds_nobody(port):
    asks = [sys.executable, "-c", SILENT.format("exchange('size', 'a', 1)")]
    hangs = [sys.executable, "-c", SILENT.format("print('in', flush=True); sys.stdin.read()")]
    # The coordinator outlives the one who asks, as it would where a host is only slow.
    silent, asking = launch(hangs, port, 0, timeout="5"), launch(asks, port, 1, timeout="5")
    assert silent.stdout.readline() == "in\n"
    code, _, err = asking.wait(timeout=100), *asking.communicate()
    silent.send_signal(signal.SIGKILL)
    silent.communicate()
    assert code != 0
    assert "size: process 0 of 2 said nothing for 1 s" in err, err


def test_somebody_who_looks_at_ports_is_not_a_process(port):
    """A connection that says nothing of ours does not disturb the roll call."""
    first, second = (group_lib.Group(f"127.0.0.1:{port}", 2, index) for index in range(2))
    with ThreadPoolExecutor() as pool:
        called = pool.submit(group_lib.roll_call, first, 20)
        for junk in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"index": 7}\n', b"\xff\xfe\n", b""):
            connection = None
            while connection is None:
                try:
                    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
                except ConnectionRefusedError:  # it does not listen yet
                    assert not called.done()
            with connection:
                connection.sendall(junk)
        group_lib.roll_call(second, 20)
        called.result()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (("a:1", "2", "2"), "JAX_PROCESS_ID=2: needs less than JAX_NUM_PROCESSES=2"),
        (("nowhere", "2", "0"), "needs HOST:PORT"),
        (("a:99999", "2", "0"), "needs HOST:PORT"),
        (("a:1", "two", "0"), "needs HOST:PORT, a count and an index"),
        ({"SEAL_JAX_DISTRIBUTED": "1"}, "JAX finds no cluster"),
        ({"SEAL_JAX_TIMEOUT": "-1"}, "SEAL_JAX_TIMEOUT=-1: needs a number of seconds > 0"),
    ],
    ids=str,
)
def test_a_group_that_is_named_wrongly_is_refused(variables, words, monkeypatch):
    if not isinstance(variables, dict):
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        variables = dict(zip(names, variables, strict=True))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        group_lib.find_group(group_lib.timeout_seconds())
    assert words in str(error.value)


def test_a_process_without_such_variables_is_alone():
    assert group_lib.find_group(1) is None
    assert exchange("alone", "a", 1) == ["a"]


def test_a_tpu_host_that_runs_on_the_cpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(
        start.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, "0x0063")
    )
    assert start.lost_devices() == ""  # JAX_PLATFORMS=cpu asks for it
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ValueError, match="4 TPU chips, and JAX runs on the CPU"):
        start.start_jax()
    config = load_config(CONFIG)
    with pytest.raises(ValueError, match="4 TPU chips"):
        checks.check(config, str(tmp_path / "run"))


def test_chips_that_jax_does_not_find_are_counted(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(start.jax, "default_backend", lambda: "tpu")
    found = {"chips": jax.local_device_count()}
    monkeypatch.setattr(
        start.hardware_utils,
        "num_available_tpu_chips_and_device_id",
        lambda: (found["chips"], "0x0063"),
    )
    assert start.lost_devices() == ""
    found["chips"] *= 2
    assert "has 16 TPU chips, and JAX finds 8" in start.lost_devices()
    monkeypatch.setenv("TPU_VISIBLE_CHIPS", "0,1,2,3,4,5,6,7")
    assert start.lost_devices() == ""


@pytest.mark.parametrize("platforms", ["cuda,cpu", "tpu,cpu"])
def test_a_platform_that_was_asked_for_and_passed_over_is_refused(monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    wanted = platforms.partition(",")[0]
    assert start.lost_devices() == f"JAX_PLATFORMS={platforms}: asks for {wanted}, found cpu"


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        ("gs://bucket/run", ("gs://bucket/run", "gcsfuse")),
        ("/proc/nothing/run", ("/proc",)),
        ("letter.txt/run", ("letter.txt",)),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys, workdir, words):
    (tmp_path / "letter.txt").write_text("Dear ...")
    workdir = os.path.join(tmp_path, workdir) if "letter" in workdir else workdir
    assert cli.main(["doctor", "--config", CONFIG, "--workdir", workdir]) == 2
    error = capsys.readouterr().err
    assert error.startswith("seal-jax doctor: ") and all(word in error for word in words)


def test_a_mesh_is_held_against_a_model_that_is_not_here(tmp_path):
    """The sizes of known models need no download; those of others are left to the loading."""

    def look(source):
        config = load_config(CONFIG, ("mesh.tensor=8", f"model.source={source}"))
        return checks.check(config, str(tmp_path / "run"))

    with pytest.raises(ValueError, match="mesh.tensor = 8 does not divide the 28 heads"):
        look("Qwen/Qwen2.5-7B")
    assert look("org/nothing-7b")


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "LEAST_FREE", 1e18)
    with pytest.raises(ValueError, match="MB free; a run needs 1000000000000 at least"):
        checks.check(load_config(CONFIG), str(tmp_path / "run"))
    assert os.listdir(tmp_path) == []


def test_every_process_complains_about_each():
    everybody = [
        {"host": "a", "facts": {"jax": "1", "python": "3"}, "problems": ["no disk"]},
        {"host": "b", "facts": {"jax": "2", "python": "3"}, "problems": []},
        {"host": "c", "facts": {"jax": "1"}, "problems": []},
    ]
    assert checks.complain(everybody) == [
        "process 0 on a: no disk",
        'processes differ in jax: "1" on process 0 (a), 2 (c); "2" on process 1 (b)',
        'processes differ in python: "3" on process 0 (a), 1 (b); "(absent)" on process 2 (c)',
    ]
    assert checks.complain(json.loads(json.dumps(everybody[:1]))) == ["no disk"]
