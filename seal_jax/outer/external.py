"""Rows of the final table whose self-edits somebody else wrote: the config's `eval.texts`."""

from collections import Counter
from collections.abc import Mapping

from seal_jax.hosts.console import say
from seal_jax.hosts.exchange import ask_first
from seal_jax.outer.problems import Batch, read_problems
from seal_jax.outer.stages import Edit, Stages, parse_given
from seal_jax.tasks.knowledge.texts import Texts, load_texts
from seal_jax.tasks.task import Rejected, Task
from seal_jax.types import Settings


def read_texts(settings: Settings, task: Task) -> dict[str, Texts]:
    """Read the texts of `eval.texts`, by the name of their row; no model is needed.

    Raises:
      ValueError, FileNotFoundError: see `load_texts`.
    """
    section = settings.eval
    if not section.texts:
        return {}
    split = [problem for problem, _ in read_problems(task, "eval")]
    asked, beside = split[: section.num_problems], split[section.num_problems :]
    read = ask_first(
        "eval.texts",
        lambda: [
            load_texts(source, asked, section.num_edits, beside)
            for source in section.texts.values()
        ],
    )
    return {name: Texts(*one) for name, one in zip(section.texts, read, strict=True)}


def parse_texts(
    stages: Stages, problems: Batch, texts: Mapping[str, Texts]
) -> dict[str, list[list[Edit]]]:
    """Return the self-edits [P][at most eval.num_edits] of each row, and say what is used."""
    found = {}
    for name, one in texts.items():
        found[name] = parse_given(stages, problems, one.of)
        source = stages.settings.eval.texts[name]
        say(f"eval.texts, {name!r} of {source}: {describe(found[name])}")
        for remark in one.remarks:
            say(f"  {remark}")
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
