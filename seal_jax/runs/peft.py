"""PEFT adapters in and out: a folder with adapter_config.json and adapter_model.safetensors.

  PEFT   y = x @ W.T + scaling * (x @ lora_A.T) @ lora_B.T      lora_A [r in], lora_B [out r]
  ours   y = x @ W   + scale   * (x @ a.T) @ b                  a [r in],      b [r out]

PEFT knows many things beside plain LoRA on linear maps. What ours cannot be is refused by name:
an adapter that is read in part is another adapter.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from seal_jax.hosts.files import write_json
from seal_jax.models import tensor_file
from seal_jax.models.config import ModelConfig
from seal_jax.models.lora import TARGETS, target_shapes
from seal_jax.models.tensor_file import Tensor
from seal_jax.runs.peft_config import (
    CONFIG_FILE,
    Settings,
    is_targeted,
    rank_of,
    read_settings,
    scaling_of,
)
from seal_jax.sharding import to_host
from seal_jax.types import Adapters, Params

TENSOR_FILE = "adapter_model.safetensors"

_ALL = (slice(None), slice(None))

_BLOCKS = {"attn": "self_attn", "mlp": "mlp"}
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<prefix>(?:(?:model|language_model)\.)*)layers\.(?P<layer>\d+)\."
    rf"(?P<module>{'|'.join(f'{_BLOCKS[block]}[.]{target}' for target, block in TARGETS.items())})"
    r"\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight"  # the name of the adapter may stand there
)
_OTHER_NAMES = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "an adapter of the embedding",
    "embed_tokens": "the embedding",
    "lm_head": "the output layer",
    "modules_to_save": "a module trained in full",
    ".bias": "a bias",
}


class _Slot(NamedTuple):
    """One of an adapter's matrices."""

    layer: int
    target: str
    part: str  # A or B

    @property
    def module(self) -> str:
        return f"layers.{self.layer}.{_BLOCKS[TARGETS[self.target]]}.{self.target}"


def is_peft(folder: str | os.PathLike) -> bool:
    """Return whether a folder holds a PEFT adapter, or something that wants to be one."""
    return Path(folder, CONFIG_FILE).is_file()


def load_peft(folder: str | os.PathLike, config: ModelConfig) -> Adapters:
    """Load a PEFT adapter for a model; returns one adapter (A = 1) of float32 numpy arrays.

    Ranks that differ between layers are padded with zeros, scalings that differ are folded into b,
    and layers that are not adapted are zeros.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      config: of the model that the adapter is put on.

    Raises:
      FileNotFoundError: one of the files is missing.
      ValueError: the adapter is damaged, pickled, or for another model, or it is not plain LoRA on
        a decoder's linear maps; the message lists all that does not fit.
    """
    folder = Path(folder)
    settings = read_settings(folder / CONFIG_FILE)
    try:
        tensors, prefix = _find_tensors(folder)
        shapes = {slot: tensor.shape for slot, tensor in tensors.items()}
        expected = _expected_shapes(settings, config, prefix, shapes)
        _check_shapes(shapes, expected, config)
        read = partial(tensor_file.read_slice, index=_ALL, dtype=np.float32)
        values = {slot: read(tensor) for slot, tensor in tensors.items()}
        for slot, value in values.items():
            if not np.isfinite(value).all():
                raise ValueError(f"{slot.module}.lora_{slot.part} is not finite")
        scales = {
            slot: scaling_of(settings, prefix + slot.module) for slot in values if slot.part == "B"
        }
    except (ValueError, re.error) as error:
        raise ValueError(f"{folder}: {error}") from error
    return _assemble(values, scales, config)


def save_peft(
    folder: str | os.PathLike, adapters: Adapters, config: ModelConfig, base_model: str = ""
) -> None:
    """Write one adapter (A = 1) as a PEFT adapter, and verify it.

    lora_alpha equals r, so the scaling is 1 and the scale is in lora_B. Readers that know nothing
    of rank patterns compute the same.

    Args:
      folder: created if absent.
      base_model: what the adapter is for, as `model.source`; PEFT looks there for the base.

    Raises:
      ValueError: the adapter does nothing, because every b is 0, or it is not finite.
      OSError: what was read back differs from what was written.
    """
    folder = Path(folder)
    adapters = to_host(adapters)
    scale = adapters.scale[:, None, None, None]
    weights = {
        block: {target: {"a": ab["a"], "b": ab["b"] * scale} for target, ab in targets.items()}
        for block, targets in adapters.weights.items()
    }
    tensors, ranks = {}, {}
    for block, targets in weights.items():
        for target, ab in targets.items():
            ranks[target] = ab["a"].shape[-2]
            for part, matrix in (("A", ab["a"]), ("B", ab["b"].swapaxes(2, 3))):
                for i in range(config.num_layers):
                    name = f"base_model.model.model.layers.{i}.{_BLOCKS[block]}.{target}"
                    tensors[f"{name}.lora_{part}.weight"] = matrix[0, i]
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("the adapter is not finite: it cannot be exported")
    if not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name):
        raise ValueError("every b of the adapter is 0: it does nothing, and is not exported")
    tensors = {name: np.ascontiguousarray(tensors[name], np.float32) for name in sorted(tensors)}
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: ("F32", tensor.shape) for name, tensor in tensors.items()}
    tensor_file.write_file(folder / TENSOR_FILE, shapes, tensors.values())
    write_json(folder / CONFIG_FILE, _settings_of(ranks, base_model))
    found = load_peft(folder, config)
    same = found.scale[0] == 1 and jax.tree.structure(found.weights) == jax.tree.structure(weights)
    if not same or not jax.tree.all(jax.tree.map(np.array_equal, found.weights, weights)):
        raise OSError(f"{folder}: the adapter read back differs from what was written")


def _settings_of(ranks: Mapping[str, int], base_model: str) -> dict[str, Any]:
    rank = max(ranks.values())
    pattern = {target: r for target, r in ranks.items() if r != rank}
    name, _, revision = base_model.partition("@")
    if os.path.exists(base_model) or not revision:
        name, revision = base_model, None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": [target for target in TARGETS if target in ranks],
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _find_tensors(folder: Path) -> tuple[dict[_Slot, Tensor], str]:
    """Return where each matrix lies, and what stands in front of 'layers' in PEFT's names."""
    path = folder / TENSOR_FILE
    pickled = folder / "adapter_model.bin"
    if not path.is_file() and pickled.exists():
        raise ValueError(
            f"found only {pickled.name}. Such a file can run code when it is read, so it is never"
            f" opened: only {TENSOR_FILE} is supported"
        )
    tensors: dict[_Slot, Tensor] = {}
    prefixes, problems = set(), []
    for name, tensor in sorted(tensor_file.read_header(path).items()):
        match = _NAME.fullmatch(name)
        if match is None:
            why = next((why for part, why in _OTHER_NAMES.items() if part in name), "unknown")
            problems.append(f"unexpected: {name} ({why})")
            continue
        slot = _Slot(int(match["layer"]), match["module"].partition(".")[2], match["part"])
        prefixes.add(match["prefix"])
        if slot in tensors:
            problems.append(f"unexpected: {name} (a second one; the first is {tensors[slot].name})")
        if tensor.dtype not in tensor_file.DTYPES:
            problems.append(f"unsupported: {name} is of dtype {tensor.dtype}")
        if len(tensor.shape) != 2:
            problems.append(f"misshapen: {name} has shape {tensor.shape}")
        tensors[slot] = tensor
    if not tensors:
        problems.append("no LoRA matrix of a decoder's linear map")
    if len(prefixes) > 1:
        problems.append(f"layers under several names: {', '.join(map(repr, sorted(prefixes)))}")
    if problems:
        if len(problems) > 20:
            problems[20:] = [f"and {len(problems) - 20} more"]
        raise ValueError("\n  ".join([f"{TENSOR_FILE} is not plain LoRA:", *problems]))
    return tensors, prefixes.pop()


def _expected_shapes(
    settings: Settings, config: ModelConfig, prefix: str, found: Mapping[_Slot, tuple]
) -> dict[_Slot, tuple[int, int]]:
    """Return the shape of each matrix that adapter_config.json asks for, on this model."""
    for module in ("lm_head", f"{prefix}embed_tokens"):
        if is_targeted(settings, module):
            raise ValueError(
                f"target_modules include {module.rpartition('.')[2]}; supported are"
                f" {', '.join(TARGETS)}"
            )
    expected = {}
    for target, (fan_in, fan_out) in target_shapes(config, tuple(TARGETS)).items():
        for layer in range(config.num_layers):
            a, b = _Slot(layer, target, "A"), _Slot(layer, target, "B")
            targeted = is_targeted(settings, prefix + a.module)
            if targeted is None:
                targeted = a in found or b in found
            if targeted:
                rank = rank_of(settings, prefix + a.module)
                expected |= {a: (rank, fan_in), b: (fan_out, rank)}
    return expected


def _check_shapes(
    found: Mapping[_Slot, tuple], expected: Mapping[_Slot, tuple], config: ModelConfig
) -> None:
    """Raise ValueError, with all that differs, unless the matrices are the expected ones."""
    lines: dict[str, list[int]] = {}
    for slot in sorted({*found, *expected}):
        name = f"{_BLOCKS[TARGETS[slot.target]]}.{slot.target}.lora_{slot.part}"
        if slot.layer >= config.num_layers:
            line = f"{name}: the model has only {config.num_layers} layers"
        elif slot not in expected:
            line = f"{name}: unexpected, {CONFIG_FILE} does not target it"
        elif slot not in found:
            line = f"{name}: missing"
        elif found[slot] != expected[slot]:
            line = f"{name}: found {list(found[slot])}, expected {list(expected[slot])}"
        else:
            continue
        lines.setdefault(line, []).append(slot.layer)
    if lines:
        listed = [f"{line} (in layers {_ranges(layers)})" for line, layers in lines.items()]
        raise ValueError("\n  ".join(["the adapter does not fit the model:", *listed]))


def _ranges(layers: Sequence[int]) -> str:
    """Write ascending numbers briefly: 0-3, 7."""
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{start}" if start == end else f"{start}-{end}" for start, end in pairs)


def _assemble(
    values: Mapping[_Slot, np.ndarray], scales: Mapping[_Slot, float], config: ModelConfig
) -> Adapters:
    """Stack the layers, ours as [r in] and [r out]; see `load_peft` for what is padded."""
    uniform = len(set(scales.values())) == 1
    weights: Params = {}
    for target, (fan_in, fan_out) in target_shapes(config, tuple(TARGETS)).items():
        slots = [slot for slot in scales if slot.target == target]
        if not slots:
            continue
        rank = max(values[slot].shape[1] for slot in slots)
        a = np.zeros((1, config.num_layers, rank, fan_in), np.float32)
        b = np.zeros((1, config.num_layers, rank, fan_out), np.float32)
        for slot in slots:
            down, up = values[slot._replace(part="A")], values[slot].T
            a[0, slot.layer, : len(down)] = down
            b[0, slot.layer, : len(up)] = up if uniform else up * np.float32(scales[slot])
        weights.setdefault(TARGETS[target], {})[target] = {"a": a, "b": b}
    scale = next(iter(scales.values())) if uniform else 1.0
    return Adapters(weights, np.full((1,), scale, np.float32))
