"""GGUF files on disk: their headers checked, and the parts of a split one put together.

  24 bytes    "GGUF", version, number of tensors, number of metadata entries
  metadata    each: key, type, value; a string is its length and bytes, an array its type, length
              and values
  tensors     each: name, dimensions, type, offset
  the rest    the tensors' values; offsets count from here, aligned

The gguf package's reader believes every number in a header, and walks on. So all of them are first
compared with the size of the file.
"""

import mmap
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf

# What is beyond these is no language model's: Gemma's 262,144 tokens make a header of 7 MB with
# 0.8 million values. The reader needs 1 KB for each.
_MAX_HEADER_BYTES = 256 * 2**20
_MAX_VALUES = 2_000_000
_MAX_TENSORS = 200_000
_MAX_DIMENSIONS = 4  # ggml's own

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by type
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)

# What the reader raises on a damaged file: it parses with numpy views, so anything can be off.
DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError, MemoryError)


class GGUFFile(NamedTuple):
    """One file, or all parts of a split one: metadata of the first, tensors of all."""

    fields: Mapping[str, gguf.ReaderField]
    tensors: list[gguf.ReaderTensor]


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Open a GGUF file, memory-mapped; of a split one all parts, which lie beside the first.

    Raises:
      FileNotFoundError: there is no such file, or a part of it is missing.
      ValueError: it is damaged, or a part that is not the first.
    """
    first = _open_part(path)
    number, count = (_split_number(first, key, path) for key in ("split.no", "split.count"))
    if count <= 1:
        return GGUFFile(first.fields, first.tensors)
    parts = [first, *(_open_part(part) for part in _other_parts(Path(path), number, count))]
    for i, part in enumerate(parts):
        found = tuple(_split_number(part, key, path) for key in ("split.no", "split.count"))
        if found != (i, count):
            raise ValueError(
                f"{os.fspath(path)}: the file named as part {i + 1} of {count} says that it is part"
                f" {found[0] + 1} of {found[1]}."
            )
    tensors = [tensor for part in parts for tensor in part.tensors]
    expected = _split_number(first, "split.tensors.count", path) or len(tensors)
    if len({tensor.name for tensor in tensors}) != len(tensors) or len(tensors) != expected:
        raise ValueError(
            f"{os.fspath(path)}: its {count} parts hold {len(tensors)} tensors, and the first asks "
            f"for {expected}, each of its own name: they are not of one model."
        )
    return GGUFFile(first.fields, tensors)


def check_header(path: str | os.PathLike) -> None:
    """Raise ValueError where a number in the header does not fit the file, or no model's."""
    size = os.path.getsize(path)
    if size < 24:
        raise ValueError(f"it has {size} bytes, and a header has 24 at least")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        order = _byte_order(data)
        num_tensors, num_entries = struct.unpack_from(f"{order}QQ", data, 8)
        # The shortest of each kind: 13 bytes and 24.
        _fit(24, 13 * num_entries + 24 * num_tensors, size, "what its header counts")
        if num_tensors > _MAX_TENSORS:
            raise ValueError(f"it has {num_tensors:,} tensors; at most {_MAX_TENSORS:,} are read")
        at, alignment = _check_entries(data, order, num_entries)
        ends = []
        for _ in range(num_tensors):
            at, end = _check_tensor(data, order, at)
            ends.append(end)
        start = at + -at % alignment
        if ends:
            _fit(start, max(ends), size, "a tensor")


def _open_part(path: str | os.PathLike) -> gguf.GGUFReader:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)}: no such file.")
    try:
        check_header(path)
        return gguf.GGUFReader(path)
    except DAMAGE as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{os.fspath(path)}: damaged, or not a GGUF file: {reason}.") from error


def _split_number(reader: gguf.GGUFReader, key: str, path: str | os.PathLike) -> int:
    """Return a whole number of the metadata about parts, 0 where there is none."""
    value: Any = reader.fields[key].contents() if key in reader.fields else 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{os.fspath(path)}: {key} must be a whole number, found {value!r}.")
    return value


def _other_parts(path: Path, number: int, count: int) -> list[Path]:
    """Return the paths of the parts behind the first, which `path` has to be."""
    this = f"{path}: part {number + 1} of {count} of a split model."
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ValueError(
            f"{this} llama.cpp names its parts NAME-00001-of-{count:05d}.gguf and so on: give them "
            "these names, and name the first."
        )
    names = [f"{match[1]}-{i:05d}-of-{count:05d}{path.suffix}" for i in range(1, count + 1)]
    if number or path.name != names[0]:
        raise ValueError(f"{this} Name the first, {path.with_name(names[0])}.")
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        more = f" and {len(missing) - 4} others" if len(missing) > 4 else ""
        raise FileNotFoundError(f"{this} Missing beside it: {', '.join(missing[:4])}{more}.")
    return [path.with_name(name) for name in names[1:]]


def _byte_order(data: mmap.mmap) -> str:
    """Return struct's sign of the byte order. Raises ValueError if it is no GGUF file."""
    if data[:4] != b"GGUF":
        raise ValueError(f"it starts with {data[:4]!r}, expected b'GGUF'")
    orders = {struct.unpack_from(f"{order}I", data, 4)[0]: order for order in "><"}
    for version in (2, 3):
        if version in orders:
            return orders[version]
    raise ValueError(f"it has version {list(orders)[-1]}; supported: 2 and 3")


def _fit(at: int, count: int, size: int, what: str) -> int:
    """Return the place `count` bytes behind `at`. Raises ValueError beyond `size`."""
    if at + count > size:
        raise ValueError(f"{what} would end at byte {at + count:,} of {size:,}")
    return at + count


def _check_entries(data: mmap.mmap, order: str, num_entries: int) -> tuple[int, int]:
    """Return where the metadata end, and the alignment of the tensors."""
    at, num_values, alignment = 24, 0, gguf.GGUF_DEFAULT_ALIGNMENT
    for _ in range(num_entries):
        first = at + 8
        at = _string_end(data, order, at)
        key = data[first:at]
        (kind,) = _unpack(data, order, "I", at)
        if key == b"general.alignment" and kind == _UINT32:
            (alignment,) = _unpack(data, order, "I", at + 4)
        at, added = _value_end(data, order, kind, at + 4)
        num_values += added
        if num_values > _MAX_VALUES:
            raise ValueError(f"its metadata hold more than {_MAX_VALUES:,} values")
    if alignment == 0 or alignment & (alignment - 1):
        raise ValueError(f"its alignment must be a power of two, found {alignment}")
    return at, alignment


def _value_end(data: mmap.mmap, order: str, kind: int, at: int) -> tuple[int, int]:
    """Return where a value ends that starts at `at`, and how many values it is made of."""
    size = min(len(data), _MAX_HEADER_BYTES)
    if kind in _SCALAR_BYTES:
        return _fit(at, _SCALAR_BYTES[kind], size, "a value"), 1
    if kind == _STRING:
        return _string_end(data, order, at), 1
    if kind != _ARRAY:
        raise ValueError(f"a value has the unknown type {kind}")
    inner, length = _unpack(data, order, "IQ", at)
    at += 12
    if inner in _SCALAR_BYTES:
        return _fit(at, _SCALAR_BYTES[inner] * length, size, "an array"), length
    if inner != _STRING:
        raise ValueError(f"an array has values of type {inner}; supported: numbers and strings")
    _fit(at, 8 * length, size, "an array")
    for _ in range(length):
        at = _string_end(data, order, at)
    return at, length


def _string_end(data: mmap.mmap, order: str, at: int) -> int:
    (length,) = _unpack(data, order, "Q", at)
    return _fit(at + 8, length, min(len(data), _MAX_HEADER_BYTES), "a string")


def _check_tensor(data: mmap.mmap, order: str, at: int) -> tuple[int, int]:
    """Return where a tensor's entry ends, and where its values do, from the first tensor's on."""
    at = _string_end(data, order, at)
    (num_dims,) = _unpack(data, order, "I", at)
    if num_dims > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {num_dims} dimensions; at most {_MAX_DIMENSIONS} are read")
    *shape, kind, offset = _unpack(data, order, f"{num_dims}QIQ", at + 4)
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    num_values = 1
    for length in shape:
        num_values *= length
    return at + 16 + 8 * num_dims, offset + num_values * block_bytes // block


def _unpack(data: mmap.mmap, order: str, form: str, at: int) -> tuple[int, ...]:
    form = order + form
    _fit(at, struct.calcsize(form), min(len(data), _MAX_HEADER_BYTES), "the header")
    return struct.unpack_from(form, data, at)
