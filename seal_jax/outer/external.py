"""Rows of the final table whose self-edits somebody else wrote: the config's `eval.texts`."""

from collections import Counter
from typing import NamedTuple

from seal_jax.hosts.console import say
from seal_jax.hosts.exchange import ask_first
from seal_jax.outer.comparison import refuse_external
from seal_jax.outer.problems import Batch
from seal_jax.outer.stages import Edit, Stages, parse_given
from seal_jax.tasks.knowledge.texts import load_texts
from seal_jax.tasks.task import Rejected


class External(NamedTuple):
    """What others wrote on the held-out problems, by the name of its row."""

    edits: dict[str, list[list[Edit]]]  # [P][at most eval.num_edits]
    digests: dict[str, str]  # of the files


def read_external(stages: Stages, problems: Batch) -> External:
    """Read and parse the texts of `eval.texts`, and say what of them is used.

    Raises:
      ValueError: see `load_texts`; or a row has another row's name.
      FileNotFoundError: there is no such file.
    """
    section = stages.settings.eval
    asked = [problem for problem, _ in problems]
    read = ask_first(
        "eval.texts",
        lambda: [load_texts(source, asked, section.num_edits) for source in section.texts.values()],
    )
    found = External({}, {})
    for (name, source), (texts, remarks, digest) in zip(section.texts.items(), read, strict=True):
        found.digests[name] = digest
        found.edits[name] = parse_given(stages, problems, texts)
        say(f"eval.texts, {name!r} of {source}: {describe(found.edits[name])}")
        for remark in remarks:
            say(f"  {remark}")
    refuse_external(found.edits, dict.fromkeys(section.objectives))
    return found


def describe(edits: list[list[Edit]]) -> str:
    """Return how many texts there are, and how many of them cannot be used."""
    flat = [edit for row in edits for edit in row]
    line = f"{len(flat)} texts on {sum(map(bool, edits))} of {len(edits)} held-out problems"
    reasons = Counter(edit.reason for edit in flat if isinstance(edit, Rejected))
    if reasons:
        most = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        line += f"; {reasons.total()} rejected, which count as 0 ({most})"
    return line
