"""Tests of models/gguf_file.py: split files, and headers that do not fit their files.

The headers are a few bytes long, and refused before the gguf package sees them.
"""

import struct

import gguf
import numpy as np
import pytest
from test_gguf import CONFIG, flat, load_gguf, write_gguf

from seal_jax.models import gguf_file
from seal_jax.models.gguf import open_gguf

PER_PART = 8  # tensors, of 20


def write_split(folder):
    """Write a model in three parts; return the first's path, and the expected tree."""
    expected = write_gguf(folder / "m.gguf", CONFIG, split_max_tensors=PER_PART)
    return folder / "m-00001-of-00003.gguf", expected


def test_a_split_file_is_that_model(tmp_path):
    path, expected = write_split(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    config, params = load_gguf(path)
    assert config == CONFIG
    expected, params = flat(expected), flat(params)
    assert params.keys() == expected.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_parts_that_are_missing_or_not_the_first(tmp_path):
    path, _ = write_split(tmp_path)
    second, third = (tmp_path / f"m-0000{i}-of-00003.gguf" for i in (2, 3))
    with pytest.raises(ValueError, match="part 2 of 3 .*Name the first, .*m-00001-of-00003.gguf"):
        open_gguf(second)
    renamed = path.rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="part 1 of 3 .*names its parts NAME-00001-of-00003.gguf"):
        open_gguf(renamed)
    renamed.rename(path)
    third.unlink()
    message = "part 1 of 3 .*Missing beside it: m-00003-of-00003.gguf"
    with pytest.raises(FileNotFoundError, match=message):
        open_gguf(path)
    third.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="named as part 3 of 3 says that it is part 2 of 3"):
        open_gguf(path)
    third.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="m-00003-of-00003.gguf: damaged"):
        open_gguf(path)


def test_parts_of_two_models(tmp_path):
    path, _ = write_split(tmp_path)
    (tmp_path / "other").mkdir()
    write_gguf(
        tmp_path / "other" / "m.gguf", CONFIG, split_max_tensors=PER_PART, extra=["x.weight"]
    )
    last = "m-00003-of-00003.gguf"
    (tmp_path / "other" / last).replace(tmp_path / last)
    with pytest.raises(ValueError, match="hold 21 tensors, and the first asks for 20"):
        open_gguf(path)


def head(num_tensors, num_entries, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(shape, kind=gguf.GGMLQuantizationType.F32, offset=0):
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text("t") + sizes + struct.pack("<IQ", kind, offset)


HUGE = 2**60
HEADERS = {
    "an empty file": (b"", "it has 0 bytes"),
    "other words": (b"x" * 100, "it starts with b'xxxx'"),
    "version": (head(0, 0, version=9), "it has version 9; supported: 2 and 3"),
    "tensors": (head(HUGE, 0) + bytes(99), "what its header counts would end at byte"),
    "entries": (head(0, HUGE) + bytes(99), "what its header counts would end at byte"),
    "a key": (head(0, 1) + struct.pack("<Q", HUGE) + bytes(99), "a string would end at byte"),
    "a string": (
        head(0, 1) + text("k") + struct.pack("<IQ", 8, HUGE) + bytes(99),
        "a string would end at byte",
    ),
    "an array": (
        head(0, 1) + text("k") + struct.pack("<IIQ", 9, 0, HUGE) + bytes(99),
        "an array would end at byte",
    ),
    "an array of strings": (
        head(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(99),
        "an array would end at byte",
    ),
    "an array of arrays": (
        head(0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99),
        "an array has values of type 9",
    ),
    "a type": (head(0, 1) + text("k") + struct.pack("<I", 77) + bytes(99), "unknown type 77"),
    "an alignment": (
        head(0, 1) + text("general.alignment") + struct.pack("<II", 4, 0),
        "alignment must be a power of two, found 0",
    ),
    "dimensions": (head(1, 0) + tensor([1] * 9) + bytes(99), "a tensor has 9 dimensions"),
    "a shape": (head(1, 0) + tensor([HUGE, HUGE]) + bytes(99), "a tensor would end at byte"),
    "an offset": (head(1, 0) + tensor([1], offset=HUGE) + bytes(99), "a tensor would end at byte"),
    "a quantization": (head(1, 0) + tensor([1], kind=999) + bytes(99), "999 is not a valid"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_does_not_fit_its_file(tmp_path, monkeypatch, case):
    content, message = HEADERS[case]
    (tmp_path / "m.gguf").write_bytes(content)
    monkeypatch.delattr(gguf, "GGUFReader")  # it is refused before
    with pytest.raises(ValueError, match=f"m.gguf: damaged, or not a GGUF file: .*{message}"):
        open_gguf(tmp_path / "m.gguf")


def test_more_values_than_any_model_has(tmp_path, monkeypatch):
    """The file does hold them, but the reader would need a thousand times their memory."""
    monkeypatch.setattr(gguf_file, "_MAX_VALUES", 50)
    array = struct.pack("<IIQ", 9, 0, 51)
    (tmp_path / "m.gguf").write_bytes(head(0, 1) + text("k") + array + bytes(51))
    with pytest.raises(ValueError, match="its metadata hold more than 50 values"):
        open_gguf(tmp_path / "m.gguf")


def test_both_byte_orders(tmp_path):
    for endianess in gguf.GGUFEndian:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=endianess)
        writer.add_uint32("general.alignment", 64)
        writer.add_array("words", ["a", "bc"])
        writer.add_tensor("t", np.ones((3, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = open_gguf(tmp_path / "m.gguf")
        assert found.fields["words"].contents() == ["a", "bc"]
        assert found.tensors[0].data.tolist() == [[1, 1]] * 3
