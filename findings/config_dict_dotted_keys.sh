#!/usr/bin/env bash
# ml_collections 1.1.0: ConfigDict with allow_dotted_keys=True.
#
# A key with a dot in it, as the name of a model (gpt-4.1), is taken when the ConfigDict is made, also
# in a dictionary inside it, and by update(). One would expect the same of whatever else puts a
# dictionary there. But the flag is forgotten: assigning such a dictionary to a field raises, and so
# does writing such a key into a copy, whether of copy.deepcopy or of ConfigDict(config).
#
# Seen: ValueError in these three, none in the others.
# The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ml_collections==1.1.0

"$folder/venv/bin/python" - <<'PYTHON'
import copy

from ml_collections import ConfigDict


def made():
    return ConfigDict({"texts": {"gpt-4.1": "a.json"}}, allow_dotted_keys=True)


def update(config):
    config.update({"texts": {"gpt-4.2": "b.json"}})


def write(config):
    config["gpt-4.2"] = "b.json"


def assign(config):
    config.texts = {"gpt-4.2": "b.json"}


def write_into_deepcopy(config):
    write(copy.deepcopy(config))


def write_into_copy(config):
    write(ConfigDict(config))


assert made().texts["gpt-4.1"] == "a.json"
for change, expected in {
    update: False,
    write: False,
    assign: True,
    write_into_deepcopy: True,
    write_into_copy: True,
}.items():
    try:
        change(made())
        found = ""
    except ValueError as error:
        found = str(error)
    print(f"{change.__name__:20} {found or 'taken'}")
    assert bool(found) == expected, "it no longer does so"
PYTHON
