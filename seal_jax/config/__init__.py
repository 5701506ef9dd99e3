"""The config: one table of keys, the checks at the door, and the way from it to a run's stages."""

from seal_jax.config.load import (
    ConfigError,
    default_config,
    diff,
    fingerprint,
    from_json,
    load_config,
    task_arguments,
    to_json,
    validate,
)

__all__ = [
    "ConfigError",
    "default_config",
    "diff",
    "fingerprint",
    "from_json",
    "load_config",
    "task_arguments",
    "to_json",
    "validate",
]
