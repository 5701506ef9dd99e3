"""A memory of earlier training texts, one for each sequence, under a budget of tokens.

  memory = make_memory("reservoir", max_tokens=4096)
  counts = replay_counts(job.rows, share=0.25)
  rows   = mix(job.rows, counts, texts of choose(memory, ...))  # train
  memory = remember(memory, edit=k, texts=texts, key=...)       # and keep what was trained on
  memory = rescore(memory, scores)                              # after an examination

A memory holds the texts that stand first in an order, up to the first that its budget has no room
for. Each text has a random rank, so the order never changes for two texts, and what has fallen out
never comes back: to go on from a memory is the same as to begin again with all texts.

  reservoir       by random rank. Of texts of one length, every set of those seen is equally likely:
                  the distribution of Algorithm R. A longer text stays a little less often.
  per_problem     first one text of every edit, then a second one of each, and so on; of one edit,
                  and in one such round, by random rank. So edits differ by one text at most.
  most_forgotten  kept as per_problem; chosen by how much the score of a text has fallen since it
                  was learned, the largest fall first.

The scores of 'most_forgotten' are the model's own mean log-likelihood per token of the texts in
memory. Exam questions and gold answers have no way in: they would be trained on, and every figure
on forgetting would be worthless. So `remember` takes training texts, and `rescore` numbers.

Values are plain, so that a memory is written as JSON and read again. Imports no JAX.

References:
  Vitter, Random Sampling with a Reservoir, ACM TOMS 11(1), 1985: Algorithm R. Ranks in place of
  slots give the same samples, and a budget of tokens has no fixed number of slots.
  Chaudhry et al., On Tiny Episodic Memories in Continual Learning, arXiv 1902.10486.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from seal_jax.inner.texts import Text

KINDS = ("reservoir", "per_problem", "most_forgotten")
LOST = -1e9  # nats: the score of a text under a model that is not finite any more

Rows = tuple[tuple[Text, ...], ...]  # the texts of each inner step


class Entry(NamedTuple):
    """A text that was trained on."""

    edit: int  # the number of the edit, from 0
    text: str  # for people
    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    rank: float  # random, in [0, 1)
    learned: float | None = None  # its score right after its edit
    last: float | None = None  # its last known score


class Memory(NamedTuple):
    """The texts of one sequence that may be trained on again."""

    kind: str
    max_tokens: int
    entries: tuple[Entry, ...] = ()
    num_seen: int = 0  # texts that were offered
    num_too_long: int = 0  # of these, texts that alone are longer than the budget: never kept


def make_memory(kind: str, max_tokens: int) -> Memory:
    """Return an empty memory.

    Raises:
      ValueError: there is no such kind, or no budget.
    """
    if kind not in KINDS:
        raise ValueError(f"memory {kind!r}: expected one of {', '.join(KINDS)}")
    if max_tokens < 1:
        raise ValueError(f"a memory of {max_tokens} tokens can hold no text: expected 1 or more")
    return Memory(kind, max_tokens)


def remember(
    memory: Memory, edit: int, texts: Sequence[tuple[str, Text]], key: Sequence[int]
) -> Memory:
    """Return the memory after an edit was trained on these texts.

    Args:
      edit: its number.
      texts: what people read, and what the model was trained on. Its padding is not kept.
      key: nonnegative integers (seed, sequence, edit, ...) that alone decide the ranks.

    Raises:
      ValueError: this edit is in memory already: a resumed run would keep its texts twice.
    """
    if any(entry.edit == edit for entry in memory.entries):
        raise ValueError(f"edit {edit} is in this memory already")
    ranks = np.random.default_rng([*key]).random(len(texts)).tolist()
    new = [
        Entry(edit, shown, text.tokens, text.loss_mask, rank)
        for (shown, text), rank in zip(texts, ranks, strict=True)
        if len(text.tokens) <= memory.max_tokens
    ]
    return memory._replace(
        entries=_within_budget(memory, (*memory.entries, *new)),
        num_seen=memory.num_seen + len(texts),
        num_too_long=memory.num_too_long + len(texts) - len(new),
    )


def num_tokens(memory: Memory) -> int:
    """Return how many tokens the texts in memory have."""
    return sum(len(entry.tokens) for entry in memory.entries)


def _within_budget(memory: Memory, entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Return the entries that stand first, up to the first that there is no room for."""
    by_rank = sorted(entries, key=lambda entry: entry.rank)
    if memory.kind != "reservoir":
        rounds: dict[int, int] = {}  # texts of each edit so far
        placed = []
        for entry in by_rank:
            number = rounds.get(entry.edit, 0)
            rounds[entry.edit] = number + 1
            placed.append((number, entry))
        by_rank = [entry for _, entry in sorted(placed, key=lambda pair: pair[0])]
    kept, room = [], memory.max_tokens
    for entry in by_rank:
        room -= len(entry.tokens)
        if room < 0:
            break
        kept.append(entry)
    return tuple(kept)


def rescore(memory: Memory, scores: Sequence[float]) -> Memory:
    """Return the memory with what its texts score now, higher is better, in the order of entries.

    The first score of a text is the one that it was learned with. One that is no number counts as
    LOST: a model that is not finite any more has forgotten everything.

    Raises:
      ValueError: there are more or fewer scores than texts.
    """
    if len(scores) != len(memory.entries):
        raise ValueError(f"{len(scores)} scores for {len(memory.entries)} texts in memory")
    found = [float(score) if math.isfinite(score) else LOST for score in scores]
    entries = [
        entry._replace(learned=score if entry.learned is None else entry.learned, last=score)
        for entry, score in zip(memory.entries, found, strict=True)
    ]
    return memory._replace(entries=tuple(entries))


def drop_of(entry: Entry) -> float:
    """Return how much a text's score has fallen since it was learned; 0 where it is not known."""
    if entry.learned is None or entry.last is None:
        return 0.0
    return entry.learned - entry.last


def choose(memory: Memory, key: Sequence[int], num_texts: int) -> tuple[Entry, ...]:
    """Return so many texts to train on again; none of an empty memory.

    'most_forgotten' takes them by their drop, the other kinds at random. If more texts are asked
    for than there are, they come again in the same order: each as often as another, or once more.

    Args:
      key: nonnegative integers that alone decide; of equal drops, too.

    Raises:
      ValueError: num_texts is not positive.
    """
    if num_texts < 1:
        raise ValueError(f"num_texts is {num_texts}, expected 1 or more")
    order = np.random.default_rng([*key]).permutation(len(memory.entries))
    entries = [memory.entries[i] for i in order]
    if memory.kind == "most_forgotten":
        entries.sort(key=drop_of, reverse=True)  # stable: equal drops stay at random
    return tuple(entries[i % len(entries)] for i in range(num_texts)) if entries else ()


def replayed_in(step: int, batch_size: int, share: float, extra: bool = False) -> int:
    """Return how many texts of an inner step come from memory: the same in every sequence.

    The share is kept over steps, so that it holds for batches of one text, too: of the texts of
    the first n steps, share * n * batch_size come from memory, rounded down.

    Args:
      extra: they come beside the batch's own texts, not in place of them: the batch grows to
        batch_size / (1 - share).

    Raises:
      ValueError: the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"a replay share of {share}: expected more than 0 and less than 1")
    part = Fraction(share).limit_denominator(10_000)
    rate = batch_size * (part / (1 - part) if extra else part)
    return math.floor((step + 1) * rate) - math.floor(step * rate)


def replay_counts(rows: Rows, share: float, extra: bool = False) -> list[int]:
    """Return how many texts of each inner step come from memory.

    Of a short last batch at least one text of its own stays.

    Args:
      rows: of a job; the first one is a full batch.
      extra: see `replayed_in`.

    Raises:
      ValueError: see `replayed_in`.
    """
    width = len(rows[0]) if rows else 0
    counts = [replayed_in(step, width, share, extra) for step in range(len(rows))]
    if not extra and width > 1:
        counts = [min(num, len(row) - 1) for num, row in zip(counts, rows, strict=True)]
    return counts


def mix(rows: Rows, counts: Sequence[int], old: Sequence[Text], extra: bool = False) -> Rows:
    """Return the texts of each inner step with some old ones.

    They take the place of a batch's last texts, which `make_job` has shuffled: as many texts are
    trained on as before.

    Args:
      counts: of each step, see `replay_counts`; in all as many as there are old texts.
      extra: they come beside the batch's own.
    """
    drawn = iter(old)
    return tuple(
        (*row[: len(row) if extra else len(row) - num], *islice(drawn, num))
        for row, num in zip(rows, counts, strict=True)
    )


def to_json(memory: Memory) -> dict[str, Any]:
    """Return a memory as JSON has it."""
    return memory._asdict() | {"entries": [entry._asdict() for entry in memory.entries]}


def from_json(value: Mapping[str, Any], where: str) -> Memory:
    """Return the memory that `to_json` wrote.

    Args:
      where: begins each complaint.

    Raises:
      ValueError: it is none.
    """
    try:
        entries = tuple(
            Entry(**one | {"tokens": tuple(one["tokens"]), "loss_mask": tuple(one["loss_mask"])})
            for one in value["entries"]
        )
        fields: dict[str, Any] = {**value, "entries": entries}
        memory = Memory(**fields)
        make_memory(memory.kind, memory.max_tokens)
        whole = all(len(one.tokens) == len(one.loss_mask) for one in entries)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: no memory of texts: {error}") from error
    if not whole or num_tokens(memory) > memory.max_tokens:
        raise ValueError(
            f"{where}: no memory of texts: {num_tokens(memory)} tokens of at most"
            f" {memory.max_tokens}; every token needs its place in loss_mask"
        )
    return memory
