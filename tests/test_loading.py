"""Tests that loading wastes nothing: the bytes that are read, the memory, and several processes."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.models import weights
from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.config import ModelConfig
from seal_jax.models.known_models import KNOWN, TINY
from seal_jax.models.names import param_table
from seal_jax.models.tensor_file import (
    BLOCK_BYTES,
    DTYPES,
    file_order,
    read_header,
    read_slice,
    write_file,
)
from seal_jax.models.weights import load_safetensors, save_safetensors
from seal_jax.sharding import make_mesh, param_shardings
from seal_jax.sources import config_of, load_model

ROOT = Path(__file__).resolve().parents[1]
DTYPE_NAMES = [str(dtype) for dtype in DTYPES.values()]


def random_tensors(config, dtype="float32"):
    """Return finite random tensors under Hugging Face's names, in its layout."""
    rng = np.random.default_rng(0)
    size, tensors = np.dtype(dtype).itemsize, {}
    bits = {2: (np.uint16, 0x3C00), 4: (np.uint32, 0x3F80_0000)}[size]  # below 1
    for param in param_table(config):
        integers = rng.integers(bits[1], size=param.file_shape, dtype=bits[0])
        tensors[param.hf_name] = integers.view(dtype)
    return tensors


def as_tree(config, tensors):
    """Return our tree of numpy arrays."""
    leaves = {}
    for param in param_table(config):
        array = tensors[param.hf_name]
        leaves[param.path] = array.T if param.is_kernel else array
    return unflatten_dict(leaves)


def write_shards(folder, tensors, num_shards):
    folder.mkdir()
    names, weight_map = list(tensors), {}
    for i in range(num_shards):
        part, file = names[i::num_shards], f"model-{i}.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


bounds = st.none() | st.integers(0, 12)


@given(
    shape=st.lists(st.integers(0, 12), max_size=2),
    index=st.tuples(st.builds(slice, bounds, bounds), st.builds(slice, bounds, bounds)),
    stored=st.sampled_from(DTYPE_NAMES),
    dtype=st.sampled_from(DTYPE_NAMES),
    transposed=st.booleans(),
    block_bytes=st.sampled_from([1, 40, BLOCK_BYTES]),
    data=st.randoms(use_true_random=False),
)
def test_a_slice_is_numpys(
    tmp_path_factory, shape, index, stored, dtype, transposed, block_bytes, data
):
    values = [data.uniform(-9, 9) for _ in range(int(np.prod(shape)))]
    array = np.array(values).astype(stored).reshape(shape)
    path = tmp_path_factory.getbasetemp() / "slice.safetensors"
    safetensors.numpy.save_file({"other": np.ones(3, np.float64), "x": array}, path)
    ours, index = (array.T if transposed else array), index[: array.ndim]
    expected, num_bytes = ours[index].astype(dtype), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seal_jax.models.tensor_file.BLOCK_BYTES", block_bytes)
        tensor = read_header(path)["x"]
        found = read_slice(tensor, index, dtype, transposed, num_bytes.append)
    assert found.flags.c_contiguous and found.dtype == expected.dtype
    assert found.shape == expected.shape and found.tobytes() == expected.tobytes()
    assert sum(num_bytes) == ours[index].size * array.itemsize
    row_bytes = array[:1].nbytes if array.ndim == 2 else array.nbytes
    assert all(n <= max(block_bytes, row_bytes) for n in num_bytes)


def test_columns_alone_are_read(tmp_path):
    """What strace would show: from where, and how much, a file is asked for."""
    array = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)
    safetensors.numpy.save_file({"x": array}, tmp_path / "x.safetensors")
    tensor = read_header(tmp_path / "x.safetensors")["x"]
    with open(tensor.path, "r+b") as file:
        for row in range(6):
            for column in (0, 1, 5, 6, 7):  # all but columns 2 to 4
                file.seek(tensor.start + 4 * (8 * row + column))
                file.write(b"\xff" * 4)
    counts = []
    found = read_slice(tensor, [slice(2, 5), slice(1, 4)], "float32", True, counts.append)
    np.testing.assert_array_equal(found, array.T[2:5, 1:4])
    assert sum(counts) == 3 * 3 * 4


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"x": np.ones((6, 8), np.float32)}, path)
    tensor = read_header(path)["x"]
    os.truncate(path, tensor.start + 100)
    with pytest.raises(ValueError, match="x.safetensors: ended in x, while it was read"):
        read_slice(tensor, [slice(None)] * 2, "float32")


def test_files_are_those_of_safetensors(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "layer.10": (4,), "layer.9": (0, 2), 'ü"': (7, 1), "z": ()}
    tensors = {
        f"{name}.{dtype}": rng.normal(size=shape).astype(dtype)
        for name, shape in shapes.items()
        for dtype in DTYPE_NAMES
    }
    name_of = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(((n, name_of[t.dtype]) for n, t in tensors.items()), key=file_order)
    write_file(
        tmp_path / "x.safetensors",
        {name: (dtype, tensors[name].shape) for name, dtype in order},
        (tensors[name] for name, _ in order),
    )
    expected = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_go_straight_to_the_mesh(tmp_path, dtype):
    tensors = random_tensors(TINY, "bfloat16")
    write_shards(tmp_path / "m", tensors, 3)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    counts = []
    shardings = partial(param_shardings, mesh)
    with jax.transfer_guard("disallow"):
        params = load_safetensors(tmp_path / "m", TINY, dtype, shardings, counts.append)
    assert_equal(params, jax.tree.map(lambda x: x.astype(dtype), as_tree(TINY, tensors)))
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0,
        params,
        param_shardings(mesh, params),
    )
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
    # Each byte once, although every scale is on eight devices and every kernel's slice on two.
    assert sum(counts) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("source", ["random:byte-tiny", "folder"])
def test_load_model_places_by_the_mesh(tmp_path, source):
    if source == "folder":
        save_safetensors(tmp_path, load_model("random:byte-tiny").params, TINY)
        ByteTokenizer().save(tmp_path)
        source = str(tmp_path)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.transfer_guard("disallow"):
        model = load_model(source, "float32", mesh)
    assert_equal(model.params, load_model(source).params)
    kernel = model.params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == jax.P("fsdp", "tensor")
    alone = load_model(source).params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert not alone.committed and len(alone.sharding.device_set) == 1


def test_saves_shards_with_an_index(tmp_path):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    params = load_model("random:byte-tiny", "float32", mesh).params
    save_safetensors(tmp_path, params, TINY)
    one = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    save_safetensors(tmp_path, params, TINY, max_file_bytes=500_000)
    files = sorted(path.name for path in tmp_path.iterdir())
    shards = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert files == ["config.json", *shards, "model.safetensors.index.json"]
    found = {}
    for shard in shards:
        assert (tmp_path / shard).stat().st_size < 510_000
        found |= safetensors.numpy.load_file(tmp_path / shard)
    assert_equal(found, one)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in one.values())}
    assert_equal(load_safetensors(tmp_path, TINY), params)
    save_safetensors(tmp_path, params, TINY)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert_equal(load_safetensors(tmp_path, TINY), params)


def test_transformers_loads_saved_shards(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    params = load_model("random:byte-tiny").params
    save_safetensors(tmp_path, params, TINY, max_file_bytes=500_000)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    kernel = theirs.model.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(kernel.T, params["layers_1"]["mlp"]["down_proj"]["kernel"])
    embedding = theirs.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(embedding, params["embed"]["embedding"])


def test_large_loads_show_megabytes(tmp_path, monkeypatch, capsys):
    save_safetensors(tmp_path, load_model("random:byte-tiny").params, TINY)
    load_safetensors(tmp_path, TINY)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(weights, "QUIET_BYTES", 1)
    load_safetensors(tmp_path, TINY)
    assert re.search(rf"load {tmp_path.name}: 1/1 MB", capsys.readouterr().err)


HUB = """
import sys
from seal_jax.models import load_model
for source in sys.argv[1:]:
    print(float(load_model(source).params["final_norm"]["scale"][0]))
"""


def test_revisions_from_the_hubs_cache(tmp_path):
    """A cache as the hub's client leaves it: blobs, and snapshots of links to them."""
    cache, params = tmp_path / "models--org--model", load_model("random:byte-tiny").params
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    for value, (ref, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        snapshot = cache / "snapshots" / commit
        params["final_norm"]["scale"] = np.full(TINY.embed_dim, value, np.float32)
        save_safetensors(snapshot, params, TINY)
        ByteTokenizer().save(snapshot)
        for path in list(snapshot.iterdir()):
            blob = cache / "blobs" / f"{commit[:2]}-{path.name}"
            path.rename(blob)
            path.symlink_to(os.path.relpath(blob, snapshot))
        (cache / "refs" / ref).write_text(commit)
    sources = ["org/model", "org/model@v1", "org/model@main", f"org/model@{'b' * 40}"]
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = run([HUB, *sources], **environment)
    assert result.split() == ["0.0", "1.0", "0.0", "1.0"]


def run(arguments, **environment):
    """Run Python code, given first, with arguments; return its output."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run(
        [sys.executable, "-c", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


MEMORY = """
import json, sys
import jax, numpy as np, safetensors
from seal_jax.models.config import ModelConfig
from seal_jax.models.weights import load_safetensors

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

folder, dtype, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
jax.block_until_ready(jax.device_put(np.ones(9)))
before = kilobytes("VmRSS")
params = load_safetensors(folder, ModelConfig(**sizes), dtype)
beside = kilobytes("VmHWM") - before - sum(x.nbytes for x in jax.tree.leaves(params)) // 1024
with safetensors.safe_open(f"{folder}/model-0.safetensors", "numpy") as file:
    first = sizes["vocab_size"] - 100
    rows = file.get_slice("model.embed_tokens.weight")[first:]
np.testing.assert_array_equal(params["embed"]["embedding"][first:], rows.astype(dtype))
print(beside / 1024)
"""


def memory_beside_arrays(folder, config, dtype):
    """Return the peak of a load, in MiB, less what was there before and the loaded arrays."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc")
    sizes = dataclasses.asdict(config)
    return float(run([MEMORY, str(folder), dtype, json.dumps(sizes)]))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Write 211 MiB in three shards; the embedding alone is 160."""
    config = ModelConfig(
        vocab_size=81_920, num_layers=2, embed_dim=1024, num_heads=8, num_kv_heads=8, head_dim=128,
        mlp_dim=3072,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_shards(folder, random_tensors(config, "bfloat16"), 3)
    yield config, folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_needs_a_block_beside_the_arrays(wide_model, dtype):
    """A copy of a tensor, or pages of its file that stay mapped, would be 160 MiB."""
    config, folder = wide_model
    assert memory_beside_arrays(folder, config, dtype) < 64


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_gigabytes(tmp_path, dtype):
    """2.1 GiB in four shards, the embedding 0.8: mapping and copying would need that much more."""
    config = ModelConfig(
        vocab_size=102_400, num_layers=5, embed_dim=4096, num_heads=32, num_kv_heads=8,
        head_dim=128, mlp_dim=8192,
    )  # fmt: skip
    tensors = random_tensors(config, "bfloat16")
    total, largest = (f(x.nbytes for x in tensors.values()) / 2**20 for f in (sum, max))
    assert total > 2 * 1024 and largest > 700
    write_shards(tmp_path / "m", tensors, 4)
    del tensors
    beside = memory_beside_arrays(tmp_path / "m", config, dtype)
    shutil.rmtree(tmp_path / "m")
    assert beside < 64 < 1.2 * largest + 512


PROCESSES = """
import sys
from functools import partial
import jax, numpy as np, safetensors.numpy
rank, port, folder, out = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from seal_jax.models import TINY
from seal_jax.models.names import param_table
from seal_jax.models.weights import load_safetensors, save_safetensors
from seal_jax.sharding import make_mesh, param_shardings

mesh, counts = make_mesh(data=1, fsdp=2, tensor=2), []
params = load_safetensors(folder, TINY, "float32", partial(param_shardings, mesh), counts.append)
tensors = safetensors.numpy.load_file(f"{folder}/model.safetensors")
for param in param_table(TINY):
    leaf = params
    for key in param.path:
        leaf = leaf[key]
    whole = tensors[param.hf_name].T if param.is_kernel else tensors[param.hf_name]
    assert len(leaf.addressable_shards) == 2 and leaf.shape == whole.shape
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
save_safetensors(out, params, TINY)
print(sum(counts))
"""


def test_each_process_reads_its_own_bytes(tmp_path):
    """Two real processes, with two devices each, share a model by its embed axis."""
    save_safetensors(tmp_path / "in", load_model("random:byte-tiny").params, TINY)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    arguments = [str(port), str(tmp_path / "in"), str(tmp_path / "out")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, str(rank), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # The norms are on every device; of each matrix a process holds, and reads, one half.
    expected = sum(
        4 * int(np.prod(p.shape)) // (len(p.shape) if p.path[-1] != "scale" else 1)
        for p in param_table(TINY)
    )
    for process, (output, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
        assert int(output.splitlines()[-1]) == expected  # Gloo prints too
    written, read = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("out", "in"))
    assert written == read


def test_random_weights_come_in_the_sizes_of_known_models():
    assert config_of("random:qwen2.5-7b") == KNOWN["qwen2.5-7b"]
    with pytest.raises(FileNotFoundError, match="no random model 'qwen'.*byte-tiny.*smollm2-135m"):
        load_model("random:qwen")
