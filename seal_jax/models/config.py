"""The sizes of a decoder, and their translation from and to a Hugging Face `config.json`.

`ModelConfig` is hashable, so it can be a static argument of a jitted function. What the decoder
cannot compute is refused here, before any array is read.
"""

import dataclasses
import json
import os
from typing import Any

SUPPORTED_MODEL_TYPES = ("llama",)
SUPPORTED_ROPE_TYPES = ("default", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the low rope frequencies, https://arxiv.org/abs/2407.21783.

    Wavelengths are in tokens: those above `original_max_position / low_freq_factor` are stretched
    by `factor`, those below `original_max_position / high_freq_factor` are kept, and those between
    are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        if not self.factor > 0 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope scaling needs factor > 0 and 0 < low < high, found {self}.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes of one decoder: hashable, and known at compile time."""

    vocab_size: int  # V
    num_layers: int  # L
    embed_dim: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K, divides N
    head_dim: int  # H, even
    mlp_dim: int  # F
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_length: int = 2048  # tokens of context the model was trained for

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and not 0 < value < float("inf"):
                raise ValueError(f"{field.name} must be positive and finite, found {value}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, found {self.num_kv_heads} and "
                f"{self.num_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rope, found {self.head_dim}.")


def config_from_hf(source: dict[str, Any] | str | os.PathLike) -> ModelConfig:
    """Translate a Hugging Face config, given as a dict or as the path of a `config.json`.

    Both spellings of rope are read: `rope_theta` with `rope_scaling` (transformers 4) and
    `rope_parameters` (transformers 5).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, lacks a size, or asks for what the decoder cannot compute. The
            message names what was found, what is supported, and the file.
    """
    if isinstance(source, dict):
        hf, where = source, "config dict"
    else:
        hf, where = _read_json(source), os.fspath(source)
    _refuse_unsupported(hf, where)
    try:
        num_heads = int(hf["num_attention_heads"])
        embed_dim = int(hf["hidden_size"])
        num_kv_heads, head_dim = hf.get("num_key_value_heads"), hf.get("head_dim")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"hidden_size {embed_dim} is not a multiple of {num_heads} heads")
        rope_theta, rope_scaling = _rope_from_hf(hf)
        return ModelConfig(
            vocab_size=int(hf["vocab_size"]),
            num_layers=int(hf["num_hidden_layers"]),
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else int(num_kv_heads),
            head_dim=embed_dim // num_heads if head_dim is None else int(head_dim),
            mlp_dim=int(hf["intermediate_size"]),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_length=int(hf.get("max_position_embeddings", 2048)),
        )
    except KeyError as error:
        raise ValueError(f"{where}: missing key {error}.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the Hugging Face config of `config`, readable by transformers 4 and 5."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_position,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            hf = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)}: not a JSON file: {error}") from error
    if not isinstance(hf, dict):
        raise ValueError(f"{os.fspath(path)}: expected a JSON object, found {type(hf).__name__}.")
    return hf


def _refuse_unsupported(hf: dict[str, Any], where: str) -> None:
    """Raise ValueError where `hf` asks for what the decoder does not compute."""
    if "auto_map" in hf:
        raise ValueError(
            f"{where}: auto_map asks to run code that comes with the model (trust_remote_code). "
            "seal_jax never does; supported are models of type "
            f"{', '.join(SUPPORTED_MODEL_TYPES)} without auto_map."
        )
    demands = {
        "model_type": (hf.get("model_type"), SUPPORTED_MODEL_TYPES),
        "hidden_act": (hf.get("hidden_act", "silu"), ("silu",)),
        "attention_bias": (hf.get("attention_bias", False), (False,)),
        "mlp_bias": (hf.get("mlp_bias", False), (False,)),
        "quantization_config": (hf.get("quantization_config"), (None,)),
    }
    for name, (found, supported) in demands.items():
        if found not in supported:
            choices = " or ".join(repr(choice) for choice in supported)
            raise ValueError(f"{where}: unsupported {name} {found!r}; supported: {choices}.")


def _rope_from_hf(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return theta and the scaling, from either spelling. Raises KeyError or ValueError."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        choices = " or ".join(repr(choice) for choice in SUPPORTED_ROPE_TYPES)
        raise ValueError(f"unsupported rope type {rope_type!r}; supported: {choices}.")
    if rope_type == "default":
        return theta, None
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )
