"""What an adapter_config.json of PEFT asks for, and which of that is refused by name.

PEFT's rules for which module is adapted, with which rank and alpha, on the names of the modules.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from seal_jax.hosts.files import read_object
from seal_jax.models.lora import TARGETS

CONFIG_FILE = "adapter_config.json"
Settings = Mapping[str, Any]  # adapter_config.json

# What changes how an adapter computes, and is not plain LoRA.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules trained in full beside the adapter",
    "lora_bias": "biases in the adapter",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters of bare parameters",
    "fan_in_fan_out": "kernels stored as [in, out]",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's layers",
}
# What says where an adapter comes from, or how it was trained.
_HARMLESS = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision") + (
    *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("ensure_weight_tying", "peft_type", "bias", "init_lora_weights"),
)
# The other initializations (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change the base model's kernels.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(name, str) for name in names)


def _is_layers(value: Any) -> bool:
    layers = value if isinstance(value, list) else [value]
    return value is None or all(type(layer) is int for layer in layers)


def _is_pattern(value: Any, is_value: Callable[[Any], bool]) -> bool:
    return value is None or isinstance(value, dict) and all(map(is_value, value.values()))


# What is read below, and what it may hold.
_READ: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_alpha,
    "use_rslora": lambda value: value is None or isinstance(value, bool),
    "rank_pattern": partial(_is_pattern, is_value=_is_rank),
    "alpha_pattern": partial(_is_pattern, is_value=_is_alpha),
    "target_modules": _is_names,
    "exclude_modules": _is_names,
    "layers_to_transform": _is_layers,
    "layers_pattern": _is_names,
}


def read_settings(path: Path) -> Settings:
    """Return a checked adapter_config.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON, or asks for more than plain LoRA; the message has every reason.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no {path.name}; a PEFT adapter needs one")
    settings = read_object(path)
    _check(settings, path)
    return settings


def _check(settings: Settings, path: Path) -> None:
    problems = []
    if settings.get("peft_type") != "LORA":
        problems.append(f"peft_type {settings.get('peft_type')!r}")
    if settings.get("bias", "none") != "none":
        problems.append(f"bias {settings['bias']!r} (trained biases of the base)")
    init = settings.get("init_lora_weights", True)
    if init not in _INITS:
        problems.append(f"init_lora_weights {init!r} (not known to leave the base as it is)")
    for name, what in _REFUSED.items():
        if settings.get(name):
            problems.append(f"{name} ({what})")
    known = {*_REFUSED, *_READ, *_HARMLESS}
    problems += [
        f"{name} {settings[name]!r}"
        for name, test in _READ.items()
        if name in settings and not test(settings[name])
    ]
    problems += [
        f"{name} (unknown)" for name, value in settings.items() if name not in known and value
    ]
    if problems:
        raise ValueError(
            f"{path}: unsupported {', '.join(problems)}; supported is plain LoRA (peft_type"
            f" 'LORA', with or without use_rslora) on {', '.join(TARGETS)}"
        )


def is_targeted(settings: Settings, module: str) -> bool | None:
    """Return whether PEFT adapts a module of that name; None where the config leaves it open.

    Raises:
      re.error: a pattern is not a regular expression; so do the functions below.
    """

    def listed(names: list[str]) -> bool:
        return any(module == name or module.endswith(f".{name}") for name in names)

    excluded = settings.get("exclude_modules")
    if excluded:
        if re.fullmatch(excluded, module) if isinstance(excluded, str) else listed(excluded):
            return False
    targets = settings.get("target_modules")
    if targets is None:
        return None
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return not module.endswith(("lm_head", "embed_tokens"))
        return re.fullmatch(targets, module) is not None
    if not listed(targets):
        return False
    layers = settings.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = settings.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def rank_of(settings: Settings, module: str) -> int:
    """Return the rank of a module's adapter."""
    return _of_pattern(settings, "rank_pattern", "r", module)


def scaling_of(settings: Settings, module: str) -> float:
    """Return what a module's adapter is multiplied with."""
    alpha = _of_pattern(settings, "alpha_pattern", "lora_alpha", module)
    rank = rank_of(settings, module)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_pattern(settings: Settings, pattern: str, default: str, module: str) -> Any:
    """Return what a module gets: of the first pattern that matches its end, or the default."""
    for key, value in (settings.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return settings.get(default, 8)  # PEFT's default of both
