"""The problems of a run: read once, by as many processes as there are, and the same on all."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import xxhash

from seal_jax.hosts.exchange import exchange, exchange_shares, num_processes
from seal_jax.tasks.task import Exam, Problem, Question, Task, join_shares, load_share_of
from seal_jax.types import Settings

Pair = tuple[Problem, Exam]
Batch = Sequence[Pair]  # P problems with their exams


class OuterStep(NamedTuple):
    """An outer step: its problems, and where it keeps what it has found so far."""

    number: int
    label: str  # of what people see
    folder: str  # of the run
    batch: Batch
    earlier: Batch = ()  # the problems of the steps before it


def split_problems(settings: Settings, task: Task) -> tuple[list[Pair], list[Pair]]:
    """Return train and evaluation problems, as many as the config asks for.

    Raises:
      ValueError: the source has fewer.
    """
    training, held_out = (read_problems(task, split) for split in ("train", "eval"))
    wanted = settings.outer.problems_per_step * settings.outer.num_steps
    if len(training) < wanted:
        raise ValueError(
            f"outer.num_steps x outer.problems_per_step asks for {wanted} training problems;"
            f" the task has {len(training)}"
        )
    if len(held_out) < settings.eval.num_problems:
        raise ValueError(
            f"eval.num_problems = {settings.eval.num_problems}; the task has {len(held_out)}"
        )
    return training[:wanted], held_out[: settings.eval.num_problems]


class Fresh(NamedTuple):
    """Training problems that `train` does not use."""

    problems: list[Pair]
    others: list[Pair]  # from all over the rest; where there is no rest, the problems themselves
    which: str  # a sentence


def fresh_problems(
    settings: Settings, task: Task, count: int | None, most: int, num_others: int
) -> Fresh:
    """Return training problems that `train` with these settings does not use.

    They are those after the ones that it takes, without those that its final table asks (of a
    source that serves both splits).

    Args:
      count: how many; None takes `most`, or all there are.
      num_others: at most.

    Raises:
      ValueError: there are fewer, or fewer than two.
    """
    training, held_out = (read_problems(task, split) for split in ("train", "eval"))
    used = settings.outer.problems_per_step * settings.outer.num_steps
    asked = {problem.passage for problem, _ in held_out[: settings.eval.num_problems]}
    left = training[used:]
    fresh = [pair for pair in left if pair[0].passage not in asked]
    without = len(left) - len(fresh)
    why = f"the task has {len(training)} training problems, of which `train` takes {used}"
    if without:
        why += f", and the held-out table asks {without} of the others"
    wanted = 2 if count is None else count
    if len(fresh) < max(wanted, 2):
        raise ValueError(
            f"a sweep needs {max(wanted, 2)} training problems, and {len(fresh)} are left: {why}."
            " Give the source more, or have `train` take fewer (outer.num_steps,"
            " outer.problems_per_step)"
        )
    fresh, rest = fresh[: count or most], fresh[count or most :]
    some = min(num_others, len(rest))
    others = [rest[i * len(rest) // some] for i in range(some)] or fresh
    which = f"{len(fresh)} problems of split 'train', after those of `train`: {why}."
    return Fresh(fresh, others, which)


def read_problems(task: Task, split: str) -> list[Pair]:
    """Return the problems of a split, on every process the same.

    Each reads its share and tells the others, where the task reads by shares; else all read all.

    Raises:
      ValueError: they read different ones.
    """
    if num_processes() == 1:
        return task.load(split)
    if load_share := load_share_of(task):
        load = partial(load_share, split)
        everybody = range(num_processes())
        shares = exchange_shares(
            f"problems of {split}",
            everybody,
            lambda mine: [load((i, len(everybody))) for i in mine],
        )
        return join_shares([map(_problem_of, share) for share in shares])
    problems = task.load(split)
    found = exchange(f"problems of {split}", xxhash.xxh64_hexdigest(repr(problems).encode()))
    if len(set(found)) > 1:
        raise ValueError(
            f"{task}: processes read different {split!r} problems: their hashes are"
            f" {', '.join(f'{one} on process {i}' for i, one in enumerate(found))}"
        )
    return problems


def _problem_of(pair: Sequence) -> Pair:
    """Return a pair as it was before it was JSON."""
    problem, (problem_id, questions) = pair
    asked = (Question(question, answer, tuple(others)) for question, answer, others in questions)
    return Problem(*problem), Exam(problem_id, tuple(asked))


def take_problems(problems: Batch, number: int, count: int, label: str, folder: str) -> OuterStep:
    """Return an outer step with its problems: `count` fresh ones in each."""
    first = number * count
    batch, earlier = problems[first : first + count], problems[:first]
    return OuterStep(number, f"{label} step {number}", folder, batch, earlier)
