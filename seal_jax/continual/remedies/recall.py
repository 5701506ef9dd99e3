"""On-policy replay: the model's own words on earlier edits, instead of the texts themselves.

After an edit the model is given the first half of each of its texts and continues it. What it says
so, if it agrees with the text, is what the memory keeps, and only the continuation is in the loss:
it is trained to go on saying what it says now.

References:
  arXiv 2605.29495: replay of a model's own accepted answers.
"""

import re
from functools import partial

from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Work
from seal_jax.continual.remedies.replay import check_replay, drawn_texts
from seal_jax.inner.texts import Text
from seal_jax.outer import answers
from seal_jax.outer.stages import thoughts_of


def remedy(
    share: float = 0.25, kind: str = "reservoir", extra: bool = False, agrees: float = 0.5
) -> Remedy:
    """Return on-policy replay.

    Args:
      share, kind, extra: as of replay.
      agrees: the share of the other half's words that an answer must have to be kept.
    """
    check_replay(share, kind)
    if not 0 <= agrees <= 1:
        raise ValueError(f"agrees is {agrees}: expected 0 to 1")
    remember = partial(recall, agrees)
    return Remedy(share=share, extra=extra, memory=kind, old=drawn_texts, remember=remember)


def recall(agrees: float, work: Work, learner: Learner, edit: Edit) -> list[list[tuple[str, Text]]]:
    """Return what each model says to the first halves of its new texts, where it agrees."""
    stages, tokenizer = work.stages, work.stages.model.tokenizer
    halves = [[_halves(text) for text in texts] for texts in edit.texts]
    most = max((len(rest) for row in halves for _, rest in row), default=0)
    if not most:
        return [[] for _ in halves]
    settings = stages.settings.answer._replace(max_tokens=most, max_thought_tokens=0, stop=("\n",))
    given = answers.ask(
        stages.model,
        learner.params,
        None,
        [[start for start, _ in row] for row in halves],
        stages.mesh,
        settings,
        thoughts_of(stages),
    )
    kept: list[list[tuple[str, Text]]] = []
    for row, said in zip(halves, given, strict=True):
        kept.append([])
        for (start, rest), words in zip(row, said, strict=True):
            if not words or overlap(words, tokenizer.decode(rest)) < agrees:
                continue
            text = f"{tokenizer.decode(start)}{_space(tokenizer.decode(rest))}{words}"
            tokens = tokenizer.encode(text)
            loss_mask = [i >= len(start) for i in range(len(tokens))]
            kept[-1].append((text, Text(tuple(tokens), tuple(loss_mask))))
    return kept


def _halves(text: Text) -> tuple[list[int], list[int]]:
    middle = max(1, len(text.tokens) // 2)
    return list(text.tokens[:middle]), list(text.tokens[middle:])


def _space(rest: str) -> str:
    """Return what stands between two halves: an answer comes without the white space before it."""
    return rest[: len(rest) - len(rest.lstrip())]


def overlap(said: str, meant: str) -> float:
    """Return the share of the distinct words that were meant that were said."""
    wanted = _words(meant)
    return len(_words(said) & wanted) / len(wanted) if wanted else 1.0


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
