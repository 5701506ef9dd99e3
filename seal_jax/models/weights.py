"""Parameters on disk: Hugging Face safetensors in and out, one tensor at a time.

The parameter tree is a nested dict of numpy arrays. Its kernels are Hugging Face's weights
transposed, because Hugging Face stores `[out, in]` and we multiply `x @ kernel` with
`kernel: [in, out]`. `param_table` is the one place that names every parameter; gguf.py reads the
same table. Formats that can run code when they are read (pickle in .bin, .pt, ...) are refused.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes np.dtype("bfloat16") known
import numpy as np
import safetensors
import safetensors.numpy

from seal_jax.models.config import ModelConfig, config_from_hf, config_to_hf

Params = dict[str, Any]  # nested dict with arrays at the leaves

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Param(NamedTuple):
    """One parameter: where it is in our tree, and what others call it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # ours; a kernel has the reverse shape in files
    hf_name: str
    gguf_name: str

    @property
    def is_kernel(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def file_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.is_kernel else self.shape


def param_table(config: ModelConfig) -> list[Param]:
    """Return every parameter of the decoder, in the order of the forward pass."""
    dim, mlp_dim = config.embed_dim, config.mlp_dim
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = (
        ("attn_norm/scale", (dim,), "input_layernorm", "attn_norm"),
        ("attn/q_proj/kernel", (dim, q_dim), "self_attn.q_proj", "attn_q"),
        ("attn/k_proj/kernel", (dim, kv_dim), "self_attn.k_proj", "attn_k"),
        ("attn/v_proj/kernel", (dim, kv_dim), "self_attn.v_proj", "attn_v"),
        ("attn/o_proj/kernel", (q_dim, dim), "self_attn.o_proj", "attn_output"),
        ("mlp_norm/scale", (dim,), "post_attention_layernorm", "ffn_norm"),
        ("mlp/gate_proj/kernel", (dim, mlp_dim), "mlp.gate_proj", "ffn_gate"),
        ("mlp/up_proj/kernel", (dim, mlp_dim), "mlp.up_proj", "ffn_up"),
        ("mlp/down_proj/kernel", (mlp_dim, dim), "mlp.down_proj", "ffn_down"),
    )
    rows = [("embed/embedding", (config.vocab_size, dim), "model.embed_tokens", "token_embd")]
    for i in range(config.num_layers):
        rows += [
            (f"layers_{i}/{path}", shape, f"model.layers.{i}.{hf}", f"blk.{i}.{gguf}")
            for path, shape, hf, gguf in layer
        ]
    rows.append(("final_norm/scale", (dim,), "model.norm", "output_norm"))
    if not config.tie_embeddings:
        rows.append(("lm_head/kernel", (dim, config.vocab_size), "lm_head", "output"))
    return [
        Param(tuple(path.split("/")), shape, f"{hf}.weight", f"{gguf}.weight")
        for path, shape, hf, gguf in rows
    ]


def build_params(
    table: Iterable[Param], read: Callable[[Param], np.ndarray], dtype: Any, where: str
) -> Params:
    """Read each parameter in its file layout and return our tree, contiguous and cast to `dtype`.

    Raises:
        ValueError: a tensor's shape is not the one that the config asks for.
    """
    params: Params = {}
    for param in table:
        array = read(param)
        if array.shape != param.file_shape:
            raise ValueError(
                f"{where}: {param.hf_name} has shape {array.shape}, the config asks for "
                f"{param.file_shape}."
            )
        array = np.ascontiguousarray(array.T if param.is_kernel else array)
        node = params
        for key in param.path[:-1]:
            node = node.setdefault(key, {})
        node[param.path[-1]] = array.astype(dtype, copy=False)
    return params


def check_depth(config: ModelConfig, num_tensors: int, where: str) -> None:
    """Raise ValueError where a file cannot hold `num_layers` layers.

    The number may come from a damaged file: a table of billions of layers would fill the memory.
    """
    if config.num_layers > num_tensors:
        raise ValueError(
            f"{where}: the config asks for {config.num_layers} layers, the files hold only "
            f"{num_tensors} tensors."
        )


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Raise ValueError, with the names, unless a file holds exactly the expected tensors."""
    problems = []
    for label, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:8])
            problems.append(f"{len(names)} {label}: {shown}{', ...' if len(names) > 8 else ''}")
    if problems:
        raise ValueError(f"{where}: tensors do not match the config; {'; '.join(problems)}.")


def load_safetensors(
    folder: str | os.PathLike, config: ModelConfig, dtype: Any = "float32"
) -> Params:
    """Load a Hugging Face folder, single-file or sharded, into our parameter tree.

    Args:
        folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`.
        config: sizes that every tensor is checked against.
        dtype: numpy dtype or name, 'bfloat16' included; every leaf is cast to it.

    Raises:
        FileNotFoundError: no safetensors file there, or a shard is missing.
        ValueError: only pickled files there; a damaged file; missing, unexpected or misshapen
            tensors.
    """
    folder = Path(folder)
    file_of = _tensor_files(folder)
    check_depth(config, len(file_of), str(folder))
    table = param_table(config)
    # Old Llama checkpoints carry rope's inverse frequencies, which follow from the config.
    found = {name for name in file_of if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in found:
        _check_tied_head(file_of)
        found.remove("lm_head.weight")
    check_names(found, {param.hf_name for param in table}, str(folder))
    opened: dict[Path, Any] = {}

    def read(param: Param) -> np.ndarray:
        path = file_of[param.hf_name]
        if path not in opened:
            opened[path] = _open(path)
        return opened[path].get_tensor(param.hf_name)

    return build_params(table, read, dtype, str(folder))


def save_safetensors(
    folder: str | os.PathLike, params: Mapping[str, Any], config: ModelConfig
) -> None:
    """Write `model.safetensors` and `config.json` that Hugging Face can load, and verify them.

    Arrays may be jax or numpy, of any floating dtype; they keep it. The file is read back and
    compared bit for bit before it takes its name, because safetensors writes non-contiguous numpy
    arrays wrongly without an error.

    Raises:
        ValueError: `params` is not the tree that `config` describes.
        OSError: the file read back differs from what was written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors_of(params, config)
    partial = folder / f"{SINGLE_FILE}.partial"
    # transformers asks for this key and takes its value for the storage layout, not the framework.
    safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
    with _open(partial) as file:
        for name, array in tensors.items():
            read = file.get_tensor(name)
            if read.shape != array.shape or read.tobytes() != array.tobytes():
                raise OSError(f"{partial}: {name} read back differs from what was written.")
    partial.replace(folder / SINGLE_FILE)
    hf = {**config_to_hf(config), "torch_dtype": str(next(iter(tensors.values())).dtype)}
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def load_folder_config(folder: str | os.PathLike) -> ModelConfig:
    """Return the config of a Hugging Face folder, refusing pickled parameters first.

    Raises:
        FileNotFoundError: `config.json` or the parameters are missing.
        ValueError: the parameters are pickled, or the config is unsupported.
    """
    folder = Path(folder)
    _refuse_pickled(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json; a model folder needs one.")
    return config_from_hf(path)


def _tensors_of(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Return `params` under Hugging Face's names, in its layout."""
    leaves = dict(_leaves(params))
    table = param_table(config)
    expected = {"/".join(param.path) for param in table}
    check_names(set(leaves), expected, "params")
    tensors = {}
    for param in table:
        array = np.asarray(leaves["/".join(param.path)])
        if array.shape != param.shape:
            raise ValueError(
                f"params: {'/'.join(param.path)} has shape {array.shape}, the config asks for "
                f"{param.shape}."
            )
        tensors[param.hf_name] = np.ascontiguousarray(array.T if param.is_kernel else array)
    return tensors


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _refuse_pickled(folder: Path) -> None:
    """Raise unless `folder` holds safetensors."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLED_SUFFIXES)
    if pickled:
        raise ValueError(
            f"{folder}: found only {', '.join(pickled[:4])}. Such files can run code when they "
            "are read, so they are never opened: only safetensors or GGUF are supported."
        )
    raise FileNotFoundError(f"{folder}: no .safetensors file; expected {SINGLE_FILE}.")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file that holds each tensor, by the tensor's name."""
    _refuse_pickled(folder)
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        paths = [folder / SINGLE_FILE]
    else:
        paths = _shards(folder, index)
    file_of: dict[str, Path] = {}
    for path in paths:
        with _open(path) as file:
            for name in file.keys():
                if name in file_of:
                    raise ValueError(f"{name} is both in {file_of[name]} and in {path}.")
                file_of[name] = path
    return file_of


def _shards(folder: Path, index: Path) -> list[Path]:
    """Return the shards that an index lists. Its names are untrusted: none may leave `folder`."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged index: {error!r}") from error
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file beside it.")
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file: {error}") from error


def _check_tied_head(file_of: Mapping[str, Path]) -> None:
    """Some tied checkpoints store the head too: refuse one that is not the embedding."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if names[1] not in file_of:
        return
    head, embedding = (_open(file_of[name]).get_tensor(name) for name in names)
    if not np.array_equal(head, embedding):
        raise ValueError(
            f"{file_of[names[0]]}: tie_word_embeddings is true, but {names[0]} differs from "
            f"{names[1]}."
        )
