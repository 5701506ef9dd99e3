"""One safetensors file: its header, slices of its tensors, and writing it tensor by tensor.

  8 bytes     n, the length of the header, little-endian
  n bytes     the header, JSON: {name: {"dtype": ..., "shape": ..., "data_offsets": ...}}
  the rest    the tensors, row-major and little-endian; offsets count from here

The safetensors package only checks headers here: it maps a file into memory, where every page that
was read stays beside its copy. Values are read in blocks, straight to their place.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from seal_jax.hosts.json_text import parse_json

# By safetensors' names, in the order in which a file holds them.
DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("float16"),
}
# Transposing is fastest where a block fits into the cache; disks are content with 4 MiB.
BLOCK_BYTES = 4 * 2**20
# XLA on the CPU takes a numpy array as its own buffer, without a copy, only if it is aligned so.
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

Index = Sequence[slice]  # one slice of step 1 for each dimension


class Tensor(NamedTuple):
    """Where one tensor lies."""

    path: Path
    name: str
    dtype: str  # safetensors' name, which need not be among DTYPES
    shape: tuple[int, ...]
    start: int  # its first byte in the file


def read_header(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors by name. No tensor's values are read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, shorter than its header says, or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        reason = _truncation(path) or f", or not a safetensors file: {error}"
        raise ValueError(f"{path}: damaged{reason}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length), os.fspath(path))
    header.pop("__metadata__", None)
    data = 8 + length
    return {
        name: Tensor(path, name, x["dtype"], tuple(x["shape"]), data + x["data_offsets"][0])
        for name, x in header.items()
    }


def read_slice(
    tensor: Tensor,
    index: Index,
    dtype: Any,
    transposed: bool = False,
    show: Callable[[int], Any] = lambda size: None,
) -> np.ndarray:
    """Return `tensor[index]`, or `tensor.T[index]`, reading no byte beside it.

    Args:
      tensor: of a dtype in DTYPES, with two dimensions at most.
      index: of the tensor, or of its transpose if `transposed`.
      dtype: what the values are cast to, block by block.
      show: is told how many bytes were read, after each block.

    Raises:
      ValueError: the file ended early, because it changed after its header was read.
    """
    spans = [
        range(*part.indices(size))
        for part, size in zip(index[::-1] if transposed else index, tensor.shape, strict=True)
    ]
    out = aligned_empty([len(span) for span in (spans[::-1] if transposed else spans)], dtype)
    rows, columns = ([range(1), range(1)] + spans)[-2:]  # a vector is one row
    target = (out.T if transposed else out).reshape(len(rows), len(columns))
    source = DTYPES[tensor.dtype]
    num_rows = _rows_per_block(len(columns) * source.itemsize)
    with open(tensor.path, "rb", buffering=0) as file:
        for first in range(0, len(rows), num_rows):
            block = target[first : first + num_rows]
            in_place = block.dtype == source and block.flags.c_contiguous
            values = block if in_place else np.empty(block.shape, source)
            _read_rows(file, tensor, rows[first : first + num_rows], columns, values)
            if not in_place:
                block[...] = values
            show(values.nbytes)
    return out


def same_values(left: Tensor, right: Tensor, index: Index) -> bool:
    """Return whether two matrices of one shape agree in `index`, a block of rows at a time."""
    rows, columns = index
    start, stop, _ = rows.indices(left.shape[0])
    num_rows = _rows_per_block(left.shape[1] * DTYPES[left.dtype].itemsize)
    for first in range(start, stop, num_rows):
        block = (slice(first, min(first + num_rows, stop)), columns)
        one, other = (read_slice(t, block, DTYPES[t.dtype]) for t in (left, right))
        if not np.array_equal(one, other):
            return False
    return True


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Return an uninitialized array that JAX on the CPU can take as its own without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def write_file(path: Path, shapes: dict[str, tuple[str, tuple]], arrays: Iterable) -> None:
    """Write a safetensors file, as the safetensors package would, and verify it.

    Each tensor is read back and compared bit for bit while it is at hand.

    Args:
      path: is replaced.
      shapes: (dtype's name, shape) of every tensor, sorted by `file_order`.
      arrays: the tensors in the same order, asked for one at a time. They need not be contiguous.

    Raises:
      OSError: the file read back differs from what was written.
    """
    # transformers asks for this key and takes its value for the storage layout, not the framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), array in zip(shapes.items(), arrays, strict=True):
            tensor = Tensor(path, name, dtype, shape, file.tell())
            for _, block in _row_blocks(array):
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            file.flush()
            _verify(tensor, array)
        os.fsync(file.fileno())
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in read_header(path).items()}
    if found != shapes:
        raise OSError(f"{path}: the header read back differs from what was written.")


def file_order(item: tuple[str, str]) -> tuple[int, str]:
    """Return the sort key of a tensor (name, dtype's name) within its file: wide dtypes first."""
    name, dtype = item
    return list(DTYPES).index(dtype), name


def dtype_name(dtype: Any, where: str) -> str:
    """Return safetensors' name of a dtype. Raises ValueError where it is not a float of DTYPES."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"{where}: unsupported dtype {dtype}; supported: {', '.join(DTYPES)}.")


def _read_rows(
    file: FileIO, tensor: Tensor, rows: range, columns: range, values: np.ndarray
) -> None:
    """Read the given columns of the given rows into `values`, which is contiguous."""
    if not values.size:
        return
    data = values.reshape(-1).view(np.uint8).data
    width = tensor.shape[-1] if tensor.shape else 1
    size = len(columns) * values.itemsize
    if len(columns) == width:  # the rows touch each other
        rows, size = rows[:1], size * len(rows)
    for i, row in enumerate(rows):
        file.seek(tensor.start + (row * width + columns.start) * values.itemsize)
        rest = data[i * size : (i + 1) * size]
        while rest:
            count = file.readinto(rest)
            if not count:
                raise ValueError(f"{tensor.path}: ended in {tensor.name}, while it was read.")
            rest = rest[count:]


def _row_blocks(array: np.ndarray) -> Iterable[tuple[Index, np.ndarray]]:
    """Yield the array in blocks of rows, with their indices."""
    rest = tuple(slice(0, size) for size in array.shape[1:])
    if not array.ndim:
        yield (), array
        return
    num_rows = _rows_per_block(array[:1].nbytes)
    for first in range(0, len(array), num_rows):
        rows = slice(first, min(first + num_rows, len(array)))
        yield (rows, *rest), array[rows]


def _verify(tensor: Tensor, array: np.ndarray) -> None:
    for index, block in _row_blocks(array):
        if read_slice(tensor, index, array.dtype).tobytes() != block.tobytes():
            raise OSError(f"{tensor.path}: {tensor.name} read back differs from what was written.")


def _rows_per_block(row_bytes: int) -> int:
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def _truncation(path: Path) -> str:
    """Return what is missing from a file that is shorter than its header says, or ''."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            return ""
        header = file.read(length)
    ends = re.findall(rb'"data_offsets":\s*\[\s*\d+\s*,\s*(\d+)\s*\]', header)
    asked = 8 + length + max(map(int, ends), default=0)
    if size >= asked:
        return ""
    return f" (truncated): it has {size:,} bytes, its header asks for {asked:,}."
