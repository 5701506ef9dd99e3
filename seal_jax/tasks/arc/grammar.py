"""Which tokens may come next, so that what is written is a self-edit.

The grammar is one regular expression: the object of self_edit.py on one line, with few digits and
no free space, so that every path through it ends. What it lets through always parses, and within
`max_epochs` it keeps to the step budget too, see `Arc.constrain`.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from seal_jax.extensions import import_optional
from seal_jax.tasks.arc.augmentations import GROUPS
from seal_jax.tasks.arc.self_edit import FORM

_RATE = r"([1-9](\.[0-9]{1,2})?e-[2-7]|0\.0{1,6}[1-9][0-9]{0,2})"


def self_edit_pattern(max_epochs: int) -> str:
    """Return the regular expression of a self-edit with 1 to `max_epochs` epochs."""
    epochs = "|".join(map(str, range(1, max_epochs + 1)))
    switches = ["(true|false)"] * len(GROUPS)
    form = FORM.replace("{", r"\{").replace("}", r"\}")
    return form % (*switches, '"train_using_(all|output)_tokens"', _RATE, f"({epochs})")


def load_vocabulary(tokenizer_json: str, vocab_size: int, stop_ids: Sequence[int]) -> Any:
    """Prepare a tokenizer for `allowed_tokens`; takes about a second for a large vocabulary.

    Args:
      tokenizer_json: the content of a tokenizer.json.
      vocab_size: the model's V, which may be more than the tokenizer's.
      stop_ids: any of them may end a self-edit, and only where it is complete.

    Raises:
      ModuleNotFoundError: llguidance is not installed.
    """
    stops = list(stop_ids)
    return _llguidance().LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=stops)


def allowed_tokens(vocabulary: Any, pattern: str, written: Sequence[int]) -> np.ndarray:
    """Return which tokens may follow `written`, bool[V].

    Args:
      vocabulary: from `load_vocabulary`.
      pattern: from `self_edit_pattern`.
      written: the tokens of a self-edit so far, without its prompt and stop token.

    Raises:
      ValueError: `written` is no beginning of a self-edit.
    """
    llguidance = _llguidance()
    grammar = llguidance.LLMatcher.grammar_from_regex(pattern)
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    if not matcher.consume_tokens(list(written)):
        raise ValueError(f"not the beginning of a self-edit: {len(written)} tokens")
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, bitorder="little")[: vocabulary.vocab_size].astype(bool)


def _llguidance() -> ModuleType:
    return import_optional("llguidance", "constrained decoding", "'seal_jax[arc]'")
