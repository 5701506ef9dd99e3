"""Several processes as one run: how they find each other, a roll call, and what they say.

JAX connects them (`jax.distributed`), but it ends a process with a stack trace, and without a name,
where another one does not come. So they meet at the coordinator's port first: process 0 calls the
roll, and all learn who is missing. Later they speak through JAX's key-value store.
"""

import atexit
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed  # JAX has no public door to these two

# Slices start their machines one after the other.
TIMEOUT = 600.0  # seconds
_PATIENCE = 10.0  # seconds for an answer that should come at once
_MOMENT = 500  # milliseconds, for an answer that is there
_GRACE = 3.0  # seconds, for a process to end by itself where another has failed
_ENDS = threading.Event()  # this process does, by itself
_FAILED, _FIRST_FAILED = "seal_jax/failed", "seal_jax/first_failed"
_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Group(NamedTuple):
    """The processes of a run, and which one this is."""

    address: str  # HOST:PORT of process 0
    count: int
    index: int
    local_device_ids: tuple[int, ...] | None = None  # None: all that this host has


def timeout_seconds() -> float:
    """Return for how long processes wait for each other: $SEAL_JAX_TIMEOUT, or 600.

    Raises:
      ValueError: it is no positive number.
    """
    text = os.environ.get("SEAL_JAX_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"SEAL_JAX_TIMEOUT={text}: needs a number of seconds > 0")
    return seconds


def find_group(timeout: float) -> Group | None:
    """Return the group that the environment names, or None where this process is alone.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name it; with
    SEAL_JAX_DISTRIBUTED=1 JAX finds it out (Cloud TPU, GKE, Slurm, Open MPI).

    Raises:
      ValueError: only a part of it is named, or JAX does not find it.
    """
    given = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    if given:
        return _named_group(given)
    if os.environ.get("SEAL_JAX_DISTRIBUTED") != "1":
        return None
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(timeout)
    )
    address, count, index, local_device_ids = found
    if None in (address, count, index):
        raise ValueError(
            "SEAL_JAX_DISTRIBUTED=1, and JAX finds no cluster (Cloud TPU, GKE, Slurm, Open MPI)"
            f" around this process: set {', '.join(_NAMES)}, or unset it to run alone"
        )
    return Group(address, count, index, local_device_ids and tuple(local_device_ids))


def _named_group(given: dict[str, str]) -> Group:
    if len(given) < len(_NAMES):
        missing = ", ".join(name for name in _NAMES if name not in given)
        raise ValueError(f"{', '.join(given)} set, and not {missing}: all three name a process")
    address, count, index = given.values()
    host, _, port = address.rpartition(":")
    numbers = [port, count, index]
    if not host or not all(text.isdecimal() for text in numbers) or not 0 < int(port) < 65536:
        raise ValueError(f"{given}: needs HOST:PORT, a count and an index")
    if not int(index) < int(count):
        raise ValueError(f"JAX_PROCESS_ID={index}: needs less than JAX_NUM_PROCESSES={count}")
    return Group(address, int(count), int(index))


def join(group: Group, timeout: float) -> None:
    """Wait until all processes of the group are there, and connect them.

    Raises:
      ValueError: not all came, or not as the same group; every process says the same.
    """
    roll_call(group, timeout)
    jax.distributed.initialize(
        group.address,
        group.count,
        group.index,
        group.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(timeout)),
        # Processes that stop for the same reason do so within seconds.
        shutdown_timeout_seconds=max(1, min(60, int(timeout))),
        # One that is not heard of for so long, as it hangs or its machine is gone, ends the others.
        heartbeat_timeout_seconds=max(10, min(100, int(timeout))),
    )
    watch = threading.Thread(target=_end_where_another_fails, daemon=True)
    watch.start()

    def stop_watching() -> None:  # before Python ends it within a call of JAX's, which aborts
        _ENDS.set()
        watch.join()

    atexit.register(stop_watching)


def roll_call(group: Group, timeout: float) -> None:
    """Return once every process has said that it is there; process 0 listens at the address.

    Raises:
      ValueError: after `timeout` seconds somebody is missing, nobody answers at the address, two
        claim the same index, or the counts differ.
    """
    deadline = time.monotonic() + timeout
    me = {"index": group.index, "count": group.count, "host": socket.gethostname()}
    verdict = _call(group, me, deadline) if group.index == 0 else _report(group, me, deadline)
    if verdict:
        raise ValueError(verdict)


def _call(group: Group, me: dict, deadline: float) -> str:
    """Call the roll; returns what is wrong, as all the others are told, or ''."""
    port = int(group.address.rpartition(":")[2])
    try:
        dual = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        server = socket.create_server(("", port), **(dual if socket.has_dualstack_ipv6() else {}))
    except OSError as error:
        return (
            f"process 0 on {me['host']} cannot listen at port {port} ({error.strerror}): end what"
            " does, or name another port"
        )
    present, verdict, others = {0: me["host"]}, "", []
    with server, contextlib.ExitStack() as opened:
        while len(present) < group.count and not verdict:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = opened.enter_context(server.accept()[0])
                connection.settimeout(_PATIENCE)  # with one who says nothing
                other = _hear(connection)
                index, count, host = other["index"], int(other["count"]), str(other["host"])
            except TimeoutError:
                if time.monotonic() >= deadline:
                    verdict = _missing(group, present)
                continue
            except (OSError, ValueError, TypeError, KeyError):
                continue  # somebody else, who looks at ports
            others.append(connection)
            if count != group.count:
                verdict = f"process 0 expects {group.count} processes, process {index} {count}"
            elif index in present:
                verdict = f"two processes are number {index}: on {present[index]} and on {host}"
            present[index] = host
        for connection in others:
            with contextlib.suppress(OSError):  # one who has gone meanwhile: JAX will miss it
                _say(connection, verdict)
                connection.recv(1)  # it hangs up first: the port is needed again at once
    return verdict


def _missing(group: Group, present: dict[int, str]) -> str:
    missing = [str(i) for i in range(group.count) if i not in present]
    hosts = ", ".join(f"{i} on {host}" for i, host in sorted(present.items()))
    return (
        f"missing at {group.address}: process {', '.join(missing)} of {group.count}; here are"
        f" {hosts}. See the logs of the missing, and whether port"
        f" {group.address.rpartition(':')[2]} is open between the hosts"
    )


def _say(connection: socket.socket, value: Any) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _hear(connection: socket.socket) -> Any:
    with connection.makefile("rb") as file:
        return json.loads(file.readline(10_000))


def _report(group: Group, me: dict, deadline: float) -> str:
    """Report to process 0; returns its verdict, or why there is none."""
    host, _, port = group.address.rpartition(":")
    error = "no time"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(
                (host.strip("[]"), int(port)), timeout=left
            ) as connection:
                # Process 0 answers at its own deadline, which may be later than ours.
                connection.settimeout(left + _PATIENCE)
                _say(connection, me)
                return str(_hear(connection))
        except (OSError, ValueError) as found:  # nobody there yet, or gone before it answered
            error = f"{type(found).__name__}: {found}"
            time.sleep(min(0.2, max(deadline - time.monotonic(), 0)))
    return (
        f"process {group.index} of {group.count} on {me['host']}: nobody answers at {group.address}"
        f" ({error}). Is process 0 running there, and is port {port} open between the hosts?"
    )


def end_others(message: str, code: int) -> None:
    """Tell the others that this process has failed; they end with the same message.

    They may wait for it in a computation, which no exception reaches. Returns where all have
    failed, each for itself; else this process ends here, after them, as they may need its service.

    Args:
      code: what this process ends with.
    """
    state = distributed.global_state
    if state.client is None:
        return
    _ENDS.set()
    said = f"process {state.process_id} on {socket.gethostname()}: {message}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or is gone
        state.client.key_value_set(f"{_FAILED}/{state.process_id}", said)
        state.client.key_value_set(_FIRST_FAILED, said)
    deadline = time.monotonic() + 2 * _GRACE
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        while time.monotonic() < deadline:
            if len(state.client.key_value_dir_get(_FAILED)) == state.num_processes:
                return
            time.sleep(0.1)
    sys.stderr.flush()
    os._exit(code)  # the others are gone: nobody comes to JAX's barrier at the end


def _end_where_another_fails() -> None:
    """End this process a moment after another has failed, if it does not end by itself."""
    client, message = distributed.global_state.client, ""
    while not message:
        if _ENDS.wait(1.0):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has failed
            message = client.key_value_try_get(_FIRST_FAILED)
    if not _ENDS.wait(_GRACE):
        print(f"ended, as another process failed: {message}", file=sys.stderr, flush=True)
        os._exit(2)


def is_first() -> bool:
    """Return whether this process writes the run's files: the first does, or the only one."""
    return not distributed.global_state.process_id


def num_processes() -> int:
    """Return how many processes this run has."""
    return distributed.global_state.num_processes or 1


def exchange(topic: str, text: str, timeout: float | None = None) -> list[str]:
    """Return what every process says, in their order. All of them call it, in the same order.

    Args:
      topic: what it is about, for the message.
      timeout: in seconds; that of `timeout_seconds` by default.

    Raises:
      ValueError: some said nothing for that long; the message names them.
    """
    client, state = distributed.global_state.client, distributed.global_state
    if client is None:
        return [text]
    timeout = timeout_seconds() if timeout is None else timeout
    turn = next(_TURNS)
    deadline, said, silent = time.monotonic() + timeout, [], []
    client.key_value_set(f"seal_jax/{turn}/{topic}/{state.process_id}", text)
    for index in range(state.num_processes):
        # Those behind a silent one have long spoken, if at all: a moment to hear them.
        left = max(_MOMENT, int(1000 * (deadline - time.monotonic())))
        try:
            said.append(client.blocking_key_value_get(f"seal_jax/{turn}/{topic}/{index}", left))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            silent.append(str(index))
    if silent:
        raise ValueError(
            f"{topic}: process {', '.join(silent)} of {state.num_processes} said nothing for"
            f" {timeout:g} s; see its log"
        )
    if state.process_id == 0 and turn > 0:  # all have heard it: they have spoken again
        client.key_value_delete(f"seal_jax/{turn - 1}/")
    return said


_TURNS = itertools.count()


def ask_first(topic: str, read: Callable[[], Any]) -> Any:
    """Return on every process what `read` returns on the first, which alone calls it.

    Args:
      read: returns what JSON can hold; infinities and NaN, too.

    Raises:
      ValueError, OSError: that `read` raised there, on every process.
    """
    return exchange_shares(topic, [0], lambda mine: [read() for _ in mine])[0]


def exchange_shares(
    topic: str, owners: Sequence[int], make: Callable[[list[int]], list[Any]]
) -> list[Any]:
    """Return a value for each owner, all on every process; each process makes its own.

    Args:
      owners: of each value, which process makes it; see `spread`.
      make: (which of them) -> those values, of what JSON can hold; infinities and NaN, too.

    Raises:
      ValueError: what `make` raised on any process (a ValueError, an OSError or an ImportError), on
        every one. Alone, a process raises it as it is.
    """
    count, me = num_processes(), distributed.global_state.process_id
    if count == 1:
        return make(list(range(len(owners))))
    mine: dict[str, Any] = {}
    try:
        mine["values"] = make([i for i, owner in enumerate(owners) if owner == me])
    except (ValueError, OSError, ImportError) as error:
        mine["error"] = f"process {me}: {error}"
    said = [json.loads(text) for text in exchange(topic, json.dumps(mine))]
    if errors := [one["error"] for one in said if "error" in one]:
        raise ValueError("; ".join(errors))
    values = [iter(one["values"]) for one in said]
    return [next(values[owner]) for owner in owners]


def least(topic: str, number: float) -> float:
    """Return the least of the numbers that the processes have."""
    return min(map(float, exchange(topic, repr(number))))


def spread(costs: Sequence[float], count: int | None = None, most: int | None = None) -> list[int]:
    """Return who does each piece of work, so that all have about the same to do.

    Args:
      count: how many there are to do it; the processes by default.
      most: how many pieces each can have.
    """
    count = count or num_processes()
    owners, load, room = [0] * len(costs), [0.0] * count, [most or len(costs)] * count
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min((k for k in range(count) if room[k]), key=load.__getitem__)
        load[owners[i]] += costs[i]
        room[owners[i]] -= 1
    return owners
