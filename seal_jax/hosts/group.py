"""How the processes of a run find each other: the group, a roll call, and JAX's connection.

JAX connects them (`jax.distributed`), but where one does not come it ends the others with a stack
trace and no name. So they meet at the coordinator's port first: process 0 calls the roll, and all
learn who is missing.
"""

import contextlib
import json
import os
import socket
import time
from typing import Any, NamedTuple

import jax
from jax._src import clusters  # JAX has no public name for it

from seal_jax.hosts.failure import watch_others

_PATIENCE = 10.0  # seconds for an answer that should come at once
_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Group(NamedTuple):
    """The processes of a run, and which one this is."""

    address: str  # HOST:PORT of process 0
    count: int
    index: int
    local_device_ids: tuple[int, ...] | None = None  # None: all that this host has


def timeout_seconds() -> float:
    """Return for how long processes wait for each other: $SEAL_JAX_TIMEOUT, or 600.

    Slices start their machines one after the other.

    Raises:
      ValueError: it is no positive number.
    """
    text = os.environ.get("SEAL_JAX_TIMEOUT", "600")
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
    if address is None or count is None or index is None:
        raise ValueError(
            "SEAL_JAX_DISTRIBUTED=1, and JAX finds no cluster (Cloud TPU, GKE, Slurm, Open MPI)"
            f" around this process: set {', '.join(_NAMES)}, or unset it to run alone"
        )
    devices = None if local_device_ids is None else tuple(local_device_ids)
    return Group(address, count, index, devices)


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
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
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
    watch_others()


def roll_call(group: Group, timeout: float) -> None:
    """Return once every process has said that it is there; process 0 listens at the address.

    Raises:
      ValueError: after `timeout` seconds somebody is missing, nobody answers at the address, two
        claim the same index, or the counts differ.
    """
    deadline = time.monotonic() + timeout
    meet = _call if group.index == 0 else _report
    verdict = meet(group, socket.gethostname(), deadline)
    if verdict:
        raise ValueError(verdict)


def _call(group: Group, my_host: str, deadline: float) -> str:
    """Call the roll; returns what is wrong, as all the others are told, or ''."""
    port = int(group.address.rpartition(":")[2])
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        return (
            f"process 0 on {my_host} cannot listen at port {port} ({error.strerror}): end what"
            " does, or name another port"
        )
    present, verdict, others = {0: my_host}, "", []
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


def _report(group: Group, my_host: str, deadline: float) -> str:
    """Report to process 0; returns its verdict, or why there is none."""
    host, _, port = group.address.rpartition(":")
    address, error = (host.strip("[]"), int(port)), "no time"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as connection:
                # Process 0 answers at its own deadline, which may be later than ours.
                connection.settimeout(left + _PATIENCE)
                _say(connection, {"index": group.index, "count": group.count, "host": my_host})
                return str(_hear(connection))
        except (OSError, ValueError) as found:  # nobody there yet, or gone before it answered
            error = f"{type(found).__name__}: {found}"
            time.sleep(min(0.2, max(deadline - time.monotonic(), 0)))
    return (
        f"process {group.index} of {group.count} on {my_host}: nobody answers at {group.address}"
        f" ({error}). Is process 0 running there, and is port {port} open between the hosts?"
    )
