"""Models from a GGUF file, dequantized on the host.

GGUF is the format of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Unlike
Hugging Face's, Llama's q and k have permuted rows, for a rope that rotates neighboring pairs; and
Gemma's norms are stored with the 1 added that they multiply by. Both are undone here.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from seal_jax.models.config import FAMILIES, LINEARS, ModelConfig, RopeScaling
from seal_jax.models.gguf_file import DAMAGE, GGUFFile
from seal_jax.models.gguf_file import open_gguf as open_gguf  # it is offered here, too
from seal_jax.models.names import Param, check_depth, check_names, param_table
from seal_jax.models.place_params import Shardings, build_params
from seal_jax.types import Params

# Our family of each general.architecture. Mistral's files say 'llama', and leave out its window.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
# The metadata below `<architecture>.` that are read, or that say nothing about what is computed.
# Any other that is set may ask for what the decoder does not do.
_KEYS = {
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.layer_norm_rms_epsilon", "attention.value_length", "block_count"),
    *("context_length", "embedding_length", "feed_forward_length", "rope.dimension_count"),
    *("rope.freq_base", "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.type"),
    *("rope.scaling.original_context_length", "tensor_data_layout", "vocab_size"),
}
_GEMMA_KEYS = {
    *("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}
# Other keys whose value changes nothing where it is 1, or 0.
_FACTORS = (
    *("rope.scale_linear", "rope.scaling.yarn_attn_factor", "rope.scaling.alpha"),
    *("logit_scale", "residual_scale", "embedding_scale", "attention.output_scale"),
    *("expert_weights_scale", "expert_group_scale"),
)
# Values that change nothing. Of keys that are not here, it is what is 0 or empty.
_NEUTRAL = {
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    **dict.fromkeys(_FACTORS, (0.0, 1.0)),
}
# Divisors of the rope frequencies, which llama.cpp makes from Llama 3's scaling.
_ROPE_DIVISORS = "rope_freqs.weight"


def gguf_metadata(reader: GGUFFile, path: str | os.PathLike) -> dict[str, Any]:
    """Return the file's metadata as Python values, by key."""
    try:
        return {key: field.contents() for key, field in reader.fields.items()}
    except DAMAGE as error:
        raise ValueError(f"{os.fspath(path)}: damaged metadata: {error!r}") from error


def gguf_config(reader: GGUFFile, path: str | os.PathLike) -> ModelConfig:
    """Return the model config that the metadata describe, or raise ValueError."""
    metadata = gguf_metadata(reader, path)
    where = os.fspath(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    arch: Any = metadata.get("general.architecture")
    try:
        _refuse_unsupported(metadata, arch)
        config = _sizes(metadata, arch, "output.weight" not in tensors)
        # Before anything is made as long as the number of layers says.
        check_depth(config, len(tensors), "its metadata")
        changes = _rope_changes(config, metadata, arch)
        if arch == "gemma3":
            changes |= _gemma_changes(config, metadata)
        if _ROPE_DIVISORS in tensors:
            divisors = _dequantize(tensors[_ROPE_DIVISORS], where)
            changes["rope_scaling"] = _llama3_scaling(config, divisors)
        return dataclasses.replace(config, **changes)
    except KeyError as error:
        raise ValueError(f"{where}: missing metadata {error}.") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from error


def gguf_params(
    reader: GGUFFile,
    config: ModelConfig,
    path: str | os.PathLike,
    dtype: Any = "float32",
    shardings: Shardings | None = None,
) -> Params:
    """Return the dequantized parameter tree, cast to `dtype`, one tensor at a time.

    `shardings` is that of `weights.load_safetensors`.
    """
    where = os.fspath(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name != _ROPE_DIVISORS}
    check_depth(config, len(tensors), where)
    table = param_table(config)
    found = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
    check_names(found, {param.gguf_name: param.file_shape for param in table}, where)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    permuted = heads if config.family == "llama" else {}

    def read(param: Param) -> np.ndarray:
        array = _dequantize(tensors[param.gguf_name], where)
        if param.path[-2] in permuted:
            array = _undo_permutation(array, permuted[param.path[-2]])
        if config.unit_offset and param.path[-1] == "scale":
            array = array - 1
        return array

    return build_params(table, read, dtype, where, shardings)


def _refuse_unsupported(metadata: Mapping[str, Any], arch: Any) -> None:
    if arch not in _FAMILIES:
        choices = ", ".join(map(repr, _FAMILIES))
        raise ValueError(f"unsupported general.architecture {arch!r}; supported: {choices}.")
    known = {f"{arch}.{key}" for key in _KEYS | (_GEMMA_KEYS if arch == "gemma3" else set())}
    unknown = [
        f"{key} = {value!r}"
        for key, value in metadata.items()
        if key.startswith(f"{arch}.") and key not in known
        if not _is_neutral(key.removeprefix(f"{arch}."), value)
    ]
    if unknown:
        raise ValueError(f"unsupported metadata: {', '.join(unknown)}.")


def _is_neutral(key: str, value: Any) -> bool:
    """Return whether a value says nothing: what it would ask for is off, or a factor of one."""
    if key in _NEUTRAL:
        return value in _NEUTRAL[key]
    return not (any(value) if isinstance(value, list) else value)


def _sizes(metadata: Mapping[str, Any], arch: str, tied: bool) -> ModelConfig:
    """Return the config as far as all architectures have the same keys."""
    num_heads = int(metadata[f"{arch}.attention.head_count"])
    embed_dim = int(metadata[f"{arch}.embedding_length"])
    vocab_size = metadata.get(f"{arch}.vocab_size")
    if vocab_size is None:
        vocab_size = len(metadata["tokenizer.ggml.tokens"])
    return ModelConfig(
        vocab_size=int(vocab_size),
        num_layers=int(metadata[f"{arch}.block_count"]),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=int(metadata.get(f"{arch}.attention.head_count_kv", num_heads)),
        head_dim=int(metadata.get(f"{arch}.attention.key_length", embed_dim // num_heads)),
        mlp_dim=int(metadata[f"{arch}.feed_forward_length"]),
        family=_FAMILIES[arch],
        rope_theta=float(metadata.get(f"{arch}.rope.freq_base", 10_000.0)),
        norm_eps=_shortest(metadata[f"{arch}.attention.layer_norm_rms_epsilon"]),
        tie_embeddings=tied,
        max_length=int(metadata[f"{arch}.context_length"]),
        biases=LINEARS[:3] if arch == "qwen2" else (),
        **FAMILIES[_FAMILIES[arch]].switches,
    )


def _rope_changes(config: ModelConfig, metadata: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """Return the fields about linear rope scaling. Raises KeyError, TypeError or ValueError."""
    if metadata.get(f"{arch}.rope.dimension_count", config.head_dim) != config.head_dim:
        raise ValueError(f"rope on a part of the {config.head_dim} head dimensions is unsupported")
    factor = metadata.get(f"{arch}.rope.scaling.factor")
    # llama.cpp takes a factor alone for a linear one.
    kind = metadata.get(f"{arch}.rope.scaling.type", "linear" if factor else "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"unsupported rope scaling {kind!r}; supported: 'none', 'linear'.")
    return {"rope_factor": float(factor)} if kind == "linear" and factor else {}


def _gemma_changes(config: ModelConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is Gemma 3's own; llama.cpp knows some of it by heart, so it is written here."""
    pattern = int(metadata.get("gemma3.attention.sliding_window_pattern", 6))
    # Scores are scaled by head_dim, but for the 27B, which has 62 layers.
    is_27b = config.num_layers == 62
    scaled_by = config.embed_dim // config.num_heads if is_27b else config.head_dim
    caps = {
        "attn_softcap": metadata.get("gemma3.attn_logit_softcapping"),
        "logit_softcap": metadata.get("gemma3.final_logit_softcapping"),
    }
    return {
        "activation": "gelu_tanh",
        "query_scale": float(scaled_by) ** -0.5,
        "sliding_window": int(metadata["gemma3.attention.sliding_window"]),
        "local_layers": tuple((i + 1) % pattern > 0 for i in range(config.num_layers)),
        "rope_theta": float(metadata.get("gemma3.rope.freq_base", 1_000_000.0)),
        "local_rope_theta": float(metadata.get("gemma3.rope.freq_base_swa", 10_000.0)),
        **{name: float(cap) for name, cap in caps.items() if cap},
    }


def _llama3_scaling(config: ModelConfig, divisors: np.ndarray) -> RopeScaling:
    """Return the scaling that `rope_freqs.weight`, f32[H/2], was made from.

    Llama 3.1 to 3.3 differ only in the factor, which is the greatest divisor. With it the divisors
    are made anew: they must agree.
    """
    s = RopeScaling(float(divisors.max()), 1.0, 4.0, 8192)
    half = np.arange(0, config.head_dim, 2) / config.head_dim
    turns = s.original_max_position * config.rope_theta**-half / (2 * math.pi)
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    expected = 1 / (blend + (1 - blend) / s.factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5):
        raise ValueError(
            f"{_ROPE_DIVISORS} is not what Llama 3's rope scaling makes of factor {s.factor}, low "
            f"1, high 4 and 8192 positions; supported: the same model as a Hugging Face folder."
        )
    return s


def _dequantize(tensor: gguf.ReaderTensor, where: str) -> np.ndarray:
    """Return the tensor as floats, in the shape `[out, in]`."""
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"{where}: {tensor.name} has type {tensor.tensor_type.name}, which the gguf package "
            "cannot dequantize."
        ) from error


def _undo_permutation(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Turn rows for interleaved rope, (0, H/2, 1, H/2+1, ...), into rows for half-split rope."""
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])  # [heads, H/2, 2, D]
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _shortest(value: float) -> float:
    """Return the shortest decimal with the same float32, so that 9.99999975e-06 is 1e-05."""
    return float(str(np.float32(value)))
