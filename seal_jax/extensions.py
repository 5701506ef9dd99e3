"""Names that a config or a command line may say: of modules in a folder here, or of other packages.

A folder holds one thing a file, found by the file's name. Another package registers its own by a
Python entry point, whose group is `seal_jax.KIND` (tasks, objectives, rewards, families, commands):

  [project.entry-points."seal_jax.tasks"]
  my_task = "my_package.my_module:MyTask"

Nothing is imported before it is asked for by its name. Imports no jax.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any


def module_names(folder: ModuleType, base: str) -> list[str]:
    """Return the names of a folder's modules, but for the one that they all build on."""
    found = (module.name for module in pkgutil.iter_modules(folder.__path__))
    return sorted(name for name in found if name != base and not name.startswith("_"))


def plugin_names(kind: str) -> list[str]:
    """Return the names that other packages have registered."""
    return sorted({entry.name for entry in entry_points(group=f"seal_jax.{kind}")})


def load_plugin(kind: str, name: str) -> Any:
    """Return what another package has registered by that name; None where none has.

    Raises:
      ValueError: it cannot be imported, or several packages have.
    """
    found = {entry.value: entry for entry in entry_points(group=f"seal_jax.{kind}", name=name)}
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{kind}: {name!r} is registered more than once: {', '.join(found)}")
    ((value, entry),) = found.items()
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind}: {name!r} is registered as {value}: {error}") from error


def import_optional(name: str, what: str, install: str) -> ModuleType:
    """Import a library that only some runs need.

    Raises:
      ModuleNotFoundError: `what` needs it; the message has what to pip install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = f"{what} needs {error.name}: pip install {install}"
        raise ModuleNotFoundError(message, name=error.name) from error
