"""What the processes of a run say to each other, through JAX's key-value store."""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jax._src import distributed  # JAX has no public name for it

from seal_jax.hosts.group import timeout_seconds

Value = TypeVar("Value")
_MOMENT = 500  # milliseconds, for an answer that is there
_TURNS = itertools.count()


def is_first() -> bool:
    """Return whether this process writes the run's files: the first does, or the only one."""
    return not distributed.global_state.process_id


def num_processes() -> int:
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


def ask_first(topic: str, read: Callable[[], Value]) -> Value:
    """Return on every process what `read` returns on the first, which alone calls it.

    Args:
      read: returns what JSON can hold; infinities and NaN, too.

    Raises:
      ValueError, OSError: that `read` raised there, on every process.
    """
    return exchange_shares(topic, [0], lambda mine: [read() for _ in mine])[0]


def exchange_shares(
    topic: str, owners: Sequence[int], make: Callable[[list[int]], list[Value]]
) -> list[Value]:
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
    try:
        mine = {"values": make([i for i, owner in enumerate(owners) if owner == me])}
    except (ValueError, OSError, ImportError) as error:
        mine = {"error": f"process {me}: {error}"}
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
