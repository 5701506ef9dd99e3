"""The self-edit of an ARC task: a JSON object that chooses data and training settings.

    {"data_generation": {"use_basic_augmentations": bool, "use_size_augmentations": bool,
                         "use_chain_augmentations": bool, "use_repeat_augmentations": bool},
     "training": {"strategy": "train_using_all_tokens" | "train_using_output_tokens",
                  "learning_rate": float, "num_train_epochs": int}}

Keys and choices are the published ones (SEAL, arXiv 2506.10943, section 4.2); the prompt is ours.
What the policy writes is untrusted: it is this object and nothing else, or it is rejected.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from seal_jax.hosts.json_text import unique_keys
from seal_jax.tasks.arc.augmentations import GROUPS
from seal_jax.tasks.arc.format import ARROW, encode_grid
from seal_jax.tasks.arc.grids import ArcTask

MAX_STEPS = 375  # the paper's
BATCH_SIZE = 2
MAX_CHARS = 2000  # the object itself takes about 350
MIN_LEARNING_RATE, MAX_LEARNING_RATE = 1e-7, 0.1

# On one line: a switch for each of GROUPS, the strategy, the learning rate and the epochs.
FORM = (
    '{"data_generation": {'
    + ", ".join(f'"use_{group}_augmentations": %s' for group in GROUPS)
    + '}, "training": {"strategy": %s, "learning_rate": %s, "num_train_epochs": %s}}'
)
INSTRUCTION = """\
You will be fine-tuned on the examples of this task, then solve its test grid. Choose how.

data_generation, each true or false:
- use_basic_augmentations: rotate, flip, transpose, reflect and translate the grids
- use_size_augmentations: enlarge the grids
- use_chain_augmentations: rotate or flip, then enlarge
- use_repeat_augmentations: lay copies of a grid side by side

training:
- strategy: "train_using_all_tokens" or "train_using_output_tokens" (the loss on output grids only)
- learning_rate: a number, as 1e-4
- num_train_epochs: a whole number from 1; more than {max_steps} steps in all are refused

Answer with one JSON object and nothing else, in this form:
{form}

The task's examples:
"""


class _Strict(BaseModel, strict=True, extra="forbid", frozen=True):
    pass


class DataGeneration(_Strict):
    """Which groups of augmentations to use."""

    use_basic_augmentations: bool
    use_size_augmentations: bool
    use_chain_augmentations: bool
    use_repeat_augmentations: bool


class Training(_Strict):
    """How to train."""

    strategy: Literal["train_using_all_tokens", "train_using_output_tokens"]
    learning_rate: float = Field(ge=MIN_LEARNING_RATE, le=MAX_LEARNING_RATE, allow_inf_nan=False)
    num_train_epochs: int = Field(ge=1, le=MAX_STEPS)


class ArcSelfEdit(_Strict):
    """The whole object."""

    data_generation: DataGeneration
    training: Training

    @property
    def groups(self) -> tuple[str, ...]:
        """The names in `augmentations.GROUPS` that are switched on."""
        chosen = self.data_generation.model_dump()
        return tuple(group for group in GROUPS if chosen[f"use_{group}_augmentations"])

    @property
    def outputs_only(self) -> bool:
        """Whether the loss is on output grids only."""
        return self.training.strategy == "train_using_output_tokens"


def edit_prompt(task: ArcTask, max_steps: int = MAX_STEPS, instruction: str = INSTRUCTION) -> str:
    """Return the prompt that asks for a self-edit. It shows the examples and the test inputs.

    In the instruction, {max_steps} and {form} are filled in.
    """
    form = FORM % (("...",) * 7)
    lines = [f"{encode_grid(e.input)}{ARROW}{encode_grid(e.output)}" for e in task.examples]
    tests = [f"{encode_grid(grid)}{ARROW}?" for grid in task.tests]
    head = instruction.replace("{max_steps}", str(max_steps)).replace("{form}", form)
    return head + "\n".join([*lines, "The test:", *tests]) + "\n"


def parse_self_edit(text: str) -> ArcSelfEdit | str:
    """Return the self-edit, or the reason why the text is none. Never raises."""
    if len(text) > MAX_CHARS:
        return f"too long: {len(text):,} characters, at most {MAX_CHARS:,}"
    if not text.strip():
        return "empty"
    try:
        content = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except RecursionError:
        return "not one JSON object: nested too deeply"
    except json.JSONDecodeError as error:
        return f"not one JSON object: {error.msg} at character {error.pos}"
    except ValueError as error:
        return f"not one JSON object: {error}"
    try:
        return ArcSelfEdit.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        return f"{place[:100]}: {first['msg'][:200]}"


def num_steps(num_turns: int, num_epochs: int, batch_size: int = BATCH_SIZE) -> int:
    """Return the optimizer steps of a self-edit; the last batch of an epoch may be smaller."""
    return -(-num_turns // batch_size) * num_epochs


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
