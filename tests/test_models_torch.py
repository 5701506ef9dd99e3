"""Our decoder against PyTorch's, family by family, with parameters carried over both ways."""

import copy
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_device import one_device_mesh

from seal_jax.models import lora
from seal_jax.models.config import config_from_hf, config_to_hf
from seal_jax.models.logits import token_logp
from seal_jax.models.transformer import forward, hidden_states
from seal_jax.models.weights import load_folder_config, load_safetensors, save_safetensors
from seal_jax.runs.peft import load_peft, save_peft
from seal_jax.sampling.draw import make_settings
from seal_jax.sampling.generate import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, NUM_LAYERS, WINDOW = 96, 3, 6
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # so that attention is far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GEMMA = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 24,
}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": LINEAR_ROPE,
}
CASES = {
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_untied": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_linear_rope": ("llama", {"rope_parameters": LINEAR_ROPE, "head_dim": 16}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "mistral_window": ("mistral", {"sliding_window": WINDOW}),
    "mistral_no_window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", SLIDING),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_biases_window": ("qwen3", {**SLIDING, "attention_bias": True}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3_untied_linear_rope": (
        "gemma3_text",
        {**GEMMA, "tie_word_embeddings": False, "rope_parameters": GEMMA_ROPE},
    ),
    "gemma3_softcap": ("gemma3_text", {**GEMMA, "final_logit_softcapping": 3.0}),
    "gemma2_softcaps": (
        "gemma2",
        {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
}
LENGTHS = (40, 17, 3, 29)


def random_torch_model(kind, options):
    """Return a torch model whose biases and norms are not at their trivial initial values."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.add_(torch.empty_like(param).uniform_(-0.5, 0.5))
            elif name.endswith("bias"):
                param.uniform_(-0.5, 0.5)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """Return a torch model, and our (config, params) read from what it saved."""
    model = random_torch_model(*CASES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    config = load_folder_config(folder)
    return model, (config, load_safetensors(folder, config))


def ragged_batch(side):
    """Return tokens i[4 40] padded on a side, and the mask of what is no padding."""
    rng = np.random.default_rng(0)
    tokens, mask = np.zeros((4, 40), np.int32), np.zeros((4, 40), np.int32)
    for row, length in enumerate(LENGTHS):
        span = slice(40 - length, 40) if side == "left" else slice(0, length)
        tokens[row, span] = rng.integers(3, V, length)
        mask[row, span] = 1
    return tokens, mask


def positions_of(mask):
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def torch_logits(model, tokens, mask):
    with torch.no_grad():
        out = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions_of(mask)),
        )
    return out.logits.float().numpy()


def our_logits(config, params, tokens, mask):
    run = jax.jit(forward, static_argnums=0)
    return np.asarray(run(config, params, tokens, positions_of(mask), mask))


def relative_error(found, expected):
    norm = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return max(norm, np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_ragged_batches(pair, side):
    model, ours = pair
    tokens, mask = ragged_batch(side)
    expected, found = torch_logits(model, tokens, mask), our_logits(*ours, tokens, mask)
    for row in range(4):
        real = mask[row] == 1
        assert relative_error(found[row, real], expected[row, real]) < 2e-4


def test_log_probabilities_of_a_text(pair):
    model, (config, params) = pair
    tokens, mask = ragged_batch("right")
    logits = torch.tensor(torch_logits(model, tokens, mask)[0, :-1])
    expected = torch.log_softmax(logits, -1)[torch.arange(39), torch.tensor(tokens[0, 1:]).long()]

    def logp(params, tokens, positions, segments):
        hidden, _ = hidden_states(config, params, tokens, positions, segments)
        every = jnp.ones(39, bool)
        return token_logp(config, params, hidden[0, :-1], tokens[0, 1:], every, tile=16)

    found = jax.jit(logp)(params, tokens, positions_of(mask), mask)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-4, atol=2e-4)


def test_greedy_text_and_the_cache(pair):
    """64 tokens are torch's; each one's log p with the cache is that of a full forward pass."""
    model, (config, params) = pair
    tokens, mask = ragged_batch("left")
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=V
            ),
        )[:, 40:]
    texts = [row[m == 1].tolist() for row, m in zip(tokens, mask, strict=True)]
    samples = generate(
        config,
        params,
        None,
        [texts],
        jax.random.split(jax.random.key(0), 4),
        make_settings(4, temperature=0.0),
        mesh=one_device_mesh(),
        stop_ids=[V],
        max_tokens=64,
        max_rows=4,
        pad_id=0,
    )
    np.testing.assert_array_equal(samples.tokens, expected.numpy())

    whole = np.concatenate([tokens, samples.tokens], axis=1)
    whole_mask = np.concatenate([mask, samples.mask], axis=1).astype(np.int32)
    logits = our_logits(config, params, whole, whole_mask)[:, tokens.shape[1] - 1 : -1]
    uncached = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.asarray(samples.tokens)[..., None], axis=-1
    )[..., 0]
    np.testing.assert_allclose(samples.logp, uncached, rtol=1e-4, atol=1e-4)


def test_what_we_save_is_the_same_model_to_torch(pair, tmp_path):
    model, (config, params) = pair
    save_safetensors(tmp_path, params, config)
    assert load_folder_config(tmp_path) == config
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    assert type(again) is type(model)
    tokens, mask = ragged_batch("right")
    expected = torch_logits(model, tokens, mask)
    np.testing.assert_array_equal(torch_logits(again.eval(), tokens, mask), expected)


def test_an_adapter_is_the_same_to_peft(pair, tmp_path):
    peft = pytest.importorskip("peft")
    model, (config, params) = pair
    rng = np.random.default_rng(3)
    adapter = jax.jit(partial(lora.init_adapter, config, rank=4, alpha=8.0, targets=lora.TARGETS))(
        jax.random.key(4)
    )
    adapter = jax.tree.map(np.asarray, adapter)
    for targets in adapter.weights.values():
        for ab in targets.values():
            ab["b"] = rng.normal(scale=0.3, size=ab["b"].shape).astype(np.float32)
    save_peft(tmp_path, adapter, config)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    tokens, mask = ragged_batch("right")
    run = jax.jit(forward, static_argnums=0)
    for adapters in (adapter, load_peft(tmp_path, config)):
        found = run(config, params, tokens, positions_of(mask), mask, adapters)
        expected = torch_logits(theirs, tokens, mask)
        assert relative_error(np.asarray(found)[mask == 1], expected[mask == 1]) < 2e-4
    merged = our_logits(config, lora.merge(params, adapter), tokens, mask)
    assert relative_error(merged[mask == 1], expected[mask == 1]) < 2e-4
    base = torch_logits(model, tokens, mask)
    assert relative_error(expected[mask == 1], base[mask == 1]) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_configs_survive_both_ways(case):
    kind, options = CASES[case]
    theirs = transformers.AutoConfig.for_model(kind, **{**SIZES, **options}).to_dict()
    config = config_from_hf(theirs)
    assert config_from_hf(config_to_hf(config)) == config


# What a user adds to the config.json that transformers saved, beside its own spelling.
ADDED = {
    "rope_scaling": ("qwen2", {"rope_parameters": LLAMA3_ROPE}, {"rope_scaling": LINEAR_ROPE}),
    "over_gemma3": (
        "gemma3_text",
        {**GEMMA, "rope_parameters": GEMMA_ROPE},
        {"rope_scaling": {"factor": 8.0}},
    ),
    "top_level_length": (
        "llama",
        {"rope_parameters": LLAMA3_ROPE},
        {"original_max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize("case", ADDED)
def test_logits_of_a_config_with_two_spellings(case, tmp_path):
    kind, options, added = ADDED[case]
    saved = random_torch_model(kind, options)
    saved.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **added}))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    config = load_folder_config(tmp_path)
    tokens, mask = ragged_batch("right")
    found = our_logits(config, load_safetensors(tmp_path, config), tokens, mask)[mask == 1]
    assert relative_error(found, torch_logits(model, tokens, mask)[mask == 1]) < 2e-4
    assert relative_error(found, torch_logits(saved, tokens, mask)[mask == 1]) > 1e-2
