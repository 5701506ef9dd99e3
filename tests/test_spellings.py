"""Configs that say one thing twice, in an old and a new spelling: as transformers reads them.

What transformers makes of a config is asked of its own classes, which need no torch; rope's
frequencies, where torch is there, of its models.
"""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.models.config import config_from_hf
from seal_jax.models.rope import rope_frequencies
from seal_jax.models.rope_settings import RopeScaling
from seal_jax.models.tokenizer_folder import import_transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GLOBAL, LOCAL = "full_attention", "sliding_attention"

ABSENT = object()


def settings_of(**keys):
    drawn = st.fixed_dictionaries(keys)
    return drawn.map(lambda d: {k: v for k, v in d.items() if v is not ABSENT})


thetas = st.sampled_from([ABSENT, 500.0, 10000.0, 5e6])
ropes = st.one_of(
    settings_of(rope_type=st.sampled_from(["default", ABSENT]), rope_theta=thetas),
    settings_of(rope_type=st.just("linear"), factor=st.sampled_from([2, 4.0]), rope_theta=thetas),
    settings_of(type=st.just("linear"), factor=st.just(3.0), rope_theta=thetas),
    settings_of(
        **{key: st.just(value) for key, value in LLAMA3.items()},
        original_max_position_embeddings=st.sampled_from([ABSENT, 16, 64]),
        rope_theta=thetas,
    ),
    settings_of(
        rope_type=st.sampled_from(["yarn", "dynamic"]),
        factor=st.just(2.0),
        rope_theta=thetas,
        original_max_position_embeddings=st.just(64),
    ),
    settings_of(rope_theta=thetas, partial_rotary_factor=st.sampled_from([0.5, 1.0, 1.0])),
)
by_layer_type = st.fixed_dictionaries({}, optional={GLOBAL: ropes, LOCAL: ropes})
layer_types = st.lists(st.sampled_from([GLOBAL, LOCAL]), min_size=4, max_size=4)


def optional(strategy):
    return st.one_of(st.just(ABSENT), st.none(), strategy)


def configs_of(kind):
    is_gemma3 = kind == "gemma3_text"
    some = ropes if not is_gemma3 else st.one_of(by_layer_type, by_layer_type, ropes)
    nothing = [None] if kind in ("llama", "qwen3") else []
    return settings_of(
        model_type=st.just(kind),
        rope_scaling=optional(ropes),
        rope_parameters=optional(some),
        rope_theta=thetas,
        rope_local_base_freq=st.sampled_from([ABSENT, 777.0]),
        original_max_position_embeddings=st.sampled_from([ABSENT, ABSENT, 32]),
        partial_rotary_factor=st.sampled_from([ABSENT, ABSENT, None, 1.0]),
        max_position_embeddings=st.sampled_from([ABSENT, 256]),
        head_dim=st.sampled_from([ABSENT, 8, 16]),
        num_key_value_heads=st.sampled_from([2, 4, *nothing]),
        use_sliding_window=st.sampled_from([ABSENT, False, True, True]),
        sliding_window=st.sampled_from([ABSENT, None, 6, 100]),
        max_window_layers=st.sampled_from([ABSENT, 0, 2]),
        sliding_window_pattern=st.sampled_from([ABSENT, 2, 3]),
        layer_types=optional(layer_types),
        tie_word_embeddings=st.sampled_from([ABSENT, False, True]),
        query_pre_attn_scalar=st.sampled_from([ABSENT, 24]),
        final_logit_softcapping=st.sampled_from([ABSENT, None, 30.0]),
        attn_logit_softcapping=st.sampled_from([ABSENT, None, 50.0]),
    ).map(lambda hf: {**SIZES, **hf})


configs = st.sampled_from((*FAMILIES, "gemma3_text")).flatmap(configs_of)

# What may be refused, and nothing else.
REFUSED = (
    "unsupported rope type 'yarn'",
    "unsupported rope type 'dynamic'",
    "unsupported partial_rotary_factor 0.5",
    "unsupported rope by layer type",
    "rope_parameters of gemma3 has full_attention and sliding_attention",
    "rope_type 'default' and type 'linear' disagree",
    "would be lost",
    "layers with sliding_attention have no window",
    "unsupported rope type 'linear'; supported: 'default'",  # in Gemma 3's local layers
    "unsupported rope type 'llama3'; supported: 'default'",
)


def theirs_of(hf):
    """Return transformers' config; it changes what it is given."""
    transformers = import_transformers()
    transformers.logging.set_verbosity_error()
    text = {k: v for k, v in copy.deepcopy(hf).items() if k != "model_type"}
    return transformers.AutoConfig.for_model(hf["model_type"], **text)


def scaling_of(rope, theirs, is_gemma3):
    """Return (theta, linear factor, Llama 3's scaling) of a rope as transformers holds it."""
    kind = rope["rope_type"]
    if kind != "llama3":
        return rope["rope_theta"], rope["factor"] if kind == "linear" else 1.0, None
    longest = rope["original_max_position_embeddings"]
    if not is_gemma3:  # where the model makes its frequencies, the top level comes first
        longest = getattr(theirs, "original_max_position_embeddings", longest)
    return rope["rope_theta"], 1.0, RopeScaling(8.0, 1.0, 4.0, longest)


def windows_of(theirs, kind):
    """Return (window, local layers) as transformers' models take them from their config."""
    if kind == "llama" or theirs.sliding_window is None:
        return None, ()
    types = [LOCAL] * 4 if kind == "mistral" else theirs.layer_types
    if LOCAL not in types:
        return None, ()
    return theirs.sliding_window, tuple(layer == LOCAL for layer in types)


def assert_same(config, theirs, kind):
    is_gemma, is_gemma3 = kind.startswith("gemma"), kind == "gemma3_text"
    rope = theirs.rope_parameters
    if is_gemma3:
        assert config.local_rope_theta == rope[LOCAL]["rope_theta"]
        rope = rope[GLOBAL]
    found_rope = config.rope_theta, config.rope_factor, config.rope_scaling
    assert found_rope == scaling_of(rope, theirs, is_gemma3)
    assert (config.sliding_window, config.local_layers) == windows_of(theirs, kind)
    heads = theirs.num_attention_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    sizes = config.head_dim, config.num_kv_heads, config.max_length, config.tie_embeddings
    theirs_sizes = theirs.num_key_value_heads, theirs.max_position_embeddings
    assert sizes == (head_dim, *theirs_sizes, theirs.tie_word_embeddings)
    scale = theirs.query_pre_attn_scalar**-0.5 if is_gemma else None
    logit_cap = theirs.final_logit_softcapping if is_gemma else None
    score_cap = theirs.attn_logit_softcapping if kind == "gemma2" else None
    found_scores = config.query_scale, config.logit_softcap, config.attn_softcap
    assert found_scores == (scale, logit_cap, score_cap)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(configs)
def test_configs_mean_what_transformers_takes_them_for(hf):
    """Or they are refused for a reason that is known here."""
    try:
        theirs = theirs_of(hf)
    except Exception:  # noqa: BLE001 - transformers refuses it: no reference, and maybe no model
        return
    try:
        config = config_from_hf(hf)
    except ValueError as error:
        assert any(reason in str(error) for reason in REFUSED), error
        return
    assert_same(config, theirs, hf["model_type"])


LINEAR = {"rope_type": "linear", "factor": 4.0}
SAVED = {"rope_theta": 500.0, "rope_type": "default"}  # what transformers 5 writes
BY_TYPE = {GLOBAL: {**SAVED}, LOCAL: {**SAVED, "rope_theta": 50.0}}
ACCEPTED = {
    "rope_scaling wins": (
        "llama",
        {"rope_parameters": SAVED, "rope_scaling": {**LINEAR, "rope_theta": 500.0}},
    ),
    "with the theta of the top level": (
        "qwen2",
        {"rope_parameters": SAVED, "rope_scaling": LINEAR, "rope_theta": 300.0},
    ),
    "an empty one does not": (
        "qwen3",
        {"rope_parameters": {**SAVED, **LINEAR}, "rope_scaling": {}},
    ),
    "in place of another": (
        "llama",
        {
            "rope_parameters": {**LLAMA3, "rope_theta": 500.0},
            "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 400.0},
        },
    ),
    "the inner theta wins": ("mistral", {"rope_parameters": SAVED, "rope_theta": 300.0}),
    "gemma 3: laid over": ("gemma3_text", {"rope_parameters": BY_TYPE, "rope_scaling": LINEAR}),
    "gemma 3: one of two": (
        "gemma3_text",
        {"rope_parameters": {GLOBAL: LINEAR}, "rope_theta": 300.0, "rope_local_base_freq": 30.0},
    ),
    "the top level's length": (
        "llama",
        {
            "rope_parameters": {
                **LLAMA3,
                "rope_theta": 500.0,
                "original_max_position_embeddings": 16,
            },
            "original_max_position_embeddings": 64,
        },
    ),
    "no length": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 64}),
    "a window by default": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "gemma 2 has no pattern": ("gemma2", {"sliding_window_pattern": 4}),
    "no soft caps": ("llama", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24}),
    "heads by default": ("mistral", {"num_attention_heads": 8}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_the_spelling_that_wins(case):
    kind, changes = ACCEPTED[case]
    hf = {**SIZES, **changes, "model_type": kind}
    if case == "heads by default":
        del hf["num_key_value_heads"]
    assert_same(config_from_hf(hf), theirs_of(hf), kind)


@pytest.mark.parametrize("case", ACCEPTED)
def test_frequencies_are_those_of_their_models(case):
    """Of the rotary embedding that the model of a config makes."""
    pytest.importorskip("torch")
    kind, changes = ACCEPTED[case]
    hf = {**SIZES, "layer_types": [GLOBAL, LOCAL] * 2, **changes, "model_type": kind}
    if not kind.startswith("gemma3"):
        del hf["layer_types"]
    model = import_transformers().AutoModelForCausalLM.from_config(theirs_of(hf))
    rotary = model.model.rotary_emb
    if kind == "gemma3_text":
        kinds = (GLOBAL, LOCAL)
        pairs = [(getattr(rotary, f"{kind}_inv_freq"), kind == LOCAL) for kind in kinds]
    else:
        pairs = [(rotary.inv_freq, False)]
    for expected, local in pairs:
        found = rope_frequencies(config_from_hf(hf), local)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("llama", {"rope_parameters": SAVED, "rope_scaling": LINEAR}, "500.0, would be lost"),
        (
            "qwen2",
            {"rope_parameters": SAVED, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "unsupported rope type 'yarn'",
        ),
        (
            "gemma3_text",
            {"rope_parameters": BY_TYPE, "rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_type 'default' and type 'linear' disagree",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {**SAVED, **LINEAR}},
            "unsupported beside them: factor",
        ),
        ("qwen3", {"rope_parameters": BY_TYPE}, "unsupported rope by layer type"),
        ("llama", {"rope_scaling": [2.0]}, "rope_scaling must be an object, found"),
        ("llama", {"rope_theta": None}, "rope_theta must be a number, found None"),
        ("llama", {"rope_theta": "500"}, "rope_theta must be a number, found '500'"),
        ("gemma3_text", {"rope_parameters": {GLOBAL: 3}}, "full_attention must be an object"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "must be positive, found 0"),
        ("llama", {"is_causal": False}, "unsupported is_causal False"),
        ("llama", {"per_layer_config": {"1": {"head_dim": 4}}}, "unsupported per_layer_config"),
        ("llama", {"configuration_files": ["config.4.json"]}, "unsupported configuration_files"),
        ("llama", {"tie_word_embeddings": "false"}, "unsupported tie_word_embeddings 'false'"),
        ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number"),
    ],
)
def test_what_transformers_would_lose_or_ignore(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**SIZES, **changes, "model_type": kind})


def test_the_top_level_of_a_multimodal_config():
    """The text's own keys count, as long as the top level does not say otherwise."""
    text = {**SIZES, "rope_parameters": BY_TYPE, "sliding_window": 6}
    hf = {"model_type": "gemma3", "text_config": text}
    expected = config_from_hf({**text, "model_type": "gemma3_text"})
    assert config_from_hf(hf) == expected
    assert config_from_hf({**hf, "hidden_size": 32, "rope_local_base_freq": 1e4}) == expected
    theirs = theirs_of(hf).text_config
    assert_same(expected, theirs, "gemma3_text")
    for key, value in {
        "rope_scaling": LINEAR,
        "sliding_window": 8,
        "hidden_size": 64,
        "tie_word_embeddings": False,
    }.items():
        with pytest.raises(ValueError, match=f"the top level disagree about {key}"):
            config_from_hf({**hf, key: value})
    with pytest.raises(ValueError, match="disagree about tie_word_embeddings"):
        config_from_hf({**hf, "text_config": {**text, "tie_word_embeddings": False}})
