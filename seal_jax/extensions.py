"""Names that a config or a command line may say: of files in a folder here, or of other packages.

A folder holds one thing a file, found by the file's name. Another package registers its own by a
Python entry point, whose group is `seal_jax.KIND` (tasks, objectives, rewards, families, commands):

  [project.entry-points."seal_jax.tasks"]
  my_task = "my_package.my_module:MyTask"

Nothing is imported before it is asked for by its name. Imports no jax.
"""

import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any


class Found(Mapping[str, Any]):
    """What a folder's files hold and other packages have registered, by name.

    Args:
      kind: of `seal_jax.KIND`, the folder and the group of entry points.
      base: the folder's file that the others build on.
      attribute: what a file is asked for: '' is what has the file's own name, None the file itself.
    """

    def __init__(self, kind: str, base: str, attribute: str | None = ""):
        self.kind, self.base, self.attribute = kind, base, attribute

    def _files(self) -> list[str]:
        return module_names(importlib.import_module(f"seal_jax.{self.kind}"), self.base)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._files(), *plugin_names(self.kind)}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._files() or name in plugin_names(self.kind)

    def __getitem__(self, name: str) -> Any:
        if name in self._files():
            module = importlib.import_module(f"seal_jax.{self.kind}.{name}")
            return module if self.attribute is None else getattr(module, self.attribute or name)
        plugin = load_plugin(self.kind, name)
        if plugin is None:
            raise KeyError(name)
        return plugin


def module_names(folder: ModuleType, base: str) -> list[str]:
    """Return the names of a folder's modules, but for the one that they all build on."""
    found = (module.name for module in pkgutil.iter_modules(folder.__path__))
    return sorted(name for name in found if name != base and not name.startswith("_"))


def plugin_names(kind: str) -> list[str]:
    """Return the names that other packages have registered."""
    return sorted({entry.name for entry in _registered(tuple(sys.path), kind)})


def load_plugin(kind: str, name: str) -> Any:
    """Return what another package has registered by that name; None where none has.

    Raises:
      ValueError: it cannot be imported, or several packages have.
    """
    entries = _registered(tuple(sys.path), kind)
    found = {entry.value: entry for entry in entries if entry.name == name}
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{kind}: {name!r} is registered more than once: {', '.join(found)}")
    ((value, entry),) = found.items()
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind}: {name!r} is registered as {value}: {error}") from error


@functools.cache
def _registered(path: tuple[str, ...], kind: str) -> list[Any]:
    """Return a group's entry points; reading all packages' takes long enough to do it once."""
    del path  # where packages are looked for: another one has others
    return list(entry_points(group=f"seal_jax.{kind}"))


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
