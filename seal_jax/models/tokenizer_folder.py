"""Reads the tokenizer of a model's folder: its files alone, and no code that comes with them."""

import os
from pathlib import Path
from typing import Any

from seal_jax.hosts.files import read_object
from seal_jax.models.byte_tokenizer import BYTE_FILE, ByteTokenizer
from seal_jax.models.tokenizer import HFTokenizer, Tokenizer


def load_tokenizer(folder: str | os.PathLike, num_rows: int | None = None) -> Tokenizer:
    """Load the tokenizer of a local folder; code that comes with a model is never run.

    Args:
      num_rows: the V of its model; see `HFTokenizer`.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: the tokenizer is damaged or has no fast backend.
    """
    folder = Path(folder)
    if (folder / BYTE_FILE).is_file():
        size = ByteTokenizer.vocab_size  # a text may have any of them
        if num_rows is not None and num_rows < size:
            raise ValueError(
                f"{folder}: the tokenizer has {size} tokens, the model only {num_rows}."
            )
        return ByteTokenizer()
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.json, so no tokenizer to load.")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_object(folder / name)  # transformers names no file in what it raises
    # Not AutoTokenizer, which rebuilds some from their class and vocabulary, and drops the rest of
    # tokenizer.json: SmolLM2 would no longer split numbers into digits.
    fast_class = import_transformers().PreTrainedTokenizerFast
    try:
        fast = fast_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise ValueError(f"{folder}: cannot load the tokenizer: {error}") from error
    files = [folder / name for name in ("generation_config.json", "config.json")]
    ends = next(filter(None, map(_listed_stop_ids, files)), ())
    return HFTokenizer(fast, ends, num_rows).with_template(str(folder), {})


def import_transformers() -> Any:
    """Import transformers without its advice to install PyTorch, which nothing here uses."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _listed_stop_ids(path: Path) -> tuple[int, ...]:
    """Return the eos ids of a config, of which chat models list several."""
    if not path.is_file():
        return ()
    eos = read_object(path).get("eos_token_id")
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) for i in found):
        raise ValueError(f"{path}: eos_token_id must be an id or a list of ids, found {eos!r}.")
    return tuple(found)
