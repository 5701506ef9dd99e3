"""Tokenizers from a GGUF file's metadata: byte-level BPE, and the BPE of SentencePiece.

GGUF keeps tokens, their types, and scores or merges. How text is split before is only named: what a
name stands for is written here, after the tokenizer.json of the models that go by it.

SentencePiece joins the two neighbors that make the piece with the best score, the leftmost of equal
ones first. BPE goes by a ranked list of pairs, so each piece is ranked by its score with all its
splits into two pieces.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from seal_jax.models.tokenizer import HFTokenizer, import_transformers

# GGUF's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # stands for a space in SentencePiece's pieces

_KEY = "tokenizer.ggml."
# Of Qwen2, Qwen2.5 and Qwen3; Llama 3 takes up to three digits for one word.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_SUPPORTED = (("gpt2", "smollm"), ("gpt2", "qwen2"), ("gpt2", "llama-bpe"), ("llama", "default"))
# What files leave out, as llama.cpp reads it.
_BOS_BY_DEFAULT = (("gpt2", "llama-bpe"), ("llama", "default"))
# What ends a turn or a message, beside what ends a text.
_ENDS = ("eot_token_id", "eom_token_id")
# Some files list the marks of a chat as words of the user's.
_TURN_MARKS = ("<|", "<start_of_turn>", "<end_of_turn>")


def gguf_tokenizer(metadata: Mapping[str, Any], where: str) -> HFTokenizer:
    """Build the tokenizer that GGUF metadata describe.

    Raises:
      ValueError: another tokenizer model or pre-tokenizer, or metadata that do not fit together.
    """
    from tokenizers import AddedToken, processors

    fields = {k.removeprefix(_KEY): v for k, v in metadata.items() if k.startswith(_KEY)}
    kind = (fields.get("model"), fields.get("pre", "default"))
    _refuse_unsupported(fields, kind, where)
    try:
        vocab, types = _vocabulary(fields)
        tokens = list(vocab)
        names = {"eos_token": "eos", "bos_token": "bos", "pad_token": "padding"}
        ids = {name: fields.get(f"{key}_token_id") for name, key in names.items()}
        special_tokens = {name: tokens[i] for name, i in ids.items() if i is not None}
        is_sentencepiece = kind[0] == "llama"
        if is_sentencepiece:
            backend = _sentencepiece(fields, vocab, types)
        else:
            backend = _byte_level(fields, vocab, kind[1])
        special, words = _added(tokens, types)
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        # SentencePiece looks for the user's words in text whose spaces are replaced already.
        backend.add_tokens([AddedToken(word, normalized=is_sentencepiece) for word in words])
        if fields.get("add_bos_token", kind in _BOS_BY_DEFAULT):
            bos = special_tokens["bos_token"]
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, vocab[bos])]
            )
    except Exception as error:  # the Rust constructors raise bare Exception
        raise ValueError(f"{where}: damaged tokenizer metadata: {error!r}") from error
    fast = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )
    ends = [fields[key] for key in _ENDS if fields.get(key) is not None]
    return HFTokenizer(fast, ends).with_template(where, {})


def _refuse_unsupported(fields: Mapping[str, Any], kind: tuple, where: str) -> None:
    if kind not in _SUPPORTED:
        choices = ", ".join(map(str, _SUPPORTED))
        raise ValueError(
            f"{where}: unsupported GGUF tokenizer (model, pre) = {kind}; supported: {choices}, or "
            "the same model as a Hugging Face folder."
        )
    for name in ("add_eos_token", "remove_extra_whitespaces", "precompiled_charsmap"):
        if fields.get(name):
            raise ValueError(f"{where}: a tokenizer with {_KEY}{name} is unsupported.")


def _vocabulary(fields: Mapping[str, Any]) -> tuple[dict[str, int], list[int]]:
    """Return the ids of the tokens, in their order, and the tokens' types."""
    tokens, types = fields["tokens"], fields["token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{len(tokens) - len(vocab)} tokens are listed twice")
    if len(types) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(types)} types")
    return vocab, types


def _added(tokens: Iterable[str], types: Iterable[int]) -> tuple[list[str], list[str]]:
    """Return the tokens that text cannot spell, and those that it can, but that never merge."""
    special, words = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, UNKNOWN) or kind == USER_DEFINED and token.startswith(_TURN_MARKS):
            special.append(token)
        elif kind == USER_DEFINED:
            words.append(token)
    return special, words


def _byte_level(fields: Mapping[str, Any], vocab: dict[str, int], pre: str) -> Any:
    """Return GPT-2's BPE over bytes, with the splits and the normalization of `pre`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    # Llama 3's merges do not reach all of its words: a word of the vocabulary is taken whole.
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    backend = Tokenizer(model)
    if pre == "smollm":  # splits numbers into digits, then follows GPT-2
        split = pre_tokenizers.Digits(individual_digits=True)
    else:
        regex = _QWEN2_SPLIT if pre == "qwen2" else _LLAMA3_SPLIT
        split = pre_tokenizers.Split(Regex(regex), "isolated")
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> Any:
    """Return SentencePiece's BPE: spaces are part of the pieces, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    missing = {f"<0x{byte:02X}>" for byte in range(256)} - vocab.keys()
    if missing:
        raise ValueError(f"{len(missing)} of the 256 byte tokens are missing")
    merges = _merges(vocab, fields["scores"], types)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    has_prefix = fields.get("add_space_prefix", True)
    if has_prefix and USER_DEFINED in types and _added(vocab, types)[1]:
        raise ValueError("add_space_prefix and user-defined tokens are unsupported together")
    prefix = [normalizers.Prepend(SPACE)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(tokens: Iterable[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, the pairs with the best piece first.

    Left out: SentencePiece passes through pieces that are marked as unused, and splits them again
    at the end. Here they are never made; the supported families have none but padding.

    Raises:
      ValueError: equal scores leave the order open.
    """
    rows = zip(tokens, scores, types, strict=True)
    score_of = {token: score for token, score, kind in rows if kind == NORMAL}
    merges = []
    for piece in score_of:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [pair for pair in splits if pair[0] in score_of and pair[1] in score_of]
    # Llama 2 gives all runs of spaces one score: the leftmost run grows first.
    merges.sort(key=lambda pair: (-score_of["".join(pair)], -len(pair[0]), -len(pair[1])))
    words = {"".join(pair) for pair in merges if "".join(pair).strip(SPACE)}
    if len({score_of[word] for word in words}) < len(words):
        raise ValueError("several pieces have the same score, so nothing says which comes first")
    return merges
