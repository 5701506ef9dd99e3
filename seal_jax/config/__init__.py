"""The config: one table of keys, the checks before a run starts, and the way to a run's stages.

table.py    every key: its default, and what it may hold
load.py     config files, --set and stored JSON, and their checks
check_*.py  checks of the final table's arms, the inner loss, remedies and optimizers
setup.py    from a config to settings, and from these to `Stages`
sweeps.py   the settings that `tune` tries, and the best of them as a config file
workdir.py  a run's folder belongs to one config
"""

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
