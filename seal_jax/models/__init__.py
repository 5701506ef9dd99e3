"""The model: its sizes, tokenizer, weights, decoder, and LoRA adapters beside it."""

import importlib

_ELSEWHERE = {"load_model": "sources", "Model": "models.model", "TINY": "models.known_models"}


def __getattr__(name: str):
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'seal_jax.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"seal_jax.{_ELSEWHERE[name]}"), name)
