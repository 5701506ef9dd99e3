"""Llama-family models from a GGUF file, dequantized on the host.

GGUF is the format of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Its
matrices are `[out, in]` like Hugging Face's, except that the rows of q and k are permuted, for a
rope that rotates neighboring pairs; ours rotates halves, so the permutation is undone here.
"""

import os
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from seal_jax.models.config import ModelConfig
from seal_jax.models.weights import (
    Param,
    Params,
    build_params,
    check_depth,
    check_names,
    param_table,
)

# What the reader raises on a damaged file: it parses with numpy views, so anything can be off.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError, MemoryError)


def load_gguf(path: str | os.PathLike, dtype: Any = "float32") -> tuple[ModelConfig, Params]:
    """Load the config and the dequantized parameters of a Llama-architecture GGUF file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another architecture, or its tensors do not match.
    """
    reader = open_gguf(path)
    config = gguf_config(reader, path)
    return config, gguf_params(reader, config, path, dtype)


def open_gguf(path: str | os.PathLike) -> gguf.GGUFReader:
    """Open a GGUF file, memory-mapped. Raises FileNotFoundError, or ValueError if damaged."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)}: no such file.")
    try:
        return gguf.GGUFReader(path)
    except _DAMAGE as error:
        raise ValueError(f"{os.fspath(path)}: damaged, or not a GGUF file: {error!r}") from error


def gguf_metadata(reader: gguf.GGUFReader, path: str | os.PathLike) -> dict[str, Any]:
    """Return the file's metadata as Python values, by key."""
    try:
        return {key: field.contents() for key, field in reader.fields.items()}
    except _DAMAGE as error:
        raise ValueError(f"{os.fspath(path)}: damaged metadata: {error!r}") from error


def gguf_config(reader: gguf.GGUFReader, path: str | os.PathLike) -> ModelConfig:
    """Return the model config that the metadata describe, or raise ValueError."""
    metadata = gguf_metadata(reader, path)
    where = os.fspath(path)
    _refuse_unsupported(metadata, where)
    names = {tensor.name for tensor in reader.tensors}
    if "rope_freqs.weight" in names:
        raise ValueError(
            f"{where}: Llama 3 rope scaling (rope_freqs.weight) is unsupported in GGUF; supported: "
            "the same model as a Hugging Face folder with safetensors."
        )
    try:
        num_heads = int(metadata["llama.attention.head_count"])
        embed_dim = int(metadata["llama.embedding_length"])
        vocab_size = metadata.get("llama.vocab_size")
        if vocab_size is None:
            vocab_size = len(metadata["tokenizer.ggml.tokens"])
        head_dim = int(metadata.get("llama.attention.key_length", embed_dim // num_heads))
        if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"rope on a part of the {head_dim} head dimensions is unsupported")
        return ModelConfig(
            vocab_size=int(vocab_size),
            num_layers=int(metadata["llama.block_count"]),
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=int(metadata.get("llama.attention.head_count_kv", num_heads)),
            head_dim=head_dim,
            mlp_dim=int(metadata["llama.feed_forward_length"]),
            rope_theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
            norm_eps=_shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
            tie_embeddings="output.weight" not in names,
            max_length=int(metadata["llama.context_length"]),
        )
    except KeyError as error:
        raise ValueError(f"{where}: missing metadata {error}.") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from error


def gguf_params(
    reader: gguf.GGUFReader, config: ModelConfig, path: str | os.PathLike, dtype: Any = "float32"
) -> Params:
    """Return the dequantized parameter tree, cast to `dtype`, one tensor at a time."""
    where = os.fspath(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    check_depth(config, len(tensors), where)
    table = param_table(config)
    check_names(set(tensors), {param.gguf_name for param in table}, where)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}

    def read(param: Param) -> np.ndarray:
        array = _dequantize(tensors[param.gguf_name], where)
        if param.path[-2] in heads and array.shape == param.file_shape:
            array = _undo_permutation(array, heads[param.path[-2]])
        return array

    return build_params(table, read, dtype, where)


def _refuse_unsupported(metadata: Mapping[str, Any], where: str) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{where}: unsupported general.architecture {architecture!r}; supported: 'llama'."
        )
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{where}: unsupported rope scaling {scaling!r}; supported: 'none'.")
    if metadata.get("llama.expert_count", 0):
        raise ValueError(f"{where}: mixtures of experts are unsupported; supported: dense Llama.")


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
