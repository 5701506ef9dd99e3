"""Nothing imports torch or TensorFlow. The processes of tiny_run.py cannot find either."""

import json
import subprocess
import sys

from tiny_run import TESTS

pytest_plugins = ["tiny_fixtures"]

PROGRAM = """
import importlib, importlib.util, pkgutil, sys
sys.path[:0] = sys.argv[1:]
import tiny_run
tiny_run.hide_torch()
assert importlib.util.find_spec("torch") is None
import seal_jax
for module in pkgutil.walk_packages(seal_jax.__path__, "seal_jax."):
    importlib.import_module(module.name)
for name in seal_jax.__all__:
    getattr(seal_jax, name)
assert not {"torch", "tensorflow"} & {name.partition(".")[0] for name in sys.modules}
"""


def test_every_module_imports_without_torch():
    command = [sys.executable, "-c", PROGRAM, str(TESTS), str(TESTS.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_training_without_torch_ends(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["arms"]) == {"base", "passage", "own", "seal", "random"}
