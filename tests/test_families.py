"""Configs as they are on the hub, and as they must not be."""

import pytest

from seal_jax.models.config import LINEARS, RopeScaling, config_from_hf, config_to_hf
from seal_jax.models.names import param_table, text_name

QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA32_1B = {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN3_06B = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_7B = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
# The text part leaves most sizes to transformers' defaults.
GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}
# Billions of parameters, from the sizes alone: a lost or doubled tensor would show.
HUB = {
    "qwen2.5-7b": (QWEN25_7B, 7.616),
    "llama-3.2-1b": (LLAMA32_1B, 1.236),
    "qwen3-0.6b": (QWEN3_06B, 0.596),
    "mistral-7b": (MISTRAL_7B, 7.242),
    "gemma-3-4b": (GEMMA3_4B, 3.880),
}


def billions(config):
    total = 0
    for param in param_table(config):
        size = 1
        for length in param.shape:
            size *= length
        total += size
    return total / 1e9


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub(name):
    hf, size = HUB[name]
    config = config_from_hf(hf)
    assert billions(config) == pytest.approx(size, abs=6e-4)
    assert config_from_hf(config_to_hf(config)) == config


def test_what_the_families_switch_on():
    qwen2, llama, qwen3, mistral, gemma = (config_from_hf(hf) for hf, _ in HUB.values())
    assert qwen2.biases == LINEARS[:3] and not any(qwen2.local_layers)
    assert llama.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192) and llama.tie_embeddings
    assert qwen3.qk_norm and not qwen3.biases and qwen3.head_dim == 128
    assert mistral.sliding_window == 4096 and mistral.local_layers == (True,) * 32
    assert (gemma.vocab_size, gemma.num_heads, gemma.num_kv_heads) == (262208, 8, 4)
    assert (gemma.rope_theta, gemma.rope_factor, gemma.local_rope_theta) == (1e6, 8.0, 1e4)
    assert [i for i in range(34) if not gemma.is_local(i)] == [5, 11, 17, 23, 29]
    assert gemma.query_scale == 256**-0.5 and gemma.activation == "gelu_tanh"


@pytest.mark.parametrize(
    "base, change, message",
    [
        (QWEN25_7B, {"model_type": "qwen2_moe"}, "unsupported model_type 'qwen2_moe'; supported"),
        (QWEN25_7B, {"auto_map": {"AutoModel": "evil.Model"}}, "never does"),
        (GEMMA3_4B, {"auto_map": {"AutoModel": "evil.Model"}}, "never does"),
        (GEMMA3_4B, {"quantization_config": {"bits": 4}}, "unsupported quantization_config"),
        (QWEN25_7B, {"hidden_act": "relu"}, "unsupported hidden_act 'relu'"),
        (QWEN25_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (LLAMA32_1B, {"partial_rotary_factor": 0.5}, "unsupported partial_rotary_factor"),
        (QWEN3_06B, {"layer_types": ["mamba"] * 28}, "unsupported layer types .'mamba'."),
        (QWEN3_06B, {"layer_types": ["sliding_attention"] * 28}, "have no window"),
        (LLAMA32_1B, {"model_type": "gemma2", "sliding_window": None}, "have no window"),
        (
            QWEN3_06B,
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
            "1 entries for 28 layers",
        ),
        (
            QWEN3_06B,
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked"] * 28},
            "unsupported layer types .'chunked'.; supported",
        ),
        (
            QWEN3_06B,
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention"] * 3,
            },
            "3 entries for 28 layers",
        ),
    ],
)
def test_what_is_refused(base, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**base, **change})


def test_names_of_multimodal_checkpoints():
    names = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "model.language_model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.post_layernorm.bias": None,
        "model.multi_modal_projector.mm_soft_emb_norm.weight": None,
        "model.layers.0.self_attn.rotary_emb.inv_freq": None,
    }
    assert {name: text_name(name) for name in names} == names


def test_a_family_of_another_package(tmp_path, monkeypatch):
    """It is found by an entry point, reads and writes its config, and has its own tensor names."""
    (tmp_path / "their_models.py").write_text(
        "from seal_jax.models.config import Family\n"
        "FAMILY = Family('NewForCausalLM', {'head_dim': 64}, {'qk_norm': True},\n"
        "                {'mlp.up_proj': 'mlp.w1', 'self_attn.q_norm': 'self_attn.norm_q'})\n"
        "BROKEN = 'NewForCausalLM'\n"
    )
    info = tmp_path / "their_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[seal_jax.families]\nnew = their_models:FAMILY\nbroken = their_models:BROKEN\n"
    )
    hf = {**LLAMA32_1B, "model_type": "new"}
    del hf["head_dim"]
    with pytest.raises(ValueError, match="unsupported model_type 'new'; supported: 'llama' or"):
        config_from_hf(hf)
    monkeypatch.syspath_prepend(tmp_path)
    config = config_from_hf(hf)
    assert (config.family, config.head_dim, config.qk_norm) == ("new", 64, True)
    written = config_to_hf(config)
    assert written["architectures"] == ["NewForCausalLM"]
    assert config_from_hf(written) == config
    names = {"/".join(param.path): param.hf_name for param in param_table(config)}
    assert names["layers_3/mlp/up_proj/kernel"] == "model.layers.3.mlp.w1.weight"
    assert names["layers_3/attn/q_norm/scale"] == "model.layers.3.self_attn.norm_q.weight"
    with pytest.raises(ValueError, match="unsupported model_type 'newer'.*'llama'.* or 'new'"):
        config_from_hf({**hf, "model_type": "newer"})
    with pytest.raises(ValueError, match="'broken' is registered as 'NewForCausalLM'"):
        config_from_hf({**hf, "model_type": "broken"})
