"""Constrained decoding: whatever the grammar lets through is a self-edit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.tasks.arc.grammar import SELF_EDIT_PATTERN, allowed_tokens, load_vocabulary
from seal_jax.tasks.arc.self_edit import ArcSelfEdit, parse_self_edit


@settings(max_examples=50)
@given(st.from_regex(SELF_EDIT_PATTERN, fullmatch=True))
def test_all_that_the_grammar_allows_parses(written):
    assert isinstance(parse_self_edit(written), ArcSelfEdit), parse_self_edit(written)


@pytest.fixture(scope="module")
def byte_level():
    pytest.importorskip("llguidance")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    stop = backend.token_to_id("<end>")
    return backend, stop, load_vocabulary(backend.to_str(), len(alphabet) + 1, [stop])


def test_random_tokens_within_the_mask_make_a_self_edit(byte_level):
    backend, stop, vocabulary = byte_level
    rng = np.random.default_rng(0)
    written = []
    for _ in range(500):
        allowed = np.flatnonzero(allowed_tokens(vocabulary, written))
        token = int(rng.choice(allowed))
        if token == stop:
            break
        written.append(token)
    assert token == stop
    assert isinstance(parse_self_edit(backend.decode(written)), ArcSelfEdit)


def test_the_mask_forbids_prose_and_an_early_end(byte_level):
    backend, stop, vocabulary = byte_level
    allowed = allowed_tokens(vocabulary, [])
    assert backend.decode(np.flatnonzero(allowed).tolist()) == "{"
    assert not allowed[stop]
    with pytest.raises(ValueError, match="not the beginning of a self-edit: 4 tokens"):
        allowed_tokens(vocabulary, backend.encode("Sure").ids)
