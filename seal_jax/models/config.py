"""The sizes of a decoder, and their translation from and to a Hugging Face `config.json`.

`ModelConfig` is hashable, so it can be a static argument of a jitted function. What the decoder
cannot compute is refused here, before any array is read.
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from seal_jax.extensions import load_plugin, plugin_names
from seal_jax.hosts.files import read_object
from seal_jax.types import ParamRules

# Hugging Face's names of the fields of RopeScaling.
_LLAMA3_KEYS = (
    *("factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
)
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Hugging Face's names of activations, and ours.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ATTENTIONS = ("auto", "xla", "cudnn", "splash")
REMATS = ("none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable")


class Family(NamedTuple):
    """What a Hugging Face `model_type` says beside the sizes.

    Another package adds one by an entry point, see `extensions`: seal_jax.families, by model_type.
    """

    architecture: str  # transformers' class
    defaults: dict[str, Any] = {}  # of keys that a config.json may leave out
    switches: dict[str, Any] = {}  # fields of ModelConfig that follow from the type alone
    tensor_names: dict[str, str] = {}  # where not Llama's: {"mlp.up_proj": "mlp.w1"}, say


_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_SWITCHES = {"sandwich_norms": True, "unit_offset": True, "scale_embeddings": True}
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", {"sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", {"max_window_layers": 28}),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"head_dim": 128, "max_window_layers": 28}, {"qk_norm": True}
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 2,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _GEMMA_SWITCHES,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **_GEMMA_DEFAULTS,
            # The text part of a multimodal config leaves out what is as in the 4B model.
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "max_position_embeddings": 131_072,
        },
        # The config has attn_logit_softcapping, but transformers computes none, and no released
        # model asks for it.
        {**_GEMMA_SWITCHES, "qk_norm": True, "attn_softcap": None},
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the low rope frequencies, https://arxiv.org/abs/2407.21783.

    Wavelengths are in tokens: those above `original_max_position / low_freq_factor` are stretched
    by `factor`, those below `original_max_position / high_freq_factor` are kept, and those between
    are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        if not self.factor > 0 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope scaling needs factor > 0 and 0 < low < high, found {self}.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes of one decoder: hashable, and known at compile time."""

    vocab_size: int  # V
    num_layers: int  # L
    embed_dim: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K, divides N
    head_dim: int  # H, even
    mlp_dim: int  # F
    family: str = "llama"  # a key of FAMILIES: what the model is called elsewhere
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_factor: float = 1.0  # positions are divided by it
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_length: int = 2048  # tokens of context the model was trained for
    activation: str = "silu"  # silu | gelu_tanh
    biases: tuple[str, ...] = ()  # the linear maps that add one
    qk_norm: bool = False  # an RMSNorm on every head's query and key
    sandwich_norms: bool = False  # a norm behind attention and MLP too, before the residual
    unit_offset: bool = False  # norms multiply by 1 + scale
    scale_embeddings: bool = False  # by sqrt(D)
    query_scale: float | None = None  # on the attention scores; None is H ** -0.5
    attn_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_softcap: float | None = None
    sliding_window: int | None = None  # tokens a local layer sees, itself included
    local_layers: tuple[bool, ...] = ()  # [L], or () for none
    local_rope_theta: float | None = None  # in local layers; None is rope_theta, with its scaling
    # How to compute, not what: see attention.py, transformer.py for remat, sharding.py for rules.
    attention: str = "auto"
    remat: str = "none"
    rules: ParamRules = ()  # where they are not those of sharding.RULES

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and not 0 < value < float("inf"):
                raise ValueError(f"{field.name} must be positive and finite, found {value}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, found {self.num_kv_heads} and "
                f"{self.num_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rope, found {self.head_dim}.")
        if self.local_layers and len(self.local_layers) != self.num_layers:
            raise ValueError(
                f"layer_types has {len(self.local_layers)} entries for {self.num_layers} layers."
            )
        if any(self.local_layers) and self.sliding_window is None:
            raise ValueError("layers with sliding attention need a sliding_window.")
        _check_word("attention", self.attention, ATTENTIONS)
        _check_word("remat", self.remat, REMATS)
        _check_word("activation", self.activation, ACTIVATIONS.values())
        if self.family not in FAMILIES:
            _check_word("family", self.family, family_names())

    def is_local(self, layer: int) -> bool:
        """Return whether a layer sees only `sliding_window` tokens."""
        return bool(self.local_layers) and self.local_layers[layer]


def family_names() -> tuple[str, ...]:
    """Return the model types that are supported: ours, and those of other packages."""
    return (*FAMILIES, *plugin_names("families"))


def find_family(name: str) -> Family:
    """Return a family that is among `family_names`. Raises ValueError."""
    family = FAMILIES.get(name) or load_plugin("families", name)
    if not isinstance(family, Family):
        raise ValueError(f"families: {name!r} is registered as {family!r}, which is no Family")
    return family


def config_from_hf(source: dict[str, Any] | str | os.PathLike) -> ModelConfig:
    """Translate a Hugging Face config, given as a dict or as the path of a `config.json`.

    Both spellings of rope are read: `rope_theta` with `rope_scaling` (transformers 4) and
    `rope_parameters` (transformers 5).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, lacks a size, or asks for what the decoder cannot compute. The
        message names what was found, what is supported, and the file.
    """
    if isinstance(source, dict):
        hf, where = source, "config dict"
    else:
        hf, where = read_object(source), os.fspath(source)
    if hf.get("model_type") == "gemma3" and isinstance(hf.get("text_config"), dict):
        # Images are not for us; a request to run code or to dequantize is at the top.
        top = {key: hf[key] for key in ("auto_map", "quantization_config") if key in hf}
        hf = {**hf["text_config"], **top, "model_type": "gemma3_text"}
    _refuse_unsupported(hf, where)
    family = find_family(hf["model_type"])
    hf = {**family.defaults, **hf}
    try:
        num_heads = int(hf["num_attention_heads"])
        embed_dim = int(hf["hidden_size"])
        num_kv_heads, head_dim = hf.get("num_key_value_heads"), hf.get("head_dim")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"hidden_size {embed_dim} is not a multiple of {num_heads} heads")
        query_scalar = hf.get("query_pre_attn_scalar")
        fields: dict[str, Any] = {
            "vocab_size": int(hf["vocab_size"]),
            "num_layers": int(hf["num_hidden_layers"]),
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_heads if num_kv_heads is None else int(num_kv_heads),
            "head_dim": embed_dim // num_heads if head_dim is None else int(head_dim),
            "mlp_dim": int(hf["intermediate_size"]),
            "family": hf["model_type"],
            "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
            "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "max_length": int(hf.get("max_position_embeddings", 2048)),
            "activation": ACTIVATIONS[_activation(hf)],
            "biases": _biases(hf),
            "query_scale": None if query_scalar is None else float(query_scalar) ** -0.5,
            "attn_softcap": _optional_float(hf.get("attn_logit_softcapping")),
            "logit_softcap": _optional_float(hf.get("final_logit_softcapping")),
        }
        return ModelConfig(**{**fields, **_windows(hf), **_rope(hf), **family.switches})
    except KeyError as error:
        raise ValueError(f"{where}: missing key {error}.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the Hugging Face config of `config`, readable by transformers 4 and 5."""
    hf = {
        "architectures": [find_family(config.family).architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        "attention_bias": "o_proj" in config.biases,
        "mlp_bias": "up_proj" in config.biases,
        "rope_theta": config.rope_theta,
        **_rope_to_hf(config),
    }
    activation = next(hf for hf, ours in ACTIVATIONS.items() if ours == config.activation)
    if config.family.startswith("gemma"):
        hf |= {
            "hidden_activation": activation,
            "query_pre_attn_scalar": round((config.query_scale or config.head_dim**-0.5) ** -2),
            "attn_logit_softcapping": config.attn_softcap,
            "final_logit_softcapping": config.logit_softcap,
            "rope_local_base_freq": config.local_rope_theta,
        }
    else:
        hf["hidden_act"] = activation
    if config.family != "llama":
        hf["sliding_window"] = config.sliding_window
    if config.family not in ("llama", "mistral"):
        hf["use_sliding_window"] = any(config.local_layers)
        kinds = {True: "sliding_attention", False: "full_attention"}
        hf["layer_types"] = [kinds[config.is_local(i)] for i in range(config.num_layers)]
    return hf


def _check_word(name: str, found: str, words: Iterable[str]) -> None:
    if found not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}; found {found!r}.")


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)


def _refuse_unsupported(hf: dict[str, Any], where: str) -> None:
    """Raise ValueError where `hf` asks for what the decoder does not compute."""
    if "auto_map" in hf:
        raise ValueError(
            f"{where}: auto_map asks to run code that comes with the model (trust_remote_code). "
            f"seal_jax never does; supported are models of type {', '.join(family_names())} "
            "without auto_map."
        )
    demands = {
        "model_type": (hf.get("model_type"), family_names()),
        "hidden_act": (_activation(hf), tuple(ACTIVATIONS)),
        "quantization_config": (hf.get("quantization_config"), (None,)),
        "use_bidirectional_attention": (hf.get("use_bidirectional_attention") or False, (False,)),
        "partial_rotary_factor": (hf.get("partial_rotary_factor", 1.0), (1.0,)),
    }
    for name, (found, supported) in demands.items():
        if found not in supported:
            choices = " or ".join(repr(choice) for choice in supported)
            raise ValueError(f"{where}: unsupported {name} {found!r}; supported: {choices}.")


def _activation(hf: dict[str, Any]) -> str:
    """Return Hugging Face's name of the activation; Gemma has a key of its own for it."""
    if str(hf.get("model_type")).startswith("gemma"):
        return hf.get("hidden_activation") or "gelu_pytorch_tanh"
    return hf.get("hidden_act", "silu")


def _biases(hf: dict[str, Any]) -> tuple[str, ...]:
    """Return the linear maps with a bias. Qwen2 has no key for it: q, k and v always add one."""
    if hf["model_type"] == "qwen2":
        return LINEARS[:3]
    can_have = hf["model_type"] != "mistral"
    attention = LINEARS[:4] if can_have and hf.get("attention_bias", False) else ()
    mlp = LINEARS[4:] if hf["model_type"] == "llama" and hf.get("mlp_bias", False) else ()
    return attention + mlp


def _windows(hf: dict[str, Any]) -> dict[str, Any]:
    """Return `sliding_window` and `local_layers`, each family's way. Raises ValueError."""
    num_layers, window = int(hf["num_hidden_layers"]), hf.get("sliding_window")
    kind = hf["model_type"]
    unused = kind.startswith("qwen") and not hf.get("use_sliding_window", False)
    if kind == "llama" or window is None or unused:
        return {}
    if kind == "mistral":
        local = [True] * num_layers
    elif hf.get("layer_types") is not None:
        known = {"sliding_attention": True, "full_attention": False}
        unknown = set(hf["layer_types"]) - set(known)
        if unknown:
            raise ValueError(f"unsupported layer types {sorted(unknown)}; supported: {list(known)}")
        local = [known[layer] for layer in hf["layer_types"]]
    elif kind.startswith("gemma"):
        local = [(i + 1) % int(hf["sliding_window_pattern"]) > 0 for i in range(num_layers)]
    else:
        local = [i >= int(hf["max_window_layers"]) for i in range(num_layers)]
    return {"sliding_window": int(window), "local_layers": tuple(local)} if any(local) else {}


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields about rope, from either spelling. Raises KeyError or ValueError."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    fields: dict[str, Any] = {}
    if hf["model_type"] == "gemma3_text":
        local = rope.get("sliding_attention") or {}
        _check_rope_type(local, ("default",))
        fields["local_rope_theta"] = float(local.get("rope_theta", hf["rope_local_base_freq"]))
        rope = rope.get("full_attention", rope) or {}
    fields["rope_theta"] = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    rope_type = _check_rope_type(rope, SUPPORTED_ROPE_TYPES)
    if rope_type == "linear":
        fields["rope_factor"] = float(rope["factor"])
    elif rope_type == "llama3":
        factors = (float(rope[key]) for key in _LLAMA3_KEYS[:3])
        fields["rope_scaling"] = RopeScaling(*factors, int(rope[_LLAMA3_KEYS[3]]))
    return fields


def _check_rope_type(rope: dict[str, Any], supported: tuple[str, ...]) -> str:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in supported:
        choices = " or ".join(repr(choice) for choice in supported)
        raise ValueError(f"unsupported rope type {rope_type!r}; supported: {choices}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"unsupported partial_rotary_factor {rope['partial_rotary_factor']}")
    return rope_type


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return rope in both spellings."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_factor != 1.0:
        rope = {"rope_type": "linear", "factor": config.rope_factor}
    if config.rope_scaling is not None:
        values = dataclasses.astuple(config.rope_scaling)
        rope = {"rope_type": "llama3", **dict(zip(_LLAMA3_KEYS, values, strict=True))}
    parameters = {"rope_theta": config.rope_theta, **rope}
    if config.local_rope_theta is not None:
        local = {"rope_theta": config.local_rope_theta, "rope_type": "default"}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    return {
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": parameters,
    }
