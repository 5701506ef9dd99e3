"""Grids as text, and text as grids.

    user       what to do
               [[1, 2]] -> [[2, 1]]#         an example: input, output, footer
               [[3, 4]] ->                   the test input
    assistant  [[4, 3]]#

Grids are lists of lists, ' -> ' stands between input and output and '#' ends an output: the format
of the authors' code (SEAL, arXiv 2506.10943; test-time training, arXiv 2411.07279). The words are
ours. A text is kept in parts, of which those that are output grids are marked, so that the loss can
be taken on them alone, whatever the tokenizer and the chat template.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from seal_jax.tasks.arc.grids import Example, as_grid
from seal_jax.tasks.task import Part, Turn

ARROW, FOOTER = " -> ", "#"
INSTRUCTION = (
    "Each line shows a grid and what a hidden rule makes of it. A grid is a list of rows and a "
    "number from 0 to 9 is a color. Find the rule and write the grid that is missing, then "
    f"{FOOTER}"
)
_MAX_ANSWER = 8192  # characters of a grid of 30 x 30 that is written with wide spaces


class Undecodable(NamedTuple):
    """An answer that is not a grid, and why."""

    reason: str


def encode_grid(grid: np.ndarray) -> str:
    """Return a grid as a list of lists, with a space after each comma."""
    return json.dumps(grid.tolist())


def make_prompt(
    examples: Sequence[Example], test_input: np.ndarray, instruction: str = INSTRUCTION
) -> tuple[Part, ...]:
    """Return the message that shows the examples and asks for the output of `test_input`."""
    parts = [Part(instruction + "\n", False)]
    for example in examples:
        parts.append(Part(encode_grid(example.input) + ARROW, False))
        parts.append(Part(encode_grid(example.output) + FOOTER, True))
        parts.append(Part("\n", False))
    parts.append(Part(encode_grid(test_input) + ARROW.rstrip(), False))
    return tuple(parts)


def text_of(prompt: Sequence[Part]) -> str:
    """Return a prompt's text."""
    return "".join(part.text for part in prompt)


def make_turn(examples: Sequence[Example], query: Example, instruction: str = INSTRUCTION) -> Turn:
    """Return the text that trains on `query` with `examples` in context."""
    prompt = make_prompt(examples, query.input, instruction)
    return Turn(prompt, encode_grid(query.output) + FOOTER)


def decode_grid(text: str) -> np.ndarray | Undecodable:
    """Return the grid that a model wrote, or why it is none. Never raises.

    What follows the footer is not read, and there may be none: a model may end its turn instead.
    """
    written = text.split(FOOTER, 1)[0].strip()
    if not written:
        return Undecodable("empty")
    if len(written) > _MAX_ANSWER:
        return Undecodable(f"too long: {len(written):,} characters, at most {_MAX_ANSWER:,}")
    try:
        return as_grid(json.loads(written), "answer")
    except RecursionError:
        return Undecodable("not a list of lists: nested too deeply")
    except json.JSONDecodeError as error:
        return Undecodable(f"not a list of lists: {error.msg} at character {error.pos}")
    except ValueError as error:
        return Undecodable(str(error))
