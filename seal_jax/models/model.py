"""A model: config, parameters and tokenizer; read from a folder, a GGUF file, or random."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from seal_jax.hosts.files import write_json
from seal_jax.models import gguf, weights
from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.config import ModelConfig, config_to_hf
from seal_jax.models.gguf_tokenizer import gguf_tokenizer
from seal_jax.models.known_models import RANDOM
from seal_jax.models.tokenizer import Tokenizer
from seal_jax.models.tokenizer_folder import load_tokenizer
from seal_jax.models.transformer import init_params
from seal_jax.sharding import param_shardings, to_device, to_host
from seal_jax.types import ParamRules, Params


class Model(NamedTuple):
    """A model, its parameters on the devices."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer


def load_folder(folder: Path, dtype: Any, mesh: Mesh | None, rules: ParamRules) -> Model:
    """Load a folder with config.json, *.safetensors and a tokenizer; see `sources.load_model`."""
    config = dataclasses.replace(weights.load_folder_config(folder), rules=rules)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    params = weights.load_safetensors(folder, config, dtype, _shardings(mesh, rules))
    return Model(config, params, tokenizer)


def load_gguf(path: Path, dtype: Any, mesh: Mesh | None, rules: ParamRules) -> Model:
    """Load a GGUF file, dequantized."""
    reader = gguf.open_gguf(path)
    config = dataclasses.replace(gguf.gguf_config(reader, path), rules=rules)
    metadata = gguf.gguf_metadata(reader, path)
    tokenizer = gguf_tokenizer(metadata, str(path), config.vocab_size)
    params = gguf.gguf_params(reader, config, path, dtype, _shardings(mesh, rules))
    return Model(config, params, tokenizer)


def random_model(name: str, dtype: Any, mesh: Mesh | None, rules: ParamRules) -> Model:
    """Return random parameters in the sizes of a model in RANDOM, over bytes."""
    if name not in RANDOM:
        raise FileNotFoundError(f"no random model {name!r}; found {', '.join(RANDOM)}.")
    config = dataclasses.replace(RANDOM[name], rules=rules)
    with jax.transfer_guard("allow"):  # JAX's own random numbers cross the border implicitly
        params = init_params(config, jax.random.key(0), dtype)
    if mesh is not None:
        # From the host: arrays of one device cannot be moved to the devices of other processes.
        params = to_device(to_host(params), param_shardings(mesh, params, rules))
    return Model(config, params, ByteTokenizer())


def save_config(folder: str | os.PathLike, model: Model, dtype: str) -> None:
    """Write what a model is, without its parameters: config, tokenizer, and where texts end."""
    tokenizer = model.tokenizer
    ids = {
        "bos_token_id": tokenizer.bos,
        # transformers would take Llama's ids where the config has none.
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    tokenizer.save(folder)
    hf = {**config_to_hf(model.config), "torch_dtype": dtype, **ids}
    write_json(Path(folder, "config.json"), hf)
    write_json(Path(folder, "generation_config.json"), ids)


def _shardings(mesh: Mesh | None, rules: ParamRules) -> Any:
    """Return what gives every parameter its sharding, None without a mesh."""
    return None if mesh is None else functools.partial(param_shardings, mesh, rules=rules)
