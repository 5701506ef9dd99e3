"""The one place that names every parameter: ours, Hugging Face's and GGUF's.

The families share their names but for the norms around a layer's blocks. A new family with the
same parts needs no change here; one with another part needs a row.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from seal_jax.models.config import ModelConfig, find_family


class Param(NamedTuple):
    """One parameter: where it is in our tree, and what others call it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # ours; a kernel has the reverse shape in files
    hf_name: str
    gguf_name: str

    @property
    def is_kernel(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def file_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.is_kernel else self.shape


# Our linear map: the names of others.
_LINEARS = {
    "attn/q_proj": ("self_attn.q_proj", "attn_q"),
    "attn/k_proj": ("self_attn.k_proj", "attn_k"),
    "attn/v_proj": ("self_attn.v_proj", "attn_v"),
    "attn/o_proj": ("self_attn.o_proj", "attn_output"),
    "mlp/gate_proj": ("mlp.gate_proj", "ffn_gate"),
    "mlp/up_proj": ("mlp.up_proj", "ffn_up"),
    "mlp/down_proj": ("mlp.down_proj", "ffn_down"),
}
_NORMS = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
}
# With norms on both sides of a block, Hugging Face's "post_attention" is the one behind it.
_SANDWICH_NORMS = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "post_attn_norm": ("post_attention_layernorm", "post_attention_norm"),
    "mlp_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "post_mlp_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}
_QK_NORMS = {
    "attn/q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attn/k_norm": ("self_attn.k_norm", "attn_k_norm"),
}
_IMAGES = ("vision_tower.", "multi_modal_projector.")


def text_name(hf_name: str) -> str | None:
    """Return a tensor's name in a model of text alone, or None for what that has not.

    Multimodal checkpoints put a prefix before the names of their language model; old Llama ones
    store rope's inverse frequencies, which follow from the config.
    """
    if hf_name.removeprefix("model.").startswith(_IMAGES):
        return None
    if hf_name.endswith("rotary_emb.inv_freq"):
        return None
    if hf_name.startswith("model.language_model."):
        return "model." + hf_name.removeprefix("model.language_model.")
    return hf_name.removeprefix("language_model.")


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return {name: (in, out)} of a layer's linear maps."""
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    q, kv = config.num_heads * H, config.num_kv_heads * H
    return {
        "q_proj": (D, q),
        "k_proj": (D, kv),
        "v_proj": (D, kv),
        "o_proj": (q, D),
        "gate_proj": (D, F),
        "up_proj": (D, F),
        "down_proj": (F, D),
    }


_Row = tuple[str, tuple[int, ...], str, str]  # path, shape, Hugging Face's name, GGUF's name


def param_table(config: ModelConfig) -> list[Param]:
    """Return every parameter of the decoder."""
    dim, vocab = config.embed_dim, config.vocab_size
    rows: list[_Row] = [
        ("embed/embedding", (vocab, dim), "model.embed_tokens.weight", "token_embd.weight")
    ]
    layer = _layer_rows(config)
    for i in range(config.num_layers):
        rows += [
            (f"layers_{i}/{path}", shape, f"model.layers.{i}.{hf}", f"blk.{i}.{gguf}")
            for path, shape, hf, gguf in layer
        ]
    rows.append(("final_norm/scale", (dim,), "model.norm.weight", "output_norm.weight"))
    if not config.tie_embeddings:
        rows.append(("lm_head/kernel", (dim, vocab), "lm_head.weight", "output.weight"))
    return [Param(tuple(path.split("/")), shape, hf, gguf) for path, shape, hf, gguf in rows]


def _layer_rows(config: ModelConfig) -> list[_Row]:
    """Return a layer's parameters."""
    shapes, renamed = linear_shapes(config), find_family(config.family).tensor_names
    rows: list[_Row] = []
    for path, (hf, gguf) in _LINEARS.items():
        hf, name = renamed.get(hf, hf), path.split("/")[1]
        rows.append((f"{path}/kernel", shapes[name], f"{hf}.weight", f"{gguf}.weight"))
        if name in config.biases:
            rows.append((f"{path}/bias", shapes[name][1:], f"{hf}.bias", f"{gguf}.bias"))
    norms = _SANDWICH_NORMS if config.sandwich_norms else _NORMS
    for path, (hf, gguf) in (norms | (_QK_NORMS if config.qk_norm else {})).items():
        hf, size = renamed.get(hf, hf), config.head_dim if path in _QK_NORMS else config.embed_dim
        rows.append((f"{path}/scale", (size,), f"{hf}.weight", f"{gguf}.weight"))
    return rows


def check_depth(config: ModelConfig, num_tensors: int, where: str) -> None:
    """Raise ValueError where a file cannot hold `num_layers` layers.

    The number may come from a damaged file: a table of billions of layers would fill the memory.
    """
    if config.num_layers > num_tensors:
        raise ValueError(
            f"{where}: the config asks for {config.num_layers} layers, the files hold only "
            f"{num_tensors} tensors."
        )


def check_names(
    found: Mapping[str, tuple], expected: Mapping[str, tuple], where: str, others: Sequence = ()
) -> None:
    """Raise ValueError unless there are exactly the expected tensors, in the expected shapes.

    The message lists every difference on a line of its own, with the nearest name on the other side
    where one is close.

    Args:
      found: shape by name, as `expected`.
      where: what the message starts with.
      others: further problems, for the same message.
    """
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    problems = _listed("missing", missing, unexpected) + _listed("unexpected", unexpected, missing)
    problems += [
        f"misshapen: {name}: found {found[name]}, expected {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    problems += others
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{where}: tensors do not match the config:{lines}")


def _listed(label: str, names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return a line for each name, with the nearest of the others that has the same numbers.

    Of all others, it would take minutes in a deep model.
    """
    groups: dict[tuple, list[str]] = {}
    for other in sorted(others):
        groups.setdefault(_layer(other), []).append(other)
    lines = []
    for name in sorted(names):
        near = difflib.get_close_matches(name, groups.get(_layer(name), ()), n=1)
        lines.append(f"{label}: {name}" + (f" (nearest: {near[0]})" if near else ""))
    return lines


def _layer(name: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[./_]", name) if part.isdigit())
