"""Parameters on disk: Hugging Face safetensors in and out, one tensor at a time.

Hugging Face stores `[out, in]`, and we multiply `x @ kernel` with `kernel: [in, out]`: kernels are
transposed. Formats that can run code when they are read (pickle in .bin, .pt, ...) are refused.

  headers of all files -> names, shapes and dtypes are checked        no tensor is read before
  for each parameter, for each slice of it that this process's devices hold:
    the slice's bytes -> host, final dtype and layout -> the devices  one parameter at a time
"""

import collections
import contextlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from seal_jax.hosts.console import progress
from seal_jax.hosts.files import read_object, write_json
from seal_jax.models import tensor_file
from seal_jax.models.config import ModelConfig, config_from_hf, config_to_hf
from seal_jax.models.names import Param, check_depth, check_names, param_table, text_name
from seal_jax.models.place_params import ReadSlice, Shardings, place, sharding_of_each, shards_of
from seal_jax.models.tensor_file import DTYPES, Tensor
from seal_jax.types import Params

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 4 * 10**9
_HEAD = "lm_head.weight"
QUIET_BYTES = 64 * 10**6  # loads below this show no progress


def load_safetensors(
    folder: str | os.PathLike,
    config: ModelConfig,
    dtype: Any = "float32",
    shardings: Shardings | None = None,
    show: Callable[[int], Any] | None = None,
) -> Params:
    """Load a Hugging Face folder, single-file or sharded, onto the devices.

    A process reads only the bytes that its own devices hold. Beside the arrays it needs memory for
    one parameter at most, and on the CPU for one block of it.

    Args:
      folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`.
      config: sizes that every tensor is checked against, before any is read.
      dtype: dtype or name, 'bfloat16' included; every leaf is cast to it.
      shardings: gives the sharding of every leaf of a tree of jax.ShapeDtypeStruct; by default all
        is put, uncommitted, on the default device.
      show: is told the bytes of each read of a parameter, in place of the progress bar.

    Raises:
      FileNotFoundError: no safetensors file there, or a shard is missing.
      ValueError: only pickled files there; a damaged file; missing, unexpected or misshapen
        tensors, or ones of an unsupported dtype.
    """
    folder, dtype = Path(folder), jax.dtypes.canonicalize_dtype(dtype)
    tensors = _text_tensors(_find_tensors(folder), folder)
    check_depth(config, len(tensors), str(folder))
    table = param_table(config)
    expected, embedding = {param.hf_name: param for param in table}, table[0]
    stores_tied_head = config.tie_embeddings and _HEAD in tensors
    if stores_tied_head:
        expected[_HEAD] = embedding
    _check_tensors(tensors, expected, str(folder))
    sharding_of = sharding_of_each(table, dtype, shardings)
    total = sum(_num_bytes(p, sharding_of[p.path], tensors[p.hf_name]) for p in table)
    with _progress(total, f"load {folder.name}", show) as show_bytes:
        if stores_tied_head:
            shards = shards_of(embedding.shape, sharding_of[embedding.path])
            _check_tied_head(tensors[_HEAD], tensors[embedding.hf_name], shards)

        def open_param(param: Param) -> ReadSlice:
            how = {"dtype": dtype, "transposed": param.is_kernel, "show": show_bytes}
            return partial(tensor_file.read_slice, tensors[param.hf_name], **how)

        return place(table, open_param, dtype, shardings)


def save_safetensors(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    config: ModelConfig,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write parameters and `config.json` that Hugging Face can load, and verify them.

    Arrays may be numpy or jax, sharded or not, of any floating dtype; they keep it. One at a time
    is gathered on the host. Beyond `max_file_bytes` the parameters are split into shards with an
    index. Every file is read back and compared bit for bit before any takes its name. On several
    processes all must call this, and process 0 writes.

    Raises:
      ValueError: `params` is not the tree that `config` describes.
      OSError: a file read back differs from what was written.
    """
    folder = Path(folder)
    leaves = flatten_dict(params, sep="/")
    table = param_table(config)
    check_names(
        {path: tuple(leaf.shape) for path, leaf in leaves.items()},
        {"/".join(param.path): param.shape for param in table},
        "params",
    )
    leaf_of = {param.hf_name: leaves["/".join(param.path)] for param in table}
    dtypes = {name: tensor_file.dtype_name(leaf.dtype, name) for name, leaf in leaf_of.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files = _split(table, leaf_of, max_file_bytes)
    for name, group in files.items():
        group.sort(key=lambda param: tensor_file.file_order((param.hf_name, dtypes[param.hf_name])))
        arrays = (_file_layout(param, leaf_of[param.hf_name]) for param in group)
        if jax.process_index() == 0:
            shapes = {param.hf_name: (dtypes[param.hf_name], param.file_shape) for param in group}
            tensor_file.write_file(folder / f"{name}.partial", shapes, arrays)
        else:
            collections.deque(arrays, maxlen=0)  # the other processes only take part in gathering
    if jax.process_index() == 0:
        _name_files(folder, files, leaf_of)
        hf = {**config_to_hf(config), "torch_dtype": str(next(iter(leaf_of.values())).dtype)}
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def _check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Param], where: str
) -> None:
    """Raise ValueError unless there are exactly the expected tensors."""
    strange = [
        f"unsupported dtype {tensors[name].dtype}: {name}; supported: {', '.join(DTYPES)}"
        for name in sorted(tensors.keys() & expected.keys())
        if tensors[name].dtype not in DTYPES
    ]
    found = {name: tensor.shape for name, tensor in tensors.items()}
    shapes = {name: param.file_shape for name, param in expected.items()}
    check_names(found, shapes, where, strange)


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


def _num_bytes(param: Param, sharding: Sharding | None, tensor: Tensor) -> int:
    """Return how many bytes of a tensor's file this process has to read."""
    shards = shards_of(param.shape, sharding)
    sizes = [np.prod([stop - start for start, stop in bounds]) for bounds in shards]
    return int(sum(sizes)) * DTYPES[tensor.dtype].itemsize


@contextlib.contextmanager
def _progress(
    total: int, desc: str, show: Callable[[int], Any] | None
) -> Generator[Callable[[int], Any]]:
    """Give what to call with the bytes of each read: `show`, or process 0's bar of megabytes."""
    if show is not None or total < QUIET_BYTES or jax.process_index():
        yield show or (lambda size: None)
        return
    read = collections.Counter()

    def update(size: int) -> None:
        read["bytes"] += size
        bar.update(read["bytes"] // 10**6 - bar.n)

    with progress(total // 10**6, desc, "MB") as bar:
        yield update


def _split(
    table: Sequence[Param], leaf_of: Mapping[str, Any], max_file_bytes: int
) -> dict[str, list[Param]]:
    """Return the parameters of each file, by the file's name, in the order of the table."""
    groups: list[list[Param]] = [[]]
    size = 0
    for param in table:
        num_bytes = leaf_of[param.hf_name].nbytes
        if groups[-1] and size + num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(param)
        size += num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return dict(zip(names, groups, strict=True))


def _file_layout(param: Param, leaf: Any) -> np.ndarray:
    """Return a whole parameter on the host, a kernel as its transposed view."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        array = multihost_utils.process_allgather(leaf, tiled=True)
    elif isinstance(leaf, jax.Array):
        # A new array of the same buffers: `leaf` itself would keep its copy on the host.
        buffers = [shard.data for shard in leaf.addressable_shards]
        array = jax.device_get(
            jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, buffers)
        )
    else:
        array = np.asarray(leaf)
    return array.T if param.is_kernel else array


def _name_files(
    folder: Path, files: Mapping[str, Sequence[Param]], leaf_of: Mapping[str, Any]
) -> None:
    """Give verified files their names; the index comes last, and none beside a single file."""
    for name in files:
        (folder / f"{name}.partial").replace(folder / name)
    if SINGLE_FILE in files:
        (folder / INDEX_FILE).unlink(missing_ok=True)
        return
    weight_map = {param.hf_name: name for name, group in files.items() for param in group}
    total = sum(leaf.nbytes for leaf in leaf_of.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / SINGLE_FILE).unlink(missing_ok=True)  # an older model's, which would come first


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


def _find_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor in the folder's files, by name."""
    _refuse_pickled(folder)
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return tensor_file.read_header(folder / SINGLE_FILE)
    file_of = _read_index(index)
    names = sorted(set(file_of.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder}: the index lists shards that are missing: {absent}.")
    headers = {name: tensor_file.read_header(folder / name) for name in names}
    problems = [
        f"{tensor}: listed in {file}, which lacks it"
        for tensor, file in sorted(file_of.items())
        if tensor not in headers[file]
    ]
    problems += [
        f"{tensor}: stored in {file}, listed in {file_of.get(tensor, 'none')}"
        for file, header in headers.items()
        for tensor in sorted(header)
        if file_of.get(tensor) != file
    ]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{index}: the index does not match its shards:{lines}")
    return {name: tensor for header in headers.values() for name, tensor in header.items()}


def _text_tensors(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the language model, by their names in a model of text alone."""
    renamed: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        name = text_name(stored)
        if name in renamed:
            raise ValueError(f"{folder}: {name} is stored twice, once as {stored}.")
        if name is not None:
            renamed[name] = tensor
    return renamed


def _read_index(index: Path) -> dict[str, str]:
    """Return the shard of each tensor. Names are untrusted: none may leave the index's folder."""
    try:
        file_of = dict(read_object(index)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: damaged index: {error!r}") from error
    for name in file_of.values():
        is_plain = isinstance(name, str) and name == os.path.basename(name)
        if not is_plain or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file beside it.")
    return file_of


def _check_tied_head(head: Tensor, embedding: Tensor, shards: Iterable[tuple]) -> None:
    """Some tied checkpoints store the head too: refuse one that is not the embedding."""
    for bounds in shards:
        if not tensor_file.same_values(head, embedding, [slice(*bound) for bound in bounds]):
            raise ValueError(
                f"{head.path}: tie_word_embeddings is true, but {head.name} differs from "
                f"{embedding.name}."
            )
