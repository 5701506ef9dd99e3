"""Constrained decoding: whatever the grammar lets through is a self-edit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.tasks.arc.grammar import allowed_tokens, load_vocabulary, self_edit_pattern
from seal_jax.tasks.arc.self_edit import MAX_STEPS, ArcSelfEdit, parse_self_edit

TOKENIZER, PATTERN = ByteTokenizer(), self_edit_pattern(MAX_STEPS)


@settings(max_examples=50)
@given(st.from_regex(PATTERN, fullmatch=True))
def test_all_that_the_grammar_allows_parses(written):
    assert isinstance(parse_self_edit(written), ArcSelfEdit), parse_self_edit(written)


@pytest.fixture(scope="module")
def vocabulary():
    pytest.importorskip("llguidance")
    return load_vocabulary(TOKENIZER.to_json(), 264, TOKENIZER.stop_ids)


def test_random_tokens_within_the_mask_make_a_self_edit(vocabulary):
    rng = np.random.default_rng(0)
    written = []
    for _ in range(500):
        allowed = np.flatnonzero(allowed_tokens(vocabulary, PATTERN, written))
        token = int(rng.choice(allowed))
        if token in TOKENIZER.stop_ids:
            break
        written.append(token)
    assert token in TOKENIZER.stop_ids
    assert isinstance(parse_self_edit(TOKENIZER.decode(written)), ArcSelfEdit)


def test_the_mask_forbids_prose_and_an_early_end(vocabulary):
    allowed = allowed_tokens(vocabulary, PATTERN, [])
    assert TOKENIZER.decode(np.flatnonzero(allowed).tolist()) == "{"
    assert not allowed[list(TOKENIZER.stop_ids)].any()
    with pytest.raises(ValueError, match="not the beginning of a self-edit: 4 tokens"):
        allowed_tokens(vocabulary, PATTERN, TOKENIZER.encode("Sure", start=False))
