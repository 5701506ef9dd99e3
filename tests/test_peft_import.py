"""PEFT adapters that others made, read into ours; and what is refused, by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from seal_jax.models import lora
from seal_jax.models.transformer import forward
from seal_jax.models.weights import save_safetensors
from seal_jax.runs import peft

CONFIGS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 6},
    "regex": {"target_modules": r".*\.mlp\.(gate|down)_proj"},
    "excluded": {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["layers.0.mlp.up_proj"],
    },
    "rslora": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "r": 8},
    "layers": {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    "one_layer": {
        "target_modules": ["k_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6, "down_proj": 3},
        "alpha_pattern": {"v_proj": 1, r"^model\.layers\.0\.mlp\.down_proj": 5},
    },
    "rslora_patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {r"layers\.0\..*": 9},
    },
    "gaussian": {
        "target_modules": ["q_proj"],
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.1,
    },
}


def logits(config, params, tokens, adapters=None):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    segments = jnp.ones(tokens.shape, jnp.int32)
    run = jax.jit(forward, static_argnums=0)
    return np.asarray(run(config, params, jnp.asarray(tokens), positions, segments, adapters))


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def random_adapter(config, targets=("q_proj", "down_proj"), rank=3, scale=0.5, seed=0):
    rng = np.random.default_rng(seed)
    weights = {}
    for target, (fan_in, fan_out) in lora.target_shapes(config, targets).items():
        a = rng.normal(0, 0.2, (1, config.num_layers, rank, fan_in)).astype(np.float32)
        b = rng.normal(0, 0.2, (1, config.num_layers, rank, fan_out)).astype(np.float32)
        weights.setdefault(lora.TARGETS[target], {})[target] = {"a": a, "b": b}
    return lora.Adapters(weights, np.full((1,), scale, np.float32))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture
def saved(tiny, tmp_path):
    """Return the folder of a good adapter, to be damaged."""
    config, _ = tiny
    peft.save_peft(tmp_path / "adapter", random_adapter(config), config, "org/name@v2")
    return tmp_path / "adapter"


def edit_settings(folder, **changes):
    path = folder / peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, edit):
    path = folder / peft.TENSOR_FILE
    tensors = edit(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_that_peft_saved_computes_the_same(tiny, tmp_path, name):
    torch = pytest.importorskip("torch")
    peft_package = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config, params = tiny
    save_safetensors(tmp_path / "base", params, config)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = {"r": 5, "lora_alpha": 3, "task_type": "CAUSAL_LM", **CONFIGS[name]}
    model = peft_package.get_peft_model(base, peft_package.LoraConfig(**settings)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    adapters = peft.load_peft(tmp_path / "adapter", config)

    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(2, 24), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert relative_error(logits(config, params, tokens, adapters), expected) < 2e-5
    assert relative_error(logits(config, params, tokens), expected) > 1e-2
    assert len(set(lora.concatenate([adapters]).scale.tolist())) == 1
    peft.save_peft(tmp_path / "again", adapters, config)
    again = peft.load_peft(tmp_path / "again", config)
    assert relative_error(logits(config, params, tokens, again), expected) < 2e-5


def test_what_is_saved_is_read_back_with_its_scale_in_b(tiny, saved):
    config, _ = tiny
    adapter = random_adapter(config)
    settings = json.loads((saved / peft.CONFIG_FILE).read_text())
    assert settings["base_model_name_or_path"] == "org/name" and settings["revision"] == "v2"
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (3, 3, {})
    assert settings["target_modules"] == ["q_proj", "down_proj"]
    tensors = safetensors.numpy.load_file(saved / peft.TENSOR_FILE)
    prefix = "base_model.model.model.layers"
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{prefix}.0.mlp.down_proj.lora_A.weight": (3, 48),
        f"{prefix}.0.mlp.down_proj.lora_B.weight": (32, 3),
        f"{prefix}.0.self_attn.q_proj.lora_A.weight": (3, 32),
        f"{prefix}.0.self_attn.q_proj.lora_B.weight": (32, 3),
        f"{prefix}.1.mlp.down_proj.lora_A.weight": (3, 48),
        f"{prefix}.1.mlp.down_proj.lora_B.weight": (32, 3),
        f"{prefix}.1.self_attn.q_proj.lora_A.weight": (3, 32),
        f"{prefix}.1.self_attn.q_proj.lora_B.weight": (32, 3),
    }
    assert_same(peft.load_peft(saved, config), lora.concatenate([adapter]))


def test_the_sum_of_adapters_has_the_effect_of_merging_one_after_the_other(tiny, tmp_path):
    config, params = tiny
    parts = [
        random_adapter(config, ("q_proj", "v_proj"), 3, 0.5, 1),
        random_adapter(config, ("v_proj", "up_proj"), 2, 2.0, 2),
        random_adapter(config, ("up_proj",), 1, 1.0, 3),
    ]
    merged = params
    for part in parts:
        merged = lora.merge(merged, part)
    together = lora.concatenate(parts)
    ranks = {t: ab["a"].shape[-2] for block in together.weights.values() for t, ab in block.items()}
    assert ranks == {"q_proj": 3, "v_proj": 5, "up_proj": 3}
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(2, 24), dtype=np.int32)
    expected = logits(config, merged, tokens)
    assert relative_error(logits(config, params, tokens, together), expected) < 1e-5
    peft.save_peft(tmp_path, together, config)
    settings = json.loads((tmp_path / peft.CONFIG_FILE).read_text())
    assert settings["r"] == settings["lora_alpha"] == 5
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {"q_proj": 3, "up_proj": 3}
    assert_same(peft.load_peft(tmp_path, config), jax.tree.map(np.asarray, together))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.model.layers", "model.layers"),
        ("base_model.model.model.layers", "base_model.model.layers"),
        ("base_model.model.model.layers", "layers"),
        ("base_model.model.model.layers", "base_model.model.model.language_model.layers"),
        ("base_model.model.model.layers", "base_model.model.language_model.model.layers"),
        ("lora_A.weight", "lora_A.default.weight"),
    ],
)
def test_other_names_of_the_same_tensors(tiny, saved, old, new):
    config, _ = tiny
    expected = peft.load_peft(saved, config)
    edit_tensors(saved, lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})
    assert_same(peft.load_peft(saved, config), expected)
    edit_settings(saved, target_modules=None)  # then the tensors alone say what is adapted
    assert_same(peft.load_peft(saved, config), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_as_float32(tiny, saved, dtype):
    config, _ = tiny
    full = peft.load_peft(saved, config)
    edit_tensors(saved, lambda tensors: {k: v.astype(jnp.dtype(dtype)) for k, v in tensors.items()})
    half = peft.load_peft(saved, config)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), full)
    assert_same(half, rounded)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, ("use_dora", "DoRA")),
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save",)),
        ({"bias": "lora_only"}, ("bias 'lora_only'",)),
        ({"lora_bias": True}, ("lora_bias",)),
        ({"trainable_token_indices": [3]}, ("trainable_token_indices",)),
        ({"target_parameters": ["experts.weight"]}, ("target_parameters",)),
        ({"fan_in_fan_out": True}, ("fan_in_fan_out",)),
        ({"layer_replication": [[0, 1], [0, 2]]}, ("layer_replication",)),
        ({"alora_invocation_tokens": [1, 2]}, ("alora_invocation_tokens", "aLoRA")),
        ({"use_qalora": True}, ("use_qalora", "QALoRA")),
        ({"peft_type": "LOHA"}, ("peft_type 'LOHA'",)),
        ({"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights 'pissa_niter_4'",)),
        ({"init_lora_weights": "loftq"}, ("init_lora_weights 'loftq'",)),
        ({"use_novelty": 0.5}, ("use_novelty (unknown)",)),
        ({"use_dora": True, "bias": "all"}, ("use_dora", "bias 'all'")),
        ({"r": 0}, ("r 0",)),
        ({"lora_alpha": "8"}, ("lora_alpha '8'",)),
        ({"lora_alpha": float("nan")}, ("NaN is no number",)),
        ({"rank_pattern": {"q_proj": "8"}}, ("rank_pattern {'q_proj': '8'}",)),
        ({"target_modules": ["q_proj", "down_proj", "lm_head"]}, ("target_modules", "lm_head")),
        ({"target_modules": ["q_proj", "down_proj", "embed_tokens"]}, ("embed_tokens",)),
        ({"target_modules": "*"}, ("nothing to repeat",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_more_than_plain_lora_is_refused_by_name(tiny, saved, changes, words):
    config, _ = tiny
    edit_settings(saved, **changes)
    with pytest.raises(ValueError) as error:
        peft.load_peft(saved, config)
    assert all(word in str(error.value) for word in (str(saved), *words)), error.value


def renamed(old, new):
    return lambda tensors: {name.replace(old, new, 1): x for name, x in tensors.items()}


def without(part):
    return lambda tensors: {name: x for name, x in tensors.items() if part not in name}


def with_one(name, shape, dtype=np.float32):
    name = f"base_model.model.model.{name}"
    return lambda tensors: tensors | {name: np.ones(shape, dtype)}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("0.self_attn.q_proj.lora_A"), ("self_attn.q_proj.lora_A: missing (in layers 0)",)),
        (without("mlp.down_proj.lora_B"), ("mlp.down_proj.lora_B: missing (in layers 0-1)",)),
        (
            renamed("q_proj", "k_proj"),
            (
                "q_proj.lora_A: missing",
                "k_proj.lora_B: unexpected, adapter_config.json does not target it",
            ),
        ),
        (renamed("layers.1.", "layers.2."), ("model has only 2 layers (in layers 2)", "missing")),
        (
            with_one("layers.0.mlp.down_proj.lora_A.weight", (5, 48)),
            ("mlp.down_proj.lora_A: found [5, 48], expected [3, 48] (in layers 0)",),
        ),
        (
            with_one("layers.0.self_attn.q_proj.lora_magnitude_vector", (32,)),
            ("unexpected", "lora_magnitude_vector (DoRA)"),
        ),
        (with_one("embed_tokens.lora_embedding_A", (3, 64)), ("an adapter of the embedding",)),
        (with_one("lm_head.lora_A.weight", (3, 32)), ("lm_head.lora_A.weight (the output layer)",)),
        (with_one("layers.0.mlp.down_proj.lora_B.bias", (32,)), ("lora_B.bias (a bias)",)),
        (with_one("vision.layers.0.mlp.up_proj.lora_A.weight", (3, 32)), ("(unknown)",)),
        (
            with_one("layers.0.mlp.down_proj.lora_A.other.weight", (3, 48)),
            ("a second one", "lora_A.other.weight"),
        ),
        (
            with_one("layers.0.mlp.down_proj.lora_A.weight", (3, 48), np.int8),
            ("lora_A.weight is of dtype I8",),
        ),
        (
            lambda tensors: {name: np.full_like(x, np.inf) for name, x in tensors.items()},
            ("is not finite",),
        ),
        (lambda tensors: {}, ("no LoRA matrix",)),
    ],
)
def test_what_does_not_fit_is_listed(tiny, saved, edit, words):
    config, _ = tiny
    edit_tensors(saved, edit)
    with pytest.raises(ValueError) as error:
        peft.load_peft(saved, config)
    assert all(word in str(error.value) for word in (str(saved), *words)), error.value


def test_an_adapter_for_a_wider_and_deeper_model_is_one_message(tiny, tmp_path):
    config, _ = tiny
    other = type(config)(**vars(config) | {"num_layers": 4, "embed_dim": 64})
    peft.save_peft(tmp_path, random_adapter(other), other)
    with pytest.raises(ValueError) as error:
        peft.load_peft(tmp_path, config)
    assert str(error.value).splitlines() == [
        f"{tmp_path}: the adapter does not fit the model:",
        "  mlp.down_proj.lora_B: found [64, 3], expected [32, 3] (in layers 0-1)",
        "  self_attn.q_proj.lora_A: found [3, 64], expected [3, 32] (in layers 0-1)",
        "  mlp.down_proj.lora_A: the model has only 2 layers (in layers 2-3)",
        "  mlp.down_proj.lora_B: the model has only 2 layers (in layers 2-3)",
        "  self_attn.q_proj.lora_A: the model has only 2 layers (in layers 2-3)",
        "  self_attn.q_proj.lora_B: the model has only 2 layers (in layers 2-3)",
    ]


def test_files_that_are_missing_damaged_or_pickled(tiny, saved, tmp_path):
    config, _ = tiny
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        peft.load_peft(tmp_path, config)
    file = saved / peft.TENSOR_FILE
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="truncated"):
        peft.load_peft(saved, config)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=peft.TENSOR_FILE):
        peft.load_peft(saved, config)
    (saved / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match="adapter_model.bin.*can run code"):
        peft.load_peft(saved, config)
    for text in ("{", "[]", "[" * 100_000):
        (saved / peft.CONFIG_FILE).write_text(text)
        with pytest.raises(ValueError, match=peft.CONFIG_FILE):
            peft.load_peft(saved, config)


def test_an_adapter_that_does_nothing_is_not_saved(tiny, tmp_path):
    config, _ = tiny
    init = jax.jit(
        lambda key: lora.init_adapter(config, key, rank=2, alpha=4.0, targets=("q_proj",))
    )
    with pytest.raises(ValueError, match="every b of the adapter is 0"):
        peft.save_peft(tmp_path / "adapter", init(jax.random.key(0)), config)
    broken = jax.tree.map(lambda x: x * np.nan, random_adapter(config))
    with pytest.raises(ValueError, match="not finite"):
        peft.save_peft(tmp_path / "adapter", broken, config)
    assert not (tmp_path / "adapter").exists()
