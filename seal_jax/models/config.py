"""The sizes of a decoder, and their translation from and to a Hugging Face `config.json`.

`ModelConfig` is hashable, so it can be a static argument of a jitted function. What the decoder
cannot compute is refused here, before any array is read.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from seal_jax.extensions import load_plugin, plugin_names
from seal_jax.hosts.files import read_object
from seal_jax.models.rope_settings import RopeScaling, integer, number, read_rope, rope_to_hf
from seal_jax.types import ParamRules

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


# What a config.json must spell as true or false.
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
# Keys of a language model that the top level of a multimodal config may hold, too.
_TEXT_KEYS = (
    *("rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq", "sliding_window"),
    *("partial_rotary_factor", "layer_types", "sliding_window_pattern", "head_dim", "vocab_size"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "rms_norm_eps", "query_pre_attn_scalar", "final_logit_softcapping"),
    *("hidden_activation", "attention_bias", "use_bidirectional_attention", "tie_word_embeddings"),
)
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_SWITCHES = {"sandwich_norms": True, "unit_offset": True, "scale_embeddings": True}
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN_DEFAULTS),
    "qwen3": Family("Qwen3ForCausalLM", {**_QWEN_DEFAULTS, "head_dim": 128}, {"qk_norm": True}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **_GEMMA_DEFAULTS,
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

    Where one thing is said twice, as both spellings of rope do, transformers' precedence holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, lacks a size, or asks for what the decoder cannot compute. The
        message names what was found, what is supported, and the file.
    """
    if isinstance(source, dict):
        hf, where = source, "config dict"
    else:
        hf, where = read_object(source), os.fspath(source)
    try:
        if hf.get("model_type") == "gemma3" and isinstance(hf.get("text_config"), dict):
            hf = _text_part(hf)
        _refuse_unsupported(hf)
        family = find_family(hf["model_type"])
        hf = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **family.defaults, **hf}
        fields = {**_sizes(hf), **_gemma_fields(hf), **_windows(hf), **read_rope(hf)}
        return ModelConfig(**{**fields, **family.switches})
    except KeyError as error:
        raise ValueError(f"{where}: missing key {error}.") from error
    except (TypeError, ValueError, ArithmeticError) as error:
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
        **rope_to_hf(
            config.rope_theta, config.rope_factor, config.rope_scaling, config.local_rope_theta
        ),
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


def _text_part(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the language model in a multimodal one. Raises ValueError.

    Its own keys count, but for the head, which is the whole model's; images are not for us. What
    the top level says otherwise would be ignored: it is refused.
    """
    text = {**FAMILIES["gemma3_text"].defaults, **hf["text_config"]}
    top = {"tie_word_embeddings": True, **hf}
    strays = [key for key in _TEXT_KEYS if key in top and top[key] != text.get(key)]
    if strays:
        raise ValueError(f"text_config and the top level disagree about {', '.join(strays)}.")
    # A request to run code or to dequantize is at the top.
    asked = {key: hf[key] for key in ("auto_map", "quantization_config") if key in hf}
    return {**hf["text_config"], **asked, "model_type": "gemma3_text"}


def _sizes(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that all families write alike. Raises KeyError or ValueError."""
    num_heads, embed_dim = integer(hf, "num_attention_heads"), integer(hf, "hidden_size")
    if (head_dim := _optional(integer, hf, "head_dim")) is None:
        head_dim, rest = divmod(embed_dim, num_heads)
        if rest:
            raise ValueError(f"hidden_size {embed_dim} is not a multiple of {num_heads} heads")
    num_kv_heads = _optional(integer, hf, "num_key_value_heads")
    return {
        "vocab_size": integer(hf, "vocab_size"),
        "num_layers": integer(hf, "num_hidden_layers"),
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": head_dim,
        "mlp_dim": integer(hf, "intermediate_size"),
        "family": hf["model_type"],
        "norm_eps": number(hf, "rms_norm_eps"),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "max_length": integer(hf, "max_position_embeddings"),
        "activation": ACTIVATIONS[_activation(hf)],
        "biases": _biases(hf),
    }


def _gemma_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the scale and the soft caps of the scores, which transformers' others ignore."""
    if hf["model_type"] in ("llama", "mistral", "qwen2", "qwen3"):
        return {}
    scalar = _optional(number, hf, "query_pre_attn_scalar")
    return {
        "query_scale": None if scalar is None else scalar**-0.5,
        "attn_softcap": _optional(number, hf, "attn_logit_softcapping"),
        "logit_softcap": _optional(number, hf, "final_logit_softcapping"),
    }


def _optional(read: Callable[..., Any], hf: dict[str, Any], key: str) -> Any:
    return None if hf.get(key) is None else read(hf, key)


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    """Raise ValueError where `hf` asks for what the decoder does not compute."""
    if "auto_map" in hf:
        raise ValueError(
            f"auto_map asks to run code that comes with the model (trust_remote_code). "
            f"seal_jax never does; supported are models of type {', '.join(family_names())} "
            "without auto_map."
        )
    demands = {
        "model_type": (hf.get("model_type"), family_names()),
        "hidden_act": (_activation(hf), tuple(ACTIVATIONS)),
        "quantization_config": (hf.get("quantization_config"), (None,)),
        "use_bidirectional_attention": (hf.get("use_bidirectional_attention") or False, (False,)),
        "is_causal": (hf.get("is_causal", True), (True,)),
        "partial_rotary_factor": (hf.get("partial_rotary_factor"), (None, 1.0)),
        "per_layer_config": (hf.get("per_layer_config") or None, (None,)),
        # The names of other files that stand for this one.
        "configuration_files": (hf.get("configuration_files"), (None,)),
        **{key: (hf.get(key), (None, True, False)) for key in _FLAGS},
    }
    for name, (found, supported) in demands.items():
        if found not in supported:
            choices = " or ".join(repr(choice) for choice in supported)
            raise ValueError(f"unsupported {name} {found!r}; supported: {choices}.")


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
    kind = hf["model_type"]
    unused = kind.startswith("qwen") and not hf.get("use_sliding_window", False)
    window = None if unused else _optional(integer, hf, "sliding_window")
    local = [] if kind == "llama" else _local_layers(hf, window is not None)
    if any(local) and window is None:
        raise ValueError(
            "its layers with sliding_attention have no window: sliding_window or use_sliding_window"
            " is off."
        )
    return {"sliding_window": window, "local_layers": tuple(local)} if any(local) else {}


def _local_layers(hf: dict[str, Any], has_window: bool) -> list[bool]:
    """Return of each layer whether it sees only a window, for all families but Llama."""
    num_layers, kind, types = integer(hf, "num_hidden_layers"), hf["model_type"], "layer_types"
    if kind != "mistral" and hf.get(types) is not None:
        known = {"sliding_attention": True, "full_attention": False}
        unknown = set(hf[types]) - set(known)
        if unknown:
            raise ValueError(f"unsupported layer types {sorted(unknown)}; supported: {list(known)}")
        if len(hf[types]) != num_layers:
            raise ValueError(f"{types} has {len(hf[types])} entries for {num_layers} layers.")
        return [known[layer] for layer in hf[types]]
    if kind.startswith("gemma"):
        period = 2 if kind == "gemma2" else integer(hf, "sliding_window_pattern")
        if period < 1:
            raise ValueError(f"sliding_window_pattern must be positive, found {period}")
        return [(i + 1) % period > 0 for i in range(num_layers)]
    if not has_window:
        return []
    if kind == "mistral":
        return [True] * num_layers
    return [i >= integer(hf, "max_window_layers") for i in range(num_layers)]
