"""Every config that names TPU slices compiles for them: `pip install libtpu`, then -m aot."""

import math
import runpy
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from seal_jax.config import load_config
from seal_jax.config.setup import settings_of
from seal_jax.models.mesh_fit import check_divides
from seal_jax.planning.slice_plan import plan_slice
from seal_jax.planning.stage_programs import Lengths
from seal_jax.sources import config_of

AXES = ("data", "fsdp", "tensor")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Tokens of a passage on average, and of the longest; of ARC, of a task in the prompt.
LENGTHS = {
    "arc_llama3p2_1b": Lengths(2048, 4096),
    "arc_smollm2": Lengths(512, 843),
    "arc_tiny": Lengths(128, 256),
}


def slices():
    found = []
    for path in sorted(CONFIGS.glob("*.py")):
        for name, overrides in runpy.run_path(str(path)).get("SLICES", {}).items():
            found.append(pytest.param(path, name, overrides, id=f"{path.stem} on {name}"))
    return found


@pytest.mark.aot
@pytest.mark.parametrize(("path", "name", "overrides"), slices())
def test_a_config_fits_the_slices_that_it_names(path, name, overrides):
    pytest.importorskip("libtpu")
    config = load_config(str(path), overrides)
    lines, complaints = plan_slice(settings_of(config), name, LENGTHS.get(path.stem, Lengths()))
    print("\n".join(lines))
    assert not complaints


def test_the_slices_are_those_that_we_promise():
    named = {case.id for case in slices()}
    # What is planned is `train`: edits one after another have other programs.
    trained = {path.stem for path in CONFIGS.glob("*.py") if "continual" not in path.stem}
    assert {name.partition(" ")[0] for name in named} == trained
    assert {"squad_qwen2p5_7b on v5e:4x4", "squad_qwen2p5_7b on v5p:2x2x1"} <= named
    assert {"squad_qwen2p5_7b on v6e:2x4", "arc_llama3p2_1b on v5e:2x4"} <= named
    assert "squad_qwen2p5_32b on v5p:2x2x4" in named
    for case in slices():  # valid without a compiler, too, and of known sizes
        path, slice_name, overrides = case.values
        config = load_config(str(path), overrides)
        num_chips = math.prod(int(size) for size in slice_name.partition(":")[2].split("x"))
        sizes = dict(config.mesh)
        sizes["data"] = num_chips // (sizes["fsdp"] * sizes["tensor"])
        mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
        assert mesh.size == num_chips
        check_divides(mesh, config_of(config.model.source))
