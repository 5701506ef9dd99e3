"""How text and JSON are read, whoever wrote them: what cannot be used is an error with its place.

Imports no JAX, and nothing of ours: tasks read with it, too.
"""

import collections
import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

_MOST_DIGITS = 300  # of an integer: more would not fit into a float


def read_text(path: str | os.PathLike) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is a folder or cannot be read, or is not UTF-8.
    """
    where = os.fspath(path)
    if "\0" in where:
        raise ValueError(f"{where!r}: no file has a zero byte in its name")
    try:
        return Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text, at byte {error.start}") from None
    except IsADirectoryError:
        raise ValueError(f"{where}: a folder, expected a file") from None
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror}") from error


def read_value(path: str | os.PathLike) -> Any:
    """Return what a JSON file holds; see `read_text` and `parse_json`."""
    return parse_json(read_text(path), os.fspath(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Return what JSON text holds: every number finite, every key once. Texts may be any.

    Args:
      where: begins each complaint.

    Raises:
      ValueError: it is not such JSON; the message says where, and what was found.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_integer,
        )
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: not JSON: {place}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text, at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # of the functions below
        raise ValueError(f"{where}: not JSON that can be read: {error}") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object; ValueError where a key is there twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice[:40]!r} twice")
    return result


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits is too large")
    return int(text)
