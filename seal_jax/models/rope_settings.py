"""What a Hugging Face config says about rope, in its old and its new spelling.

`rope_theta` and `rope_scaling` are of transformers 4, `rope_parameters` is of transformers 5. Where
a config has both, the values are those that transformers 5 computes with; what it would lose or
ignore in silence is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Hugging Face's names of the fields of RopeScaling.
_LLAMA3_KEYS = (
    *("factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
)
_TYPES = ("default", "linear", "llama3")
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_THETA = 10_000.0  # where a config has none

Settings = Mapping[str, Any]  # a config.json, or a part of it


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


def read_rope(hf: Settings) -> dict[str, Any]:
    """Return the fields of ModelConfig about rope. Raises KeyError or ValueError."""
    old, new = _part(hf, "rope_scaling"), _part(hf, "rope_parameters")
    if hf["model_type"] == "gemma3_text":
        return _read_gemma3(hf, old, new)
    # transformers takes rope_scaling as a whole, and rope_parameters only where there is none.
    rope = old or new
    if kinds := {_GLOBAL, _LOCAL} & rope.keys():
        raise ValueError(f"unsupported rope by layer type {sorted(kinds)}; supported in gemma3.")
    theta = {"rope_theta": hf.get("rope_theta", _THETA), **rope}["rope_theta"]
    # In this one thing the top level comes first.
    top = {key: hf[key] for key in _LLAMA3_KEYS[3:] if key in hf}
    fields = _read({**rope, "rope_theta": theta, **top}, hf)
    if old and "rope_theta" not in {**hf, **old} and new.get("rope_theta", theta) != theta:
        raise ValueError(
            f"rope_scaling stands for all of rope_parameters, and has no rope_theta: that of "
            f"rope_parameters, {new['rope_theta']}, would be lost. Write the keys of rope_scaling "
            "into rope_parameters and drop rope_scaling, or add rope_theta to it."
        )
    return fields


def number(settings: Settings, key: str) -> float:
    """Return a number among the settings. Raises KeyError, or ValueError if it is none."""
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be a number, found {value!r}")
    return float(value)


def integer(settings: Settings, key: str) -> int:
    """Return a whole number among the settings. Raises KeyError, or ValueError if it is none."""
    value = number(settings, key)
    if value % 1:
        raise ValueError(f"{key} must be a whole number, found {settings[key]!r}")
    return int(settings[key])


def rope_to_hf(
    theta: float, factor: float, scaling: RopeScaling | None, local_theta: float | None
) -> dict[str, Any]:
    """Return rope in both spellings; the arguments are fields of ModelConfig."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if factor != 1.0:
        rope = {"rope_type": "linear", "factor": factor}
    if scaling is not None:
        values = dataclasses.astuple(scaling)
        rope = {"rope_type": "llama3", **dict(zip(_LLAMA3_KEYS, values, strict=True))}
    parameters = {"rope_theta": theta, **rope}
    if local_theta is not None:
        local = {"rope_theta": local_theta, "rope_type": "default"}
        parameters = {_GLOBAL: parameters, _LOCAL: local}
    return {
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": parameters,
    }


def _part(settings: Settings, key: str) -> dict[str, Any]:
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, found {value!r}")
    return value or {}


def _read_gemma3(hf: Settings, old: Settings, new: Settings) -> dict[str, Any]:
    """Return the fields of Gemma 3, whose global and local layers have a rope each.

    Its old spelling is about the global layers alone, and is laid over the new one.
    """
    if strange := sorted(new.keys() - {_GLOBAL, _LOCAL}):
        raise ValueError(
            f"rope_parameters of gemma3 has {_GLOBAL} and {_LOCAL}; unsupported beside them: "
            f"{', '.join(strange)}."
        )
    local = {"rope_theta": hf["rope_local_base_freq"], **_part(new, _LOCAL)}
    _check_type(local, ("default",))
    # What transformers adds before it reads the old spelling.
    default = {} if _part(new, _GLOBAL) else {"rope_type": "default"}
    rope = {"rope_theta": hf["rope_theta"], **default, **_part(new, _GLOBAL), **old}
    return {"local_rope_theta": number(local, "rope_theta"), **_read(rope, hf)}


def _read(rope: Settings, hf: Settings) -> dict[str, Any]:
    """Return the fields that one rope asks for."""
    fields: dict[str, Any] = {"rope_theta": number(rope, "rope_theta")}
    rope_type = _check_type(rope, _TYPES)
    if rope_type == "linear":
        fields["rope_factor"] = number(rope, "factor")
    elif rope_type == "llama3":
        rope = {_LLAMA3_KEYS[3]: hf["max_position_embeddings"], **rope}
        factors = (number(rope, key) for key in _LLAMA3_KEYS[:3])
        fields["rope_scaling"] = RopeScaling(*factors, integer(rope, _LLAMA3_KEYS[3]))
    return fields


def _check_type(rope: Settings, supported: tuple[str, ...]) -> str:
    """Return the type of a rope. Raises ValueError where the decoder does not compute it."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in supported:
        choices = " or ".join(repr(choice) for choice in supported)
        raise ValueError(f"unsupported rope type {rope_type!r}; supported: {choices}.")
    if rope.get("type", rope_type) != rope_type:
        raise ValueError(
            f"rope_type {rope_type!r} and type {rope['type']!r} disagree: keep rope_type alone."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"unsupported partial_rotary_factor {rope['partial_rotary_factor']}")
    return rope_type
