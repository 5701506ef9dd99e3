#!/usr/bin/env bash
# transformers 5.24.0: rope_scaling added to a config.json that transformers 5 has saved.
#
# Model cards say to stretch a context by adding "rope_scaling" to config.json. A config saved by
# transformers 5 has "rope_parameters", with the base frequency (rope_theta) inside. The added key
# replaces it whole: the theta of the model is lost, and the default of 10,000 takes its place. No
# error, no warning; every position is turned by other angles.
#
# In Gemma 3 it is laid over the rope of the layers with full attention. There the older spelling of
# the kind ("type" instead of "rope_type") is not understood: the rope stays "default".
#
# Seen: theta 500,000 becomes 10,000; Gemma 3 scales with "rope_type" and does not with "type".
# The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import Gemma3TextConfig, LlamaConfig


def with_scaling(saved, kind, scaling):
    folder = Path(sys.argv[1]) / "model"
    saved.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_scaling": scaling}))
    return kind.from_pretrained(folder).rope_parameters


llama = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
found = with_scaling(llama, LlamaConfig, {"rope_type": "linear", "factor": 4.0})
print("saved:", llama.rope_parameters, "\nwith rope_scaling:", found)
assert llama.rope_parameters["rope_theta"] == 500000.0
assert found["rope_theta"] == 10000.0, "it no longer does so"

gemma = Gemma3TextConfig()
for name, expected in {"rope_type": "linear", "type": "default"}.items():
    found = with_scaling(gemma, Gemma3TextConfig, {name: "linear", "factor": 8.0})
    print(f"Gemma 3 with {name!r}:", found["full_attention"])
    assert found["full_attention"]["rope_type"] == expected, "it no longer does so"
PYTHON
