"""Our decoder against PyTorch's Llama, with parameters carried over in safetensors both ways."""

import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.models.transformer import forward
from seal_jax.models.weights import load_folder_config, load_safetensors, save_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "llama3": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 16, "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
    "one_kv_head": {"num_key_value_heads": 1},
}


@pytest.fixture(params=CASES)
def llama(request):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,  # so that attention is far from uniform
        "attn_implementation": "eager",
    }
    config = transformers.LlamaConfig(**{**sizes, **CASES[request.param]})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.uniform_(0.5, 1.5)
    return model


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(config, params, tokens):
    num_rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (num_rows, length))
    mask = jnp.broadcast_to(jnp.tri(length, dtype=bool), (num_rows, length, length))
    return np.asarray(forward(config, params, jnp.asarray(tokens, jnp.int32), positions, mask))


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_logits_agree_both_ways(llama, tmp_path):
    tokens = np.random.default_rng(0).integers(96, size=(2, 40))
    expected = torch_logits(llama, tokens)
    llama.save_pretrained(tmp_path / "theirs")
    config = load_folder_config(tmp_path / "theirs")
    params = load_safetensors(tmp_path / "theirs", config)
    assert relative_error(our_logits(config, params, tokens), expected) < 2e-5
    save_safetensors(tmp_path / "ours", params, config)
    again = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    np.testing.assert_array_equal(torch_logits(again.eval(), tokens), expected)
