"""Past the door: a config's sections become the NamedTuples that the stages take."""

import typing

from ml_collections import ConfigDict

from seal_jax.config.load import task_arguments
from seal_jax.types import Settings

# The sections that are a NamedTuple in types.py, with a field for each key.
SECTIONS = {
    name: kind for name, kind in typing.get_type_hints(Settings).items() if hasattr(kind, "_fields")
}


def settings_of(config: ConfigDict) -> Settings:
    """Return a validated config as values."""
    plain = config.to_dict()
    return Settings(
        seed=config.seed,
        task=task_arguments(config),
        mesh=plain["mesh"],
        rules=tuple(plain["sharding"].items()),
        **{name: kind(**plain[name]) for name, kind in SECTIONS.items()},
    )
